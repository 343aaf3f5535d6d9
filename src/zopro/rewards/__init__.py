"""Reward models, trained on pairs or scores, refined, interpolated with their predecessor, called on token ids; and
rewards that a program computes (`zopro.rewards.functions`).

A reward model is a LoRA adapter and a linear head over the base model. It reads the prompt and the
answer in its frame (`zopro.text.frame`), and the reward is the head's value at the token that ends the turn, in
training and in scoring alike. Rewards are raw, as in the published system (which keeps the samples whose reward is
nearest to zero); `RewardModel.center` moves zero to the mean reward of given answers where a model's zero has drifted
away from them.

    model = RewardModel(get_peft_model(classifier, LoraConfig(task_type="SEQ_CLS")), tokenizer, max_length=304)
    model.train_pairs(pairs, steps=100, batch_size=8, learning_rate=2e-4, seed=0)
    model.score(prompt_ids, completion_ids)
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zopro.rewards.model import RewardModel
    from zopro.rewards.sequences import Pair, Scored
    from zopro.weights.interpolation import interpolate

__all__ = ["Pair", "RewardModel", "Scored", "interpolate"]

_HOME = {
    "Pair": "zopro.rewards.sequences",
    "RewardModel": "zopro.rewards.model",
    "Scored": "zopro.rewards.sequences",
    "interpolate": "zopro.weights.interpolation",
}


def __getattr__(name: str) -> Any:
    """On first use, so that `zopro.rewards.functions` needs no torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'zopro.rewards' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
