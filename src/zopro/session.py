"""One run in progress: its data, models and records, opened once and shared by the stages."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model

from zopro import judges, tasks
from zopro.callbacks import MetricsCallback, SnapshotCallback
from zopro.checkpoints import newest
from zopro.config import RunConfig
from zopro.engine import models
from zopro.engine.abilities import abilities
from zopro.engine.causal import causal_parts
from zopro.engine.rollouts import Rollouts, generate
from zopro.errors import InputError
from zopro.launch import Job
from zopro.memory import peak_rss_mb
from zopro.policies import Policies
from zopro.random_state import derived_seed, preserve_random_state
from zopro.rewards import RewardModel
from zopro.rundir import RunDirectory
from zopro.tasks import Example
from zopro.verdicts import Verdicts

FULL_REWARD_RANK = 8  # of the reward model's adapter where the policy has none (lora_r: 0)


@dataclass(frozen=True)
class Item:
    """An example with its prompt rendered: as text (what trainers get) and as token ids (what the engine gets)."""

    prompt: str
    ids: list[int]
    example: Example


class Session:
    """What the stages of one run share.

    Args:
        config: the run's configuration.
        resume: continue a run directory of the same configuration.
        quiet: no progress on stderr.
        job: the processes that work on the run; only the first one writes.

    Everything that can be refused is refused here, before the run directory is written to.

    Raises:
        InputError: data, model, lengths or run directory do not fit; see the message.
    """

    def __init__(self, config: RunConfig, resume: bool = False, quiet: bool = False, job: Job | None = None) -> None:
        self.job = job or Job()
        self.config, self.quiet = config, quiet or not self.job.first
        self.directory = RunDirectory(config, resume, self.job.first)
        self.tokenizer = models.load_tokenizer(config.model, trust_remote_code=config.trust_remote_code)
        data = tasks.load(config, config.eval_prompts, config.seed, refuse=self._too_long)
        self.task = data.task
        device = models.resolve_device(config.device)
        self.base = self._load(device)
        _check_context(self.base, config)
        self.judge = judges.make_judge(
            config.judge,
            self.task,
            self.base,
            self.tokenizer,
            load=lambda path: self._load_other(path, device),
            options=config,
        )
        self.train = [self._item(example) for example in data.train]
        self.eval = [self._item(example) for example in data.eval]
        self.policies = Policies(self.base, config)
        self.eos_token_ids = models.stop_ids(self.base, self.tokenizer)
        self._reward_model = self._new_reward_model()
        self._callback: MetricsCallback | None = None
        self.directory.create()
        self.job.wait()
        left_out = "".join(f"; left out {count}: {reason}" for reason, count in data.dropped.items())
        self.rows = f"{len(self.train)} training rows, {len(self.eval)} held-out prompts{left_out}"
        self.say(self.rows)

    def _load(self, device: Any) -> Any:
        config = self.config
        dtype = models.resolve_dtype(config.dtype, device)
        base = models.load_base(config.model, dtype, device, config.trust_remote_code).requires_grad_(False)
        abilities(causal_parts(base))  # refuses an architecture, or says what it costs, before anything runs
        return base

    def _load_other(self, path: str, device: Any) -> tuple[Any, Any]:
        dtype = models.resolve_dtype(self.config.dtype, device)
        model = models.load_base(path, dtype, device, self.config.trust_remote_code)
        return model, models.load_tokenizer(path, trust_remote_code=self.config.trust_remote_code)

    def _item(self, example: Example) -> Item:
        prompt = models.render_prompt(self.tokenizer, example.prompt)
        return Item(prompt, self.tokenizer(prompt)["input_ids"], example)

    def _too_long(self, example: Example) -> str | None:
        if len(self._item(example).ids) > self.config.max_prompt_length:
            return "prompt is longer than max_prompt_length"
        return None

    def answer_length(self, answer: str) -> int:
        """Tokens of an answer, its EOS included."""
        return len(self.tokenizer(answer, add_special_tokens=False)["input_ids"]) + 1

    def answers_fit(self, *answers: str | None) -> bool:
        """Whether all of these answers end within max_completion_length: longer ones would teach not to end."""
        limit = self.config.max_completion_length
        return all(answer is None or self.answer_length(answer) <= limit for answer in answers)

    def judged(
        self,
        stage: str,
        iteration: int | None,
        prompts: list[str],
        completions: list[list[str]],
        references: list[str | None],
    ) -> judges.JudgeResult:
        """The configured judge's verdicts, which are kept on the disk until the stage is done."""
        verdicts = Verdicts(self.directory.verdicts(stage, iteration))
        return judges.judge_pairs(
            self.judge, prompts, completions, references, verdicts, batch_size=self.config.eval_batch_size
        )

    def say(self, line: str) -> None:
        """One line of progress on stderr."""
        if not self.quiet:
            print(line, file=sys.stderr, flush=True)

    def seed(self, *names: object) -> int:
        return derived_seed(self.config.seed, *names)

    def callback(self, stage: str, iteration: int | None) -> MetricsCallback:
        self._callback = MetricsCallback(self.directory.log, stage, iteration, quiet=self.quiet)
        return self._callback

    def snapshots(self, kind: str, iteration: int, save: Callable[[Path], object]) -> list[SnapshotCallback]:
        """The callback that keeps weights inside an iteration, if the run does.

        What a stopped attempt left goes, unless the attempt is continued from its checkpoint.
        """
        if not self.job.first:
            return []
        folder = self.directory.snapshots(kind, iteration)
        if newest(self.directory.trainer("refine" if kind == "reward" else kind, iteration))[1] is None:
            shutil.rmtree(folder, ignore_errors=True)
        every = self.config.snapshot_every
        return [SnapshotCallback(save, folder, every)] if every else []

    @contextmanager
    def stage(self, name: str, iteration: int | None) -> Iterator[None]:
        """Time one stage; what an interrupted attempt at it had logged after its checkpoint is dropped first."""
        self.directory.discard(name, iteration, after=newest(self.directory.trainer(name, iteration))[0])
        start = time.perf_counter()
        try:
            yield
        finally:
            if self._callback is not None:
                self._callback.close()
        line = {"stage": name, "iteration": iteration, "step": None, "event": "end"}
        self.directory.log(
            {**line, "seconds": round(time.perf_counter() - start, 3), "peak_rss_mb": round(peak_rss_mb(), 1)}
        )

    def _new_reward_model(self) -> RewardModel:
        """Made while the base is without adapters: the classifier shares its weights by their plain names."""
        config = self.config
        base = self._load(self.base.device) if self.policies.full else self.base
        classifier = models.sequence_classifier(base, self.tokenizer, self.seed("reward head"))
        with preserve_random_state():
            torch.manual_seed(self.seed("reward adapter"))
            options = replace(config, lora_r=FULL_REWARD_RANK) if self.policies.full else config
            model = get_peft_model(classifier, models.lora_config(options, "SEQ_CLS", self.base))
        return RewardModel(model, self.tokenizer, config.max_prompt_length + config.max_completion_length + 1)

    def reward_model(self, iteration: int | None) -> RewardModel:
        """The one live reward model, with the weights saved for `iteration`, or (None) as it is."""
        if iteration is not None:
            self._reward_model.restore(self.directory.reward(iteration))
        return self._reward_model

    def sample(self, model: Any, items: Sequence[Item], seed: int) -> Rollouts:
        """One completion for each item, drawn at the configured temperature."""
        return generate(
            model,
            [item.ids for item in items],
            max_new_tokens=self.config.max_completion_length,
            eos_token_ids=self.eos_token_ids,
            pad_token_id=self.tokenizer.pad_token_id,
            temperature=self.config.temperature,
            generator=torch.Generator(self.base.device).manual_seed(seed),
        )

    def texts(self, completion_ids: list[list[int]]) -> list[str]:
        return [text.strip() for text in self.tokenizer.batch_decode(completion_ids, skip_special_tokens=True)]


def batches(items: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


def trimmed(rollout: Rollouts) -> list[list[int]]:
    """Completions as lists without padding, EOS kept."""
    lengths = rollout.completion_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(rollout.completion_ids.tolist(), lengths, strict=True)]


def _check_context(model: Any, config: RunConfig) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    needed = config.max_prompt_length + config.max_completion_length
    if context is not None and needed > context:
        raise InputError(
            f"max_prompt_length: with max_completion_length must fit the model's context of {context} tokens, "
            f"got {config.max_prompt_length} + {config.max_completion_length}. Lower one of them."
        )
