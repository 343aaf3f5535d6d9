"""Options that only a backward pass has a use for are said, and do no harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from trl import SFTConfig

from tiny_trainers import settings
from zopro import ZOPrOConfig
from zopro.train.gradients import without_backward


@pytest.mark.parametrize("config", [SFTConfig, ZOPrOConfig])
def test_only_what_was_chosen_is_said_and_gets_its_default(
    config: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = settings(tmp_path)
    without_backward(config(**given))
    assert not caplog.records
    args = config(**given, optim="lomo", max_grad_norm=0.3, weight_decay=0.1, gradient_checkpointing=True)
    without_backward(args)
    assert "optim, max_grad_norm: without effect" in caplog.text
    assert (args.optim, args.max_grad_norm, args.weight_decay) == ("adamw_torch_fused", 1.0, 0.1)
    assert not args.gradient_checkpointing
