"""Updates that a trainer is given are followed, or refused: none is left out without a word."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_trainers import PROMPTS, TOKENIZER, es, online, shares, tea, with_adapter, zopro
from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.system.random_state import preserve_random_state
from zopro.train.guided import GuidedSPSAConfig, GuidedSPSATrainer
from zopro.train.methods import PolicyInputs

pytestmark = pytest.mark.usefixtures("random_state")

MU = {"lm_head.weight": torch.ones(12, 16)}
OTHER = {"nonsense": torch.ones(3)}
FEW: dict[str, Any] = {"population": 2, "max_completion_length": 2}


def along(folder: Path, **options: Any) -> Any:
    return online(GuidedSPSATrainer, GuidedSPSAConfig, folder, {"model": with_adapter(), "eps": 1e-3, **options})


@pytest.mark.parametrize("v", [MU, OTHER])
@pytest.mark.parametrize(
    ("build", "options", "remedy"),
    [
        (zopro, {}, r"Pass previous_update, or leave it out\.$"),
        (es, FEW, r"Set targeted=True in ESConfig, or leave it out\.$"),
        (es, {**FEW, "targeted": True}, r"Pass previous_update, or leave it out\.$"),
        (along, {"guide": 1.0}, r"Set guide below 1, or leave it out\.$"),
    ],
)
def test_an_update_to_avoid_needs_one_to_follow(build: Any, options: Any, remedy: str, v: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=rf"^reward_update: must come with a previous_update .*, got 1 tensors\. {remedy}"
    ):
        build(tmp_path, reward_update=v, **options)
    build(tmp_path, reward_update={}, **{**options, "targeted": False} if "targeted" in options else options)


@pytest.mark.parametrize(
    ("build", "options", "remedy"),
    [(es, FEW, "Set targeted=True in ESConfig"), (along, {"guide": 1.0}, "Set guide below 1")],
)
def test_an_update_that_no_step_follows_is_refused(build: Any, options: Any, remedy: str, tmp_path: Path) -> None:
    said = (
        rf"^previous_update: must be followed by the steps, got 1 tensors that none looks at\. {remedy}, or leave it out"
    )
    with pytest.raises(InputError, match=said):
        build(tmp_path, previous_update=MU, **options)


def test_noise_may_be_made_of_an_update_that_is_not_followed(tmp_path: Path) -> None:
    trainer = es(tmp_path, previous_update=MU, noise="signs", max_steps=1, **FEW)
    trainer.train()
    assert type(trainer.spsa.directions).__name__ == "Signs"
    assert es(tmp_path, previous_update=MU, reward_update=MU, targeted=True, **FEW).follows_update
    assert along(tmp_path, previous_update=MU, guide=0.5).follows_update


def test_members_need_an_update_to_go_along(tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^targeted: must be False without an update to follow, got True\. Pass previous"
    ):
        es(tmp_path, targeted=True, **FEW)


@pytest.mark.parametrize(
    "build",
    [lambda folder, **o: es(folder, targeted=True, **FEW, **o), lambda folder, **o: zopro(folder, eps=1e-3, **o)],
    ids=["es", "zopro"],
)
def test_trainings_of_one_trainer_follow_the_update_from_where_they_begin(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 1}
    trainer = build(tmp_path, previous_update=MU, max_steps=3, **saving)
    trainer.train()
    first = (tmp_path / "out" / "checkpoint-1").rename(tmp_path / "checkpoint-1")
    found = shares(monkeypatch)
    trainer.train()
    assert trainer.spsa.step_count == 6 and found == {0.999, 0.4995, 0}
    found.clear()
    trainer.train(resume_from_checkpoint=str(first))
    assert trainer.spsa.step_count == 3 and found == {0.4995, 0}, "where that training had come to"


@pytest.mark.parametrize(
    ("name", "options", "given"),
    [
        ("es", {"targeted": True}, {"previous_update", "reward_update"}),
        ("es", {}, set()),
        ("es", {"noise": "signs"}, {"previous_update"}),
        ("es-paper", {"targeted": True, "noise": "signs"}, set()),
        ("zopro", {}, {"previous_update", "reward_update"}),
        ("mezo", {}, set()),
        ("guided", {"guide": "spsa"}, set()),
        ("guided", {"guide": "mixed"}, {"previous_update", "reward_update"}),
    ],
)
@pytest.mark.parametrize("first", [False, True])
def test_methods_give_what_their_steps_look_at(
    name: str, options: Any, given: set[str], first: bool, tmp_path: Path
) -> None:
    update = {n: p.detach() + 1e-3 for n, p in with_adapter().named_parameters() if p.requires_grad}
    updates: dict[str, Any] = {} if first else {"previous_update": update, "reward_update": update}
    config = RunConfig(model="m", task="chat", train_data="x", prompts_per_step=2, **options)
    inputs = PolicyInputs(with_adapter(), TOKENIZER, tea, [*PROMPTS], 1, 0, tmp_path, config, **updates)
    with preserve_random_state():
        trainer: Any = METHODS[name].load()(inputs)
    assert {which for which in ("previous_update", "reward_update") if getattr(trainer, which)} == (
        set() if first else given
    )


def test_a_step_s_pseudo_gradient_is_of_its_own_training(tmp_path: Path) -> None:
    trainer = along(tmp_path, guide=0.5, max_steps=1)
    trainer.train()
    directions = trainer.spsa.directions
    assert directions.step == 0
    trainer.create_optimizer()
    assert directions.step == -1


def test_what_a_step_was_left_with_is_not_the_next_training_s(tmp_path: Path) -> None:
    trainer = zopro(tmp_path, max_steps=1, eps=1e-3)
    trainer.train()
    assert trainer._slopes[0] == 0 and trainer._slopes[2]
    trainer.exchanged_bytes = 8
    trainer.create_optimizer()
    assert trainer._slopes == (-1, True, []) and trainer.exchanged_bytes == 0
