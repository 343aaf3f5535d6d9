"""`ZOPrOTrainer`: TRL's RLOOTrainer made zeroth-order, with the paper's targeted directions.

ZOPrOTrainer(model, reward_funcs, args=ZOPrOConfig(...), train_dataset=..., peft_config=LoraConfig(...),
             previous_update=mu, reward_update=v).train()
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from trl import RLOOConfig

from zopro.config.fields import check, for_parsers, option
from zopro.config.step import PRESETS, StepOptions
from zopro.engine import Batch
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.rollouts import MAX_BATCH_TOKENS
from zopro.train.arguments import check_guess, check_kinds
from zopro.train.directed import DirectedTrainer, moves
from zopro.train.evaluations import counting
from zopro.train.objectives import log_ratio_surrogate
from zopro.train.papers import FZOO, ZOPRO
from zopro.train.rehearsal import repeatable
from zopro.train.step_kl import STEP_KL, slopes_along, step_kl, two_sided
from zopro.zo import Displacement, Estimate
from zopro.zo.directions import there

TEXT_INPUTS = {"prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "old_logps", "advantages"}


@for_parsers
@dataclass
class ZOPrOConfig(StepOptions, RLOOConfig):
    """`trl.RLOOConfig` with the options of the zeroth-order step. Empty options, and None, take the preset's.

    >>> default, paper = ZOPrOConfig("runs/short"), ZOPrOConfig("runs/short", preset="paper")
    >>> default.eps, default.learning_rate, paper.eps, paper.learning_rate
    ('auto', 0.0001, 1e-05, 1.0)
    """

    learning_rate: float | None = option(
        None,
        "Step size: in the default preset the change of a weight in a typical step (1e-4), in the paper's relative to "
        "the previous update (1).",
    )
    gradient_checkpointing: bool = option(False, "There is no backward pass: leave it off.")
    bf16: bool | None = option(False, "Autocast to bfloat16; off, since a model loads in its own dtype.")
    normalize: bool | None = option(None, "Scale targeted directions to root mean square 1.")
    second_moment_beta: float | None = option(
        None, "Decay of the mean square that scales the projected gradient; 0: none."
    )
    eps_guess: float | None = option(
        None,
        "With eps auto: one that did before, in place of a step's length; kept if 11 evaluations do not speak against it",
    )

    def __post_init__(self) -> None:
        check_kinds(self, queries=1, num_generations=2)
        if self.learning_rate is None:
            self.learning_rate = PRESETS.get(self.preset, 0.0)
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
        beta = self.second_moment_beta
        check(0 <= beta < 1, "second_moment_beta", "must lie in [0, 1)", beta, "0: none.")
        check_guess(self, "eps_guess", "eps")


class ZOPrOTrainer(DirectedTrainer):
    """TRL's RLOOTrainer, zeroth-order, with ZOPrO's directions (Galatolo et al. 2025).

    Its arguments are those of `DirectedTrainer`; `args` is a `ZOPrOConfig`. Without `previous_update` the directions are
    noise alone (Gaussian: SPSA as in MeZO).

    The default preset's loss is -mean(advantage * log-ratio), which has RLOO's gradient where the ratios are 1, but stays
    a line where RLOO's ratio is exponential and clipped at 0.8 and 1.2. So eps can be large enough for a difference to
    stand above bfloat16's rounding: on a 270M model that moved an answer's log-prob by 0.16 nats.

    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> def short(completions, **columns):  # any TRL reward function
    ...     return [-float(len(completion)) for completion in completions]
    >>> rows = Dataset.from_dict({"prompt": ["What is rust?", "What is tea?"]})
    >>> args = ZOPrOConfig("runs/short", max_steps=1, per_device_train_batch_size=4, report_to=[])
    >>> lora = LoraConfig(task_type="CAUSAL_LM")
    >>> trainer = ZOPrOTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", short, args, rows, peft_config=lora)
    >>> trainer.train().global_step
    1
    """

    _name, _paper = "ZOPrO", ZOPRO
    _tag_names: ClassVar[list[str]] = ["trl", "zopro", "zeroth-order"]
    config_cls = ZOPrOConfig
    _given: Tensor | None = None  # log-probs from the engine, for the next loss
    _slopes: tuple[int, bool, list[Tensor]] = (-1, True, [])  # a step, whether two-sided, and its micro-batches' slopes
    known_loss = True  # tests compare both surrogates with autograd

    @property
    def on_policy(self) -> bool:
        """Whether every step's completions are drawn from the parameters that the step starts from."""
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """As `DirectedTrainer`'s; with `evaluation: batched` the engine takes all displacements of a step at once.

        Raises InputError: the learning rate is relative to a previous update, and there is none.
        """
        rate, paper = self.args.learning_rate, self.args.preset == "paper"
        check(
            not paper or rate != PRESETS["paper"] or moves(self.previous_update),
            "learning_rate",
            "must be given with the paper preset where there is no previous_update, to which its 1 is relative",
            rate,
            "MeZO's for adapters is 1e-4.",
        )
        optimizer = super().create_optimizer(model)
        self._slopes = (-1, True, [])  # a training before may have left a part of a step that comes again
        if isinstance(self.engine, LocalEngine) and self.args.evaluation == "batched":
            self.engine.logprob_tokens = MAX_BATCH_TOKENS
        return optimizer

    def loss_at_theta(self, inputs: Any) -> float | None:
        """L(theta) on-policy, where every ratio is 1: -mean(advantage), or 0 for log-ratios."""
        if self.args.sides == 2 or self.aux_loss_enabled or not self.on_policy:
            return None
        if self._takes_log_ratios(inputs):
            return 0.0
        loss = -float(there.in_float64(inputs["advantages"]).mean())
        return loss if self.spsa.ranks is None else self.spsa.ranks.mean([loss])[0]

    def _takes_log_ratios(self, inputs: Any) -> bool:
        return self.args.surrogate == "log_ratio" and self.on_policy and inputs.keys() <= TEXT_INPUTS

    def _takes_rollout_logprobs(self, model: Any) -> bool:
        # Of log-ratios the old log-probs are a constant offset, equal at theta + eps z and theta - eps z. The KL penalty
        # gets their rounding: docs/performance.md says how much that is.
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
            given = engine.logprobs(batch, at, self.temperature)
            self._note_slopes(at, [batch.sums(tokens) for tokens in given])
            found.extend(given)
            seen(len(at))
            return [float(evaluate()) for _ in at]

        here = engine.during(evaluator) if isinstance(engine, LocalEngine) else nullcontext()
        with here, counting(self.spsa) as seen:
            return self.spsa.measure_by(values, evaluator, self.loss_at_theta(inputs))

    def _note_slopes(self, at: Sequence[Displacement], sums: Sequence[Tensor]) -> None:
        """For `step_kl`; one-sided, what all z have in common is lost in the differences among them."""
        (step, _, known), both = self._slopes, two_sided(at)
        found = slopes_along(at, sums) if both or not self.z_alike else None
        if found is not None:
            now = self.spsa.step_count
            self._slopes = now, both, [*(known if step == now else []), found]

    @property
    def z_alike(self) -> bool:
        """Whether all z of a step have a part in common."""
        return self.follows_update

    def zeroth_order_logs(self) -> dict[str, float]:
        """And `step_kl`: how far the step went from the policy before it, in nats an answer (`zopro.train.step_kl`)."""
        logs, (_, both, batches) = super().zeroth_order_logs(), self._slopes
        if batches and len(batches[0]) == len(self.spsa.last.coefficients):  # else other ranks have the others
            logs[STEP_KL] = step_kl(self.spsa.last, torch.cat(batches, 1), both)
        return logs

    def _logprobs(self, model: Any, batch: Batch) -> Tensor:
        given, self._given = self._given, None
        return super()._logprobs(model, batch) if given is None else given

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if not (self._measuring and self._takes_log_ratios(inputs)):
            return super()._compute_loss(model, inputs)
        batch = Batch.of_inputs(inputs)
        tokens, _, _ = self._get_per_token_logps_and_entropies(model, *batch)
        return log_ratio_surrogate(*there.summable(batch.sums(tokens), inputs["old_logps"], inputs["advantages"]))

    def spsa_arguments(self) -> dict[str, Any]:
        return {
            "eps": self.args.eps,
            "eps_guess": self.args.eps_guess,
            "queries": self.args.queries,
            "sides": self.args.sides,
            "evaluation": "sequential" if self.args.evaluation == "batched" else self.args.evaluation,
            "second_moment_beta": self.args.second_moment_beta or None,
            "measure_noise": True,
        }


class FZOOTrainer(ZOPrOTrainer):
    """ZOPrO's loss by FZOO's step (Dang et al. 2025, arXiv 2506.09034): over the standard deviation of the losses.

    Departures: the losses of a step's queries are taken one after another, unless `evaluation: batched` has them in one
    batch of displaced models, as theirs are; the learning rate is their eta / eps (`zopro.zo.SPSAStrategy`); L(theta) is
    known where answers are the policy's own. Its signs are `noise="rademacher"`, which `zopro.train.methods.fzoo` sets.

    It has no use for `second_moment_beta`.

    Raises InputError: `args` has other `sides` than 1, or fewer than two `queries`.
    """

    _name, _paper = "FZOO", FZOO
    _tag_names: ClassVar[list[str]] = ["trl", "zopro", "fzoo", "zeroth-order"]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        args = self.args
        check(args.sides == 1, "sides", "must be 1 for FZOO, whose differences are one-sided", args.sides)
        check(args.queries > 1, "queries", "must be at least 2 for FZOO, which divides by their deviation", args.queries)
        return super().create_optimizer(model)

    def spsa_arguments(self) -> dict[str, Any]:
        return {**super().spsa_arguments(), "second_moment_beta": None, "over_std": True}
