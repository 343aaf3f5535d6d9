"""The one place through which trained weights leave the memory: nothing that is not finite is saved as if it were whole.

save_weights(model, folder)        # an ordinary PEFT adapter, or an ordinary model
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import save_file
from torch import Tensor

from zopro.errors import Diverged

LARGEST_WEIGHT = 1e6  # no language model has one near it


def save_weights(model: Any, folder: Path) -> None:
    """Write the active adapter of a PEFT model, or a whole model, into `folder` (see `zopro.store.durable.whole_folder`).

    A whole model has the names in its files that it has in memory, by which updates are asked for; transformers reads
    these too. `publish` writes the names that others know.

    Raises:
        Diverged: as `check_whole`; nothing was written.
    """
    check_whole(model)
    if not isinstance(model, PeftModel):
        model.save_pretrained(folder, save_original_format=False)
        return
    adapter = model.active_adapter
    model.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)
    if adapter != "default":  # PEFT puts every adapter of another name in a folder of its own
        shutil.copytree(folder / adapter, folder, dirs_exist_ok=True)
        shutil.rmtree(folder / adapter)


def publish(model: Any, folder: Path) -> None:
    """Write a whole model under the names that its own files had when it was loaded, which other programs know.

    Raises as `check_whole`.
    """
    check_whole(model)
    model.save_pretrained(folder)


@torch.no_grad()
def check_whole(model: Any) -> None:
    """Refuse weights that are no model any more: the active adapter's or all, and what comes of them for a few tokens.

    Raises:
        Diverged: a tensor, or the model's output, has NaN or infinity in it; or a weight is beyond all use.
    """
    adapter = f".{model.active_adapter}." if isinstance(model, PeftModel) else ""
    weights = [(name, weight) for name, weight in model.named_parameters() if adapter in f"{name}."]
    sizes = largest_entries(weights)
    if getattr(model, "serve", None) is None:  # else another engine runs it
        was_training = model.training
        try:
            logits = model.eval()(input_ids=torch.tensor([[0, 1]], device=model.device), use_cache=False).logits
        finally:
            model.train(was_training)
        if not bool(logits.isfinite().all()):
            raise Diverged("the model's output is not finite")
    for name, size in sizes.items():
        if size >= LARGEST_WEIGHT:
            raise Diverged(f"{name} has weights of {size:.2g}")


def save_tensors(tensors: dict[str, Tensor], file: Path) -> None:
    """Write a safetensors file; raises as `largest_entries`."""
    largest_entries(tensors.items())
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file, metadata={"format": "pt"})


def largest_entries(tensors: Iterable[tuple[str, Tensor]]) -> dict[str, float]:
    """The largest absolute entry of each floating point tensor. Raises `Diverged` with the name of the first one that has
    NaN or infinity in it."""
    sizes = {}
    for name, tensor in tensors:
        if tensor.is_floating_point() and tensor.numel():
            low, high = tensor.detach().aminmax()  # which copies nothing
            sizes[name] = max(-float(low), float(high))
            if not math.isfinite(sizes[name]):
                raise Diverged(f"{name} is not finite")
    return sizes
