"""Saved adapters and models as named tensors: where they are, one name for a tensor everywhere, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

from torch import Tensor

from zopro.errors import InputError
from zopro.weights.names import ADAPTER_FILE, MODEL_FILES, MODEL_INDEX
from zopro.weights.tensors import read_whole, tensor_names

_ADAPTER_NAME = re.compile(
    r"\.(lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector|trainable_tokens_delta|modules_to_save)\.(?!weight$|bias$)[^.]+"
)
_MAGNITUDE = ".lora_magnitude_vector"  # whose last word, "weight", PEFT leaves out of its files


def tensor_name(name: str) -> str:
    """An adapter tensor's name in the model itself, whether it comes from a file or from a live PEFT model.

    >>> tensor_name("base_model.model.model.layers.0.mlp.up_proj.lora_A.default.weight")
    'model.layers.0.mlp.up_proj.lora_A.weight'
    >>> tensor_name("base_model.model.score.modules_to_save.my-head.weight")
    'score.weight'
    >>> tensor_name("base_model.model.model.layers.0.mlp.up_proj.lora_magnitude_vector.default.weight")
    'model.layers.0.mlp.up_proj.lora_magnitude_vector'
    """
    name = _ADAPTER_NAME.sub(r".\1", name.removeprefix("base_model.model."))
    return name.replace(".modules_to_save.", ".").replace(f"{_MAGNITUDE}.weight", _MAGNITUDE)


def weight_name(name: str) -> str:
    """`tensor_name`, also of the weights that PEFT wraps: the name they have in the model without adapters.

    >>> weight_name("base_model.model.model.layers.0.mlp.up_proj.base_layer.weight")
    'model.layers.0.mlp.up_proj.weight'
    """
    return tensor_name(name).replace(".base_layer.", ".")


def weight_files(folder: Path) -> list[Path]:
    """The file of a saved adapter, or else those of a saved model; none where there is neither.

    Raises `InputError`: the model's index of its files cannot be read.
    """
    adapter = folder / ADAPTER_FILE
    return [adapter] if adapter.is_file() else model_files(folder)


def model_files(folder: Path) -> list[Path]:
    """The files of a saved model: those of its index where it has one. Raises as `weight_files`."""
    index = folder / MODEL_INDEX
    if not index.is_file():
        return sorted(folder.glob(MODEL_FILES))
    try:
        names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        return [folder / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index}: must be an index of safetensors files, got one that cannot be read.") from None


def tensor_files(folder: Path) -> dict[str, Path]:
    """Which file of a saved adapter or model holds each tensor. Raises InputError: no such file, or a damaged one."""
    files = weight_files(folder)
    if not files:
        raise InputError(f"{folder}: must hold {ADAPTER_FILE} or {MODEL_FILES} files, got none.")
    return {name: file for file in files for name in tensor_names(file)}


def adapter_tensors(folder: str | Path) -> dict[str, Tensor]:
    """The tensors of a saved PEFT adapter, on the CPU, by their names in the file.

    Raises:
        InputError: the file is missing, damaged, empty or has a value that is not finite.
    """
    path = Path(folder) / ADAPTER_FILE
    tensors = read_whole(path, _damage)
    if not tensors:
        raise InputError(f"adapter: {str(path)!r} holds no tensor.")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise InputError(f"adapter: {name} in {str(path)!r} is not finite; the training that wrote it diverged.")
    return tensors


def _damage(file: Path, error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return f"adapter: {str(file)!r} does not exist."
    return f"adapter: {str(file)!r} is damaged ({error}). Delete its folder and run again."


def adapter_state(folder: str | Path) -> dict[str, Tensor]:
    """`adapter_tensors` by `tensor_name`; raises as it does."""
    return {tensor_name(name): tensor for name, tensor in adapter_tensors(folder).items()}
