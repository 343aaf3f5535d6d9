"""Saved PEFT adapters as named tensors: where they are, how they are read, and one name for a tensor everywhere."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from zopro.errors import InputError

ADAPTER_FILE = "adapter_model.safetensors"


ADAPTER_CONFIG = "adapter_config.json"


_ADAPTER_NAME = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|modules_to_save)\.(?!weight$|bias$)\w+"
)


def tensor_name(name: str) -> str:
    """An adapter tensor's name in the model itself, whether it comes from a file or from a live PEFT model.

    >>> tensor_name("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    'model.layers.0.mlp.up_proj.lora_A.weight'
    >>> tensor_name("base_model.model.score.modules_to_save.default.weight")
    'score.weight'
    """
    name = _ADAPTER_NAME.sub(r".\1", name.removeprefix("base_model.model."))
    return name.replace(".modules_to_save.", ".")


def adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved PEFT adapter, on the CPU, by their names in the file.

    Raises:
        InputError: the file is missing, damaged, empty or has a value that is not finite.
    """
    path = Path(folder) / ADAPTER_FILE
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except FileNotFoundError:
        raise InputError(f"adapter: {str(path)!r} does not exist.") from None
    except (SafetensorError, OSError) as error:
        raise InputError(f"adapter: {str(path)!r} is damaged ({error}). Delete its folder and run again.") from error
    if not tensors:
        raise InputError(f"adapter: {str(path)!r} holds no tensor.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"adapter: {name} in {str(path)!r} is not finite; the training that wrote it diverged.")
    return tensors


def adapter_state(folder: str | Path) -> dict[str, Tensor]:
    """`adapter_tensors` by `tensor_name`; raises as it does."""
    return {tensor_name(name): tensor for name, tensor in adapter_tensors(folder).items()}
