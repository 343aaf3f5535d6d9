"""Loading: device, precision, base model, adapters, and a reward model over the base model's weights."""

from __future__ import annotations

import copy
import logging
import re
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from zopro.config.model import ModelOptions
from zopro.engine.local.products import multiplies_bfloat16
from zopro.engine.local.quantised import hide, quantised, share_modules
from zopro.errors import InputError, out_of_memory
from zopro.text.tokenizer import cannot_load

logger = logging.getLogger(__name__)

# Kernels of these read the weight itself, so that PEFT refuses an adapter there.
FUSED_OUT_PROJ = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_NAMES = re.compile(r"[\w.\-\s,]*")  # a comma-separated list of module names


def resolve_device(device: str) -> torch.device:
    """`auto` is the GPU if there is one. Raises InputError on a device that does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise InputError(f"device: must be auto, cpu, cuda or mps, got {device!r}.") from None
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if resolved.type not in ("cpu", "cuda") and (accelerator is None or resolved.type != accelerator.type):
        raise InputError(f"device: must be auto, cpu, cuda or mps, got {device!r}, which torch does not find here.")
    if resolved.type == "cuda" and resolved.index:
        raise InputError(
            f"device: must be the first GPU that is seen, which is the one that trainers use, got {device!r}. Set the "
            f"environment variable CUDA_VISIBLE_DEVICES={resolved.index} and device: cuda."
        )
    if resolved.type == "cuda" and not torch.cuda.device_count():
        raise InputError(f"device: must exist, got {device!r} with 0 GPUs. Use auto or cpu.")
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the hardware multiplies it (elsewhere it gains memory at best), else float32."""
    if dtype != "auto":
        return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[dtype]
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        fast = device.type == "cpu" and multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def context_of(model: Any) -> int | None:
    """Tokens that a model reads at most; None where it does not say."""
    config = model.config.get_text_config()
    said = (getattr(config, name, None) for name in ("max_position_embeddings", "max_seq_len"))  # the latter is MPT's
    return next(filter(None, said), None)


def load_base(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    stored: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """A causal language model in eval mode, from safetensors only.

    `stored` is what `zopro.engine.local.quantised.stored_in` gives.

    Raises:
        InputError: there is no such model, it is not a causal language model, or its files are damaged or incomplete.
    """
    try:
        loaded, info = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            output_loading_info=True,
            **(stored or {}),
        )
        hide(loaded)
        loaded = loaded if quantised(loaded) and loaded.device.type == device.type else loaded.to(device)
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        AttributeError,
        RuntimeError,
        ImportError,
        SafetensorError,
    ) as error:
        if out_of_memory(error):
            raise
        raise cannot_load("model", model, error) from error
    if info["missing_keys"]:
        raise InputError(f"model: the files of {model!r} lack {min(info['missing_keys'])!r}: incomplete.")
    if left_out := sorted(info["unexpected_keys"]):
        name = type(loaded).__name__
        logger.warning("model: %d tensors of its files have no place in %s: %s ...", len(left_out), name, left_out[0])
    return loaded.eval()


def sequence_classifier(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int) -> PreTrainedModel:
    """A one-output sequence classifier over the base model's own weights: only its score head takes memory.

    Modules and `requires_grad` are its own, so adapters on either model leave the other alone; the storage is shared,
    so training the base model's weights in place would change both.

    Args:
        base: a causal language model without adapters.
        tokenizer: gives the pad token; the score is read at the last token that is not padding.
        seed: of the head's normal initialisation (standard deviation: the model's own `initializer_range`).

    Raises:
        InputError: transformers has no sequence classifier for the architecture.
    """
    config = copy.deepcopy(base.config)
    config.num_labels = 1
    config.pad_token_id = tokenizer.pad_token_id
    try:
        with torch.device("meta"):
            classifier = AutoModelForSequenceClassification.from_config(
                config, dtype=base.dtype, attn_implementation=base.config._attn_implementation
            )
    except ValueError:
        name = type(base).__name__
        raise InputError(
            f"model: {name} has no sequence classification head in transformers, which the reward model needs. "
            "Choose another architecture."
        ) from None
    if quantised(base):
        share_modules(base, classifier)
    shared = dict(base.base_model.named_parameters(remove_duplicate=False))
    buffers = dict(base.base_model.named_buffers(remove_duplicate=False))
    for prefix, module in classifier.base_model.named_modules():
        for name, parameter in module.named_parameters(prefix, recurse=False):
            source = shared[name]
            if parameter is source:
                continue  # of a quantised module
            module.register_parameter(name.rpartition(".")[2], nn.Parameter(source.detach(), source.requires_grad))
            assert parameter.shape == source.shape, name
        for name, _ in module.named_buffers(prefix, recurse=False):
            module._buffers[name.rpartition(".")[2]] = buffers[name]
    generator = torch.Generator().manual_seed(seed)
    deviation = getattr(config.get_text_config(), "initializer_range", 0.02)
    for module in classifier.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and parameter.is_meta:  # the head: all that the base model does not have
                value = torch.zeros(parameter.shape)
                if value.dim() > 1:
                    value.normal_(std=deviation, generator=generator)
                module.register_parameter(name, nn.Parameter(value.to(base.device, _trained_dtype(base))))
    score: Any = getattr(classifier, "score", None)
    if score is not None and base.dtype == torch.float16:
        score.register_forward_pre_hook(_widen)
    return classifier.eval()


def _trained_dtype(base: PreTrainedModel) -> torch.dtype:
    """Of a head over the base: in float16 the squares that Adam keeps would be 0."""
    return torch.float32 if base.dtype == torch.float16 else base.dtype


def _widen(module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(value.float() for value in args)


def lora_config(options: ModelOptions, task_type: str, base: PreTrainedModel | None = None) -> LoraConfig:
    """PEFT's configuration of the adapters that `lora_r`, `lora_alpha` and `lora_target_modules` describe.

    Args:
        options: a RunConfig or its group of model options.
        task_type: "CAUSAL_LM", or "SEQ_CLS" for a reward model, whose `score` head is then trained and saved too.
        base: the model they are for, whose `out_proj` all-linear leaves out where PEFT takes no adapter there.

    Raises:
        InputError: `lora_r` is 0, which asks for full-parameter training.
    """
    if options.lora_r == 0:
        raise InputError("lora_r: must be greater than 0 for an adapter, got 0.")
    given = options.lora_target_modules
    listed = given != "all-linear" and _NAMES.fullmatch(given)  # else a regular expression, as in PEFT
    targets = [name.strip() for name in given.split(",") if name.strip()] if listed else given
    fused = base is not None and base.config.model_type in FUSED_OUT_PROJ
    return LoraConfig(
        task_type=task_type,
        r=options.lora_r,
        lora_alpha=options.lora_alpha,
        lora_dropout=0.0,
        exclude_modules=["out_proj"] if targets == "all-linear" and fused else None,
        target_modules=targets,
        modules_to_save=["score"] if task_type == "SEQ_CLS" else None,
    )
