"""ZOPrO's ingredients, one without the other: methods for `zopro compare` and `loop.py`.

At the settings of the paper:

    PYTHONPATH=benchmarks zopro compare CONFIG.yaml --preset paper --start iteration --seeds 5 --steps 40 --points 2 \
        --methods zopro-paper,python:ingredients:no_v,python:ingredients:no_mu,python:ingredients:neither,\
python:ingredients:mu_alone

zopro-paper's direction is d mu + sqrt(1 - d^2) n, where n is noise orthogonal to the reward model's update v and as long
as the policy's previous update mu, tensor by tensor, and d falls from 0.999 to 0. no_v: noise is not made orthogonal.
no_mu: noise alone, d is 0 at every step. neither: both. mu_alone: d is 0.999 at every step. Noise is as long as mu in all
of them, so that a rate means the same.

With the step size of the default preset, whose slopes are normalised (`--methods zopro,python:ingredients:line,...`):
line: d is 0.999 at every step, a search along mu. signs: d is 0 at every step, mu with a random sign for each sub-layer.
published: the paper's direction, whose noise is Gaussian and orthogonal to v.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from torch import Tensor
from transformers import Trainer

from zopro import ZOPrOTrainer
from zopro.choices import Method
from zopro.train.methods import PolicyInputs, paper, targeted
from zopro.zo import Directions, Targeted


class NoiseAlone(Targeted):
    """What the directions are beyond the last step, where d is 0."""

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        return super().tensor(name, like, seed, step + self.total_steps)

    def tensors(self, named: Sequence[tuple[str, Tensor]], seed: int, step: int) -> list[Tensor]:
        return [self.tensor(name, like, seed, step) for name, like in named]


class HeldTrainer(ZOPrOTrainer):
    """Whose share of the previous update is the same at every step."""

    held: type[Targeted]
    total_steps: int

    def directions(self) -> Directions:
        found = super().directions()
        if not isinstance(found, Targeted):
            raise ValueError("previous_update: must not be empty, start from an iteration (--start iteration)")
        updates = found.previous_update, found.reward_update
        return self.held(*updates, self.total_steps, "linear", found.normalize, found.noise)


class NoiseAloneTrainer(HeldTrainer):
    held, total_steps = NoiseAlone, 2


class UpdateAloneTrainer(HeldTrainer):
    held, total_steps = Targeted, 1  # of one step, d stays what it is at the first


def _train(inputs: PolicyInputs, trainer_cls: type = ZOPrOTrainer, avoid: bool = True) -> Trainer:
    return paper(inputs if avoid else replace(inputs, reward_update={}), trainer_cls=trainer_cls)


no_v = Method(
    "no_v",
    partial(_train, avoid=False),
    "zopro-paper, its noise not orthogonal to the reward model's update",
    preset="paper",
)
no_mu = Method(
    "no_mu", partial(_train, trainer_cls=NoiseAloneTrainer), "zopro-paper without the previous update", preset="paper"
)
neither = Method(
    "neither",
    partial(_train, trainer_cls=NoiseAloneTrainer, avoid=False),
    "Gaussian noise, as long as the previous update",
    preset="paper",
)
mu_alone = Method(
    "mu_alone", partial(_train, trainer_cls=UpdateAloneTrainer), "zopro-paper, d held at 0.999", preset="paper"
)

line = Method("line", partial(targeted, trainer_cls=UpdateAloneTrainer), "zopro, d held at 0.999")
signs = Method("signs", partial(targeted, trainer_cls=NoiseAloneTrainer), "zopro, d held at 0")


def _published(inputs: PolicyInputs) -> Trainer:
    return targeted(replace(inputs, config=replace(inputs.config, noise="gaussian")))


published = Method("published", _published, "zopro along the paper's direction")
