"""TRL's RLOOTrainer with guided directions: first-order steps in forward passes (`zopro.zo.guided` says how).

The log-prob pass that RLOO makes anyway yields the loss and, from the loss's derivative with respect to the log-probs
alone, a pseudo-gradient. Three things can be made of it (`guide`):

    adam    the pseudo-gradient takes the gradient's place in AdamW. Every `guard_every` steps the slope along it is
            measured by two more forward passes, and a direction that does not go downhill is not followed.
    spsa    a direction for SPSA: each step measures the slope along it; the running root mean square bounds the step.
    mixed   as spsa, with ZOPrO's direction in the mixture: z = guide g + (1 - guide) (b mu + c n_perp).

    GuidedTrainer(model, reward_funcs, args=GuidedConfig(...), train_dataset=..., peft_config=LoraConfig(...)).train()
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from trl import RLOOConfig

from zopro.config.fields import for_parsers, one_of, option, positive
from zopro.config.guided import GUIDE_LOCAL, GUIDED_LEARNING_RATE
from zopro.engine import Batch
from zopro.engine.feedback import Feedback
from zopro.engine.local.engine import LocalEngine
from zopro.train.arguments import check_kinds
from zopro.train.construction import adapter_kind, trainable
from zopro.train.gradients import arguments_in, without_checkpointing
from zopro.train.objectives import clipped_surrogate
from zopro.train.rloo import EngineRLOOTrainer
from zopro.train.typed import Mixin
from zopro.train.zopro import ZOPrOConfig, ZOPrOTrainer
from zopro.weights.live import by_saved_names
from zopro.zo.directions import Directions
from zopro.zo.directions.base import check_update, norms
from zopro.zo.guided import ResidualFeedback
from zopro.zo.perturbation import InPlace

logger = logging.getLogger(__name__)


@for_parsers
@dataclass
class GuidedConfig(RLOOConfig):
    """`trl.RLOOConfig` with the options of the guide, for Adam on pseudo-gradients.

    >>> args = GuidedConfig("runs/short", guard_every=0)
    >>> args.local, args.learning_rate
    ('block', 0.0002)
    """

    learning_rate: float = option(GUIDED_LEARNING_RATE, "Learning rate of AdamW.")
    gradient_checkpointing: bool = option(False, "The sweep keeps one block's activations anyway: leave it off.")
    bf16: bool | None = option(False, "Autocast to bfloat16; off, since a model loads in its own dtype.")
    local: str = option("block", "Block-local vector-Jacobian products: none, mlp, chain or block.")
    tail: int = option(4, "With block: how many tokens at the prompts' ends are swept; 0: all.")
    top_blocks: int = option(0, "Guide the last so many blocks only; 0 guides all.")
    guard_every: int = option(10, "Measure the slope along the pseudo-gradient every so many steps; 0 never does.")
    guard_eps: float = option(1e-4, "Root mean square change of a guided weight in that measurement.")

    def __post_init__(self) -> None:
        check_kinds(self, tail=0, top_blocks=0, guard_every=0, num_generations=2)
        super().__post_init__()
        one_of(self, "local", GUIDE_LOCAL)
        positive(self, "guard_eps")


@for_parsers
@dataclass
class GuidedSPSAConfig(ZOPrOConfig):
    """`ZOPrOConfig` with the options of the guide, for SPSA along pseudo-gradients."""

    learning_rate: float | None = option(GUIDED_LEARNING_RATE, "Step size: the change of a weight in a typical step.")
    local: str = option("block", "Block-local vector-Jacobian products: none, mlp, chain or block.")
    tail: int = option(4, "With block: how many tokens at the prompts' ends are swept; 0: all.")
    top_blocks: int = option(0, "Guide the last so many blocks only; 0 guides all.")
    guide: float = option(1.0, "Weight of the pseudo-gradient in z; the rest, 1 - guide, is ZOPrO's direction.")

    def __post_init__(self) -> None:
        check_kinds(self, tail=0, top_blocks=0)
        super().__post_init__()
        one_of(self, "local", GUIDE_LOCAL)
        if not 0 < self.guide <= 1:
            raise ValueError(f"guide: must lie in (0, 1], got {self.guide}")
        if self.guide == 1 and self.queries > 1:
            raise ValueError(f"queries: must be 1 with guide=1, which has one direction a step, got {self.queries}")


class FeedbackScores(Mixin):
    """In front of a trainer on the engine: log-probs asked for with autograd on come from `Feedback`.

    `args` has `local`, `tail` and `top_blocks`, as `GuidedConfig` does; `avoid` is that of `Feedback`, by names that may
    carry PEFT's wrapping. What is trained but not reached by the guide stays as it is, and is counted in a warning. A
    mixture of experts' balancing loss, which TRL adds by default, is left out.

    Raises ValueError: `avoid` of another model, or not finite; more than one process; another engine than the local one;
    adapters other than plain LoRA with another `local` than "block"; `args.router_aux_loss_coef` asks for the
    balancing loss.
    """

    _name = "RLOO along guided directions"
    _paper: ClassVar[dict[str, str]] = {}
    _tag_names: ClassVar[list[str]] = ["trl", "zopro", "rloo", "guided"]
    config_cls: ClassVar[type] = GuidedConfig
    sweeps: ClassVar[bool] = True  # block by block, in place of a backward pass
    aux_loss_enabled: bool
    _feedback: Feedback | None = None
    _reachable: Sequence[int] = ()  # ids of what was trained when it was made

    def __init__(self, *args: Any, avoid: Mapping[str, Tensor] | None = None, **kwargs: Any) -> None:
        without_checkpointing(arguments_in((*args, *kwargs.values())))
        super().__init__(*args, **kwargs)
        self.avoid = by_saved_names(avoid, self.model, "avoid")
        check_update("avoid", self.avoid, {name: (*p.shape,) for name, p in trainable(self.model)})
        norms("avoid", self.avoid)
        if self.accelerator.num_processes > 1:
            raise ValueError("accelerator: guided trainers run in one process, since DDP synchronises true gradients")
        if not isinstance(self.engine, LocalEngine):
            raise ValueError(
                "engine: must be the local one for guided trainers, whose directions come from the model's activations, "
                f"got {type(self.engine).__name__}"
            )
        kind = adapter_kind(self.model)
        if kind not in ("", "LORA") and self.args.local != "block":
            raise ValueError(f"local: must be 'block' for adapters of the kind {kind}, got {self.args.local!r}")
        if any(isinstance(module, nn.Dropout) and module.p > 0 for module in self.model.modules()):
            logger.warning("dropout: guided trainers draw none, since blocks run again as they were measured")
        if self.aux_loss_enabled:
            if self.args.router_aux_loss_coef:
                raise ValueError(
                    "router_aux_loss_coef: must be 0 with guided trainers, which know the gradient of log-probs alone, "
                    f"got {self.args.router_aux_loss_coef}"
                )
            self.aux_loss_enabled = False  # the architecture's own
            logger.warning("router_aux_loss_coef: guided trainers leave the experts' balancing loss out")

    @property
    def feedback(self) -> Feedback:
        """Of the policy under training; made at first use, and anew where something else is trained."""
        policy = self.accelerator.unwrap_model(self.model)
        trained = [id(parameter) for parameter in policy.parameters() if parameter.requires_grad]
        if self._feedback is None or trained != self._reachable:
            options = {name: getattr(self.args, name) for name in ("top_blocks", "local", "tail")}
            self._feedback, self._reachable = Feedback(policy, **options, avoid=self.avoid), trained
            left = len(trained) - len(self._feedback.parameters)
            if left:
                count = left, len(trained)
                logger.warning(
                    "the guide (local=%s) does not reach %d of the %d trained tensors", self.args.local, *count
                )
        return self._feedback

    def _score(self, model: Any, batch: Batch, copies: int) -> Tensor:
        if not torch.is_grad_enabled():
            return super()._score(model, batch, copies)
        return self.feedback.logprobs(*batch, temperature=self.temperature, num_generations=copies)

    def _answer_logprobs(self, model: Any, inputs: Any) -> Tensor:
        """(B,) log-probs of whole answers, in nats."""
        batch = Batch.of_inputs(inputs)
        return batch.sums(self._logprobs(model, batch))

    def _surrogate(self, logprobs: Tensor, inputs: Any) -> Tensor:
        """RLOO's loss alone, without what TRL logs beside it."""
        return clipped_surrogate(logprobs, inputs["old_logps"], inputs["advantages"], self.epsilon_low, self.epsilon_high)


class GuidedTrainer(FeedbackScores, EngineRLOOTrainer):
    """TRL's RLOOTrainer, AdamW and all, with residual feedback in place of the backward pass.

    Arguments are those of `EngineRLOOTrainer`; `args` is a `GuidedConfig`. Adapters that the feedback does not reach stay
    as they are. Logged beside TRL's numbers where the guard measures: `guide/slope`, the measured slope along the
    pseudo-gradient; `guide/slope_ratio`, that over the slope the pseudo-gradient predicts (1 if it were the gradient);
    `guide/refused`, 1 for a direction that was not followed.

    Raises:
        InputError: the model has no residual stream, or no adapter that writes to it is trained (at the first step).
        ValueError: more than one process.

    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> def short(completions, **columns):  # any TRL reward function
    ...     return [-float(len(completion)) for completion in completions]
    >>> rows = Dataset.from_dict({"prompt": ["What is rust?", "What is tea?"]})
    >>> args = GuidedConfig("runs/short", max_steps=1, per_device_train_batch_size=4, report_to=[])
    >>> lora = LoraConfig(task_type="CAUSAL_LM")
    >>> trainer = GuidedTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", short, args, rows, peft_config=lora)
    >>> trainer.train().global_step
    1
    """

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().compute_loss(model, inputs, *args, **kwargs)
        every = self.args.guard_every
        if not (every and torch.is_grad_enabled() and self.state.global_step % every == 0):
            return loss
        # The rest of the step needs these alone: what the forward pass kept is let go before the guard's own pass.
        found, known = list(self.feedback.gradients(loss).values()), loss.detach()
        loss = _WithGradients.apply(known, found, *self.feedback.parameters.values())
        slope, predicted = self._slope(model, inputs, found)
        if not predicted > 0:  # nothing to follow or to refuse: no completion was better than another, or NaN
            return loss
        downhill = slope > 0
        for name, value in (("slope", slope), ("slope_ratio", slope / predicted), ("refused", float(not downhill))):
            if math.isfinite(value):
                self._metrics["train"][f"guide/{name}"].append(value)
        return loss if downhill else 0.0 * loss

    def _slope(self, model: Any, inputs: Any, gradients: Sequence[Tensor]) -> tuple[float, float]:
        """How fast the loss falls against the pseudo-gradient: as measured one-sided, and as the guess predicts.

        What is measured is log-probs. The loss is taken as linear in them: itself it ends at the clip range, which this
        distance may leave.
        """
        square = sum(float(g.float().square().sum()) for g in gradients)
        if not 0 < square < math.inf:
            return (0.0, 0.0) if square == 0 else (math.nan, math.nan)
        scale = self.args.guard_eps * math.sqrt(sum(g.numel() for g in gradients) / square)
        perturbation = InPlace(list(self.feedback.parameters.values()))
        with torch.no_grad():
            here = self._answer_logprobs(model, inputs)
            with perturbation.at(lambda index: gradients[index].float() * -scale):
                moved = self._answer_logprobs(model, inputs)
        weights = torch.autograd.functional.jacobian(lambda logprobs: self._surrogate(logprobs, inputs), here)
        falls = (weights * (here - moved)).sum(dtype=torch.float64)
        return float(falls) / (scale * math.sqrt(square)), math.sqrt(square)


class _WithGradients(torch.autograd.Function):
    """A value whose gradients with respect to the parameters are known."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return value.clone()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *(upstream.to(gradient.dtype) * gradient for gradient in ctx.gradients)


class GuidedSPSATrainer(FeedbackScores, ZOPrOTrainer):
    """`ZOPrOTrainer` whose directions are pseudo-gradients, or mixtures of them with its own.

    Arguments are those of `ZOPrOTrainer`; `args` is a `GuidedSPSAConfig`. Micro-batches of one step share the first
    one's pseudo-gradient, as they share directions.
    """

    _name = "SPSA along guided directions"
    _tag_names: ClassVar[list[str]] = ["trl", "zopro", "guided", "zeroth-order"]
    config_cls = GuidedSPSAConfig
    z_alike = True  # the pseudo-gradient
    to_follow = "Set guide below 1"

    def targets(self) -> bool:
        return self.draws_noise

    @property
    def draws_noise(self) -> bool:
        return bool(self.args.guide < 1)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `ZOPrOTrainer`'s. What a training before has left is of a step that may come again, on other answers."""
        optimizer = super().create_optimizer(model)
        if isinstance(self.spsa.directions, ResidualFeedback):
            self.spsa.directions.step = -1
        return optimizer

    def directions(self) -> Directions:
        return ResidualFeedback(self.args.guide, 1 - self.args.guide, super().directions())

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        directions = self.spsa.directions if self._measuring else None
        if isinstance(directions, ResidualFeedback) and directions.step != self.spsa.step_count:
            with torch.enable_grad():
                gradients = self.feedback.gradients(self._surrogate(self._answer_logprobs(model, inputs), inputs))
            directions.update(gradients, self.spsa.step_count)
        return super().compute_loss(model, inputs, *args, **kwargs)
