"""GRPO's advantages in every trainer: TRL's numbers, and rewards that rise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import GRPOConfig, GRPOTrainer, RLOOConfig

from tiny_trainers import PROMPTS, adapted, mean_reward, online
from zopro import GuidedConfig, GuidedTrainer, ZOPrOConfig, ZOPrOTrainer
from zopro.train.rloo import EngineRLOOTrainer

pytestmark = pytest.mark.usefixtures("random_state")


TRAINERS: dict[str, tuple[type, type, dict[str, Any]]] = {
    "first-order": (EngineRLOOTrainer, RLOOConfig, {}),
    "zeroth-order": (ZOPrOTrainer, ZOPrOConfig, {}),
    "guided": (GuidedTrainer, GuidedConfig, {"model": adapted}),
}


def built(kind: str, folder: Path, **options: Any) -> Any:
    trainer_cls, config_cls, own = TRAINERS[kind]
    own = {**own, **options}
    return online(trainer_cls, config_cls, folder, {**own, **({"model": own["model"]()} if "model" in own else {})})


def fixed(completions: list[str], **kwargs: Any) -> list[float | None]:
    """Rewards by place: one of the first group and all but one of the second are missing, the last are all equal."""
    values = torch.randn(len(completions), generator=torch.Generator().manual_seed(3)).tolist()
    values[2] = None
    values[8:15] = [None] * 7
    values[24:] = [0.5] * 8
    return values


@pytest.mark.filterwarnings("ignore:.*returned None")
@pytest.mark.parametrize("kind", TRAINERS)
def test_they_are_trl_s_numbers(kind: str, tmp_path: Path) -> None:
    rows = [{"prompt": prompt} for prompt in PROMPTS for _ in range(8)]
    found = []
    peer = online(GRPOTrainer, GRPOConfig, tmp_path, {})
    for trainer in (built(kind, tmp_path, advantage="grpo"), peer):
        trainer.reward_funcs = [fixed]
        trainer.model.train()
        found.append(trainer._generate_and_score_completions(rows)["advantages"])
    assert torch.allclose(*found, atol=1e-5)
    assert found[0][2] == 0 and not found[0][8:16].any() and found[0][:2].all()
    assert math.isclose(float(found[0][16:24].std()), 1, rel_tol=1e-3)


def test_the_reward_rises(tmp_path: Path) -> None:
    """One-sided, which takes the loss at theta as known."""
    options = {"queries": 4, "sides": 1, "eps": 1e-3, "max_steps": 8, "learning_rate": 0.3}
    trainer = built("zeroth-order", tmp_path, advantage="grpo", **options)
    before = mean_reward(trainer)
    trainer.train()
    assert mean_reward(trainer) > before + 0.1


def test_an_unknown_advantage_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"advantage: must be one of rloo, grpo, got 'ppo'"):
        built("first-order", tmp_path, advantage="ppo")
