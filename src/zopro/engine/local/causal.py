"""A causal language model as the two parts the engine runs: the backbone, and the head from hidden states to logits.

transformers' own forward always applies the head to a slice `[:, -n:, :]` of the hidden states, which on a CPU costs
more than the rest of the step when the slice is not contiguous (measured: 5.7 s against 0.1 s for 8 x 33 rows of a
262144-token vocabulary). Here the caller picks the rows, and the head sees a contiguous `[rows, hidden]`.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional

from zopro.engine.local import few_rows, lora
from zopro.engine.local.attention import of_any_shape
from zopro.engine.local.products import fast_products
from zopro.errors import InputError

STATES, KEYS_AND_VALUES = "cache_params", "past_key_values"  # names of a backbone's cache
LARGE_LOGIT = 50.0  # beyond any bound that architectures have

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@dataclass(frozen=True)
class Decoder:
    """A model and its backbone: what takes tokens to hidden states."""

    model: Any
    backbone: nn.Module

    @property
    def checkpoints(self) -> bool:
        """Whether a backward pass would run blocks again; transformers has renamed what it calls that."""
        names = ("is_activation_checkpointing", "is_gradient_checkpointing")
        asked = next((name for name in names if hasattr(type(self.model), name)), None)
        return self.model.training and asked is not None and bool(getattr(self.model, asked))

    @property
    def config(self) -> Any:
        """Configuration of the text model."""
        return self.model.config.get_text_config(decoder=True)

    @cached_property
    def takes_positions(self) -> bool:
        return "position_ids" in inspect.signature(type(self.backbone).forward).parameters

    @cached_property
    def cache_name(self) -> str:
        """What the backbone calls its cache; pure state-space models have a name of their own."""
        names = inspect.signature(type(self.backbone).forward).parameters
        return STATES if STATES in names and KEYS_AND_VALUES not in names else KEYS_AND_VALUES

    @cached_property
    def is_large(self) -> bool:
        return few_rows.concern(self.backbone)

    def hidden(self, input_ids: Tensor, attention_mask: Tensor | None, position_ids: Tensor, cache: Any) -> Tensor:
        """Last hidden states (B, T, H), after the final norm. `cache` is extended in place; None keeps nothing."""
        if attention_mask is not None and self.cache_name == STATES:  # which know what they have read, and no mask of it
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        given = {"position_ids": position_ids} if self.takes_positions else {}
        of, rows = (self.model.dtype, input_ids.device), input_ids.numel()
        products = fast_products(*of, rows if self.is_large else 0)
        with products, lora.fewer_passes(self.backbone, *of, rows), of_any_shape(input_ids.device):
            output = self.backbone(
                input_ids=input_ids,
                attention_mask=attention_mask,
                use_cache=cache is not None,
                **{self.cache_name: cache},
                **given,
            )
        return output.last_hidden_state


@dataclass(frozen=True)
class CausalParts(Decoder):
    """Backbone and head of one model; `scale` and `softcap` are what some architectures do to the head's output."""

    head: nn.Module
    scale: float
    softcap: float | None

    def output(self, hidden: Tensor, block: slice | None = None) -> Tensor:
        """The head's output (rows, V) of contiguous hidden states (rows, H), as it is.

        With `block`, its columns there alone, which takes a head that is one matrix.
        """
        with fast_products(hidden.dtype, hidden.device, len(hidden)):
            if block is None:
                output: Tensor = self.head(hidden)
            else:
                head: Any = self.head
                output = functional.linear(hidden, head.weight[block], None if head.bias is None else head.bias[block])
        return output

    def logits(self, hidden: Tensor, block: slice | None = None) -> Tensor:
        """fp32 logits (rows, V), or those in `block`, of contiguous hidden states (rows, H)."""
        logits = self.output(hidden, block).float()
        if self.scale != 1.0:
            logits = logits * self.scale
        if self.softcap is not None:
            logits = torch.tanh(logits / self.softcap) * self.softcap
        return logits


def causal_parts(model: Any) -> CausalParts:
    """Take a causal model apart; PEFT models (LoRA and the like), compiled ones and `module` wrappers are looked through.

    The first time a model is seen, head(backbone(x)) is compared with the model's own forward on two tokens, so that
    an architecture that treats its logits in a way not known here is refused instead of trained on wrong numbers.

    Raises:
        InputError: the model is not a decoder with an output matrix, has prompt-learning adapters, or fails the check.
    """
    if torch.is_grad_enabled() and isinstance(model, nn.parallel.DistributedDataParallel):
        raise InputError("model: DistributedDataParallel synchronises gradients in its own forward; pass its .module.")
    model = getattr(model, "module", model)
    model = getattr(model, "_orig_mod", model)  # of torch.compile; the engine runs what was written
    if isinstance(model, PeftModel):
        if model.active_peft_config.is_prompt_learning:
            raise InputError("model: prompt-learning adapters are not supported, use LoRA or another weight adapter.")
        model = model.get_base_model()
    name = type(model).__name__
    head = model.get_output_embeddings()
    if model.config.is_encoder_decoder or head is None:
        raise InputError(f"model: must be a decoder-only causal language model, got {name}.")
    config = model.config.get_text_config(decoder=True)
    parts = CausalParts(
        model=model,
        backbone=_backbone(model),
        head=head,
        scale=_logit_scale(config),
        softcap=_softcap(config),
    )
    if model not in _checked:
        with refusing(model):
            _check(parts)
        _checked.add(model)
    return parts


def _backbone(model: Any) -> nn.Module:
    found: nn.Module
    for found in (model.base_model, model.get_decoder(), getattr(model, "model", model)):
        if found is not model:
            return found
    raise InputError(f"model: {type(model).__name__} has no backbone apart from its head; choose another architecture.")


def _softcap(config: Any) -> float | None:
    """The bound of the logits; its name differs between architectures."""
    for name in ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    return None


def _logit_scale(config: Any) -> float:
    """The factor on the head's output; its name differs between architectures (list: TRL's `add_fused_lm_head`)."""
    for name in ("logit_scale", "output_multiplier", "lm_head_multiplier"):
        if getattr(config, name, None) is not None:
            return float(getattr(config, name))
    scaling = getattr(config, "logits_scaling", None)
    if scaling is None:
        return 1.0
    return float(scaling) if config.model_type == "hyperclovax" else 1.0 / scaling


@torch.no_grad()
def _check(parts: CausalParts) -> None:
    ids = torch.arange(2, device=parts.model.get_input_embeddings().weight.device)[None]
    mask = torch.ones_like(ids)

    def logits() -> tuple[Tensor, Tensor]:
        expected = parts.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[0].float()
        return expected, parts.logits(parts.hidden(ids, mask, ids, None)[0])

    plain = torch.autocast(ids.device.type, enabled=False)
    with evaluating(parts.model), without_wrapping(parts.model), fast_products(parts.model.dtype, ids.device), plain:
        pairs = [logits()]
        gain = LARGE_LOGIT / pairs[0][0].abs().max().clamp(min=1e-6)  # small logits would hide what bounds large ones
        hook = parts.head.register_forward_hook(lambda head, args, output: output * gain)
        try:
            pairs.append(logits())
        finally:
            hook.remove()
    if not pairs[0][0].isfinite().all():
        raise InputError(f"model: its logits are not finite; {why_not_finite(parts.model.dtype)}.")
    exact = parts.model.dtype in (torch.float32, torch.float64)
    for expected, found in pairs:
        error = (found - expected).abs().max() / expected.abs().max().clamp(min=1e-6)
        if error > (1e-3 if exact else 2e-2):  # bf16 rounding of the logits stays below 2^-7
            name = type(parts.model).__name__
            raise InputError(f"model: {name} changes its logits in a way the engine does not know.")


def why_not_finite(dtype: torch.dtype, otherwise: str = "the weights are damaged or training diverged") -> str:
    """What may have made a model's numbers infinite, in words."""
    if dtype == torch.float16:
        return "float16 ends at 65504, which many models exceed. Set dtype: bfloat16 or float32"
    return otherwise


@contextmanager
def refusing(model: nn.Module) -> Iterator[None]:
    """Turn whatever an architecture's code raises, when it is first run as the engine runs it, into one line."""
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = next(iter(str(error).splitlines()), "")
        raise InputError(
            f"model: {type(model).__name__} does not run as a causal language model here ({type(error).__name__}: "
            f"{reason}). Choose another architecture or dtype."
        ) from error


@contextmanager
def without_wrapping(model: Any) -> Iterator[None]:
    """A model's own forward in place of accelerate's around it, whose autocast no other one switches off."""
    original, wrapped = vars(model).get("_original_forward"), vars(model).get("forward")
    if original is None or wrapped is None:
        yield
        return
    model.forward = original
    try:
        yield
    finally:
        model.forward = wrapped


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Dropout and gradient checkpointing off, and afterwards every submodule in the mode it was in."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def positions(attention_mask: Tensor) -> Tensor:
    """Position ids (B, T) that count real tokens only, as `generate` counts them under left padding."""
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)
