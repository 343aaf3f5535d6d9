"""`lora_freeze_a`: A stays as it was drawn, to the bit; B alone moves, is displaced and journalled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from one_run import no_report
from tiny_runs import config, write_inputs
from zopro.loop import pipeline
from zopro.loop.replay import replay
from zopro.store.journal import read


@pytest.mark.parametrize(
    "options", [{"method": "es", "population": 4}, {"method": "zopro", "warm_start": "sft"}], ids=str
)
def test_a_stays_and_b_moves(options: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    no_report(monkeypatch)
    out = tmp_path / "run"
    settings = config(write_inputs(tmp_path), out, iterations=1, policy_steps=2, lora_freeze_a=True, **options)
    pipeline.run(settings, quiet=True)
    first, last = (load_file(out / folder / "adapter_model.safetensors") for folder in ("initial", "policy/000"))
    for name, tensor in first.items():
        assert torch.equal(tensor, last[name]) == ("lora_A" in name), name
    header = read(out / "iterations" / "000" / "journal.jsonl").header
    assert header.untrained == sorted(name for name in header.untrained if "lora_A" in name) != []
    assert replay(out, tmp_path / "again")["equal"] is True
