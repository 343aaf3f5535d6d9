"""The arguments of every trainer that the loop and the bench make: quiet, without autocast, on the model's device."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from numbers import Integral
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import TrainingArguments

from zopro.config.fields import check
from zopro.errors import InputError
from zopro.system.ranks import launched
from zopro.train.checkpoints import save_arguments
from zopro.zo.groups import number

logger = logging.getLogger(__name__)

FIRST = 8  # rows whose prompts are looked at before a training
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


def check_whole(arguments: Any, least: int, *names: str) -> None:
    """Raise InputError for fields that are no whole numbers of at least so much."""
    for name in names:
        value = getattr(arguments, name)
        if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
            raise InputError(f"{name}: must be a whole number of at least {least}, got {value!r}.")


def check_guess(arguments: Any, name: str, of: str) -> None:
    """Raise InputError for a guess at what "auto" finds that is no such number, or where nothing is to be found."""
    if (guess := getattr(arguments, name)) is not None:
        check(getattr(arguments, of) == "auto", name, f"must be left out unless {of} is auto", guess)
        check(0 < number(guess) < math.inf, name, "must be finite and above 0", guess)


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


def check_rows(rows: Any, args: Any) -> None:
    """Raise InputError for rows that cannot be answered or rewarded, as far as the first ones and their columns tell, or
    that are too few.

    Args:
        rows: the data of a training; of a stream only its columns are looked at, where they are known.
        args: a `trl.RLOOConfig`.
    """
    columns = getattr(rows, "column_names", None)
    if columns and "prompt" not in columns:
        raise InputError(f"train_dataset: must have a column 'prompt', got {', '.join(columns)}. Rename it.")
    if taken := {"prompts", "completions"}.intersection(columns or ()):
        raise InputError(
            f"train_dataset: must not have a column {min(taken)!r}, by which reward functions get the trainer's own. "
            "Rename or remove it."
        )
    if not hasattr(rows, "__len__"):
        return
    check_enough(len(rows), args)
    for index in range(min(FIRST, len(rows))):
        prompt = rows[index]["prompt"]
        talk = isinstance(prompt, list) and prompt and all(isinstance(one, Mapping) and "role" in one for one in prompt)
        if not (talk or isinstance(prompt, str)):
            raise InputError(
                f"train_dataset: must have prompts that are texts or messages with a role, got {prompt!r:.60} in row "
                f"{index + 1}. Drop or mend such rows."
            )


def check_text(rows: Sequence[Mapping[str, Any]], images: Any, fields: Mapping[str, Any]) -> None:
    """Raise InputError for prompts that have more than text, which an engine does not show the model.

    Args:
        rows: of one batch, with TRL's columns for images.
        images, fields: what TRL finds beside the tokens of their prompts.
    """
    empty: tuple[Any, ...] = (type(None), list)
    columns = [n for n in ("image", "images") if any(row.get(n) or not isinstance(row.get(n), empty) for row in rows)]
    others = sorted(fields.keys() - {"token_type_ids", "mm_token_type_ids"})  # text has these too
    if found := [*columns, *(["images in messages"] if images else others)]:
        raise InputError(
            f"train_dataset: must have prompts of text alone for ESTrainer, got {', '.join(found)}. Remove them, or use "
            "ZOPrOTrainer."
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
