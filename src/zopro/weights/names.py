"""What the files of saved adapters and models are called."""

from __future__ import annotations

from pathlib import Path

ADAPTER_FILE = "adapter_model.safetensors"
ADAPTER_CONFIG = "adapter_config.json"
MODEL_FILE, MODEL_FILES = "model.safetensors", "model*.safetensors"
MODEL_INDEX = "model.safetensors.index.json"


def has_weights(folder: Path) -> bool:
    """Whether an adapter or a model is saved in `folder`."""
    return any((folder / name).is_file() for name in (ADAPTER_FILE, MODEL_FILE, MODEL_INDEX))


def is_adapter(folder: Path) -> bool:
    return (folder / ADAPTER_CONFIG).is_file()
