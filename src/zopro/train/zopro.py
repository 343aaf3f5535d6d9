"""`ZOPrOTrainer`: TRL's RLOOTrainer made zeroth-order, with the paper's targeted directions.

ZOPrOTrainer(model, reward_funcs, args=ZOPrOConfig(...), train_dataset=..., peft_config=LoraConfig(...),
             previous_update=mu, reward_update=v).train()
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor
from trl import RLOOConfig

from zopro.config.fields import option
from zopro.config.step import PRESETS, StepOptions
from zopro.engine import Batch, Engine
from zopro.engine.local.engine import LocalEngine
from zopro.train.objectives import log_ratio_surrogate
from zopro.train.rehearsal import repeatable
from zopro.train.rloo import EngineRLOOTrainer
from zopro.train.zeroth_order import ZerothOrderMixin
from zopro.weights.adapters import tensor_name
from zopro.zo import Directions, Displacement, Estimate, Ranks, StepRecord, Targeted
from zopro.zo.directions import noise_source

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zopro.train.typed import RLOOArguments

TEXT_INPUTS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logps", "advantages"}


@dataclass
class ZOPrOConfig(StepOptions, RLOOConfig):
    """`trl.RLOOConfig` with the options of the zeroth-order step. Empty options, and None, take the preset's."""

    learning_rate: float = option(
        PRESETS["default"], "Step size; in the default preset the change of a weight in a typical step."
    )
    gradient_checkpointing: bool = option(False, "There is no backward pass: leave it off.")
    bf16: bool | None = option(False, "Autocast to bfloat16; off, since a model loads in its own dtype.")
    normalize: bool | None = option(None, "Scale targeted directions to root mean square 1.")
    second_moment_beta: float | None = option(
        None, "Decay of the mean square that scales the projected gradient; 0: none."
    )

    def __post_init__(self) -> None:
        RLOOConfig.__post_init__(self)
        for name in ("eps", "noise", "surrogate"):
            setattr(self, name, "" if getattr(self, name) is None else getattr(self, name))
        StepOptions.__post_init__(self)
        default = self.preset == "default"
        self.noise = self.noise or ("signs" if default else "gaussian")
        self.surrogate = self.surrogate or ("log_ratio" if default else "clipped")
        self.eps = self.eps or ("auto" if default else 1e-5)
        self.normalize = self.normalize if self.normalize is not None else default
        if self.second_moment_beta is None:
            self.second_moment_beta = 0.9 if default else 0.0


class ZOPrOTrainer(ZerothOrderMixin, EngineRLOOTrainer):
    """TRL's RLOOTrainer, zeroth-order, with ZOPrO's directions (Galatolo et al. 2025).

    Args:
        previous_update: name -> mu, the policy's update over the previous iteration. Without it the directions are
            noise alone (Gaussian: SPSA as in MeZO).
        reward_update: name -> v, the reward model's update over the same iteration.
        engine: what samples and gives log-probs of displaced policies, by default the local one over `model`. Another one
            holds the same policy and makes the same directions: it is displaced and moved by numbers alone.

    All other arguments are those of `EngineRLOOTrainer` and `trl.RLOOTrainer`; `args` is a `ZOPrOConfig`. Names may carry
    PEFT's wrapping.

    The default preset's loss is -mean(advantage * log-ratio), which has RLOO's gradient where the ratios are 1, but stays
    a line where RLOO's ratio is exponential and clipped at 0.8 and 1.2. So eps can be large enough for a difference to
    stand above bfloat16's rounding: on a 270M model that moved an answer's log-prob by 0.16 nats.
    """

    config_cls = ZOPrOConfig
    _given: Tensor | None = None  # log-probs from the engine, for the next loss
    known_loss = True  # tests compare both surrogates with autograd

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: ZOPrOConfig | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        previous_update: Mapping[str, Tensor] | None = None,
        reward_update: Mapping[str, Tensor] | None = None,
        engine: Engine | None = None,
        **kwargs: Unpack[RLOOArguments],
    ) -> None:
        self.previous_update = plain_names(previous_update)
        self.reward_update = plain_names(reward_update)
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        if engine is not None:
            if not engine.abilities.logprobs:
                raise ValueError(
                    f"engine: must give log-probs of given answers, got {type(engine).__name__}, which cannot"
                )
            self.engine = engine

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """SPSA, whose records the engine applies: to the same tensors if it is local, to its own as well if not."""
        optimizer = super().create_optimizer(model)
        if isinstance(self.engine, LocalEngine):
            self.engine.weights, self.spsa.move = self.spsa.weights, self.engine.apply
        else:
            self.spsa.move = self._move_both
        return optimizer

    def _move_both(self, record: StepRecord) -> None:
        self.spsa.weights.apply(record)
        self.engine.apply(record)

    def directions(self) -> Directions:
        noise = noise_source(self.args.noise, self.previous_update)
        if not self.previous_update:
            return noise
        steps, args = max(1, self.state.max_steps), self.args
        return Targeted(self.previous_update, self.reward_update, steps, args.decay, args.normalize, noise)

    def ranks(self) -> Ranks | None:
        if self.args.parallel == "data" or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().ranks()
        if self.accelerator.num_processes > 1:
            raise ValueError("parallel: with 'queries' args and trainer must be made inside zopro.system.launch.alone()")
        return Ranks("queries", self.accelerator.device)

    @property
    def on_policy(self) -> bool:
        """Whether every step's completions are drawn from the parameters that the step starts from."""
        return self.args.steps_per_generation * self.num_iterations <= self.args.gradient_accumulation_steps

    def loss_at_theta(self, inputs: Any) -> float | None:
        """L(theta) on-policy, where every ratio is 1: -mean(advantage), or 0 for log-ratios."""
        if self.args.sides == 2 or self.aux_loss_enabled or not self.on_policy:
            return None
        if self._takes_log_ratios(inputs):
            return 0.0
        loss = -float(inputs["advantages"].double().mean())
        return loss if self.spsa.ranks is None else self.spsa.ranks.mean([loss])[0]

    def _takes_log_ratios(self, inputs: Any) -> bool:
        return self.args.surrogate == "log_ratio" and self.on_policy and inputs.keys() <= TEXT_INPUTS

    def _takes_rollout_logprobs(self, model: Any) -> bool:
        # Of log-ratios the old log-probs are a constant offset, equal at theta + eps z and theta - eps z.
        return (self.args.surrogate == "log_ratio" and self.on_policy) or super()._takes_rollout_logprobs(model)

    def _estimate(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Estimate:
        """By the engine, which gets all of the step's displacements at once, where the loss is one of log-probs."""
        own = getattr(self._compute_loss, "__func__", None) is ZOPrOTrainer._compute_loss
        if not own or self.aux_loss_enabled or not inputs.keys() <= TEXT_INPUTS:
            return super()._estimate(model, inputs, *args, **kwargs)
        batch, engine = Batch.of_inputs(inputs), self.engine
        evaluator = self.spsa.evaluator() if isinstance(engine, LocalEngine) else None
        found: list[Tensor] = []

        def loss() -> Tensor:
            self._given = found.pop(0)
            try:
                return self._base_loss(model, dict(inputs), *args, **kwargs)
            finally:
                self._given = None

        evaluate = repeatable(self, loss)

        def values(at: Sequence[Displacement]) -> list[float]:
            found.extend(engine.logprobs(batch, at, self.temperature))
            return [float(evaluate()) for _ in at]

        with engine.during(evaluator) if isinstance(engine, LocalEngine) else nullcontext():
            return self.spsa.measure_by(values, evaluator, self.loss_at_theta(inputs))

    def _logprobs(self, model: Any, batch: Batch) -> Tensor:
        given, self._given = self._given, None
        return super()._logprobs(model, batch) if given is None else given

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if not (self._measuring and self._takes_log_ratios(inputs)):
            return super()._compute_loss(model, inputs)
        batch = Batch.of_inputs(inputs)
        tokens, _, _ = self._get_per_token_logps_and_entropies(model, *batch)
        return log_ratio_surrogate(batch.sums(tokens), inputs["old_logps"], inputs["advantages"])

    def spsa_arguments(self) -> dict[str, Any]:
        return {
            "eps": self.args.eps,
            "queries": self.args.queries,
            "sides": self.args.sides,
            "evaluation": self.args.evaluation,
            "second_moment_beta": self.args.second_moment_beta or None,
            "measure_noise": True,
        }


def plain_names(update: Mapping[str, Tensor] | None) -> Mapping[str, Tensor]:
    """The update by names without PEFT's wrapping; one that has such names already stays as lazy as it is."""
    update = update or {}
    if all(tensor_name(name) == name for name in update):
        return update
    return {tensor_name(name): update[name] for name in update}
