"""A trainer whose step takes its loss from elsewhere than `compute_loss` is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from transformers import Trainer
from trl import GRPOTrainer, SFTTrainer

from tiny_slopes import CONFIGS, build, classes, token_logprobs
from zopro import zeroth_order
from zopro.system.random_state import preserve_random_state


class OwnStep(SFTTrainer):
    """Its loss is that of `measure_of`."""

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        loss = self.measure_of(model, inputs)
        self.accelerator.backward(loss)
        return loss.detach()

    def measure_of(self, model: Any, inputs: Any) -> Tensor:
        with self.compute_loss_context_manager():
            return -token_logprobs(model, inputs).mean()


class Indirect(OwnStep):
    def measure_of(self, model: Any, inputs: Any) -> Tensor:
        return self.compute_loss(model, inputs)


class Before(OwnStep):
    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self.begun = True
        return super().training_step(*args, **kwargs)


def test_a_trainer_whose_step_computes_another_loss_is_refused_when_it_is_made() -> None:
    online_dpo, _ = classes("OnlineDPOTrainer")
    for trainer_cls, owner in ((online_dpo, "OnlineDPOTrainer"), (OwnStep, "OwnStep"), (Before, "OwnStep")):
        with pytest.raises(
            ValueError, match=rf"trainer_cls: must take its loss from compute_loss, but {owner}.training_step"
        ):
            zeroth_order(trainer_cls)
    for trainer_cls in (Indirect, GRPOTrainer, *CONFIGS):
        assert issubclass(zeroth_order(trainer_cls), trainer_cls)


def test_a_step_without_source_is_refused_when_it_ends(tmp_path: Path) -> None:
    names: dict[str, Any] = {"Trainer": Trainer}
    exec("class Own(Trainer):\n  def training_step(self, *args): return self.args.weight_decay", names)
    with preserve_random_state():
        trainer = build(names["Own"], tmp_path)
    with pytest.raises(RuntimeError, match=r"must take its loss from compute_loss, but Own.training_step"):
        trainer.train()
