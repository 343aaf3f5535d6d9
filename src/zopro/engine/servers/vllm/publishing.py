"""Adapters as folders that a server reads: each version appears whole, under a name that was never used before.

with Published(folder) as published:
    path = published.write(tensors, alpha=16.0)      # folder/zopro-1f3a..., as PEFT writes it
"""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
import time
import uuid
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from zopro.engine.servers.adapters import shared_folder
from zopro.store.durable import whole_folder
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE
from zopro.weights.saving import save_tensors

STALE = 24 * 3600.0  # seconds after which an adapter's process has certainly ended: they live for one answer


class Published:
    """Where adapters are written; a context, at whose end they are gone.

    Args:
        folder: one that this process and the servers see by the same path; "": shared memory.
    """

    def __init__(self, folder: str = "") -> None:
        self._parent, self._made = published_in(folder), set[Path]()

    def __enter__(self) -> Published:
        return self

    def __exit__(self, *error: object) -> None:
        for path in tuple(self._made):
            self.remove(path)

    def write(self, tensors: Mapping[str, Tensor], alpha: float) -> Path:
        """A PEFT adapter of A and B by plain names; its folder's name is the adapter's.

        vLLM divides alpha by one rank, the largest here: B of a smaller one is made larger for that.
        The name is random: servers keep prompts and adapters by it, and other runs may share the server.
        Raises InputError: the folder cannot be written. Diverged: a tensor is not finite.
        """
        path = self._parent / f"zopro-{uuid.uuid4().hex}"
        files = {f"base_model.model.{name}": tensor.detach().to("cpu", torch.float32) for name, tensor in tensors.items()}
        ranks = {name: len(tensor) for name, tensor in files.items() if name.endswith(".lora_A.weight")}
        largest = max(ranks.values())
        for name, rank in ranks.items():
            if rank < largest:
                of_b = name.replace(".lora_A.weight", ".lora_B.weight")
                files[of_b] = files[of_b] * (largest / rank)
        modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
        settings = {
            "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": None, "bias": "none",
            "r": largest, "lora_alpha": alpha,
            "lora_dropout": 0.0, "inference_mode": True, "fan_in_fan_out": False, "target_modules": modules,
        }  # fmt: skip
        with whole_folder(path) as partial:
            save_tensors(files, partial / ADAPTER_FILE)
            (partial / ADAPTER_CONFIG).write_text(json.dumps(settings), "utf-8")
        self._made.add(path)
        return path

    def remove(self, path: Path) -> None:
        shutil.rmtree(path, ignore_errors=True)
        if not path.exists():  # else it is tried again at the end
            self._made.discard(path)


def published_in(folder: str) -> Path:
    return (Path(folder) if folder else shared_folder() or Path(tempfile.gettempdir())).absolute()


def tidy(folder: str) -> None:
    """Remove what processes left that were killed."""
    name = "zopro-" + "[0-9a-f]" * 32
    for path in itertools.chain.from_iterable(published_in(folder).glob(one) for one in (name, f".{name}.partial")):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime > STALE:
                shutil.rmtree(path, ignore_errors=True)
