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
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import RLOOConfig
from trl.data_utils import is_conversational

from zopro.config.evolution import EvolutionOptions
from zopro.config.fields import for_parsers, option
from zopro.config.step import DirectionOptions
from zopro.engine import Batch, Rollouts, Sampling
from zopro.errors import InputError
from zopro.system.clock import timed
from zopro.train.arguments import as_if_more_answers, check_guess, check_kinds, check_several
from zopro.train.directed import DirectedTrainer
from zopro.train.kept import Asked, KeptRewards, checked_folder
from zopro.train.papers import EVOLUTION
from zopro.train.population import Scored, flat, joined, mean_of_finite, numbers, total
from zopro.train.rows import check_text
from zopro.zo import ES, Displacement

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from zopro.train.typed import RLOOArguments

logger = logging.getLogger(__name__)

ALIKE = "all members had the same reward: raise sigma, population or the number of prompts, or give partial credit"
UNSCORED = "no answer had a reward from every member: let the reward functions score more answers"


@for_parsers
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
    sigma_guess: float | None = option(None, "With sigma auto where it begins, such as where an earlier training ended.")

    def __post_init__(self) -> None:
        if self.beta:
            raise ValueError(f"beta: must be 0, since no log-probs are taken, got {self.beta!r}. Use anchor")
        check_kinds(self, num_generations=1, population=1)
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self, name):
                raise InputError(f"{name}: must be off, since displaced members answer. Pass engine= to ESTrainer.")
        if self.num_iterations != 1:
            raise InputError(f"num_iterations: must be 1, since every step asks anew, got {self.num_iterations}.")
        given = copy.copy(self)
        try:  # TRL wants a baseline of answers; a population has its members.
            with as_if_more_answers(self, 2 if self.num_generations == 1 else 1):
                RLOOConfig.__post_init__(self)
        except ValueError:
            RLOOConfig.__post_init__(given)  # says it with the numbers that were given
            raise
        check_several(self)
        EvolutionOptions.__post_init__(self)
        check_guess(self, "sigma_guess", "sigma")
        DirectionOptions.__post_init__(self)
        self.noise = self.noise or "gaussian"


class ESTrainer(DirectedTrainer):
    """Evolution strategies (Salimans et al. 2017; Qiu et al. 2025) with TRL's arguments, prompts and reward functions.

    Its arguments are those of `DirectedTrainer`; `args` is an `ESConfig`. Prompts come in the order of TRL's RLOOTrainer.

    Args:
        kept: a folder for rewards as they come. A training that is begun or resumed with the same folder asks for none
            that are in it; `zopro.train.checkpoints.clear` removes what checkpoints have.

    Raises:
        InputError: what `DirectedTrainer` refuses; another `advantage` than "rloo", since there are none; `targeted`
            without an update to follow. While training, prompts with images.

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

    _name, _paper = "evolution strategies", EVOLUTION
    _tag_names: ClassVar[list[str]] = ["trl", "zopro", "evolution-strategies"]
    config_cls = ESConfig
    optimizer_cls = ES
    asks_logprobs = False
    to_follow = "Set targeted=True in ESConfig"

    def __init__(self, *args: Any, kept: str | Path | None = None, **kwargs: Unpack[RLOOArguments]) -> None:
        if (advantage := kwargs.get("advantage", "rloo")) != "rloo":
            raise InputError(f"advantage: must be 'rloo' or left out, since ES takes no advantages, got {advantage!r}.")
        super().__init__(*args, **kwargs)
        if self.args.targeted and not self.previous_update:
            raise InputError("targeted: must be False without an update to follow, got True. Pass previous_update.")
        self._parts = math.gcd(self.args.steps_per_generation, self.args.gradient_accumulation_steps)
        self._folder = None if kept is None else checked_folder(kept)
        self._kept: KeptRewards | None = None
        self._extras: list[dict[str, list[Any]]] = []  # what reward functions add to the table, by member asked
        self._shown: tuple[list[Any], list[Any], list[list[float]], dict[str, list[Any]]] = ([], [], [], {})

    def spsa_arguments(self) -> dict[str, Any]:
        names = ("population", "antithetic", "sigma", "shaping", "normalize", "momentum", "second_moment", "anchor")
        return {name: getattr(self.args, name) for name in (*names, "sigma_guess")}

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
        skipped = {ALIKE: es.skipped_steps - es.unscored_steps, UNSCORED: es.unscored_steps}
        for cause, steps in skipped.items() if 2 * es.skipped_steps > es.step_count else ():
            if steps:
                logger.warning("%d of %d steps were skipped, for %s", steps, es.step_count, cause)

    def training_step(self, model: Any, inputs: list[dict[str, Any]], num_items_in_batch: Any = None) -> Tensor:
        """One micro-batch of prompts, answered by all members; the optimiser then takes the step."""
        began = time.perf_counter()
        self._follow_anew()
        model.train()
        parts = self.args.steps_per_generation  # of the rows that TRL's loader gives again for each of them
        size = len(inputs) // parts
        inputs = inputs[self._step % parts * size :][:size]
        with self._counting():
            rows = self.spsa.measure_by(lambda at: [flat(member) for member in self._members(inputs, at)])
            blocks = self.accelerator.num_processes  # of as many numbers from each rank
            members = [joined(row, blocks, len(inputs)) for row in rows]
            self._step += 1
            reward = self._log_members(members)
            self._note_drawn(reward, inputs)
        self.spsa.accumulate([member.rewards for member in members])
        if self.log_completions and self._shown[0]:  # else no member was this rank's
            self._fill_table(members)
        self._current_train_step_time += time.perf_counter() - began
        if self.accelerator.sync_gradients:  # the step's last micro-batch
            self._metrics["train"]["step_time"].append(self._current_train_step_time)
            self._current_train_step_time = 0.0
        # As transformers returns it: a micro-batch's part of the step's loss.
        return torch.tensor(-reward / self.current_gradient_accumulation_steps, device=self.args.device)

    def _members(self, inputs: list[dict[str, Any]], at: Sequence[Displacement]) -> list[Scored]:
        prompts = [row["prompt"] for row in inputs]
        prompt_ids, images, fields = self._tokenize_prompts(prompts)
        check_text(inputs, images, fields)
        told = [self._decoded(prompts, rollout) for rollout in self._answers(prompt_ids, at)]
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
        tokens = sum(map(len, prompt_ids))
        return [self._scored(ids, found.rewards, tokens) for (_, ids), found in zip(told, asked, strict=True)]

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """transformers' own. The loss is the mean reward with the other sign, as it is while training."""
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        output.metrics[f"{metric_key_prefix}_loss"] = -mean_of_finite(self._metrics["eval"].get("reward", []))
        return output

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        return torch.tensor(-self._metrics["eval"]["reward"][-1], device=self.args.device)

    def _logprobs(self, model: Any, batch: Batch) -> Tensor:
        """None are taken: TRL's evaluation sums them, and nothing looks at the sum."""
        return torch.zeros(batch.completion_ids.shape, device=batch.completion_ids.device)

    @timed("rollout")
    def _answers(self, prompt_ids: list[list[int]], at: Sequence[Displacement]) -> list[Rollouts]:
        self._check_weights()
        return self.engine.sample(*self._sampling(prompt_ids), at)

    def _sampling(self, prompt_ids: list[list[int]]) -> tuple[list[list[int]], int, Sampling]:
        prompts, copies, options = super()._sampling(prompt_ids)
        return prompts, copies, dataclasses.replace(options, do_sample=options.do_sample and not self.args.greedy)

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
        given = copy.deepcopy((inputs, prompts, completions, ids))  # what functions change is not the next member's
        everyone = self._calculate_rewards(*given)
        asked = Asked(everyone[first : first + len(inputs)].tolist(), dict(self._pending_metrics))
        self._extras.append(dict(self._pending_extra_logs))
        self._pending_metrics.clear()
        self._pending_extra_logs.clear()
        if self._kept is not None:
            self._kept.keep(member, prompts, completions, asked)
        return asked

    def _scored(self, ids: list[list[int]], table: list[list[float]], prompt_tokens: int) -> Scored:
        weights = self.reward_weights.tolist()
        return Scored(
            [total(row, weights, self.reward_clip_range) for row in table],
            [float(len(row)) for row in ids],
            [float(row[-1] in (*self.eos_token_ids, self._tokenizer.pad_token_id)) for row in ids],
            [list(told) for told in zip(*table, strict=True)],
            float(prompt_tokens),
        )

    def _log_members(self, members: list[Scored]) -> float:
        """Numbers of the step for the training log; returns the mean reward."""
        each = math.gcd(self.num_generations, len(members[0].rewards) // self.accelerator.num_processes)
        metrics, found = self._metrics["train"], numbers(members, self.reward_func_names, each)
        for name, value in found.items():
            metrics[name].append(value)
        metrics["answers"] = [float(self._step * len(members) * len(members[0].rewards))]  # so far
        self.state.num_input_tokens_seen += int(sum(member.prompt_tokens + sum(member.lengths) for member in members))
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        return found["reward"]

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
        means = [mean_of_finite(answer) for answer in zip(*(member.rewards for member in members), strict=True)]
        logs["advantages"].extend(own - other for own, other in zip(members[0].rewards, means, strict=True))

    def zeroth_order_logs(self) -> dict[str, float]:
        """SPSA's, whose eps is sigma; no slope was measured, and no noise shows where members answer alike."""
        logs = super().zeroth_order_logs()
        logs = {"sigma": logs.pop("eps"), **logs}
        return {name: value for name, value in logs.items() if name != "projected_gradient" and math.isfinite(value)}
