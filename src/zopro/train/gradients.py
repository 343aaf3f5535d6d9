"""Options of training arguments that only a backward pass has a use for."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import fields
from typing import Any

from transformers import TrainingArguments

logger = logging.getLogger(__name__)

SAVES_ACTIVATIONS = ("activation_checkpointing", "activation_offloading", "gradient_checkpointing")
OF_GRADIENTS = (
    "optim",
    "optim_args",
    "optim_target_modules",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
)


def arguments_in(given: Iterable[Any]) -> TrainingArguments | None:
    """The training arguments among those of a trainer."""
    return next((value for value in given if isinstance(value, TrainingArguments)), None)


def without_checkpointing(args: Any) -> None:
    """Switch off what saves activations: few are kept anyway."""
    for name in SAVES_ACTIVATIONS:
        if getattr(args, name, False):
            setattr(args, name, False)


def without_backward(args: Any) -> None:
    """The same, and say which other options have no effect; these get their defaults.

    Some optimisers of `optim` would take their step inside of `backward`.
    """
    without_checkpointing(args)
    defaults = {field.name: field.default for field in fields(args) if field.name in OF_GRADIENTS} if args else {}
    given = [name for name in OF_GRADIENTS if name in defaults and getattr(args, name) != defaults[name]]
    for name in given:
        setattr(args, name, defaults[name])
    if given:
        logger.warning(
            "%s: without effect, since a zeroth-order step has no gradient; its size is `learning_rate`'s",
            ", ".join(given),
        )
