"""`ESTrainer`: evolution strategies for language models. Displaced policies answer, rewards are all that is looked at.

ESTrainer(model, reward_funcs, args=ESConfig(population=32, sigma=0.01, ...), train_dataset=..., peft_config=...).train()

Every member of the population answers the step's prompts with the same random numbers; the step is made of the members'
mean rewards (`zopro.zo.evolution`). No log-probs, no reference policy, no gradient of anything.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import RLOOConfig
from trl.data_utils import is_conversational

from zopro.config.evolution import EvolutionOptions
from zopro.config.fields import option
from zopro.config.step import DirectionOptions
from zopro.engine import Rollouts
from zopro.errors import InputError
from zopro.system.clock import timed
from zopro.train.arguments import as_if_more_answers, check_whole
from zopro.train.directed import DirectedTrainer
from zopro.train.kept import Asked, KeptRewards
from zopro.zo import ES, Displacement
from zopro.zo.shaping import mean

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zopro.train.typed import RLOOArguments

logger = logging.getLogger(__name__)


@dataclass
class ESConfig(EvolutionOptions, DirectionOptions, RLOOConfig):
    """`trl.RLOOConfig` with the options of evolution strategies; what TRL has for log-probs and advantages is not used.

    >>> args = ESConfig("runs/short", population=16, sigma="auto")
    >>> args.num_generations, args.beta
    (1, 0.0)
    """

    learning_rate: float = option(1e-2, "Step size: the change of a weight in a step, if the step is normalised.")
    lr_scheduler_type: str = option("constant", "How the learning rate changes.")
    gradient_checkpointing: bool = option(False, "There is no backward pass: leave it off.")
    bf16: bool | None = option(False, "Autocast to bfloat16; off, since a model loads in its own dtype.")
    beta: float = option(0.0, "Must be 0: there is no reference policy to stay near. Use anchor.")
    num_generations: int = option(1, "Answers of each member to each prompt.")
    normalize: bool = option(True, "Scale a step to the learning rate, whatever population and sigma are.")

    def __post_init__(self) -> None:
        if self.beta:
            raise ValueError(f"beta: must be 0, since no log-probs are taken, got {self.beta}. Use anchor")
        check_whole(self, 1, "num_generations", "population")
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self, name):
                raise InputError(f"{name}: must be off, since displaced members answer. Pass engine= to ESTrainer.")
        given = copy.copy(self)
        try:  # TRL wants a baseline of answers; a population has its members.
            with as_if_more_answers(self, 2 if self.num_generations == 1 else 1):
                RLOOConfig.__post_init__(self)
        except ValueError:
            RLOOConfig.__post_init__(given)  # says it with the numbers that were given
            raise
        EvolutionOptions.__post_init__(self)
        DirectionOptions.__post_init__(self)
        self.noise = self.noise or "gaussian"


class Scored(NamedTuple):
    """A member's answers to this rank's prompts, as numbers."""

    rewards: list[float]  # of each answer
    length: float  # mean, in tokens
    ended: float  # share
    means: list[float]  # of each reward function


class ESTrainer(DirectedTrainer):
    """Evolution strategies (Salimans et al. 2017; Qiu et al. 2025) with TRL's arguments, prompts and reward functions.

    Its arguments are those of `DirectedTrainer`; `args` is an `ESConfig`. Prompts come in the order of TRL's RLOOTrainer.

    Args:
        kept: a folder for rewards as they come. A training that is begun or resumed with the same folder asks for none
            that are in it; `zopro.train.checkpoints.clear` removes what checkpoints have.

    >>> from datasets import Dataset
    >>> from peft import LoraConfig
    >>> def short(completions, **columns):  # any TRL reward function
    ...     return [-float(len(completion)) for completion in completions]
    >>> rows = Dataset.from_dict({"prompt": ["What is rust?", "What is tea?"]})
    >>> args = ESConfig("runs/short", population=4, max_steps=1, per_device_train_batch_size=2, report_to=[])
    >>> lora = LoraConfig(task_type="CAUSAL_LM")
    >>> trainer = ESTrainer("HuggingFaceTB/SmolLM2-135M-Instruct", short, args, rows, peft_config=lora)
    >>> trainer.train().global_step
    1
    """

    config_cls = ESConfig
    optimizer_cls = ES
    asks_logprobs = False

    def __init__(self, *args: Any, kept: Path | None = None, **kwargs: Unpack[RLOOArguments]) -> None:
        super().__init__(*args, **kwargs)
        self._folder = kept
        self._kept: KeptRewards | None = None
        self._extras: list[dict[str, list[Any]]] = []  # what reward functions add to the table, by member asked
        self._shown: tuple[list[Any], list[Any], list[list[float]], dict[str, list[Any]]] = ([], [], [], {})

    def spsa_arguments(self) -> dict[str, Any]:
        names = ("population", "antithetic", "sigma", "shaping", "normalize", "momentum", "second_moment", "anchor")
        return {name: getattr(self.args, name) for name in names}

    def targets(self) -> bool:
        return bool(self.args.targeted)

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's training. Raises RuntimeError: ranks end with different parameters."""
        if self._folder is not None:
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            self._kept = KeptRewards(self._folder, rank)
        return super().train(*args, **kwargs)

    def _check_steps(self) -> None:
        es: ES = self.spsa
        if 2 * es.skipped_steps > es.step_count:
            logger.warning(
                "%d of %d steps were skipped, for all members had the same reward: raise sigma, population or the number "
                "of prompts, or give partial credit",
                es.skipped_steps,
                es.step_count,
            )

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch of prompts, answered by all members; the optimiser then takes the step."""
        began = time.perf_counter()
        model.train()
        parts = self.args.steps_per_generation  # of the rows that TRL's loader gives again for each of them
        size = len(inputs) // parts
        inputs = inputs[self._step % parts * size :][:size]
        with self._counting():
            rows = self.spsa.measure_by(lambda at: [_flat(member) for member in self._members(inputs, at)])
            blocks = self.accelerator.num_processes  # of as many numbers from each rank
            members = [_joined(row, blocks, len(inputs)) for row in rows]
            self._step += 1
            means = self._log_members(members)
            self._note_drawn(mean(means), inputs)
        self.spsa.accumulate([member.rewards for member in members])
        if self.log_completions and self._shown[0]:  # else no member was this rank's
            self._fill_table(members)
        self._metrics["train"]["step_time"].append(time.perf_counter() - began)
        return torch.tensor(-mean(means), device=self.args.device)

    def _members(self, inputs: list[dict[str, Any]], at: Sequence[Displacement]) -> list[Scored]:
        prompts = [row["prompt"] for row in inputs]
        told = [self._decoded(prompts, rollout) for rollout in self._answers(prompts, at)]
        known = self._known(prompts, at, [completions for completions, _ in told])
        self._extras.clear()
        asked = [
            found or self._ask(member, inputs, prompts, *answers)
            for member, answers, found in zip(at, told, known, strict=True)
        ]
        self._shown = prompts, told[0][0], asked[0].rewards, {} if known[0] else self._extras[0]
        for name in sorted({name for found in asked for name in found.logged}):  # of this rank's members and prompts
            logged = [value for found in asked for value in found.logged.get(name, [])]
            self._metrics["train"][name].append(sum(logged) / len(logged))
        return [self._scored(ids, found.rewards) for (_, ids), found in zip(told, asked, strict=True)]

    @timed("rollout")
    def _answers(self, prompts: list[Any], at: Sequence[Displacement]) -> list[Rollouts]:
        self._check_weights()
        prompt_ids, *_ = self._tokenize_prompts(prompts)
        prompts, copies, options = self._sampling(prompt_ids)
        options = dataclasses.replace(options, do_sample=options.do_sample and not self.args.greedy)
        return self.engine.sample(prompts, copies, options, at)

    def _decoded(self, prompts: list[Any], rollout: Rollouts) -> tuple[list[Any], list[list[int]]]:
        """Completions as reward functions get them, and their tokens."""
        ids = rollout.answers()
        texts = self.processing_class.batch_decode(ids, skip_special_tokens=True)
        talks = is_conversational({"prompt": prompts[0]})
        return [[{"role": "assistant", "content": text}] for text in texts] if talks else texts, ids

    def _known(self, prompts: list[Any], at: Sequence[Displacement], completions: list[list[Any]]) -> list[Asked | None]:
        """What was asked for before, of each member; where ranks ask together, what all of them know."""
        if self._kept is None:
            return [None] * len(at)
        found = [self._kept.get(member, prompts, answers) for member, answers in zip(at, completions, strict=True)]
        if self.accelerator.num_processes > 1:
            everyone = self.spsa.ranks.gather([float(asked is not None) for asked in found])
            found = [asked if all(knows) else None for asked, *knows in zip(found, *everyone, strict=True)]
        return found

    def _ask(
        self,
        member: Displacement,
        inputs: list[dict[str, Any]],
        prompts: list[Any],
        completions: list[Any],
        ids: list[list[int]],
    ) -> Asked:
        first = self.accelerator.process_index * len(inputs)
        everyone = self._calculate_rewards(inputs, list(prompts), list(completions), ids)
        asked = Asked(everyone[first : first + len(inputs)].tolist(), dict(self._pending_metrics))
        self._extras.append(dict(self._pending_extra_logs))
        for pending in (self._pending_metrics, self._pending_extra_logs):
            pending.clear()
        if self._kept is not None:
            self._kept.keep(member, prompts, completions, asked)
        return asked

    def _scored(self, ids: list[list[int]], table: list[list[float]]) -> Scored:
        weights = self.reward_weights.tolist()
        ended = [row[-1] in (*self.eos_token_ids, self._tokenizer.pad_token_id) for row in ids]
        return Scored(
            [self._total(row, weights) for row in table],
            mean([len(row) for row in ids]),
            sum(ended) / len(ended),
            [mean([row[i] for row in table if not math.isnan(row[i])] or [math.nan]) for i in range(len(weights))],
        )

    def _total(self, rewards: list[float], weights: list[float]) -> float:
        """The weighted sum of what applies; NaN where no function does."""
        apply = [weight * reward for weight, reward in zip(weights, rewards, strict=True) if not math.isnan(reward)]
        if not apply:
            return math.nan
        low, high = self.reward_clip_range or (-math.inf, math.inf)
        return min(max(sum(apply), low), high)

    def _log_members(self, members: list[Scored]) -> list[float]:
        """Numbers of the step for the training log; returns the mean reward of each member."""
        means = [mean([reward for reward in member.rewards if math.isfinite(reward)] or [math.nan]) for member in members]
        metrics = {
            "reward": mean(means),
            "reward_best": max(means),
            "reward_spread": math.sqrt(mean([(reward - mean(means)) ** 2 for reward in means])),
            "completions/mean_length": mean([member.length for member in members]),
            "completions/clipped_ratio": 1 - mean([member.ended for member in members]),
            "ended": mean([member.ended for member in members]),
        }
        for number, name in enumerate(self.reward_func_names):
            metrics[f"rewards/{name}/mean"] = mean([member.means[number] for member in members])
        for name, value in metrics.items():
            self._metrics["train"][name].append(value)
        self._metrics["train"]["answers"] = [float(self._step * len(members) * len(members[0].rewards))]  # so far
        return means

    def _fill_table(self, members: list[Scored]) -> None:
        """TRL's table of completions, the first member's; an advantage is a reward less what members get in the mean."""
        logs, (*columns, extra) = self._logs, self._shown
        prompts, completions, rewards = (gather_object(column) for column in columns)
        for column in sorted({*logs["extra"], *gather_object(list(extra))}):
            values = logs["extra"][column]
            values.extend([None] * (len(logs["prompt"]) - len(values)))  # of rows before that have none
            values.extend(gather_object(extra.get(column, [None] * len(columns[0]))))
        logs["prompt"].extend(prompts)
        logs["completion"].extend(completions)
        for name, values in zip(self.reward_func_names, zip(*rewards, strict=True), strict=True):
            logs["rewards"][name].extend(values)
        means = [
            mean([r for r in answer if math.isfinite(r)] or [math.nan])
            for answer in zip(*(member.rewards for member in members), strict=True)
        ]
        logs["advantages"].extend(own - other for own, other in zip(members[0].rewards, means, strict=True))

    def zeroth_order_logs(self) -> dict[str, float]:
        last, es = self.spsa.last, self.spsa
        logs = {"sigma": last.eps[0], "skipped_steps": float(es.skipped_steps)}
        if es.ranks is not None:
            logs["exchanged_bytes"] = float(self.exchanged_bytes)
        if math.isfinite(last.signal_to_noise):
            logs["signal_to_noise"] = last.signal_to_noise
        return logs


def _flat(member: Scored) -> list[float]:
    """A member as ranks exchange it."""
    return [*member.rewards, member.length, member.ended, *member.means]


def _joined(row: list[float], ranks: int, answers: int) -> Scored:
    """The inverse of `_flat`, of all ranks' parts."""
    width = len(row) // ranks
    parts = [row[rank * width : (rank + 1) * width] for rank in range(ranks)]
    length, ended, *means = (mean(column) for column in zip(*(part[answers:] for part in parts), strict=True))
    return Scored([reward for part in parts for reward in part[:answers]], length, ended, means)
