"""What a trainer collects in its loss, for its log, is of a step's evaluations alone."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import Trainer, TrainingArguments

from tiny_slopes import ROWS
from tiny_trainers import lines, llama, quiet, settings
from zopro import zeroth_order

pytestmark = pytest.mark.usefixtures("random_state")


class Collects(Trainer):
    """Notes its losses as TRL's trainers do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics: dict[str, dict[str, list[float]]] = {"train": defaultdict(list), "eval": defaultdict(list)}

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self._metrics["train"]["loss"].append(float(loss))
        return loss


def test_the_search_for_eps_leaves_nothing_in_the_log(tmp_path: Path) -> None:
    arguments = TrainingArguments(**settings(tmp_path, max_steps=2, learning_rate=1e-4))
    trainer = quiet(zeroth_order(Collects)(llama(), arguments, train_dataset=ROWS["Trainer"]))
    trainer.train()
    found = trainer._metrics["train"]["loss"]
    assert len(found) == 4, "both sides of two steps"
    for line, both in zip(lines(trainer), (found[:2], found[2:]), strict=True):
        assert sum(both) / 2 == pytest.approx(line["loss"], abs=1e-4)
