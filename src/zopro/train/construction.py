"""What must hold before an online trainer is made: one line for each thing that would fail later, or not at all."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainingArguments

from zopro.errors import Diverged, InputError
from zopro.weights.adapters import tensor_name

LARGEST_WEIGHT = 1e6  # no language model has one near it


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters, by their names without PEFT's wrapping. Raises InputError where there is none."""
    named = [(tensor_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    if not named:
        remedy = " Load the adapter with is_trainable=True." if hasattr(model, "peft_config") else ""
        raise InputError(f"model: has no parameter with requires_grad=True, so there is nothing to train.{remedy}")
    return named


def arguments(given: Any, config_cls: type[TrainingArguments]) -> Any:
    """`given`, or the defaults of the trainer's configuration. Raises InputError for others."""
    if given is None:
        return config_cls(bf16=False)  # TRL's own default asks for a GPU
    if not isinstance(given, config_cls):
        raise InputError(
            f"args: must be a {config_cls.__name__}, which has the options of this trainer, got {type(given).__name__}."
        )
    if not 0 <= given.learning_rate < math.inf:
        raise InputError(f"learning_rate: must be finite and must not be negative, got {given.learning_rate:g}.")
    return given


REFUSED = {
    "ADALORA": "AdaLoRA changes its ranks by the gradients of a loss of its own, which is not part of this trainer's",
    "POLY": "Poly chooses its adapters by task ids, which the rows do not have",
    "XLORA": "X-LoRA runs the model twice, in a forward pass of its own",
}
"""Kinds of adapters that no trainer on the engine can drive, and why."""


def check_model(model: Any, beta: float, processing_class: Any, peft_config: Any) -> None:
    """Raise InputError for adapters that cannot be driven, and where TRL would find no reference policy or tokenizer.

    Args:
        model: a model, or the name of one, which is not looked at.
        beta: weight of the divergence from the reference policy.
        peft_config: of the adapter that TRL is to make.
    """
    saved = [*getattr(model, "peft_config", {}).values()]
    for adapter in [*saved, *([peft_config] if peft_config is not None else [])]:
        why = REFUSED.get(getattr(adapter.peft_type, "value", adapter.peft_type))
        if getattr(adapter, "alora_invocation_tokens", None):
            why = "activated LoRA is switched on by tokens, in a forward pass of its own"
        if why:
            raise InputError(f"model: must have adapters that this trainer can drive: {why}. Use LoRA.")
        bias = getattr(adapter, "bias", None) or "none"
        if str(bias).lower() != "none" and (saved or beta):
            raise InputError(
                f"model: must have adapters without biases, since the reference policy is the same base without them, "
                f"got bias={bias!r}. Use bias='none'."
            )
    if isinstance(model, str) or getattr(model.config, "_name_or_path", None):
        return
    if processing_class is None:
        raise InputError("processing_class: must be given for a model that was loaded from no folder, got None.")
    if beta and not saved and peft_config is None:
        raise InputError(
            f"beta: must be 0 for a model that was loaded from no folder, since its reference policy is loaded from "
            f"there, got {beta}. Save it and load it, or train an adapter."
        )


def adapter_kind(model: nn.Module) -> str:
    """LORA for plain LoRA, the name of another kind or of a variant of LoRA, or an empty string without adapters."""
    for adapter in getattr(model, "peft_config", {}).values():
        variants = [v for module in model.modules() for v in getattr(module, "lora_variant", {}).values()]
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        return type(variants[0]).__name__ if variants else str(kind)
    return ""


def check_weights(parameters: Iterable[Tensor], rate: float, step: int) -> None:
    """Raise Diverged where training has left weights that are not finite, or beyond all use."""
    held = [parameter.detach() for parameter in parameters if parameter.numel()]
    largest = float(torch.nn.utils.get_total_norm(held, math.inf)) if held else 0.0
    if not largest < LARGEST_WEIGHT:
        raise Diverged(f"weights are {largest:.2g} after step {step}", rate)
