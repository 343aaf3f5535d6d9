"""Saved adapters: read from safetensors only, refused by name where they are damaged, foreign or not finite.

from zopro.engine.local.adapters import open_adapter
model = open_adapter(base, "RUN/policy/002")
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from zopro.engine.local.quantised import shown
from zopro.errors import InputError
from zopro.weights.adapters import adapter_state, tensor_name
from zopro.weights.names import ADAPTER_CONFIG

BASE_LAYER = ".base_layer."  # in names, where PEFT saves a layer below its adapter too


def open_adapter(base: Any, folder: str | Path, name: str = "default", trainable: bool = False) -> PeftModel:
    """`base`, or the PEFT model that it is already, with the saved adapter in it under `name`.

    PEFT itself takes a pickle where there is no safetensors file, and fills up what a file lacks with new weights.

    Raises:
        InputError: the adapter is missing, damaged, not finite, no LoRA, or was made for another model.
    """
    saved, path = adapter_state(folder), Path(folder) / ADAPTER_CONFIG
    try:
        kind = json.loads(path.read_text("utf-8"))["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"adapter: {str(path)!r} cannot be read ({_line(error)}).") from None
    if kind != "LORA":
        raise InputError(f"adapter: {str(path)!r} must be of the type LORA, got {kind!r}.")
    saved = {key: tensor for key, tensor in saved.items() if not _of_base(base, folder, key, tensor)}
    try:
        with shown(base):
            if isinstance(base, PeftModel):
                base.load_adapter(str(folder), adapter_name=name, is_trainable=trainable)
                model = base
            else:
                model = PeftModel.from_pretrained(base, str(folder), adapter_name=name, is_trainable=trainable)
    except (RuntimeError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise _foreign(folder, _line(error)) from error
    live = {tensor_name(key) for key, _ in model.named_parameters() if f".{name}." in f"{key}."}
    if unmatched := sorted(live ^ saved.keys()):
        where = "is not in the model" if unmatched[0] in saved else "is not in the file"
        raise _foreign(folder, f"{unmatched[0]} {where}")
    return model


def _of_base(base: Any, folder: str | Path, key: str, tensor: Tensor) -> bool:
    """Whether PEFT saved the weight of the layer below an adapter with it, as it does of embeddings and output heads.

    Raises InputError: it is another weight than the model's, in whose place PEFT would put it.
    """
    if BASE_LAYER not in key:
        return False
    try:
        weight = base.get_parameter(key.replace(BASE_LAYER, "."))
    except AttributeError:
        return False
    there = weight.detach().cpu()
    if tensor.dtype != weight.dtype and tensor.shape == there.shape and torch.equal(there.to(tensor.dtype), tensor):
        raise _foreign(
            folder,
            f"{key} is saved in {tensor.dtype}, not {weight.dtype}. Set dtype, or save it with "
            "save_embedding_layers=False",
        )
    if there.shape != tensor.shape or not torch.equal(there, tensor.to(weight.dtype)):
        raise _foreign(folder, f"{key} is another weight than the model's. Save it with save_embedding_layers=False")
    return True


def _foreign(folder: str | Path, why: str) -> InputError:
    return InputError(f"adapter: '{folder}' must be an adapter of this model, but {why}.")


def _line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch names the first tensor in the second line
    return f"{type(error).__name__}: {' '.join(lines[:2]):.200}".rstrip(".")
