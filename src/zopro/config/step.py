"""The options of a zeroth-order step, declared once: for configurations, trainers and measurements."""

from __future__ import annotations

from dataclasses import dataclass

from zopro.choices import DIRECTIONS, EVALUATIONS, PARALLEL
from zopro.config.fields import check, check_choices, number_or, option, positive

PRESETS = {"default": 1e-4, "paper": 1.0}
"""Presets with their zeroth-order learning rates; the paper's is relative to |mu|."""


def preset_rate(preset: str, follows_update: bool) -> float:
    """A preset's learning rate; where there is no mu for the paper's to be relative to, the default's.

    >>> preset_rate("paper", True), preset_rate("paper", False)
    (1.0, 0.0001)
    """
    return PRESETS[preset if follows_update else "default"]


@dataclass
class DirectionOptions:
    """Where a zeroth-order step looks, and who looks."""

    decay: str = option(
        "linear", "How the share of the previous update, d, decays: linear or exponential.", ("linear", "exponential")
    )
    noise: str = option(
        "",
        f"What directions, or the noise in them, are drawn from: {DIRECTIONS.about()}, or python:MODULE:NAME, a class of "
        "yours; empty takes the preset's. fzoo draws rademacher whatever this says; signs are of an update, so that mezo "
        "draws gaussian in their place.",
        DIRECTIONS,
    )
    parallel: str = option(
        "data",
        "What processes share in a zeroth-order step: data (each has its prompts) or queries (each has all prompts and "
        "evaluates its part of the directions).",
        PARALLEL,
    )

    def __post_init__(self) -> None:
        check_choices(self, DirectionOptions)


@dataclass
class StepOptions(DirectionOptions):
    """The zeroth-order step. Empty options take the preset's."""

    preset: str = option(
        "default",
        "default (normalised directions, eps auto, adaptive step) or paper (their scaling, eps 1e-5).",
        tuple(PRESETS),
    )
    eps: float | str = option(
        "", "Perturbation scale: a number, or auto (a step's length, or from the noise floor); empty takes the preset's."
    )
    queries: int = option(
        1,
        "Directions averaged in a step, all over the same answers: worth it where answers cost more than log-probs. A "
        "step of noise alone is 1 / sqrt(queries) as long.",
    )
    sides: int = option(
        2, "2: central difference. 1: forward difference, one evaluation less per direction.", choices=(1, 2)
    )
    evaluation: str = option(
        "sequential",
        "A step's losses one after another (sequential); both sides of a central difference in one pass of the base "
        "weights over twice the rows (together); or those of all queries in one, as far as 65536 tokens go (batched). "
        "LoRA only; faster where a pass is bound by reading weights or by launching kernels.",
        EVALUATIONS,
    )
    surrogate: str = option(
        "",
        "log_ratio (advantage times log-ratio, on-policy) or clipped (RLOO's clipped ratio); empty takes the preset's.",
        ("", "log_ratio", "clipped"),
    )

    def __post_init__(self) -> None:
        check_choices(self, StepOptions)
        positive(self, "queries")
        self.eps = number_or(self, "eps", "", "auto")
        fits = self.evaluation != "together" or self.sides == 2
        check(fits, "evaluation", "must be sequential or batched with sides: 1", self.evaluation)
        fits = self.parallel == "data" or self.evaluation != "together"
        check(fits, "parallel", "must be data with evaluation: together", self.parallel)
