"""What zeroth-order trainers of policies have in common: the updates that directions are made of, and an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from zopro.choices import DIRECTIONS
from zopro.engine import Engine, OverTensors
from zopro.errors import InputError
from zopro.system.launch import exchanging
from zopro.train.rloo import EngineRLOOTrainer
from zopro.train.zeroth_order import ZerothOrderMixin
from zopro.weights.live import by_saved_names
from zopro.zo import Directions, Ranks, StepRecord, Targeted
from zopro.zo.directions import noise_source

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zopro.train.typed import RLOOArguments


class DirectedTrainer(ZerothOrderMixin, EngineRLOOTrainer):
    """TRL's RLOOTrainer whose steps are records along directions, taken by an engine.

    Args:
        previous_update: name -> mu, the policy's update over the previous iteration, which directions may be made of.
        reward_update: name -> v, the reward model's update over the same iteration.
        engine: what samples and gives log-probs of displaced policies, by default the local one over `model`. Another one
            holds the same policy and makes the same directions: it is displaced and moved by numbers alone.

    All other arguments are those of `EngineRLOOTrainer` and `trl.RLOOTrainer`. Names may carry PEFT's wrapping.

    Raises:
        InputError: an update that no step would look at.
        ValueError: an engine that gives no log-probs to a trainer that asks for them.
    """

    asks_logprobs: ClassVar[bool] = True
    to_follow: ClassVar[str] = ""  # what makes steps follow a previous update, where args say whether they do

    def __init__(
        self,
        model: Any,
        reward_funcs: Any,
        args: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        *,
        previous_update: Mapping[str, Tensor] | None = None,
        reward_update: Mapping[str, Tensor] | None = None,
        engine: Engine | None = None,
        **kwargs: Unpack[RLOOArguments],
    ) -> None:
        super().__init__(model, reward_funcs, args, train_dataset, eval_dataset, processing_class, **kwargs)
        self.previous_update = by_saved_names(previous_update, self.model, "previous_update")
        self.reward_update = by_saved_names(reward_update, self.model, "reward_update")
        self._check_updates()
        if engine is not None:
            if not hasattr(engine, "abilities"):
                raise InputError(f"engine: must follow zopro.engine.Engine, got {type(engine).__name__}.")
            if self.asks_logprobs and not engine.abilities.logprobs:
                raise ValueError(
                    f"engine: must give log-probs of given answers, got {type(engine).__name__}, which cannot"
                )
            self.engine = engine

    def _check_updates(self) -> None:
        """Raise InputError for an update that no step would look at."""
        used = self.follows_update or (self.draws_noise and DIRECTIONS[self.args.noise].of_update)
        if self.previous_update and not used:
            count = len(self.previous_update)
            raise InputError(
                f"previous_update: must be followed by the steps, got {count} tensors that none looks at. "
                f"{self.to_follow}, or leave it out."
            )
        if self.reward_update and not self.follows_update:
            remedy = "Pass previous_update" if self.targets() else self.to_follow
            raise InputError(
                "reward_update: must come with a previous_update that is followed, since noise alone does not avoid it, "
                f"got {len(self.reward_update)} tensors. {remedy}, or leave it out."
            )

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Whose records the engine applies: to the same tensors if it is local, to its own as well if not."""
        optimizer = super().create_optimizer(model)
        if isinstance(self.engine, OverTensors):
            self.engine.hold(self.spsa.weights)
            self.spsa.move = self.engine.apply
        else:
            self.spsa.move = self._move_both
        return optimizer

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        self._follow_anew()
        loss: Tensor = super().training_step(*args, **kwargs)
        return loss

    def _follow_anew(self) -> None:
        """In a second training, whose steps are counted on, d begins anew."""
        before = self.spsa.step_count - self.state.global_step
        directions = getattr(self.spsa.directions, "base", self.spsa.directions)
        if isinstance(directions, Targeted) and 0 <= before != directions.first_step:
            directions.begin(before, self.state.max_steps)

    def _move_both(self, record: StepRecord) -> None:
        self.spsa.weights.apply(record)
        self.engine.apply(record)

    def directions(self) -> Directions:
        """Along the previous update and noise, or noise alone where there is none."""
        noise = noise_source(self.args.noise, self.previous_update)
        if not self.follows_update:
            return noise
        steps, args = max(1, self.state.max_steps), self.args
        return Targeted(self.previous_update, self.reward_update, steps, args.decay, args.normalize, noise)

    @property
    def follows_update(self) -> bool:
        """Whether steps go along the previous update, beside noise."""
        return bool(self.previous_update) and self.targets()

    @property
    def draws_noise(self) -> bool:
        """Whether directions have noise in them, which `noise` may make of the previous update."""
        return True

    def targets(self) -> bool:
        """Whether a previous update is followed, and not only what noise is made of."""
        return True

    def ranks(self) -> Ranks | None:
        if self.args.parallel == "data" or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().ranks()
        if self.accelerator.num_processes > 1:
            raise ValueError("parallel: with 'queries' args and trainer must be made inside zopro.system.launch.alone()")
        return Ranks("queries", exchanging(self.accelerator.device))


def moves(update: Mapping[str, Tensor]) -> bool:
    """Whether an update is not 0; a lazy one is read as far as it is."""
    return any(bool(tensor.any()) for tensor in update.values())
