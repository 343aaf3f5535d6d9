"""What is compared and how, and one training of it as plain data: a `Job`, which becomes a process and a folder."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.config.step import preset_rate
from zopro.errors import InputError

STARTS = ("sft", "iteration")
RATE_STEP = 3.0  # factor between neighbouring learning rates of the search
PROBE_STEPS = 3  # that tell how many steps fit a budget


@dataclass(frozen=True)
class Plan:
    """One comparison.

    Args:
        methods: names of `zopro.choices.METHODS`, compared in this order.
        seeds: trainings of each method, with seeds 0, 1, ...
        steps: policy steps of each training; 0 if a budget is given.
        budget_minutes: minutes of training, evaluation left out; each method takes the steps that fit; 0: by the others.
        answers: sampled by each training; each method takes the steps that fit; 0: by the others.
        points: measurements along each training, evenly spaced over its steps (the start is one more).
        search_trials: rates tried for each method at most, by factors of 3, from the configured one on to where the
            best lies between two others; 1 searches nothing.
        search_share: length of a trial of a rate, as a share of a training.
        start: "sft", every method starts from the SFT policy, whose update is the previous one; or "iteration": from
            iteration 0's policy, with its update and the reward model's.
        against: the method that others are set beside; "": rloo, where it is compared.

    Raises:
        InputError: an argument out of range.
    """

    methods: tuple[str, ...]
    seeds: int = 1
    steps: int = 0
    budget_minutes: float = 0.0
    points: int = 5
    search_trials: int = 3
    search_share: float = 0.25
    start: str = "sft"
    answers: int = 0
    against: str = ""

    def __post_init__(self) -> None:
        _check(len(self.methods) > 0, "methods", "must name at least one method", list(self.methods))
        for method in self.methods:
            METHODS.check(method, "methods")
        if self.against:
            METHODS.check(self.against, "against")
        once = len(set(self.methods)) == len(self.methods)
        _check(once, "methods", "must name each method once", ",".join(self.methods))
        _check(self.seeds >= 1, "seeds", "must be at least 1", self.seeds)
        minutes = self.budget_minutes
        _check(math.isfinite(minutes), "budget_minutes", "must be a finite number", minutes)
        lengths = self.steps, self.budget_minutes, self.answers
        _check(
            min(lengths) >= 0 and sum(length > 0 for length in lengths) == 1,
            "steps",
            "one of steps, budget_minutes and answers must be given, greater than 0",
            ", ".join(map(str, lengths)),
        )
        _check(self.points >= 1, "points", "must be at least 1", self.points)
        _check(self.search_trials >= 1, "search_trials", "must be at least 1", self.search_trials)
        _check(0 < self.search_share <= 1, "search_share", "must lie in (0, 1]", self.search_share)
        _check(self.start in STARTS, "start", f"must be one of {', '.join(STARTS)}", self.start)

    def steps_of(self, method: str, config: RunConfig) -> int:
        """Steps of a method's training; 0 where they are what fits in a time. Raises InputError: not one fits."""
        if not self.answers:
            return self.steps
        a_step = config.answers_a_step(method)
        _check(self.answers >= a_step, "answers", f"must be enough for a step of {method}, {a_step}", self.answers)
        return self.answers // a_step

    def rate(self, method: str, config: RunConfig, power: int = 0) -> float:
        """The configured learning rate of a method, times 3^power.

        >>> Plan(("rloo",), steps=1).rate("rloo", RunConfig(model="m", task="chat", train_data="x", seed=0), 1)
        0.0006
        """
        chosen = METHODS[method]
        preset = config.preset_of(method)
        configured = getattr(config, chosen.rate) if preset == config.preset else 0.0  # else it is the other preset's
        follows = chosen.follows_update and (self.start == "iteration" or config.sft_steps > 0)
        middle = float(configured) or preset_rate(preset, follows)
        return float(f"{middle * RATE_STEP**power:.6g}")

    def left_out_rate(self, method: str, config: RunConfig) -> str:
        """A line where a configured rate is not the method's, which has a preset of its own; else empty."""
        chosen = METHODS[method]
        given = getattr(config, chosen.rate)
        if not given or chosen.preset in ("", config.preset):
            return ""
        return (
            f"{method}: begins at {self.rate(method, config):g}, the {chosen.preset} preset's rate; {chosen.rate}: "
            f"{given:g} is for the {config.preset} preset. --preset {chosen.preset} gives it to {method}."
        )

    def next_power(self, objectives: Mapping[int, float]) -> int | None:
        """Which power of 3 the search tries next: the best one's neighbours, upwards first.

        Args:
            objectives: what each power tried so far gave; -inf for a training that failed.

        Returns:
            None once `search_trials` are tried, or the best lies between two others.

        >>> Plan(("rloo",), steps=1, search_trials=4).next_power({0: 1.0, 1: 1.2})
        2
        """
        if not objectives:
            return 0
        best = max(objectives, key=lambda power: (objectives[power], -power))  # of failures the smallest
        beside = [power for power in (best + 1, best - 1) if power not in objectives]
        return beside[0] if beside and len(objectives) < self.search_trials else None

    def trial(self, job: Job) -> Job:
        """A short training of the search from a full one."""
        return replace(
            job,
            steps=max(1, math.ceil(job.steps * self.search_share)),
            budget_seconds=job.budget_seconds * self.search_share,
            points=1,
            prompts="search",
        )


@dataclass(frozen=True)
class Job:
    """One training and the measurements along it."""

    kind: str  # "prepare", "inference" or "train"
    start: str = "sft"
    method: str = ""
    seed: int = 0
    learning_rate: float = 0.0
    steps: int = 0
    budget_seconds: float = 0.0  # the training stops after it; 0: it does not
    points: int = 0  # measurements; 0 only takes the time
    prompts: str = "test"  # those measured on: "test", or "search" for the search of the learning rate

    @property
    def name(self) -> str:
        """Folder of the job: what it is, and a digest of all of it."""
        digest = hashlib.blake2b(json.dumps(asdict(self)).encode(), digest_size=4).hexdigest()
        words: Sequence[object] = (self.kind, self.start) if self.kind != "train" else (
            self.method, "trial" if self.prompts == "search" else f"seed{self.seed}", f"lr{self.learning_rate:g}",
        )  # fmt: skip
        return "-".join(map(str, (*words, digest))).replace(":", "-")

    def marks(self) -> list[int]:
        """Steps after which the policy is kept to be measured; the last step is one.

        >>> Job("train", steps=10, points=4).marks()
        [3, 5, 8, 10]
        """
        return sorted({math.ceil(self.steps * (i + 1) / self.points) for i in range(self.points)})


def _check(ok: bool, name: str, rule: str, value: object) -> None:
    if not ok:
        raise InputError(f"{name}: {rule}, got {value}.")
