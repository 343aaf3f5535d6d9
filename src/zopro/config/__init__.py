"""Every setting of a run, one flat name space, grouped by stage.

`zopro run CONFIG.yaml --key value` reads the same names from the file and from the command line. Values are checked
here, before anything is loaded or written; what needs the model or the data to be checked is checked by the stage
that has them. Names follow TRL and PEFT where they have one.

    python -c "from zopro.config import RunConfig; print(RunConfig(model='DIR', task='chat', train_data='x.jsonl'))"
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from zopro.choices import METHOD_OF_START, METHODS
from zopro.config.data import DataOptions
from zopro.config.defaults import default_of, own_defaults
from zopro.config.evolution import EvolutionOptions
from zopro.config.fields import check, check_choices, not_negative, option, positive, representable
from zopro.config.guided import GuidedOptions
from zopro.config.heeded import own_keys
from zopro.config.judging import PairOptions
from zopro.config.model import ModelOptions
from zopro.config.objective import ObjectiveOptions
from zopro.config.policy import PolicyOptions
from zopro.config.serving import check_served
from zopro.config.step import StepOptions
from zopro.config.values import read_as
from zopro.errors import InputError, nearest

WARM_STARTS = ("sft", *METHOD_OF_START)
FEW_QUESTIONS, ALL_QUESTIONS = 5, 200  # easy ones: what `true` asks, and how many there are


@dataclass
class LoopOptions:
    """The iterated loop (the paper's)."""

    output_dir: str = option("", "Run directory. Empty: runs/<task>-<method>-<time>.", path=True)
    seed: int = option(0, "Seed of everything random: data order, sampling, directions, initialisation.")
    method: str = option(
        "zopro",
        f"How the policy is optimised: {METHODS.about()}. What each uses: zopro methods.",
        METHODS,
    )
    iterations: int = option(4, "Policy iterations, iteration 0 included.")
    warm_start: str = option(
        "first_order",
        "Iteration 0: first_order (RLOO, as the paper), sft (its update is the last one), spsa, or a method that starts "
        "by itself, such as guided (RLOO's gain in nearly the memory of inference) or es. Verifiable: spsa.",
        WARM_STARTS,
    )
    iteration_share: float = option(
        0.05,
        "Share of the training rows used by one iteration (the paper's 5 %); 1.0 is a whole epoch, 2.0 two. Verifiable: "
        "0.25.",
    )
    snapshot_every: int = option(
        0, "Also keep the adapters every this many steps inside an iteration, for finer trajectories; 0: never."
    )
    checkpoint_steps: int = option(
        10, "Save a training stage every this many steps, for --resume to continue from; 0: a stopped stage starts over."
    )
    report_to: list[str] = field(
        default_factory=list,
        metadata={"help": "tensorboard, wandb, trackio: as in transformers. metrics.jsonl is always kept."},
    )

    def __post_init__(self) -> None:
        check_choices(self, LoopOptions)
        positive(self, "iterations", "iteration_share")
        not_negative(self, "seed", "snapshot_every", "checkpoint_steps")
        check(self.seed < 2**63, "seed", "must be less than 2^63", self.seed)
        if isinstance(self.report_to, str):
            self.report_to = [] if self.report_to in ("", "none") else self.report_to.split(",")


@dataclass
class SFTOptions:
    """Supervised fine-tuning on the chosen answers."""

    sft_steps: int = option(
        100, "Optimiser steps of supervised fine-tuning; 0 starts from the base model. Verifiable: 0."
    )
    sft_batch_size: int = option(8, "Rows in a step.")
    sft_learning_rate: float = option(2e-4, "Peak learning rate (AdamW, linear decay).")

    def __post_init__(self) -> None:
        not_negative(self, "sft_steps")
        positive(self, "sft_batch_size", "sft_learning_rate")


@dataclass
class RewardOptions:
    """The reward model: first training, refinement and interpolation with its predecessor."""

    reward_steps: int = option(100, "Optimiser steps of the first reward model.")
    reward_batch_size: int = option(8, "Pairs (or scored rows) in a step.")
    reward_learning_rate: float = option(2e-4, "Peak learning rate (AdamW, linear decay).")
    refine_steps: int = option(10, "Optimiser steps of each refinement on the judged pairs.")
    refine_learning_rate: float = option(1e-4, "Peak learning rate of each refinement.")
    interpolation: float = option(
        0.5, "Weight of the newly refined reward model against its predecessor: 1 keeps only the new one."
    )

    def __post_init__(self) -> None:
        positive(self, "reward_steps", "reward_batch_size", "reward_learning_rate", "refine_learning_rate")
        not_negative(self, "refine_steps")
        check(0 <= self.interpolation <= 1, "interpolation", "must lie in [0, 1]", self.interpolation)


@dataclass
class EvaluationOptions:
    """Measurements on held-out prompts after SFT and after every iteration."""

    eval_prompts: int = option(100, "Held-out prompts answered and scored after each iteration.")
    eval_batch_size: int = option(32, "Rows in a batch of evaluation and scoring.")
    eval_samples: int = option(1, "Answers sampled to each held-out prompt. Verifiable: 4.")
    eval_greedy: bool = option(False, "Also take the likeliest answer to each held-out prompt. Verifiable: true.")
    easy_questions: bool | int = option(
        True,
        "Also ask easy questions (the capital of France) before and after each iteration, and say which the model has "
        f"forgotten: true asks {FEW_QUESTIONS}, a number asks that many, up to {ALL_QUESTIONS}. Of models with a chat "
        "template of their own that can answer any.",
    )
    other_data: str = option(
        "",
        "Prompts of another task, same formats (a column prompt suffices), at most eval_prompts of them: how far each "
        "iteration's policy has moved there is measured too, in nats an answer.",
        path=True,
    )

    def __post_init__(self) -> None:
        positive(self, "eval_prompts", "eval_batch_size", "eval_samples")
        asked = self.easy_questions
        rule = f"must be true, false or a number of questions up to {ALL_QUESTIONS}"
        check(0 <= asked <= ALL_QUESTIONS, "easy_questions", rule, asked)
        if asked in (0, FEW_QUESTIONS):  # one value for one meaning, by which a run is found to be the same
            self.easy_questions = bool(asked)

    @property
    def questions_asked(self) -> int:
        """How many easy questions are asked."""
        return FEW_QUESTIONS if self.easy_questions is True else int(self.easy_questions)


@dataclass
class RankOptions:
    """Many processes, started by torchrun or accelerate launch."""

    rank_timeout: int = option(30, "Minutes after which a process that waits for another one in a step gives up.")

    def __post_init__(self) -> None:
        positive(self, "rank_timeout")


GROUPS = (
    ModelOptions,
    DataOptions,
    LoopOptions,
    ObjectiveOptions,
    SFTOptions,
    RewardOptions,
    PolicyOptions,
    StepOptions,
    EvolutionOptions,
    GuidedOptions,
    PairOptions,
    EvaluationOptions,
    RankOptions,
)


@dataclass
class _Options(
    RankOptions,
    EvaluationOptions,
    PairOptions,
    GuidedOptions,
    EvolutionOptions,
    StepOptions,
    PolicyOptions,
    RewardOptions,
    SFTOptions,
    ObjectiveOptions,
    LoopOptions,
    DataOptions,
    ModelOptions,
):
    def __post_init__(self) -> None:
        for group in GROUPS:
            group.__post_init__(self)
        representable(self, "seed")
        fits = self.evaluation == "sequential" or self.lora_r > 0
        check(fits, "evaluation", "must be sequential with lora_r: 0", self.evaluation)
        if self.served:
            check_served(self)
        fits = self.beta > 0 or self.method != "online-dpo"
        check(fits, "beta", "must be greater than 0 with method online-dpo, whose reference policy it weighs", self.beta)
        fits = self.sigma != "auto" or self.prompts_per_step > 1
        check(fits, "sigma", "must be a number with prompts_per_step: 1, of which no noise can be measured", self.sigma)


class RunConfig(_Options):
    """All settings of one run; `GROUPS` says which belong together.

    What is not given takes its default, which for some keys depends on the task or the engine
    (`zopro.config.defaults`), and so does what is given as None. Raises `InputError` on a value that is not of the key's
    type or out of range.

    >>> config = RunConfig(model="HuggingFaceTB/SmolLM2-135M-Instruct", task="verifiable", train_data="rows.jsonl")
    >>> config.warm_start, config.sft_steps, RunConfig(**config.to_dict()) == config
    ('spsa', 0, True)
    """

    def __init__(self, **given: Any) -> None:
        given = {key: value for key, value in given.items() if value is not None}
        for each in dataclasses.fields(self):
            if each.name in given:
                given[each.name] = read_as(each, given[each.name])
        super().__init__(**{**own_defaults(given), **given})

    def answers_a_step(self, method: str) -> int:
        """How many answers a step of a method samples.

        >>> config = RunConfig(model="m", task="chat", train_data="x", prompts_per_step=4, population=16)
        >>> [config.answers_a_step(method) for method in ("es", "rloo")]
        [64, 8]
        """
        return self.prompts_per_step * (self.population if METHODS[method].population else self.num_generations)

    def differences_of(self, method: str) -> tuple[int, int]:
        """(queries, sides) of a zeroth-order step by a method.

        >>> RunConfig(model="m", task="chat", train_data="x").differences_of("fzoo")
        (8, 1)
        """
        chosen = METHODS[method]
        return self.queries if self.queries > 1 else chosen.queries, 1 if chosen.one_sided else self.sides

    def unheeded(self) -> list[str]:
        """Keys that are set to something, and that no method of the run has a use for.

        >>> RunConfig(model="m", task="chat", train_data="x", sigma=1, method="es-paper", anchor=0.1, sides=1).unheeded()
        ['anchor', 'sides']
        """
        each = [own_keys(METHODS[method], self.guide) for method in self.methods]
        values = {name: getattr(self, name) for name in self.changed(*each[0])}
        return [
            name for name, value in values.items() if value and all(own.get(name) in ("", str(value)) for own in each)
        ]

    @property
    def methods(self) -> list[str]:
        """That of iteration 0 and that of all others, or the one that is both."""
        return [*dict.fromkeys((self.method_of(0), self.method))]

    def unused(self) -> list[str]:
        """Keys of the reward model, the pairs and their judge that are set where no reward model is trained."""
        groups = () if self.trains_reward else (RewardOptions, PairOptions)
        return self.changed(*(key.name for group in groups for key in dataclasses.fields(group)))

    def changed(self, *names: str) -> list[str]:
        """Those of some keys that are not the defaults.

        >>> RunConfig(model="m", task="chat", train_data="x", anchor=0.1).changed("anchor", "beta")
        ['anchor']
        """
        keys = {key.name: key for key in dataclasses.fields(self)}
        return [name for name in names if getattr(self, name) != default_of(keys[name], self.task, self.engine)]

    def method_of(self, iteration: int) -> str:
        """The method that optimises an iteration."""
        own = iteration > 0 or METHODS[self.method].self_starting
        return self.method if own else METHOD_OF_START.get(self.warm_start, self.method)

    def preset_of(self, method: str) -> str:
        """The preset of a method's steps: its own, if it always has one, or the configured one."""
        return METHODS[method].preset or self.preset

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunConfig:
        """The configuration with these keys, refusing unknown ones with the nearest known one."""
        known = [f.name for f in dataclasses.fields(cls)]
        for key in values:
            if key not in known:
                raise InputError(f"{key}: no such configuration key.{nearest(str(key), known)}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
