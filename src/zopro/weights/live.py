"""A live model's tensors by the names that they have in its files, which PEFT itself knows for each kind of adapter."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from torch import Tensor

from zopro.errors import InputError
from zopro.weights.adapters import tensor_name


def saved_state(model: PeftModel, adapter: str) -> dict[str, Tensor]:
    """What PEFT saves of an adapter, by the names in its file; the model's own tensors, unless PEFT saves others."""
    whole = model.state_dict(keep_vars=True)
    state: dict[str, Tensor] = get_peft_model_state_dict(model, whole, adapter, save_embedding_layers=False)
    return state


def saved_names(model: Any) -> dict[str, str]:
    """Of each parameter: `tensor_name` of what a file has it by. Parameters of several adapters share theirs."""
    adapters = model.peft_config if isinstance(model, PeftModel) else ()
    saved = {id(tensor): name for adapter in adapters for name, tensor in saved_state(model, adapter).items()}
    return {name: tensor_name(saved.get(id(parameter), name)) for name, parameter in model.named_parameters()}


def variant_name(variant: object) -> str:
    """What PEFT calls a variant of LoRA, such as Dora, whichever module it is of."""
    return re.split("Linear|Embedding|Conv", type(variant).__name__)[0].removeprefix("_")


def by_saved_names(tensors: Mapping[str, Tensor] | None, model: Any, argument: str = "tensors") -> Mapping[str, Tensor]:
    """Tensors of a file or of the model, by the names of `saved_names`; a lazy mapping that has these stays lazy.

    Raises InputError: `argument`, which they are given as, holds something else. Values of a lazy mapping are not read.
    """
    if tensors is None:
        return {}
    named = isinstance(tensors, Mapping) and all(isinstance(name, str) for name in tensors)
    values = tensors.values() if named and isinstance(tensors, dict) else ()
    for wrong in [value for value in values if not isinstance(value, Tensor)] if named else [tensors]:
        raise InputError(
            f"{argument}: must hold tensors by name, got {wrong!r:.60} ({type(wrong).__name__}). Use "
            "peft.load_peft_weights(FOLDER)."
        )
    live = saved_names(model)
    names = {name: live.get(name, tensor_name(name)) for name in tensors}
    if all(name == plain for name, plain in names.items()):
        return tensors
    return {plain: tensors[name] for name, plain in names.items()}
