"""Models whose weights are stored in a few bits (bitsandbytes, GPTQ, ...): frozen, under adapters in float32.

PEFT must see how the weights are stored when it puts an adapter on them. TRL must not: it would turn the adapters to
bfloat16, in which the steps of an optimiser are lost.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from zopro.config.model import ModelOptions, check_bitsandbytes
from zopro.errors import InputError

_FLAGS = ("is_loaded_in_4bit", "is_loaded_in_8bit")
_KEPT = "_zopro_stored_in"


def stored_in(options: ModelOptions, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """What `from_pretrained` is given for `load_in_4bit` (NF4, as QLoRA has it) or `load_in_8bit`; {} without either.

    Raises:
        InputError: bitsandbytes is not installed, or the model's files are quantised already.
    """
    if not options.bits:
        return {}
    check_bitsandbytes(options)
    try:
        files = PreTrainedConfig.get_config_dict(options.model)[0]
    except OSError:
        files = {}  # whoever loads the model says what is wrong with its name
    if "quantization_config" in files:
        raise InputError(
            f"load_in_{options.bits}bit: must not be given, the weights of {options.model!r} are quantised already. "
            "Leave it out."
        )
    settings = BitsAndBytesConfig(
        load_in_4bit=options.bits == 4,
        load_in_8bit=options.bits == 8,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return {"quantization_config": settings, "device_map": {"": device}}


def quantised(model: nn.Module) -> bool:
    """Whether the model's weights are stored in fewer bits than they are computed in."""
    return getattr(model, "hf_quantizer", None) is not None or bool(getattr(model, _KEPT, ()))


def hide(model: PreTrainedModel) -> None:
    """Make a loaded model ready: the libraries do not see how its weights are stored, except inside `shown`."""
    for module in model.modules():
        # bitsandbytes packs 4-bit weights anew at the first inference on some CPUs; no gradient passes what it packed.
        if getattr(module, "support_avx512bf16_for_cpu", False):
            module.support_avx512bf16_for_cpu = False
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # it tells of a cast at each product
    kept = [flag for flag in _FLAGS if getattr(model, flag, False)]
    setattr(model, _KEPT, kept)
    for flag in kept:
        setattr(model, flag, False)


@contextmanager
def shown(model: Any) -> Iterator[None]:
    """Inside, the libraries see how the weights are stored."""
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    flags = getattr(plain, _KEPT, [])
    for flag in flags:
        setattr(plain, flag, True)
    try:
        yield
    finally:
        for flag in flags:
            setattr(plain, flag, False)


def trained_tensors(model: Any) -> dict[str, Tensor]:
    """What is trained of a model, by name; nothing of the name of one."""
    named = model.named_parameters() if isinstance(model, nn.Module) else ()
    return {name: parameter.data for name, parameter in named if parameter.requires_grad}


def undo_rounding(model: nn.Module, given: dict[str, Tensor]) -> None:
    """Have adapters over quantised weights as `given`, where TRL has turned them to bfloat16, and new ones in float32."""
    if not quantised(model):
        return
    for name, tensor in trained_tensors(model).items():
        if tensor.dtype == torch.bfloat16:
            model.get_parameter(name).data = given.get(name, tensor.float())


def check_trainable(model: PreTrainedModel, lora_r: int) -> None:
    """Raise InputError where no adapter can be trained over the model's quantised weights."""
    if not quantised(model):
        return
    quantizer: Any = model.hf_quantizer
    method = getattr(quantizer.quantization_config, "quant_method", type(quantizer).__name__)
    name = str(getattr(method, "value", method))
    if lora_r == 0:
        raise InputError(f"lora_r: must be greater than 0 over weights quantised by {name}, which cannot move, got 0.")
    if not quantizer.is_trainable:
        raise InputError(
            f"model: its weights are quantised by {name}, over which transformers trains nothing, not even an adapter. "
            "Give the model before quantisation, or one quantised by bitsandbytes."
        )


def share_modules(base: PreTrainedModel, other: PreTrainedModel) -> None:
    """Put the quantised modules of `base` in their places in `other`, of the same backbone: copies that share weights."""
    modules, places = dict(base.base_model.named_modules()), other.base_model
    for name, module in list(places.named_modules()):
        source = modules[name]
        if type(source) is not type(module):
            shared = copy.copy(source)
            shared.__dict__ |= {key: dict(source.__dict__[key]) for key in ("_parameters", "_buffers", "_modules")}
            places.set_submodule(name, shared)
    setattr(other, _KEPT, getattr(base, _KEPT))
