"""A trainer that trains a second time: after a failure, along the previous update, over what has been unfrozen."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from tiny_trainers import es, head_only, online, plain, sft, shares, with_adapter, zopro
from zopro.train.guided import GuidedSPSAConfig, GuidedSPSATrainer

pytestmark = pytest.mark.usefixtures("random_state")


class Interrupted(Exception):
    """Ctrl-C, or a reward function that raises."""


def measured_by_loss(folder: Path) -> Any:
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    return plain(folder, {"eps": 1e-3, "second_moment_beta": None, "check_slope": False}, max_steps=1, **options)


def answered(folder: Path) -> Any:
    return es(folder, population=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, max_steps=1)


@pytest.mark.parametrize(("build", "method"), [(measured_by_loss, "compute_loss"), (answered, "training_step")])
def test_a_step_that_failed_between_micro_batches_leaves_nothing(
    build: Any, method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, trainer = build(tmp_path), build(tmp_path)
    clean.train()
    original, calls = getattr(trainer, method), []

    def failing(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted
        return original(*args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer, method, failing)
        trainer.train()
    trainer.train()
    assert replace(trainer.spsa.last, signal_to_noise=0.0) == replace(clean.spsa.last, signal_to_noise=0.0)


def mixed(folder: Path, **options: Any) -> Any:
    return online(GuidedSPSATrainer, GuidedSPSAConfig, folder, {"model": with_adapter(), "guide": 0.5, **options})


@pytest.mark.parametrize(("build", "model"), [(zopro, head_only), (mixed, with_adapter)])
def test_a_second_training_follows_the_update_anew(
    build: Any, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mu = {name: torch.ones_like(p) for name, p in model().named_parameters() if p.requires_grad}
    trainer = build(tmp_path, previous_update=mu, eps=1e-3, max_steps=2)
    trainer.train()
    trainer.args.max_steps = 3
    found = shares(monkeypatch)
    trainer.train()
    assert trainer.spsa.step_count == 5 and found == {0.999, 0.4995, 0}


def test_two_adapters_that_train_at_once_have_noise_of_their_own(tmp_path: Path) -> None:
    model = with_adapter()
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM"))
    model.base_model.set_adapter(["default", "other"])
    trainer = sft(tmp_path, {"eps": 1e-3}, model=model, max_steps=1)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    trainer.train()
    assert {name.split(".")[-2] for name in before} == {"default", "other"}
    moved = {name: p.detach() - before[name] for name, p in model.named_parameters() if name in before}
    assert all(bool(change.any()) for change in moved.values())
    (one, two) = (next(c for n, c in moved.items() if f"lora_B.{adapter}." in n) for adapter in ("default", "other"))
    assert not torch.equal(one, two)
