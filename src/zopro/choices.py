"""Every list of names as a registry: methods, directions, judges, tasks, rewards. One call registers a variant.

Names, help texts, errors, `zopro methods`, `zopro config-schema`, comparisons, journals and replay read these tables, and
the tests run over them. What a name stands for is imported when it is first used, so that names are known, and wrong ones
refused, before torch is.

A variant of one's own needs no registration: `python:MODULE:NAME` names a class or function in any importable module, or
a `Method` or `Direction` object where more is to be said about it than the defaults.

    python -c "from zopro.choices import METHODS; print(METHODS.about())"
"""

from __future__ import annotations

import contextlib
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from zopro.errors import InputError, nearest

FUNCTION_VALUES = "function values only"
SWEEP = "back-propagation, block by block"
BACK_PROPAGATION = "back-propagation"

EVALUATIONS = ("sequential", "together")
"""How the two sides of a central difference are evaluated."""
PARALLEL = ("data", "queries")
"""What processes share in a step."""
SHAPINGS = ("z_score", "centred_rank")
"""What a population's rewards become before they weigh its directions."""


@dataclass(frozen=True)
class Choice:
    """One name and what it stands for.

    name: as configurations give it; of "model:PATH" the part after the colon is the user's. target: "module:attribute",
    or the thing itself. help: what it is, in a few words.
    """

    name: str
    target: Any
    help: str

    @property
    def prefix(self) -> str:
        """Of "model:PATH" the word before the colon; empty for a plain name."""
        kind, colon, _ = self.name.partition(":")
        return kind if colon else ""

    def load(self) -> Any:
        """What the name stands for."""
        if not isinstance(self.target, str):
            return self.target
        module, _, attribute = self.target.partition(":")
        return getattr(importlib.import_module(module), attribute)


@dataclass(frozen=True)
class Method(Choice):
    """How a policy iteration is optimised: `zopro.train.methods.PolicyInputs` -> trainer.

    uses: FUNCTION_VALUES (steps are a few scalars, which ranks exchange and a journal replays), SWEEP or
    BACK_PROPAGATION. self_starting: it needs no previous update, so that iteration 0 is its own and no warm start's.
    rate: the key of its learning rate. preset: the one it always has. population: every member of one answers a step's
    prompts once, in place of num_generations answers to each.
    """

    uses: str = FUNCTION_VALUES
    self_starting: bool = False
    rate: str = "learning_rate"
    preset: str = ""
    population: bool = False

    @property
    def zeroth_order(self) -> bool:
        return self.uses == FUNCTION_VALUES


@dataclass(frozen=True)
class Direction(Choice):
    """A class of `zopro.zo.Directions` that options can name.

    keeps: attributes that are arguments of its constructor too; a journal keeps them. of_update: the constructor takes
    the policy's previous update (name -> mu); where there is none, Gaussian noise takes its place.
    """

    keeps: tuple[str, ...] = ()
    of_update: bool = False


@dataclass(frozen=True)
class Reward(Choice):
    """What the policy is optimised for. The target makes a function as TRL calls it from the text after the name's colon.

    needs: columns that each row must have. checks: 1 means that an answer is right, so that accuracy can be measured.
    trained: it is the run's own reward model. network: the target makes a network that scores.
    """

    needs: tuple[str, ...] = ()
    checks: bool = False
    trained: bool = False
    network: bool = False


C = TypeVar("C", bound=Choice)


class Registry(Generic[C]):
    """The choices of one configuration key.

    Args:
        key: of the configuration, which errors name.
        kind: what its choices are.

    >>> TASKS["chat"].help
    'a reply to a conversation'
    >>> "chat" in TASKS, "chess" in TASKS
    (True, False)
    """

    def __init__(self, key: str, kind: type[C]) -> None:
        self.key, self.kind = key, kind
        self._choices: dict[str, C] = {}
        self._foreign: dict[str, C] = {}

    def add(self, choice: C) -> C:
        """Register a variant. Raises ValueError for a name that is taken."""
        if choice.name in self._choices:
            raise ValueError(f"name: must be new among {', '.join(self)}, got {choice.name!r}")
        self._choices[choice.name] = choice
        return choice

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def values(self) -> list[C]:
        return list(self._choices.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._find(name) is not None or _python(name))

    def check(self, name: str, key: str = "") -> None:
        """Raise `InputError` for an unknown name; of `python:MODULE:NAME` only the form is looked at."""
        if name not in self:
            known = [*self, *([] if self._find("python:M:N") else ["python:MODULE:NAME"])]
            hint = nearest(name.partition(":")[0], known)
            raise InputError(f"{key or self.key}: must be one of {', '.join(known)}, got {name!r}.{hint}")

    def __getitem__(self, name: str) -> C:
        """The choice of a name. Raises `InputError`: unknown, or a `python:` one that cannot be imported."""
        self.check(name)
        found = self._find(name) or self._foreign.get(name)
        if found is None:
            thing = imported(name.removeprefix("python:"), self.key)
            given = thing if isinstance(thing, self.kind) else self.kind(name, thing, "")
            found = self._foreign[name] = given
        return found

    def name_of(self, thing: type) -> str | None:
        """The name of a class; None for one that has none."""
        target = f"{thing.__module__}:{thing.__qualname__}"
        named = (*self._choices.items(), *self._foreign.items())
        return next((name for name, choice in named if choice.target in (target, thing)), None)

    def about(self) -> str:
        """All names with their helps, for a help text."""
        return ", ".join(f"{choice.name} ({choice.help})" for choice in self.values())

    def _find(self, name: str) -> C | None:
        kind, colon, rest = name.partition(":")
        prefixed = (choice for choice in self.values() if kind and rest and choice.prefix == kind)
        return next(prefixed, None) if colon else self._choices.get(name)


def imported(path: str, key: str) -> Any:
    """What "MODULE:NAME" names; modules of the working directory are found as well.

    Raises `InputError` that begins with `key`: not of this form, a module that cannot be imported, no such name in it.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{key}: a Python {key} must be module:function, got {path!r}.")
    try:
        with _working_directory_importable():
            module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise InputError(f"{key}: cannot import {module_name!r} ({type(error).__name__}: {error}).") from error
    if not hasattr(module, attribute):
        raise InputError(f"{key}: {module_name!r} has no {attribute!r}.{nearest(attribute, dir(module))}")
    return getattr(module, attribute)


def _python(name: str) -> bool:
    kind, module, attribute = (*name.split(":", 2), "", "")[:3]
    return kind == "python" and bool(module and attribute)


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


METHODS = Registry("method", Method)
for method in (
    Method("zopro", "zopro.train.methods:targeted", "SPSA along the previous update and noise"),
    Method("zopro-paper", "zopro.train.methods:paper", "the same as published: preset paper", preset="paper"),
    Method("mezo", "zopro.train.methods:mezo", "SPSA along noise alone"),
    Method("fzoo", "zopro.train.methods:fzoo", "one-sided SPSA, its step over the losses' deviation", self_starting=True),
    *(
        Method(
            name, f"zopro.train.methods:{function}", text, self_starting=True, rate="es_learning_rate", population=True
        )
        for name, function, text in (
            ("es", "evolution", "a population, scored by rewards of its own answers"),
            ("es-paper", "evolution_paper", "the same as published: Gaussian, greedy, z-scores, plain step"),
        )
    ),
    Method(
        "guided",
        "zopro.train.methods:guided",
        "residual feedback",
        SWEEP,
        self_starting=True,
        rate="guided_learning_rate",
    ),
    *(
        Method(name, f"zopro.train.methods:{function}", text, BACK_PROPAGATION, True, "first_order_learning_rate")
        for name, function, text in (
            ("rloo", "first_order", "TRL's RLOO with AdamW"),
            ("rloo-checkpointed", "checkpointing", "the same with one block's activations at a time"),
            ("grpo", "grpo", "rewards normalised over a prompt's answers"),
            ("online-dpo", "online_dpo", "DPO on pairs of fresh answers"),
        )
    ),
):
    METHODS.add(method)

DIRECTIONS = Registry("noise", Direction)
for direction in (
    Direction("gaussian", "zopro.zo.directions.gaussian:Gaussian", "N(0, 1)"),
    Direction("rademacher", "zopro.zo.directions.rademacher:Rademacher", "-1 or 1"),
    Direction("low_rank", "zopro.zo.directions.low_rank:LowRank", "cheap where all parameters are trained", ("rank",)),
    Direction(
        "signs",
        "zopro.zo.directions.signs:Signs",
        "the previous update, with a random sign for each sub-layer",
        of_update=True,
    ),
):
    DIRECTIONS.add(direction)

JUDGES = Registry("judge", Choice)
for judge in (
    Choice("auto", "zopro.judges.making:by_task", "by task"),
    Choice("rouge", "zopro.judges.making:by_metric", "the answer nearer to the reference in words"),
    Choice("chrf", "zopro.judges.making:by_metric", "nearer in characters"),
    Choice("model", "zopro.judges.making:by_base", "the base model"),
    Choice("model:PATH", "zopro.judges.making:by_model", "another one"),
    Choice("openai:MODEL", "zopro.judges.making:by_endpoint", "an endpoint"),
    Choice("python:MODULE:FUNCTION", "zopro.judges.making:by_callable", "your function"),
):
    JUDGES.add(judge)

TASKS = Registry("task", Choice)
for task in (
    Choice("chat", "zopro.tasks.chat:task", "a reply to a conversation"),
    Choice("summarization", "zopro.tasks.summarization:task", "a summary of a text"),
    Choice("translation", "zopro.tasks.translation:task", "a translation, scored or paired"),
    Choice("preference", "zopro.tasks.preference:task", "TRL's prompt, chosen and rejected"),
    Choice("verifiable", "zopro.tasks.verifiable:task", "a prompt whose answer a program checks"),
):
    TASKS.add(task)

REWARDS = Registry("reward", Reward)
for reward in (
    Reward("model", "zopro.rewards.model:RewardModel", "trained on the rows' preferences", trained=True),
    Reward("model:PATH", "zopro.rewards.classifier:Classifier", "a sequence classifier with one output", network=True),
    Reward("python:MODULE:FUNCTION", "zopro.rewards.functions.own:own", "your function, as TRL calls it"),
    *(
        Reward(name, f"zopro.rewards.functions.{target}", text, columns, checks)
        for name, target, text, columns, checks in (
            ("exact", "answer:exact", "the completion is the row's answer", ("answer",), True),
            ("contains", "answer:contains", "the row's answer stands in it", ("answer",), True),
            ("maths", "maths:maths", "it ends with a number or expression equal to the answer", ("answer",), True),
            ("countdown", "countdown:countdown", "an equation reaches the row's target", ("nums", "target"), True),
            ("regex:PATTERN", "pattern:regex", "Python's re.search finds the pattern", (), True),
            ("json", "structured:structured", "it is JSON", (), True),
            ("json:KEY,KEY", "structured:structured", "a JSON object with these keys", (), True),
            ("length:MIN-MAX", "length:length", "so many words", (), False),
        )
    ),
):
    REWARDS.add(reward)
