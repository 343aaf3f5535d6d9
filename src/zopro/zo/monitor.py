"""Whether a projected gradient is more than rounding, how large it typically is, and whether steps get lost."""

from __future__ import annotations

import logging
import math
from typing import Any

from torch import Tensor

from zopro.zo.eps import LOW_SIGNAL

logger = logging.getLogger(__name__)

REMEDY = "raise eps, use eps='auto', or perturb fp32 tensors"
REMEDY_CHOSEN = (
    "eps is chosen anew where that lasts; otherwise use more prompts a step, a float32 model, or a higher learning rate"
)
PATIENCE = 1  # doubtful steps one after another, after which a chosen eps is looked at again; doubles each time
MOVED_SHARE = 0.5  # of the entries that a step is to move


class SignalMonitor:
    """Signal-to-noise ratio of loss differences, with a warning where it is low."""

    def __init__(self) -> None:
        self.noise_floor = math.nan  # sigma, the standard deviation of one loss value; NaN: not measured
        self.low_steps = 0
        self.doubtful = 0  # of the last steps, one after another, since eps was looked at
        self.patience = PATIENCE
        self.doubted = False  # whether a chosen eps is to be looked at again
        self.blind = False  # whether it was chosen along a direction that showed no slope

    def ratio(self, difference: float) -> float:
        """|L+ - L-| over the standard deviation, sqrt(2) sigma, that rounding alone would give it."""
        return abs(difference) / (math.sqrt(2) * self.noise_floor)

    def watch(self, step: int, ratio: float, typical: float, chosen: bool) -> None:
        """Warn at the 1st, 2nd, 4th, 8th, ... step of low signal, so that a long run is not drowned in warnings.

        Args:
            ratio: of this step.
            typical: of the slope that steps are divided by, where they are: where this is high, a step of low signal is
                merely a short one, no reason to warn or to doubt; 0: they are not.
            chosen: eps was chosen from the noise floor, along one direction of one batch. It is doubted after 1, 2,
                4, ... steps of low signal, one after another; of any signal, where it was chosen blindly.
        """
        low = max(ratio, typical) < LOW_SIGNAL
        self.doubtful = self.doubtful + 1 if low or self.blind else 0
        if chosen and self.doubtful >= self.patience:
            self.doubted, self.doubtful, self.patience = True, 0, 2 * self.patience
        if not low:
            return
        self.low_steps += 1
        if self.low_steps & (self.low_steps - 1) == 0:
            logger.warning(
                "step %d: signal-to-noise %.2g is under %g (%d steps so far): the projected gradient "
                "is mostly rounding; %s",
                step,
                ratio,
                LOW_SIGNAL,
                self.low_steps,
                REMEDY_CHOSEN if chosen else REMEDY,
            )

    def state(self) -> dict[str, Any]:
        """What goes on with a run."""
        return {
            "noise_floor": self.noise_floor,
            "low_signal_steps": self.low_steps,
            "doubtful_steps": self.doubtful,
            "patience": self.patience,
            "doubted": self.doubted,
            "blind": self.blind,
        }

    def load(self, state: dict[str, Any]) -> None:
        self.noise_floor, self.low_steps = state["noise_floor"], state["low_signal_steps"]
        self.doubtful = state.get("doubtful_steps", 0)  # 0.1.0 has neither these nor the ones below
        self.patience = state.get("patience", PATIENCE)
        self.doubted, self.blind = state.get("doubted", False), state.get("blind", False)


class ResolutionMonitor:
    """How much of a step 16-bit parameters can hold: what is below their resolution is lost. Said once."""

    def __init__(self) -> None:
        self.said = self.looking = False
        self._dtypes: set[str] = set()
        self._moved: list[Tensor] = []
        self._meant: list[Tensor] = []

    def begin(self, step: int) -> None:
        """A step that is to be seen, if it is the 1st, 2nd, 4th, 8th, ... and nothing was said yet."""
        self.looking = not self.said and (step + 1) & step == 0

    def see(self, before: Tensor, after: Tensor) -> None:
        """One tensor's values before the step, and after it in single precision."""
        if not self.looking:
            return
        self._meant.append((after != before).sum())
        self._moved.append((after.to(before.dtype) != before).sum())
        self._dtypes.add(str(before.dtype).removeprefix("torch."))

    def end(self, step: int, lr: float) -> None:
        """Warn if the step moved less than half of the entries that it was to move."""
        self.looking = False
        moved, meant = (sum(int(count) for count in counts) for counts in (self._moved, self._meant))
        self._moved, self._meant = [], []
        if meant and moved < meant * MOVED_SHARE:
            self.said = True
            logger.warning(
                "step %d moves %.2g %% of the entries of %s tensors at learning rate %g, the rest of the step is below "
                "their resolution and lost: train float32 parameters (such as adapters) or raise the learning rate",
                step,
                100 * moved / meant,
                " and ".join(sorted(self._dtypes)),
                lr,
            )


class SecondMoment:
    """Adam's second moment of the projected gradient, as one scalar: a running mean square, bias-corrected."""

    def __init__(self, beta: float | None) -> None:
        self.beta = beta
        self.mean_square = 0.0
        self.weight = 0.0

    def root(self, gradients: list[float]) -> float:
        """Take in a step's projected gradients; return what to divide them by, never 0."""
        if self.beta is None:
            return 1.0
        square = sum(g * g for g in gradients) / len(gradients)
        self.mean_square = self.beta * self.mean_square + (1 - self.beta) * square
        self.weight = self.beta * self.weight + (1 - self.beta)
        return self.typical or 1.0

    @property
    def typical(self) -> float:
        """The running root mean square; 0: there is none."""
        return math.sqrt(self.mean_square / self.weight) if self.weight else 0.0
