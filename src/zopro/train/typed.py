"""What the mixins in front of transformers' and TRL's trainers use of them, declared for type checkers.

A mixin has its base class only when it is put together, so a checker cannot know what `self` has. For it a mixin derives
from transformers' `Trainer`; when it runs, from nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypedDict

if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator
    from transformers import Trainer, TrainerState

    class Mixin(Trainer):
        """Anything of a trainer; what is declared here is what the mixins have to do with most."""

        args: Any  # of many classes
        accelerator: Accelerator
        model: torch.nn.Module
        optimizer: Any  # None, an optimiser, or accelerate's wrapping of one
        state: TrainerState

else:
    Mixin = object


class TRLArguments(TypedDict, total=False):
    """Arguments of `trl.RLOOTrainer` that our trainers hand on, beyond those they name."""

    reward_processing_classes: Any  # tokenizers of reward models
    callbacks: list[Any] | None
    optimizers: tuple[Any, Any]
    quantization_config: Any
    peft_config: Any


class RLOOArguments(TRLArguments, total=False):
    """Those of `EngineRLOOTrainer` that trainers on top of it hand on; its docstring says what they are."""

    reference: Mapping[str, torch.Tensor] | None
    advantage: str
    reward_timeout: float
