"""Configuration keys of what answers are rewarded for; a group of `zopro.config.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass, field

from zopro.choices import REWARDS
from zopro.config.fields import LONGEST, at_most, check, check_choices, not_negative, option
from zopro.errors import InputError


@dataclass
class ObjectiveOptions:
    """What answers are rewarded for."""

    reward: list[str] = field(
        default_factory=lambda: ["model"],
        metadata={
            "help": f"One reward or several: {REWARDS.about()}. A name that has a comma in it must be in a list of its "
            'own, also on the command line: ["json:name,age"]. Default for task verifiable: maths.',
            "choices": REWARDS,
        },
    )
    reward_weights: list[float] = field(
        default_factory=list,
        metadata={"help": "Weight of each reward in the sum, in their order; empty: 1 each. A penalty has one below 0."},
    )
    reward_timeout: float = option(
        600.0, "Seconds for one call of a python: reward (the answers of a step), after which the run stops; 0: no limit."
    )

    def __post_init__(self) -> None:
        self.reward = [self.reward] if isinstance(self.reward, str) else self.reward
        check(bool(self.reward), "reward", "must name at least one reward", self.reward, f"One of {', '.join(REWARDS)}.")
        try:
            check_choices(self, ObjectiveOptions)
        except InputError as error:
            if not any(":" in name for name in self.reward):
                raise
            raise InputError(f'{error} A name with a comma in it stands in a list, as ["json:name,age"].') from None
        twice = next((name for name in self.reward if self.reward.count(name) > 1), None)
        check(twice is None, "reward", "must name each reward once", self.reward)
        fits = len(self.reward_weights) in (0, len(self.reward))
        remedy = "With other rewards give their weights too."
        check(fits, "reward_weights", f"must be one for each of {len(self.reward)} rewards", self.reward_weights, remedy)
        check(all(self.reward_weights), "reward_weights", "must not be 0", self.reward_weights, "Leave the reward out.")
        for weight in self.reward_weights:
            check(abs(weight) <= 1e9, "reward_weights", "must be at most 1e9", weight)
        not_negative(self, "reward_timeout")
        at_most(self, LONGEST, "reward_timeout")

    @property
    def weights(self) -> list[float]:
        """Of each reward."""
        return self.reward_weights or [1.0] * len(self.reward)

    @property
    def trains_reward(self) -> bool:
        """Whether one of the rewards is a model that this run trains."""
        return any(REWARDS[name].trained for name in self.reward)
