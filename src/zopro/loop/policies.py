"""The policy's weights over the base loaded once: opened for a stage, put away after it, and their updates.

With LoRA a policy is an adapter; in full-parameter mode (`lora_r: 0`) it is a model folder of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from zopro.config import RunConfig
from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.starts import load_start
from zopro.engine.local.targets import new_adapter
from zopro.system.random_state import preserve_random_state
from zopro.weights import updates
from zopro.weights.adapters import adapter_state
from zopro.weights.saving import save_weights


class Policies:
    """Opens policies of one run over its base model.

    Args:
        base: the causal model; with LoRA it is lent to one adapter at a time and comes back pristine.
        config: for the adapter's shape, and for loading whole models in full-parameter mode.
    """

    def __init__(self, base: PreTrainedModel, config: RunConfig) -> None:
        self.base, self.config = base, config
        self.full = config.lora_r == 0

    @contextmanager
    def open(self, folder: Path | None, trainable: bool = False) -> Iterator[Any]:
        """The policy saved in `folder`, or (None) a fresh one: the base with a new adapter, or the base's weights."""
        if self.full:
            source = self.config.model if folder is None else str(folder)
            model = load_start(source, self.base.dtype, self.base.device, self.config.trust_remote_code)
            yield model.requires_grad_(trainable)
            return
        with preserve_random_state():
            if folder is None:
                torch.manual_seed(self.config.seed)
                model = new_adapter(self.base, self.config, "CAUSAL_LM")
            else:
                model = open_adapter(self.base, folder, trainable=trainable)
        if self.config.lora_freeze_a:
            for name, parameter in model.named_parameters():
                if "lora_A" in name:
                    parameter.requires_grad_(False)
        try:
            yield model
        finally:
            model.unload()
            # TRL's trainers wrap `forward` on the instance; without this every stage would wrap it once more.
            self.base.__dict__.pop("forward", None)
            self.base.requires_grad_(False).eval()
            self.base.config.use_cache = True

    def save(self, model: Any, folder: Path) -> None:
        """Write an ordinary PEFT adapter, or an ordinary model. Raises `Diverged`: it is not finite."""
        save_weights(model, folder)

    def reference(self, folder: Path) -> dict[str, Tensor] | None:
        """The adapter weights of a reference policy; None where it is a whole model."""
        return None if self.full else adapter_state(folder)

    def update(self, after: Path, before: Path) -> Mapping[str, Tensor]:
        """mu: the difference of two saved policies."""
        return updates.policy_update(after, before, self.full)

    def reward_update(self, after: Path, before: Path) -> Mapping[str, Tensor]:
        """v: the difference of two saved reward models, of the tensors they share with the policy."""
        return updates.reward_update(after, before, self.full, self.config.lora_alpha)
