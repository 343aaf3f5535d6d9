"""Which modules an adapter may be put on: checked by name before anything runs, and put there.

from zopro.engine.local.targets import new_adapter
policy = new_adapter(base, options, "CAUSAL_LM")
"""

from __future__ import annotations

import re
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import PreTrainedModel

from zopro.config.model import ModelOptions
from zopro.engine.local import models
from zopro.engine.local.quantised import shown
from zopro.errors import InputError, out_of_memory

SHOWN = 12  # names of modules in a message


def new_adapter(model: PreTrainedModel, options: ModelOptions, task_type: str) -> PeftModel:
    """`model` with a new adapter on it, as `models.lora_config` describes it.

    Raises:
        InputError: PEFT cannot put one there.
    """
    try:
        with shown(model):
            return get_peft_model(model, models.lora_config(options, task_type, model))
    except (ValueError, TypeError, AttributeError, RuntimeError, ImportError, re.error) as error:
        if out_of_memory(error) is not None:
            raise
        where = "" if task_type == "CAUSAL_LM" else " (in the reward model, which has no output head)"
        raise _refused(model, options.lora_target_modules, f"{_first(error)}{where}") from error


def check_targets(model: PreTrainedModel, options: ModelOptions) -> None:
    """Refuse target modules that the model does not have, or that cannot carry an adapter of the policy.

    Raises:
        InputError: a name (or the regular expression) fits no module; it fits the output head, whose weights the
            log-probabilities are computed from; or embeddings that the output head shares.
    """
    targets = models.lora_config(options, "CAUSAL_LM").target_modules
    if targets == "all-linear":
        return
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    for target in [targets] if isinstance(targets, str) else sorted(targets or ()):
        config = LoraConfig(target_modules=target if isinstance(targets, str) else [target])
        try:
            found = [module for name, module in model.named_modules() if check_target_module_exists(config, name)]
        except re.error as error:
            raise _refused(model, options.lora_target_modules, f"it is no regular expression ({error})") from None
        if not found:
            whole = ", which must match whole names such as 'model.layers.0.self_attn.q_proj'"
            kind = f"the regular expression {target!r}{whole}," if isinstance(targets, str) else repr(target)
            raise _refused(model, options.lora_target_modules, f"{kind} fits none of the model's")
        if any(module is head for module in found):
            reason = "the output head cannot carry one: log-probabilities are computed from its weights"
            raise _refused(model, options.lora_target_modules, reason)
        if any(module is embeddings for module in found) and tied(head, embeddings):
            reason = "the embeddings share their weights with the output head, which the adapter would not reach"
            raise _refused(model, options.lora_target_modules, reason)


def tied(head: nn.Module | None, embeddings: nn.Module) -> bool:
    return head is not None and getattr(head, "weight", None) is getattr(embeddings, "weight", False)


def _refused(model: nn.Module, given: str, reason: str) -> InputError:
    plain: Any = getattr(model, "get_base_model", lambda: model)()
    head = plain.get_output_embeddings() if hasattr(plain, "get_output_embeddings") else None
    linear = [
        name.split(".lora_")[0].removesuffix(".base_layer").rpartition(".")[2]
        for name, module in plain.named_modules()
        if getattr(getattr(module, "weight", None), "dim", int)() == 2 and module is not head
    ]
    names = list(dict.fromkeys(name for name in linear if name not in ("score", "classifier")))
    shown = ", ".join(names[:SHOWN]) + (" ..." if len(names) > SHOWN else "")
    return InputError(
        f"lora_target_modules: must be all-linear, names of linear layers or a regular expression for them, got "
        f"{given!r}: {reason}. There are: {shown}."
    )


def _first(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0].split(". ")[0].strip().rstrip(".(")
    return f"{line:.200}" or type(error).__name__
