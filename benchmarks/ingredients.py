"""ZOPrO's two ingredients, one without the other: methods for `zopro compare`, at the settings of the paper.

    PYTHONPATH=benchmarks zopro compare CONFIG.yaml --start iteration --seeds 5 --steps 40 --points 2 \
        --methods zopro-paper,python:ingredients:no_v,python:ingredients:no_mu,python:ingredients:neither

zopro-paper's direction is d mu + sqrt(1 - d^2) n, where n is noise orthogonal to the reward model's update v and as long
as the policy's previous update mu. no_v: noise is not made orthogonal. no_mu: noise alone, d is 0 at every step. Noise is
as long as mu in all of them, tensor by tensor, so that a rate means the same.
"""

from __future__ import annotations

from dataclasses import replace

from transformers import Trainer

from zopro import ZOPrOTrainer
from zopro.choices import Method
from zopro.train.methods import PolicyInputs, paper
from zopro.zo import Directions, Targeted


class NoiseAloneTrainer(ZOPrOTrainer):
    """Whose directions are what the last step's are, where nothing is left of the previous update."""

    def directions(self) -> Directions:
        found = super().directions()
        if not isinstance(found, Targeted):
            raise ValueError("previous_update: must not be empty, start from an iteration (--start iteration)")
        return Targeted(found.previous_update, found.reward_update, 1, "linear", found.normalize, found.noise)


def _without_v(inputs: PolicyInputs) -> PolicyInputs:
    return replace(inputs, reward_update={})


def _no_v(inputs: PolicyInputs) -> Trainer:
    return paper(_without_v(inputs))


def _no_mu(inputs: PolicyInputs) -> Trainer:
    return paper(inputs, trainer_cls=NoiseAloneTrainer)


def _neither(inputs: PolicyInputs) -> Trainer:
    return _no_mu(_without_v(inputs))


no_v = Method("no_v", _no_v, "zopro-paper, its noise not orthogonal to the reward model's update", preset="paper")
no_mu = Method("no_mu", _no_mu, "zopro-paper without the previous update", preset="paper")
neither = Method("neither", _neither, "Gaussian noise, as long as the previous update", preset="paper")
