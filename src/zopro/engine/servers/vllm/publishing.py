"""Adapters as folders that a server reads: each version appears whole, under a name that was never used before.

with Published(folder) as published:
    path = published.write(tensors, alpha=16.0)      # folder/zopro-1f3a..., as PEFT writes it
"""

from __future__ import annotations

import json
import shutil
import tempfile
import uuid
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from zopro.engine.servers.adapters import shared_folder
from zopro.store.durable import whole_folder
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE
from zopro.weights.saving import save_tensors


class Published:
    """Where adapters are written; a context, at whose end they are gone.

    Args:
        folder: one that this process and the servers see by the same path; "": shared memory.
    """

    def __init__(self, folder: str = "") -> None:
        self._parent = Path(folder) if folder else shared_folder() or Path(tempfile.gettempdir())
        self._made: list[Path] = []

    def __enter__(self) -> Published:
        return self

    def __exit__(self, *error: object) -> None:
        for path in self._made:
            shutil.rmtree(path, ignore_errors=True)
        self._made.clear()

    def write(self, tensors: Mapping[str, Tensor], alpha: float) -> Path:
        """A PEFT adapter of A and B by plain names; its folder's name is the adapter's.

        The name is random: servers keep prompts and adapters by it, and other runs may share the server.
        Raises InputError: the folder cannot be written. Diverged: a tensor is not finite.
        """
        path = (self._parent / f"zopro-{uuid.uuid4().hex}").absolute()
        files = {f"base_model.model.{name}": tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
        modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "bias": "none",
            "r": next(tensor.shape[0] for name, tensor in tensors.items() if ".lora_A." in name), "lora_alpha": alpha,
            "lora_dropout": 0.0, "inference_mode": True, "fan_in_fan_out": False, "target_modules": modules,
        }  # fmt: skip
        with whole_folder(path) as partial:
            save_tensors(files, partial / ADAPTER_FILE)
            (partial / ADAPTER_CONFIG).write_text(json.dumps(settings), "utf-8")
        self._made.append(path)
        return path
