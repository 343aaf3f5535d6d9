"""One run in progress: its data, models and records, opened once and shared by the stages."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from zopro import judges, tasks
from zopro.config import RunConfig
from zopro.engine.local import models
from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.quantised import check_trainable
from zopro.engine.local.rollouts import Rollouts, generate
from zopro.engine.local.starts import load_start, start_note, tokenizer_home
from zopro.engine.local.targets import check_targets, new_adapter
from zopro.errors import InputError
from zopro.judges.verdicts import Verdicts
from zopro.loop.policies import Policies
from zopro.rewards import RewardModel
from zopro.store.rundir import RunDirectory
from zopro.system.launch import Job
from zopro.system.random_state import derived_seed, preserve_random_state
from zopro.tasks import Example
from zopro.text import chat
from zopro.text.frame import check_vocabulary, declared_stops, frame_of
from zopro.text.tokenizer import load_tokenizer
from zopro.train.callbacks import MetricsCallback, SnapshotCallback, check_reports
from zopro.train.checkpoints import newest

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
        began: when this process began to work on the run, by `time.perf_counter()`; by default now.

    Everything that can be refused is refused here, before the run directory is written to.

    Raises:
        InputError: data, model, lengths or run directory do not fit; see the message.
    """

    def __init__(
        self,
        config: RunConfig,
        resume: bool = False,
        quiet: bool = False,
        job: Job | None = None,
        began: float | None = None,
    ) -> None:
        self.job = job or Job()
        self.config, self.quiet = config, quiet or not self.job.first
        self.directory = RunDirectory(config, resume, self.job.first, began)
        check_reports(config.report_to)
        self.tokenizer = load_tokenizer(tokenizer_home(config.model), trust_remote_code=config.trust_remote_code)
        self.frame = frame_of(self.tokenizer)
        fit = tasks.Fit(partial(chat.render_prompt, self.tokenizer))
        data = tasks.load(config, config.eval_prompts, config.seed, refuse=self._unfit, fit=fit)
        self.task = data.task
        device = models.resolve_device(config.device)
        self.base = self._load(device)
        _check_context(self.base, config)
        self.frame = frame_of(self.tokenizer, declared_stops(self.base))
        check_trainable(self.base, config.lora_r)
        if config.lora_r:
            check_targets(self.base, config)
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
        check_vocabulary(self.tokenizer, self.base, self.frame, self._texts())
        self.policies = Policies(self.base, config)
        with nullcontext() if self.policies.full else self.policies.open(None):
            pass  # what PEFT refuses, it refuses now
        self.eos_token_ids = sorted(self.frame.stops)
        self._reward_model = self._new_reward_model()
        self._callback: MetricsCallback | None = None
        self.directory.create()
        self.job.wait()
        left_out = "".join(f"; left out {count}: {reason}" for reason, count in data.dropped.items())
        self.rows = f"{len(self.train)} training rows, {len(self.eval)} held-out prompts{left_out}"
        for line in filter(None, (start_note(config.model), self.rows, *data.remarks(), *self._remarks())):
            self.say(line)

    def _remarks(self) -> Iterator[str]:
        """What is unusual about the model's text."""
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        if beyond := [token for token in self.eos_token_ids if token >= vocabulary]:
            yield f"the model declares stop tokens that its vocabulary of {vocabulary} does not have: {beyond}"
        if options := chat.turn_of(self.tokenizer).options:
            named = ", ".join(f"{name}={value}" for name, value in options.items())
            yield f"the chat template is rendered with {named}: else an answer would stand inside its reasoning"
        if "strftime_now" in str(self.tokenizer.chat_template):
            yield "the chat template writes the date: prompts of a run resumed on another day are not the same"

    def _load(self, device: Any) -> Any:
        config = self.config
        dtype = models.resolve_dtype(config.dtype, device)
        base = load_start(config.model, dtype, device, config.trust_remote_code).requires_grad_(False)
        abilities(causal_parts(base))  # refuses an architecture, or says what it costs, before anything runs
        return base

    def _load_other(self, path: str, device: Any) -> tuple[Any, Any]:
        dtype = models.resolve_dtype(self.config.dtype, device)
        model = load_start(path, dtype, device, self.config.trust_remote_code)
        return model, load_tokenizer(tokenizer_home(path), trust_remote_code=self.config.trust_remote_code)

    def _item(self, example: Example) -> Item:
        prompt = chat.render_prompt(self.tokenizer, example.prompt, example.tools)
        return Item(prompt, self.tokenizer(prompt)["input_ids"], example)

    def _unfit(self, example: Example) -> str | None:
        """Why a row is left out: its prompt is too long, or the chat template does not give back what it is given."""
        item = self._item(example)
        if not item.ids:
            return "prompt has no token"
        if len(item.ids) > self.config.max_prompt_length:
            return "prompt is longer than max_prompt_length"
        if (role := chat.lost_message(example.prompt, item.prompt)) is not None:
            return f"the chat template leaves out or changes the {role}'s message"
        for answer in (example.chosen, example.rejected):
            if answer is not None:
                whole = chat.render_answered(self.tokenizer, example.prompt, answer, example.tools)
                if not whole.startswith(item.prompt + self.frame.write(answer)):
                    return "the chat template changes the answer"
        return None

    def _texts(self) -> Iterator[str]:
        """Prompts and answers as they are encoded."""
        for item in (*self.train, *self.eval):
            for answer in (item.example.chosen, item.example.rejected):
                yield item.prompt + self.frame.write(answer or "")

    @property
    def max_length(self) -> int:
        """Tokens of the longest prompt, the longest completion and the ending that one cut short gets."""
        return self.config.max_prompt_length + self.config.max_completion_length + len(self.frame.ending)

    def answer_length(self, answer: str) -> int:
        """Tokens of an answer in its frame."""
        written = self.tokenizer(self.frame.write(answer), add_special_tokens=False)["input_ids"]
        return len(written) + len(self.frame.ending)

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
        try:
            with self.directory.usage.stage(name, iteration) as spent:
                yield
        finally:
            if self._callback is not None:
                self._callback.close()
        self.stage_ended(name, iteration, spent())

    def stage_ended(self, name: str, iteration: int | None, seconds: float) -> None:
        """Say so in metrics.jsonl: seconds of all processes that worked on it, and the run's peak memory so far."""
        usage = self.directory.usage
        line = {"stage": name, "iteration": iteration, "step": None, "event": "end"}
        self.directory.log({**line, "seconds": round(seconds, 3), "peak_rss_mb": usage.peak_rss_mb()})
        usage.note()

    def _new_reward_model(self) -> RewardModel:
        """Made while the base is without adapters: the classifier shares its weights by their plain names."""
        config = self.config
        base = self._load(self.base.device) if self.policies.full else self.base
        classifier = models.sequence_classifier(base, self.tokenizer, self.seed("reward head"))
        with preserve_random_state():
            torch.manual_seed(self.seed("reward adapter"))
            options = replace(config, lora_r=FULL_REWARD_RANK) if self.policies.full else config
            model = new_adapter(classifier, options, "SEQ_CLS")
        return RewardModel(model, self.tokenizer, self.max_length, self.frame)

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
        """The answers that sampled completions hold."""
        return [self.frame.read(ids) for ids in completion_ids]


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
