"""The arguments of every trainer that the loop and the bench make: quiet, without autocast, on the model's device."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from inspect import get_annotations
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments
from trl import RLOOConfig

from zopro.config.fields import check
from zopro.errors import InputError
from zopro.system.ranks import launched
from zopro.train.checkpoints import save_arguments
from zopro.zo.groups import number

logger = logging.getLogger(__name__)

Arguments = TypeVar("Arguments", bound=TrainingArguments)


def common_arguments(
    *,
    output_dir: str | Path,
    steps: int,
    batch_size: int,
    seed: int,
    device: torch.device,
    logging_steps: int,
    report_to: Sequence[str] = (),
    checkpoint_steps: int = 0,
) -> dict[str, Any]:
    """By their names in `transformers.TrainingArguments`.

    Mixed precision is off: what is trained is float32 over a base in any type, so there is nothing to cast.

    Args:
        batch_size: rows on this process.
        report_to: transformers' names of where logs go; nowhere by default.
        checkpoint_steps: steps between checkpoints; 0: none.
    """
    return {
        "output_dir": str(output_dir),
        "max_steps": steps,
        "per_device_train_batch_size": batch_size,
        "seed": seed,
        "logging_steps": logging_steps,
        **save_arguments(checkpoint_steps, logging_steps),
        "report_to": list(report_to) or "none",
        "disable_tqdm": True,
        "bf16": False,
        "use_cpu": device.type == "cpu",
        "dataloader_pin_memory": device.type == "cuda",
    }


def quiet_arguments(
    kind: type[Arguments],
    *,
    output_dir: str | Path,
    steps: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    device: torch.device,
    report_to: Sequence[str] = (),
    checkpoint_steps: int = 0,
    **more: Any,
) -> Arguments:
    """Arguments of a stage that learns from rows: AdamW with linear decay to zero, about a hundred log lines.

    The named ones are those of `common_arguments`; `more` are further ones of `kind`.
    """
    # Renamed in transformers 5; TRL turns it on, which costs a second forward pass that adapters do not need.
    renamed = "activation_checkpointing" in kind.__dataclass_fields__
    more["activation_checkpointing" if renamed else "gradient_checkpointing"] = False
    shared = common_arguments(
        output_dir=output_dir,
        steps=steps,
        batch_size=batch_size,
        seed=seed,
        device=device,
        logging_steps=max(1, steps // 100),
        report_to=report_to,
        checkpoint_steps=checkpoint_steps,
    )
    arguments = kind(**shared, learning_rate=learning_rate, data_seed=seed, remove_unused_columns=False, **more)
    return on_one_gpu(without_autocast(arguments))


def without_autocast(arguments: Arguments) -> Arguments:
    """Without the mixed precision of `accelerate launch`, unless the arguments themselves ask for one."""
    if not (arguments.bf16 or arguments.fp16):
        arguments.mixed_precision = "no"
    return arguments


def on_one_gpu(arguments: Arguments) -> Arguments:
    """Of one process. With several GPUs in sight transformers would train on copies of the model on all of them
    (DataParallel), by batches as many times as large; displaced weights and the engine are of one model.
    """
    if arguments.n_gpu > 1:
        logger.warning("of %d GPUs one is used: torchrun starts a process for each", arguments.n_gpu)
        arguments._n_gpu = 1
    return arguments


def scaled_gradients(model: Any) -> dict[str, Any]:
    """Arguments with which back-propagation through a float16 model scales its loss, so that gradients do not vanish.

    On a GPU alone, where accelerate does it. Function-value methods need none of it.
    """
    return {"fp16": True} if model.dtype == torch.float16 and model.device.type == "cuda" else {}


def whole(value: Any) -> bool:
    """Whether it is a whole number."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def finite(value: Any) -> bool:
    """Whether it is a finite number."""
    return not isinstance(value, bool) and math.isfinite(number(value))


KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "bool": ("must be True or False", lambda value: number(value) in (0, 1)),
    "int": ("must be a whole number", whole),
    "float": ("must be a finite number", finite),
    "float | str": (
        "must be a number greater than 0, or auto",
        lambda value: isinstance(value, str) or not math.isnan(number(value)),
    ),
    "str": ("must be a text", lambda value: isinstance(value, str)),
    "list[float]": ("must be finite numbers", lambda value: isinstance(value, Iterable) and all(map(finite, value))),
    "dict": ("must be a dict", lambda value: isinstance(value, Mapping) or str(value).startswith("{")),  # or one as JSON
}
"""By the type of an option: what its values must be, and whether one is."""
LIMITS = ("epsilon", "epsilon_high", "vllm_server_timeout")  # may be infinite


def kinds(config: type) -> dict[str, str]:
    """The types of a configuration's options that transformers does not have; an empty string for one not in `KINDS`.

    By what classes declare: parsers of command lines write other types into their fields.
    """
    found = {}
    for name, hint in [pair for base in reversed(config.__mro__) for pair in get_annotations(base).items()]:
        text = hint.__name__ if isinstance(hint, type) else str(hint)
        kind = "dict" if text.startswith("dict") else text.removesuffix(" | None")
        kind = "float | str" if name in ("eps", "sigma") else kind  # a str for those parsers
        if name not in TrainingArguments.__dataclass_fields__:
            found[name] = kind if kind in KINDS else ""
    return found


def check_kinds(arguments: Any, **least: int) -> None:
    """Raise InputError for options of other types than theirs, or for those named that are no whole numbers of at least
    so much. transformers' own are not looked at."""
    for name, lowest in least.items():
        value = getattr(arguments, name)
        check(whole(value) and value >= lowest, name, f"must be a whole number of at least {lowest}", value)
    known = kinds(type(arguments))
    for key in fields(arguments):
        value, kind = getattr(arguments, key.name), known.get(key.name)
        absent = value is None and (key.default in (None, "") or key.name in RLOOConfig.__dataclass_fields__)
        if kind and not absent and not (key.name in LIMITS and value == math.inf):
            rule, holds = KINDS[kind]
            check(holds(value), key.name, rule, value)


def check_guess(arguments: Any, name: str, of: str) -> None:
    """Raise InputError for a guess at what "auto" finds that is no such number, or where nothing is to be found."""
    if (guess := getattr(arguments, name)) is not None:
        check(getattr(arguments, of) == "auto", name, f"must be left out unless {of} is auto", guess)
        check(guess > 0, name, "must be above 0", guess)


def check_several(args: Any) -> None:
    """Raise InputError where sigma is to be found from the noise of one answer."""
    answers = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    if args.sigma == "auto" and answers < 2:
        raise InputError(
            "sigma: must be a number where members answer once in a step, of which no noise can be measured, got "
            "'auto'. Or raise per_device_train_batch_size."
        )


def check_enough(rows: int, args: Any, said: str = "") -> None:
    """Raise InputError for fewer rows (`said`: in words) than the prompts that are answered at once: TRL drops those."""
    needed = args.generation_batch_size // args.num_generations
    if rows < needed:
        raise InputError(
            f"train_dataset: must have at least the {needed} prompts that are answered at once, got {said or rows}. Add "
            "rows, or lower per_device_train_batch_size."
        )


@contextmanager
def as_if_more_answers(arguments: Any, times: int) -> Iterator[None]:
    """Within the context arguments of `trl.RLOOConfig` count so many times as many rows."""
    rows = ("per_device_train_batch_size", "per_device_eval_batch_size", "generation_batch_size")
    names = ("num_generations", "num_generations_eval", *rows)
    for name in names:
        setattr(arguments, name, getattr(arguments, name) and getattr(arguments, name) * times)
    yield
    for name in names:
        setattr(arguments, name, getattr(arguments, name) and getattr(arguments, name) // times)


def policy_arguments(
    *, prompts: int, num_generations: int, max_completion_length: int, temperature: float, beta: float, **shared: Any
) -> dict[str, Any]:
    """Arguments of a policy stage, by their names in `trl.RLOOConfig`.

    Args:
        prompts: of one step, on all processes together.
        shared: those of `common_arguments` but the batch size.
    """
    return {
        **common_arguments(batch_size=prompts * num_generations // launched(), **shared),
        "num_generations": num_generations,
        "max_completion_length": max_completion_length,
        "temperature": temperature,
        "beta": beta,
        "gradient_checkpointing": False,
    }
