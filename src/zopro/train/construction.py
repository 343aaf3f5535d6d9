"""What must hold before an online trainer is made: one line for each thing that would fail later, or not at all."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainingArguments

from zopro.config.fields import LONGEST, check
from zopro.errors import Diverged, InputError, nearest
from zopro.train.arguments import check_kinds, finite
from zopro.weights.adapters import tensor_name
from zopro.weights.live import by_saved_names, saved_names, saved_state, variant_name
from zopro.weights.names import ADAPTER_CONFIG
from zopro.weights.saving import LARGEST_WEIGHT
from zopro.zo import SPSA
from zopro.zo.groups import number

ADAPTER = "default"  # the only adapter that TRL trains
REFERENCE = "ref"  # TRL's name for the adapter of the reference policy


def trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """The trainable parameters, by their names without PEFT's wrapping, unless several adapters have tensors of one name.

    Raises InputError where there is none.
    """
    plain = saved_names(model)
    full = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    seen = Counter(plain[name] for name, _ in full)
    named = [(name if seen[plain[name]] > 1 else plain[name], p) for name, p in full]
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
            f"args: must be {config_cls.__name__}(...), with the options of this trainer, got {type(given).__name__}."
        )
    check_kinds(given)
    if not 0 <= number(given.learning_rate) < math.inf:
        raise InputError(f"learning_rate: must be a finite number and must not be negative, got {given.learning_rate!r}.")
    within = getattr(given, "reward_clip_range", None) or (0, 0)
    two = isinstance(within, (list, tuple)) and len(within) == 2
    if not two or not number(within[0]) <= number(within[1]):
        raise InputError(
            f"reward_clip_range: must be two numbers, the lower one first, got {within!r}. Give (-10, 10), say, or leave "
            "it out."
        )
    return given


REFUSED = {
    "ADALORA": "AdaLoRA changes its ranks by the gradients of a loss of its own, which is not part of this trainer's",
    "POLY": "Poly chooses its adapters by task ids, which the rows do not have",
    "XLORA": "X-LoRA runs the model twice, in a forward pass of its own",
}
"""Kinds of adapters that no trainer on the engine can drive, and why."""
TAKEN_OUT = ("pissa", "corda", "olora", "loftq", "lora_ga")
"""Beginnings of LoRA that are taken out of the base's own weights, for each adapter that is made once more."""


def check_model(model: Any, beta: float, processing_class: Any, peft_config: Any) -> None:
    """Raise InputError for what gives no answers, adapters that cannot be driven, and where TRL would find no reference
    policy or tokenizer.

    TRL trains and saves the adapter "default", and copies it to "ref".

    Args:
        model: a model, or the name of one, which is not looked at.
        beta: weight of the divergence from the reference policy.
        peft_config: of the adapter that TRL is to make.
    """
    if not (isinstance(model, str) or hasattr(model, "generation_config")):
        raise InputError(
            f"model: must be a causal language model of transformers, or the name or folder of one as text, got "
            f"{type(model).__name__}. Load it with AutoModelForCausalLM, or pass str(PATH)."
        )
    if isinstance(model, str) and (Path(model) / ADAPTER_CONFIG).exists() and not (Path(model) / "config.json").exists():
        raise InputError(
            f"model: must be the name or folder of a whole model where it is a text, got an adapter's, {model}. Load it "
            "with AutoPeftModelForCausalLM.from_pretrained(FOLDER, is_trainable=True)."
        )
    if peft_config is not None and not isinstance(peft_config, PeftConfig):
        kind = type(peft_config).__name__
        raise InputError(f"peft_config: must be a peft.PeftConfig, got {kind}. Use peft.LoraConfig(...).")
    if isinstance(model, PeftModel):
        _check_names(model)
    saved = [*getattr(model, "peft_config", {}).values()]
    for adapter in [*saved, *([peft_config] if peft_config is not None else [])]:
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        why = REFUSED.get(kind)
        if adapter.is_prompt_learning:
            why = f"{kind} learns a prompt, which the engine does not take"
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
        begins = getattr(adapter, "init_lora_weights", None)
        if str(begins).lower().startswith(TAKEN_OUT) and (saved or beta):
            raise InputError(
                f"model: must have adapters that leave their base as it is, since the reference policy is made on it, "
                f"got init_lora_weights={begins!r}. Use a new adapter with init_lora_weights=True."
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


def _check_names(model: PeftModel) -> None:
    names, active = [*model.peft_config], model.active_adapters
    if ADAPTER not in names:
        raise InputError(
            f"model: must have its adapter under the name {ADAPTER!r}, got {', '.join(map(repr, names))}. Give "
            f"get_peft_model or PeftModel.from_pretrained adapter_name={ADAPTER!r}."
        )
    if active != [ADAPTER]:
        raise InputError(
            f"model: must have the adapter {ADAPTER!r} active, and no other, got {', '.join(map(repr, active))}. Call "
            f"model.set_adapter({ADAPTER!r})."
        )
    if REFERENCE in names:
        raise InputError(
            f"model: must have no adapter {REFERENCE!r}, which becomes the reference policy's, got one. Call "
            f"model.delete_adapter({REFERENCE!r})."
        )


def freeze_reference(model: nn.Module, reference: Mapping[str, Tensor] | None, beta: float) -> None:
    """Freeze the reference policy's adapter, and put `reference`, or what training starts from, in its place.

    Raises:
        InputError: `reference` is given, and the model has no such adapter.
        ValueError: `reference` has other names or shapes than that adapter.
        InputError: `beta` is above 0, and PEFT keeps no second adapter of this kind beside the one that is trained.
    """
    own = [parameter for name, parameter in model.named_parameters() if f".{REFERENCE}." in f"{name}."]
    for parameter in own:
        parameter.requires_grad_(False)
    if beta and REFERENCE in getattr(model, "peft_config", {}) and not own:
        raise InputError(
            f"beta: must be 0 for adapters of the kind {adapter_kind(model)}, of which a model holds no second one, for "
            f"the reference policy, got {beta}. Use LoRA."
        )
    if reference is not None and not own:
        raise InputError(
            f"reference: must be left out where the model has no second adapter for it, got {len(reference)} tensors. "
            "Pass a PEFT model, as AutoPeftModelForCausalLM loads it, in place of peft_config."
        )
    start = saved_state(model, ADAPTER) if own else {}  # TRL overlooks what has no ".default." in its name
    if reference is not None:
        given = by_saved_names(reference, model, "reference")
        ours, theirs = ({tensor_name(n): (*t.shape,) for n, t in tensors.items()} for tensors in (start, given))
        if wrong := sorted(name for name, _ in ours.items() ^ theirs.items()):
            raise ValueError(
                f"reference: must have the policy's adapter tensors in their shapes, got {theirs.get(wrong[0])} for "
                f"{wrong[0]!r}, where the policy has {ours.get(wrong[0])}."
            )
        start = {name: given[tensor_name(name)] for name in start}
    if start:
        set_peft_model_state_dict(model, start, REFERENCE)


def check_rewards(reward_funcs: Any, processing: Any = None, timeout: Any = 0.0) -> list[Any]:
    """The reward functions as a list, which TRL wants.

    Args:
        processing: tokenizers of reward models; those of transformers that were loaded from a folder find their own.
        timeout: seconds for one call of a function; 0, or None: no limit.

    Raises:
        InputError: one that is neither a function, the name of a classifier nor a network that TRL can call; or a time
            limit that is none.
    """
    bounded = finite(timeout or 0) and 0 <= (timeout or 0) <= LONGEST
    check(bounded, "reward_timeout", f"must be a number of seconds from 0 to {LONGEST:g}", timeout, "0: no limit.")
    functions = [*reward_funcs] if isinstance(reward_funcs, (list, tuple)) else [reward_funcs]
    tokenizers = processing if isinstance(processing, list) else [processing] * len(functions)
    if not functions:
        raise InputError("reward_funcs: must have at least one function, got none.")
    for function, tokenizer in zip(functions, tokenizers, strict=False):
        name, config = type(function).__name__, getattr(function, "config", None)
        if not (callable(function) or isinstance(function, str)):
            raise InputError(f"reward_funcs: must be functions or names of classifiers, got {function!r:.60} ({name}).")
        if not isinstance(function, nn.Module):
            continue
        if config is None:
            raise InputError(f"reward_funcs: must have networks of transformers, got {name}. Call it in a function.")
        if tokenizer is None and not (isinstance(function, PreTrainedModel) and config._name_or_path):
            raise InputError(f"reward_processing_classes: must have the tokenizer of {name}, got None. Pass it.")
    return functions


def named_apart(names: Iterable[str]) -> list[str]:
    """Names of which a later one that was there before has a number, so that each has its own column of a log.

    >>> named_apart(["exact", "<lambda>", "<lambda>", "<lambda>_2"])
    ['exact', '<lambda>', '<lambda>_2', '<lambda>_2_2']
    """
    found: dict[str, None] = {}
    for name in names:
        numbered = (f"{name}_{number}" for number in itertools.count(2))
        found[name if name not in found else next(other for other in numbered if other not in found)] = None
    return [*found]


def check_options(given: Mapping[str, Any]) -> None:
    """Raise InputError for what are no options of SPSA, beside parameters and learning rate, which a trainer gives it."""
    known = [name for name in inspect.signature(SPSA).parameters if name not in ("params", "lr")]
    for name in given:
        if name not in known:
            remedy = " Set learning_rate in the trainer's args." if name == "lr" else nearest(name, known)
            raise InputError(f"spsa_options: must be of {', '.join(known)}, got {name!r}.{remedy}")


def adapter_kind(model: nn.Module) -> str:
    """LORA for plain LoRA, the name of another kind or of a variant of LoRA, or an empty string without adapters."""
    for adapter in getattr(model, "peft_config", {}).values():
        variants = [v for module in model.modules() for v in getattr(module, "lora_variant", {}).values()]
        kind = getattr(adapter.peft_type, "value", adapter.peft_type)
        return variant_name(variants[0]) if variants else str(kind)
    return ""


def check_weights(parameters: Iterable[Tensor], rate: float, step: int) -> None:
    """Raise Diverged where training has left weights that are not finite, or beyond all use."""
    held = [parameter.detach() for parameter in parameters if parameter.numel()]
    largest = float(torch.nn.utils.get_total_norm(held, math.inf)) if held else 0.0
    if not largest < LARGEST_WEIGHT:
        raise Diverged(f"weights are {largest:.2g} after step {step}", rate)
