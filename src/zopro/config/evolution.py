"""Options of evolution strategies, declared once: for configurations and trainers."""

from __future__ import annotations

from dataclasses import dataclass

from zopro.choices import SHAPINGS
from zopro.config.fields import check, check_choices, number_or, option


@dataclass
class EvolutionOptions:
    """Evolution strategies (es): members of a population are scored by the rewards of their own answers."""

    population: int = option(32, "Members, each of which answers all prompts of a step once.")
    antithetic: bool = option(True, "Members in pairs, theta + sigma z and theta - sigma z; population must be even.")
    sigma: float | str = option(
        0.1,
        "Scale of the members' displacements: a number, or auto (from 0.01 to where members' rewards differ twice as "
        "much as sampling noise would make them).",
    )
    shaping: str = option(
        "z_score", "What members' mean rewards become: z_score or centred_rank (in [-0.5, 0.5]).", SHAPINGS
    )
    momentum: float = option(0.0, "Decay of a running mean of the steps' estimates, in [0, 1); 0: none.")
    second_moment: float = option(
        0.0, "Decay of a running mean of their squares, over whose root the step is taken (Adam), in [0, 1); 0: none."
    )
    anchor: float = option(0.0, "Share of the way back to the iteration's start at each step, against forgetting.")
    targeted: bool = option(False, "Members along the previous update and noise, as zopro, in place of noise alone.")
    greedy: bool = option(False, "Members give their most likely answers in place of sampled ones.")

    def __post_init__(self) -> None:
        check_choices(self, EvolutionOptions)
        members = self.population
        if self.antithetic:
            rule = "must be an even number of at least 2 with antithetic: true (members come in pairs)"
            check(members >= 2 and members % 2 == 0, "population", rule, members)
        check(members >= 2, "population", "must be at least 2", members)
        for name in ("momentum", "second_moment", "anchor"):
            check(0 <= getattr(self, name) < 1, name, "must lie in [0, 1)", getattr(self, name))
        self.sigma = number_or(self, "sigma", "auto")
