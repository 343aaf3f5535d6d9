"""Every list of names as a registry: methods, directions, judges, tasks, rewards. One call registers a variant.

Names, help texts, errors, `zopro methods`, `zopro config-schema`, comparisons, journals and replay read these tables, and
the tests run over them. What a name stands for is imported when it is first used, so that names are known, and wrong ones
refused, before torch is.

A variant of one's own needs no registration: `python:MODULE:NAME` names a class or function in any importable module, or
a `Method` or `Direction` object where more is to be said about it than the defaults.

    python -c "from zopro.choices import METHODS; print(METHODS.about())"
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from zopro.choices.registry import Choice, Registry, imported, loaded, made_by

__all__ = [
    "BACK_PROPAGATION",
    "DIRECTIONS",
    "ENGINES",
    "EVALUATIONS",
    "FUNCTION_VALUES",
    "JUDGES",
    "METHODS",
    "PARALLEL",
    "REGISTRIES",
    "REWARDS",
    "SHAPINGS",
    "SWEEP",
    "TASKS",
    "Choice",
    "Direction",
    "Method",
    "Registry",
    "Reward",
    "imported",
    "loaded",
    "made_by",
]

FUNCTION_VALUES = "function values only"
SWEEP = "back-propagation, block by block"
BACK_PROPAGATION = "back-propagation"

EVALUATIONS = ("sequential", "together", "batched")
"""How a step's losses are evaluated: one after another, both sides of a difference in one pass, or all of them in one."""
PARALLEL = ("data", "queries")
"""What processes share in a step."""
SHAPINGS = ("z_score", "centred_rank")
"""What a population's rewards become before they weigh its directions."""


@dataclass(frozen=True)
class Method(Choice):
    """How a policy iteration is optimised: `zopro.train.methods.PolicyInputs` -> trainer.

    uses: FUNCTION_VALUES (steps are a few scalars, which ranks exchange and a journal replays), SWEEP or
    BACK_PROPAGATION. self_starting: it needs no previous update, so that iteration 0 is its own and no warm start's.
    rate: the key of its learning rate. preset: the one it always has. population: every member of one answers a step's
    prompts once, in place of num_generations answers to each. one_sided, queries: its differences, whatever `sides` and
    a `queries` of 1 say. follows_update: its steps go along the previous update, where there is one. fixed: options that
    are its own, whatever the configuration says; KEY=VALUE: where it says this. heeds: of the option groups that not
    every method has a use for (`zopro.config.heeded`) those that it has; None: not known.
    """

    uses: str = FUNCTION_VALUES
    self_starting: bool = False
    rate: str = "learning_rate"
    preset: str = ""
    population: bool = False
    one_sided: bool = False
    queries: int = 1
    follows_update: bool = False
    fixed: tuple[str, ...] = ()
    heeds: tuple[str, ...] | None = None

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
    trained: it is the run's own reward model. network: the target makes a network that scores. refuses: a function, or
    its "module:attribute", that raises `InputError` for a row's columns that the reward cannot read.
    """

    needs: tuple[str, ...] = ()
    checks: bool = False
    trained: bool = False
    network: bool = False
    refuses: Any = None


PUBLISHED = (
    *("noise", "greedy", "shaping", "antithetic", "targeted", "momentum", "second_moment", "anchor", "weight_decay"),
)
"""Options of es that es-paper has values of its own for."""

METHODS = Registry(
    "method",
    Method,
    Method(
        "zopro",
        "zopro.train.methods:targeted",
        "SPSA along the previous update and noise",
        follows_update=True,
        heeds=("step",),
    ),
    Method(
        "zopro-paper",
        "zopro.train.methods:paper",
        "the same as published: preset paper",
        preset="paper",
        follows_update=True,
        heeds=("step",),
    ),
    Method("mezo", "zopro.train.methods:mezo", "SPSA along noise alone", fixed=("decay",), heeds=("step",)),
    Method(
        "fzoo",
        "zopro.train.methods:fzoo",
        "one-sided SPSA, its step over the losses' deviation",
        self_starting=True,
        one_sided=True,
        queries=8,
        fixed=("noise", "decay", "evaluation=together"),
        heeds=("step",),
    ),
    *(
        Method(
            name,
            f"zopro.train.methods:{function}",
            text,
            self_starting=True,
            rate="es_learning_rate",
            population=True,
            fixed=("num_generations", "beta", "advantage", *fixed),
            heeds=("evolution", "directions"),
        )
        for name, function, text, fixed in (
            ("es", "evolution", "a population, scored by rewards of its own answers", ()),
            (
                "es-paper",
                "evolution_paper",
                "the same as published: Gaussian, greedy, z-scores, plain step",
                (*PUBLISHED, "decay"),
            ),
        )
    ),
    Method(
        "guided",
        "zopro.train.methods:guided",
        "RLOO's gradient, or nearly, swept back block by block",
        SWEEP,
        self_starting=True,
        rate="guided_learning_rate",
        heeds=("guided", "step"),
    ),
    *(
        Method(
            name,
            f"zopro.train.methods:{function}",
            text,
            BACK_PROPAGATION,
            self_starting=True,
            rate="first_order_learning_rate",
            fixed=fixed,
            heeds=(),
        )
        for name, function, text, fixed in (
            ("rloo", "first_order", "TRL's RLOO with AdamW", ()),
            ("rloo-checkpointed", "checkpointing", "the same with one block's activations at a time", ()),
            ("grpo", "grpo", "rewards normalised over a prompt's answers", ()),
            ("online-dpo", "online_dpo", "DPO on pairs of fresh answers", ("advantage",)),
        )
    ),
)

METHOD_OF_START = {"first_order": "rloo", "spsa": "mezo"} | {m: m for m in METHODS if METHODS[m].self_starting}
"""Methods of an iteration 0 whose own method needs a previous update; `sft` gives it one."""

DIRECTIONS = Registry(
    "noise",
    Direction,
    Direction("gaussian", "zopro.zo.directions.gaussian:Gaussian", "N(0, 1)"),
    Direction("rademacher", "zopro.zo.directions.rademacher:Rademacher", "-1 or 1"),
    Direction("low_rank", "zopro.zo.directions.low_rank:LowRank", "cheap where all parameters are trained", ("rank",)),
    Direction(
        "signs",
        "zopro.zo.directions.signs:Signs",
        "the previous update, with a random sign for each sub-layer",
        of_update=True,
    ),
)

JUDGES = Registry(
    "judge",
    Choice,
    Choice(
        "auto",
        "zopro.judges.making:by_task",
        "by task: chrf for translation, rouge for summarization, else the base model",
    ),
    Choice("rouge", "zopro.judges.making:by_metric", "the answer nearer to the reference in words"),
    Choice("chrf", "zopro.judges.making:by_metric", "nearer in characters"),
    Choice("model", "zopro.judges.making:by_base", "the base model"),
    Choice("model:PATH", "zopro.judges.making:by_model", "another one"),
    Choice("openai:MODEL", "zopro.judges.making:by_endpoint", "an endpoint"),
    Choice("python:MODULE:FUNCTION", "zopro.judges.making:by_callable", "your function"),
)

ENGINES = Registry(
    "engine",
    Choice,
    Choice("transformers", "zopro.engine.local.engine:LocalEngine", "PyTorch"),
    Choice("llamacpp:FILE", "zopro.engine.servers.llamacpp.skeleton:open_file", "llama.cpp, over a GGUF file"),
    Choice("vllm", "zopro.engine.servers.vllm.hollow:open_servers", "a vLLM server that zopro starts and stops"),
    Choice("vllm:URLS", "zopro.engine.servers.vllm.hollow:open_servers", "vLLM servers by their addresses"),
)

TASKS = Registry(
    "task",
    Choice,
    Choice("chat", "zopro.tasks.chat:task", "a reply to a conversation"),
    Choice("summarization", "zopro.tasks.summarization:task", "a summary of a text"),
    Choice("translation", "zopro.tasks.translation:task", "a translation, scored or paired"),
    Choice("preference", "zopro.tasks.preference:task", "TRL's prompt, chosen and rejected"),
    Choice("verifiable", "zopro.tasks.verifiable:task", "a prompt whose answer a program checks"),
)

_REFUSES = {name: f"zopro.rewards.functions.{name}:refuse" for name in ("maths", "countdown")}

REWARDS = Registry(
    "reward",
    Reward,
    Reward("model", "zopro.rewards.model:RewardModel", "trained on the rows' preferences", trained=True),
    Reward("model:PATH", "zopro.rewards.classifier:Classifier", "a sequence classifier with one output", network=True),
    Reward("python:MODULE:FUNCTION", "zopro.rewards.functions.own:own", "your function, as TRL calls it"),
    *(
        Reward(name, f"zopro.rewards.functions.{target}", text, columns, checks, refuses=_REFUSES.get(name))
        for name, target, text, columns, checks in (
            ("exact", "answer:exact", "the completion is the row's answer", ("answer",), True),
            ("contains", "answer:contains", "the row's answer stands in it", ("answer",), True),
            ("maths", "maths:maths", "it ends with a number or expression equal to the answer", ("answer",), True),
            ("countdown", "countdown:countdown", "an equation reaches the row's target", ("nums", "target"), True),
            ("regex:PATTERN", "pattern:regex", "Python's re.search finds the pattern", (), True),
            ("json", "structured:structured", "it is JSON", (), True),
            ("json:KEY,KEY", "structured:structured", "a JSON object with these keys", (), True),
            ("length:MIN-MAX", "length:length", "a number of words in this range", (), False),
            ("chrf", "nearness:chrf", "near to the row's answer in characters", ("answer",), False),
            ("rouge", "nearness:rouge", "near to it in words", ("answer",), False),
        )
    ),
)

REGISTRIES = (METHODS, DIRECTIONS, JUDGES, TASKS, REWARDS, ENGINES)
"""All of them."""
