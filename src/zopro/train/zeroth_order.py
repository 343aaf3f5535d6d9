"""Hugging Face and TRL trainers without the backward pass.

`zeroth_order(TrainerCls)` turns any `transformers.Trainer` subclass into one that uses forward passes only. The base
class keeps its whole loop: the loss is measured around theta where it computes it, and its own call of `backward` on that
scalar tells which weight it gives to the micro-batch (gradient accumulation, token averaging).

    from trl import SFTTrainer
    Trainer = zeroth_order(SFTTrainer)          # same arguments
    Trainer("Qwen/Qwen3-0.6B", args=SFTConfig(learning_rate=1e-4), train_dataset=rows, peft_config=LoraConfig()).train()
"""

from __future__ import annotations

import itertools
import logging
import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, ClassVar

import torch
from accelerate.utils import DistributedType, set_seed
from torch import Tensor

from zopro.errors import InputError
from zopro.system.clock import timed
from zopro.system.launch import counted, exchanging
from zopro.train.arguments import on_one_gpu
from zopro.train.construction import check_options, trainable
from zopro.train.evaluations import counting
from zopro.train.gradients import arguments_in, without_backward
from zopro.train.papers import zeroth_order_card
from zopro.train.reached import reaches_loss, unreached
from zopro.train.resuming import Resuming
from zopro.train.slope import GradientSlope
from zopro.zo import ES, SPSA, Directions, Gaussian, Ranks
from zopro.zo.optimizer import Recorded
from zopro.zo.records import Estimate

logger = logging.getLogger(__name__)

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


class ZerothOrderMixin(Resuming):
    """What `zeroth_order` puts in front of a trainer class; use that function rather than this class."""

    spsa_options: ClassVar[dict[str, Any]] = {}
    check_slope: ClassVar[bool] = True
    optimizer_cls: ClassVar[type[SPSA] | type[ES]] = SPSA
    known_loss: ClassVar[bool] = False  # True: its differences are known to have its gradient's slope, nothing is checked
    _measuring = _measured = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        training_args = arguments_in((*args, *kwargs.values()))
        if getattr(training_args, "fp16", False):
            raise ValueError("fp16: must be off, its loss scaling is made for gradients; use bf16=True or neither")
        without_backward(training_args)
        if training_args is not None:
            on_one_gpu(training_args)
        try:
            super().__init__(*args, **kwargs)
        except ValueError as error:
            if training_args is not None or "bf16" not in str(error):
                raise
            raise ValueError(
                "args: must be given on a machine without a GPU, since the default asks for bfloat16 on one. Pass the "
                "trainer's configuration with bf16=False."
            ) from None
        without_backward(self.args)
        if (given := getattr(self, "optimizer_cls_and_kwargs", None)) is not None:
            own, theirs = self.optimizer_cls.__name__, given[0].__name__
            raise ValueError(f"optimizer_cls_and_kwargs: must be None, since zopro.{own} takes the steps, got {theirs}")
        self._slope = GradientSlope(self, self.check_slope)
        if self.args.world_size > 1:
            set_seed(self.args.seed)  # TRL has just given each rank a seed of its own

    def create_accelerator_and_postprocess(self) -> None:
        """Without the wrapping in which gradients would be exchanged: there are none.

        Raises ValueError where accelerate is set up to split a model over ranks.
        """
        super().create_accelerator_and_postprocess()
        accelerator = self.accelerator
        if accelerator.distributed_type in (DistributedType.DEEPSPEED, DistributedType.FSDP, DistributedType.MEGATRON_LM):
            raise ValueError(
                f"accelerator: must keep the whole model on every rank, got {accelerator.distributed_type.value}. Launch "
                "with torchrun, or accelerate launch --multi_gpu"
            )
        if accelerator.distributed_type != DistributedType.NO:
            accelerator.prepare_model = partial(accelerator.prepare_model, evaluation_mode=True)

    def directions(self) -> Directions:
        """Where z comes from. Override it, or pass `directions=` to `zeroth_order`."""
        return Gaussian()

    def ranks(self) -> Ranks | None:
        """Between whom losses are exchanged: the launcher's processes, each with accelerate's share of the data."""
        accelerator = self.accelerator
        return Ranks(device=exchanging(accelerator.device)) if accelerator.num_processes > 1 else None

    def spsa_arguments(self) -> dict[str, Any]:
        """Arguments of the optimiser beyond the learning rate."""
        normalised = {"second_moment_beta": None} if self.spsa_options.get("over_std") else {}
        return {**SPSA_DEFAULTS, **normalised, **self.spsa_options}

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """SPSA (or `optimizer_cls`) over the trainable parameters, by their names without PEFT's wrapping."""
        if self.optimizer is None:
            named = trainable(model or self.model)
            options = self.spsa_arguments()
            options.setdefault("directions", self.directions())
            options.setdefault("weight_decay", self.args.weight_decay)
            options.setdefault("seed", self.args.seed)
            ranks = options.setdefault("ranks", self.ranks())
            if ranks is not None:
                model = model or self.model
                shared = ranks.share(itertools.chain(model.named_parameters(), model.named_buffers()))
                if shared:
                    logger.info("%d tensors differed between ranks and are rank 0's now: %s, ...", len(shared), shared[0])
            self.optimizer = self.optimizer_cls(named, lr=self.args.learning_rate, **options)
        if not isinstance(self.spsa, self.optimizer_cls):
            wanted, given = self.optimizer_cls.__name__, type(self.spsa).__name__
            raise ValueError(f"optimizers: must hold a zopro.{wanted} or nothing, got {given}")
        self.spsa.accumulation = "sum"  # the base class's weights already normalise over micro-batches
        self.spsa.zero_grad()  # a training that failed in the middle of a step has left its estimates
        self.exchanged_bytes, self._counted_step = 0, -1  # by this rank in the current step
        return self.optimizer

    @property
    def spsa(self) -> Any:
        """The optimiser, without accelerate's wrapping."""
        spsa: Recorded = getattr(self.optimizer, "optimizer", self.optimizer)
        return spsa

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """The base class's training.

        Raises:
            InputError: the loss was not finite at the end, nor in half of the steps: a learning rate far too high.
            RuntimeError: ranks end with different parameters.
        """
        result = super().train(*args, **kwargs)
        if self.optimizer is None:
            return result  # no step was left to take
        self._check_steps()
        ranks = self.spsa.ranks
        trained = [(n, p) for n, p in self.model.named_parameters() if p.requires_grad]
        if ranks is not None and (names := ranks.differing(trained)):
            raise RuntimeError(f"ranks: must end with the same parameters, {len(names)} differ, such as {names[0]}")
        return result

    def _check_steps(self) -> None:
        """Raise InputError after a training of losses that were not finite."""
        spsa, rate = self.spsa, self.args.learning_rate
        if spsa.last is not None and spsa.last.skipped and 2 * spsa.skipped_steps >= spsa.step_count:
            raise InputError(
                f"learning_rate: must leave a loss that is finite, got {rate:g}, with which it was not in "
                f"{spsa.skipped_steps} of {spsa.step_count} steps. Lower it, or fix the loss."
            )

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._measuring, self._measured = True, False
        try:
            with self._counting():
                loss: Tensor = super().training_step(*args, **kwargs)
        finally:
            self._measuring = False
        if not self._measured:
            raise RuntimeError(unreached(type(self)))
        return loss

    def _counting(self) -> AbstractContextManager[None]:
        """Inside, what this rank exchanges is added to the step's `exchanged_bytes`."""
        step: int = self.state.global_step
        if step != self._counted_step:
            self.exchanged_bytes, self._counted_step = 0, step
        return counted(self._count)

    def _count(self, size: int) -> None:
        self.exchanged_bytes += size

    @timed("loss")
    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        if not self._measuring:
            return self._base_loss(model, inputs, *args, **kwargs)
        self._measured = True
        estimate = self._estimate(model, inputs, *args, **kwargs)
        loss = torch.tensor(estimate.loss, device=self.args.device, requires_grad=True)
        with torch.enable_grad():
            return _BaseClassBackward.apply(loss, lambda weight: self.spsa.accumulate(estimate, weight))

    def _estimate(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Estimate:
        """Losses of one micro-batch around theta: of the base class's own loss, evaluated as a closure."""

        def loss_of(trainer: Any, batch: Any) -> Any:
            return trainer._base_loss(model, dict(batch) if isinstance(batch, Mapping) else batch, *args, **kwargs)

        closure = self._slope.closure(loss_of, inputs, search=not self.known_loss)
        with counting(self.spsa) as seen:

            def evaluate() -> Any:
                seen(1)
                return closure()

            return self.spsa.measure(evaluate, self.loss_at_theta(inputs))

    def _base_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **kwargs)

    def loss_at_theta(self, inputs: Any) -> float | None:
        """L(theta) averaged over ranks, where it is known without a forward pass; one-sided estimates then use it."""
        return None

    def _calculate_rewards(self, *args: Any, **kwargs: Any) -> Tensor:
        """TRL's rewards. After them TRL gathers all texts for its table; where that is off, empty ones are gathered."""
        rewards: Tensor = super()._calculate_rewards(*args, **kwargs)
        gathered = len(args) == 4  # of (inputs, prompts, completions, ids); trainers without a table have others
        if gathered and self.accelerator.num_processes > 1 and not getattr(self, "log_completions", True):
            _, prompts, completions, _ = args
            prompts[:], completions[:] = [""] * len(prompts), [""] * len(completions)
        return rewards

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self.optimizer is not None and self.spsa.last is not None:
            logs.pop("grad_norm", None)  # of gradients that do not exist
            logs.update(self.zeroth_order_logs())
        super().log(logs, *args, **kwargs)

    def zeroth_order_logs(self) -> dict[str, float]:
        """What the last step measured, for the training log."""
        last = self.spsa.last
        assert last is not None
        logs = {
            "projected_gradient": last.projected_gradient,
            "eps": last.eps[0],
            "skipped_steps": float(self.spsa.skipped_steps),
        }
        if self.spsa.ranks is not None:
            logs["exchanged_bytes"] = float(self.exchanged_bytes)
        if not math.isnan(last.signal_to_noise):
            logs["signal_to_noise"] = last.signal_to_noise
        return logs


def zeroth_order(trainer_cls: type, *, check_slope: bool = True, **spsa_options: Any) -> type:
    """Turn a `transformers.Trainer` subclass into one that trains with forward passes only.

    The arguments of the class stay as they are; `args.learning_rate`, schedules, gradient accumulation, PEFT,
    evaluation, callbacks, logging and checkpoints keep working. The defaults are those of the `default` preset:
    `eps="auto"` and `second_moment_beta=0.9`, which makes the learning rate the change of a weight in a typical step.

    What the loss's gradient takes as constant (detached factors, masks) is kept at theta, and the first step compares
    the slope of the differences with autograd's on a row or two: docs/trainers.md.

    Args:
        trainer_cls: a subclass of `transformers.Trainer`.
        check_slope: False leaves out the comparison, and with it the only backward pass.
        spsa_options: further arguments of `zopro.SPSA` (eps, directions, queries, sides, ...).

    Raises:
        TypeError: `trainer_cls` is not such a class, or is without a backward pass already.
        InputError: an option that SPSA does not have.
        ValueError: its `training_step` computes a loss of its own instead of calling `compute_loss`.

    >>> from datasets import Dataset
    >>> from trl import SFTConfig, SFTTrainer
    >>> rows = Dataset.from_dict({"prompt": ["What is tea? "] * 8, "completion": ["Leaves in hot water."] * 8})
    >>> args = SFTConfig("runs/sft", max_steps=1, learning_rate=1e-4, use_cpu=True, bf16=False, report_to=[])
    >>> model = "HuggingFaceTB/SmolLM2-135M-Instruct"
    >>> zeroth_order(SFTTrainer)(model, args=args, train_dataset=rows).train().global_step
    1
    """
    if not (isinstance(trainer_cls, type) and hasattr(trainer_cls, "training_step")):
        raise TypeError(f"trainer_cls: must be a subclass of transformers.Trainer, got {trainer_cls!r}")
    if issubclass(trainer_cls, ZerothOrderMixin) or getattr(trainer_cls, "sweeps", False):
        raise TypeError(
            f"trainer_cls: must have a backward pass, got {trainer_cls.__name__}, which has none. Use it as it is."
        )
    check_options(spsa_options)
    if not reaches_loss(trainer_cls):
        raise ValueError(unreached(trainer_cls))
    namespace = {"spsa_options": spsa_options, "check_slope": check_slope, **zeroth_order_card(trainer_cls)}
    return type(f"ZerothOrder{trainer_cls.__name__}", (ZerothOrderMixin, trainer_cls), namespace)
