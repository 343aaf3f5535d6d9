"""Hugging Face and TRL trainers without the backward pass.

`zeroth_order(TrainerCls)` turns any `transformers.Trainer` subclass into one that uses forward passes only. The base
class keeps its whole loop: the loss is measured around theta where the base class computes it, and the base class's own
call of `backward` on that scalar tells which weight it gives to the micro-batch (gradient accumulation, token
averaging). `ZOPrOTrainer` is TRL's RLOOTrainer made zeroth-order, with the paper's targeted directions.

    from trl import SFTTrainer
    Trainer = zeroth_order(SFTTrainer)          # same arguments
    Trainer("Qwen/Qwen3-0.6B", args=SFTConfig(learning_rate=1e-4), train_dataset=rows, peft_config=LoraConfig()).train()
"""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import RLOOConfig

from zopro.engine.models import tensor_name
from zopro.objectives import log_ratio_surrogate
from zopro.rloo import EngineRLOOTrainer
from zopro.zo import SPSA, Directions, Gaussian, Targeted
from zopro.zo.records import Estimate

logger = logging.getLogger(__name__)

TEXT_INPUTS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logps", "advantages"}
SPSA_DEFAULTS: dict[str, Any] = {"eps": "auto", "second_moment_beta": 0.9}


class _BaseClassBackward(torch.autograd.Function):
    """A loss whose `backward` hands over the weight the base class gives it; there is no graph behind it."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, receive: Callable[[float], None]) -> Tensor:
        ctx.receive = receive
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, weight: Tensor) -> tuple[Tensor, None]:
        ctx.receive(float(weight))
        return torch.zeros_like(weight), None


def _without_checkpointing(args: Any) -> None:
    """There is no backward pass to save activations for. The option has two names, of which older versions know one."""
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if getattr(args, name, False):
            setattr(args, name, False)


class ZerothOrderMixin:
    """What `zeroth_order` puts in front of a trainer class; use that function rather than this class."""

    spsa_options: ClassVar[dict[str, Any]] = {}
    _measuring = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        bound = inspect.signature(super().__init__).bind(*args, **kwargs)
        training_args = bound.arguments.get("args")
        if getattr(training_args, "fp16", False):
            raise ValueError("fp16: must be off, its loss scaling is made for gradients; use bf16=True or neither")
        _without_checkpointing(training_args)
        super().__init__(*args, **kwargs)
        _without_checkpointing(self.args)  # type: ignore[attr-defined]

    def directions(self) -> Directions:
        """Where z comes from. Override it, or pass `directions=` to `zeroth_order`."""
        return Gaussian()

    def spsa_arguments(self) -> dict[str, Any]:
        """Arguments of `zopro.SPSA` beyond those that `args` has."""
        return {**SPSA_DEFAULTS, **self.spsa_options}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """SPSA over the trainable parameters, by their names without PEFT's wrapping."""
        trainer: Any = self
        if trainer.optimizer is None:
            named = [(tensor_name(n), p) for n, p in (model or trainer.model).named_parameters() if p.requires_grad]
            if not named:
                raise ValueError("model: has no parameter with requires_grad=True, so there is nothing to train")
            options = self.spsa_arguments()
            options.setdefault("directions", self.directions())
            options.setdefault("weight_decay", trainer.args.weight_decay)
            options.setdefault("seed", trainer.args.seed)
            if trainer.accelerator.num_processes > 1:
                options["reduce"] = self._mean_over_ranks
            trainer.optimizer = SPSA(named, lr=trainer.args.learning_rate, **options)
        if not isinstance(self.spsa, SPSA):
            raise ValueError(f"optimizers: must hold a zopro.SPSA or nothing, got {type(self.spsa).__name__}")
        self.spsa.accumulation = "sum"  # the base class's weights already normalise over micro-batches
        return trainer.optimizer

    @property
    def spsa(self) -> SPSA:
        """The optimiser, without accelerate's wrapping."""
        optimizer = self.optimizer  # type: ignore[attr-defined]
        return getattr(optimizer, "optimizer", optimizer)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._measuring = True
        try:
            return super().training_step(*args, **kwargs)  # type: ignore[misc]
        finally:
            self._measuring = False

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss_of = super().compute_loss  # type: ignore[misc]
        if not self._measuring:
            return loss_of(model, inputs, *args, **kwargs)
        inputs = self._with_old_logprobs(model, inputs)
        tokens = getattr(self, "_total_train_tokens", None)  # TRL counts them in the loss: count one evaluation only

        def closure() -> Tensor:
            if tokens is not None:
                self._total_train_tokens = tokens
            return loss_of(model, dict(inputs) if isinstance(inputs, Mapping) else inputs, *args, **kwargs)

        estimate: Estimate = self.spsa.measure(closure, self.loss_at_theta(inputs))
        loss = torch.tensor(estimate.loss, device=self.args.device, requires_grad=True)  # type: ignore[attr-defined]
        with torch.enable_grad():
            return _BaseClassBackward.apply(loss, lambda weight: self.spsa.accumulate(estimate, weight))

    def loss_at_theta(self, inputs: Any) -> float | None:
        """L(theta) averaged over ranks, where it is known without a forward pass; one-sided estimates then use it."""
        return None

    @torch.no_grad()
    def _with_old_logprobs(self, model: Any, inputs: Any) -> Any:
        """GRPO's on-policy inputs with the log-probs at theta, against which its ratio is taken.

        TRL leaves them out there and detaches the ones it evaluates, a ratio of 1 whose value would not depend on
        theta: a gradient sees through that, function values do not.
        """
        online = isinstance(inputs, Mapping) and {"completion_ids", "advantages"} <= inputs.keys()
        if not online or inputs.keys() & {"old_logps", "old_per_token_logps"}:
            return inputs
        trainer: Any = self
        input_ids, attention_mask = (
            torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
        )
        logprobs = trainer._get_per_token_logps_and_entropies(
            model, input_ids, attention_mask, inputs["completion_ids"].size(1)
        )[0]
        return {**inputs, "old_per_token_logps": logprobs}

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.optimizer is not None and self.spsa.last is not None:  # type: ignore[attr-defined]
            logs.pop("grad_norm", None)  # of gradients that do not exist
            logs.update(self.zeroth_order_logs())
        super().log(logs, *args, **kwargs)  # type: ignore[misc]

    def zeroth_order_logs(self) -> dict[str, float]:
        """What the last step measured, for the training log."""
        last = self.spsa.last
        assert last is not None
        logs = {
            "projected_gradient": last.projected_gradient,
            "eps": last.eps[0],
            "skipped_steps": float(self.spsa.skipped_steps),
        }
        if not math.isnan(last.signal_to_noise):
            logs["signal_to_noise"] = last.signal_to_noise
        return logs

    def _mean_over_ranks(self, values: Tensor) -> Tensor:
        accelerator = self.accelerator  # type: ignore[attr-defined]
        return accelerator.reduce(values.to(accelerator.device), reduction="mean")


def zeroth_order(trainer_cls: type, **spsa_options: Any) -> type:
    """Turn a `transformers.Trainer` subclass into one that trains with forward passes only.

    The arguments of the class stay as they are; `args.learning_rate`, schedules, gradient accumulation, PEFT,
    evaluation, callbacks, logging and checkpoints keep working. The defaults are those of the `default` preset:
    `eps="auto"` and `second_moment_beta=0.9`, which makes the learning rate the change of a weight in a typical step.

    Args:
        trainer_cls: a subclass of `transformers.Trainer`.
        spsa_options: further arguments of `zopro.SPSA` (eps, directions, queries, sides, ...).

    Raises:
        TypeError: `trainer_cls` is not such a class.
    """
    if not (isinstance(trainer_cls, type) and hasattr(trainer_cls, "training_step")):
        raise TypeError(f"trainer_cls: must be a subclass of transformers.Trainer, got {trainer_cls!r}")
    return type(f"ZerothOrder{trainer_cls.__name__}", (ZerothOrderMixin, trainer_cls), {"spsa_options": spsa_options})


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass
class ZOPrOConfig(RLOOConfig):
    """`trl.RLOOConfig` with the options of the zeroth-order step. Empty options take the preset's."""

    learning_rate: float = _option(1e-4, "Step size; in the default preset the change of a weight in a typical step.")
    gradient_checkpointing: bool = _option(False, "There is no backward pass: leave it off.")
    bf16: bool | None = _option(False, "Autocast to bfloat16; off, since a model loads in its own dtype.")
    preset: str = _option("default", "default (normalised, eps auto, adaptive step) or paper (their scale, eps 1e-5).")
    eps: float | str | None = _option(None, "Perturbation scale, or auto.")
    queries: int = _option(1, "Directions averaged in a step.")
    sides: int = _option(2, "2: central differences, 1: forward differences.")
    surrogate: str | None = _option(
        None, "clipped (RLOO's clipped ratio) or log_ratio (same gradient, on-policy; bends and clips nowhere)."
    )
    decay: str = _option("linear", "Decay of the previous update's share d: linear or exponential.")
    normalize: bool | None = _option(None, "Scale targeted directions to root mean square 1.")
    second_moment_beta: float | None = _option(
        None, "Decay of the mean square that scales the projected gradient; 0: none."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in ("default", "paper"):
            raise ValueError(f"preset: must be 'default' or 'paper', got {self.preset!r}")
        default = self.preset == "default"
        self.surrogate = self.surrogate or ("log_ratio" if default else "clipped")
        if self.surrogate not in ("clipped", "log_ratio"):
            raise ValueError(f"surrogate: must be 'clipped' or 'log_ratio', got {self.surrogate!r}")
        self.eps = self.eps if self.eps is not None else ("auto" if default else 1e-5)
        self.normalize = self.normalize if self.normalize is not None else default
        if self.second_moment_beta is None:
            self.second_moment_beta = 0.9 if default else 0.0


class ZOPrOTrainer(ZerothOrderMixin, EngineRLOOTrainer):
    """TRL's RLOOTrainer, zeroth-order, with ZOPrO's directions (Galatolo et al. 2025).

    Args:
        previous_update: name -> mu, the policy's update over the previous iteration. Without it the directions are
            Gaussian (SPSA as in MeZO).
        reward_update: name -> v, the reward model's update over the same iteration.
        reference: name -> tensor, adapter weights of the reference policy; by default those the training starts from.

    All other arguments are those of `trl.RLOOTrainer`; `args` is a `ZOPrOConfig`. Names may carry PEFT's wrapping.

    The default preset's loss is -mean(advantage * log-ratio), which has RLOO's gradient where the ratios are 1, but stays
    a line where RLOO's ratio is exponential and clipped at 0.8 and 1.2. So eps can be large enough for a difference to
    stand above bfloat16's rounding: on a 270M model that moved an answer's log-prob by 0.16 nats.
    """

    def __init__(
        self,
        *args: Any,
        previous_update: Mapping[str, Tensor] | None = None,
        reward_update: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        self.previous_update = _plain_names(previous_update)
        self.reward_update = _plain_names(reward_update)
        super().__init__(*args, **kwargs)

    def directions(self) -> Directions:
        options: Any = self.args
        if not self.previous_update:
            return Gaussian()
        steps = max(1, self.state.max_steps)
        return Targeted(self.previous_update, self.reward_update, steps, options.decay, options.normalize)

    @property
    def on_policy(self) -> bool:
        """Whether every step's completions are drawn from the parameters that the step starts from."""
        options: Any = self.args
        return options.steps_per_generation * self.num_iterations <= options.gradient_accumulation_steps

    def loss_at_theta(self, inputs: Any) -> float | None:
        """L(theta) on-policy, where every ratio is 1: -mean(advantage), or 0 for log-ratios."""
        options: Any = self.args
        if options.sides == 2 or self.aux_loss_enabled or not self.on_policy:
            return None
        if self._takes_log_ratios(inputs):
            return 0.0
        loss = -inputs["advantages"].double().mean()
        return float(self._mean_over_ranks(loss) if self.accelerator.num_processes > 1 else loss)

    def _takes_log_ratios(self, inputs: Any) -> bool:
        options: Any = self.args
        return options.surrogate == "log_ratio" and self.on_policy and inputs.keys() <= TEXT_INPUTS

    def _takes_rollout_logprobs(self, model: Any) -> bool:
        # Of log-ratios the old log-probs are a constant offset, equal at theta + eps z and theta - eps z.
        options: Any = self.args
        return (options.surrogate == "log_ratio" and self.on_policy) or super()._takes_rollout_logprobs(model)

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if not (self._measuring and self._takes_log_ratios(inputs)):
            return super()._compute_loss(model, inputs)
        input_ids, attention_mask = (
            torch.cat([inputs[f"prompt_{kind}"], inputs[f"completion_{kind}"]], dim=1) for kind in ("ids", "mask")
        )
        mask = inputs["completion_mask"]
        logprobs, _, _ = self._get_per_token_logps_and_entropies(model, input_ids, attention_mask, mask.size(1))
        return log_ratio_surrogate((logprobs * mask).sum(1), inputs["old_logps"], inputs["advantages"])

    def spsa_arguments(self) -> dict[str, Any]:
        options: Any = self.args
        return {
            "eps": options.eps,
            "queries": options.queries,
            "sides": options.sides,
            "second_moment_beta": options.second_moment_beta or None,
            "measure_noise": True,
        }


def _plain_names(update: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The update by names without PEFT's wrapping; one that has such names already stays as lazy as it is."""
    update = update or {}
    if all(tensor_name(name) == name for name in update):
        return update
    return {tensor_name(name): update[name] for name in update}
