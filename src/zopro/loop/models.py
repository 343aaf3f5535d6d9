"""The models of one run: the base loaded once, the policies over it, the rewards, and the judge of pairs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from zopro.choices import REWARDS
from zopro.config import RunConfig
from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.models import context_of, resolve_device, resolve_dtype, sequence_classifier
from zopro.engine.local.quantised import check_trainable
from zopro.engine.local.starts import load_start, tokenizer_home
from zopro.engine.local.targets import check_targets, new_adapter
from zopro.engine.opening import end, open_base
from zopro.errors import InputError
from zopro.judges import Judge, make_judge
from zopro.loop.data import Data
from zopro.loop.own import check_own
from zopro.loop.policies import Policies
from zopro.loop.rewarding import Rewards
from zopro.loop.served import Said, look
from zopro.loop.trainers import try_method
from zopro.rewards import RewardModel
from zopro.rewards.functions import reward_function
from zopro.system.random_state import derived_seed, preserve_random_state
from zopro.text import chat
from zopro.text.frame import Frame, check_vocabulary, declared_stops, frame_of
from zopro.text.tokenizer import load_tokenizer
from zopro.weights.adapters import tensor_name

FULL_REWARD_RANK = 8  # of the reward model's adapter where the policy has none (lora_r: 0)


@dataclass(frozen=True)
class Models:
    """frame: how an answer is written after a prompt, and where it ends. max_length: tokens of the longest prompt, the
    longest completion and the ending that one cut short gets. rewards: all of them. judge: of pairs, for a run that
    trains a reward model. checked, said: what was found out about an engine of its own, a line each, and what it said."""

    tokenizer: PreTrainedTokenizerBase
    frame: Frame
    base: Any
    policies: Policies
    rewards: Rewards
    judge: Judge | None
    max_length: int
    checked: list[str] = field(default_factory=list)
    said: Said | None = None

    @property
    def eos_token_ids(self) -> list[int]:
        return sorted(self.frame.stops)

    @property
    def reward(self) -> RewardModel:
        """The one live reward model, of a run that trains one."""
        assert self.rewards.model is not None
        return self.rewards.model

    def reward_from(self, folder: Path) -> RewardModel:
        """The one live reward model, with the weights saved in `folder`."""
        self.reward.restore(folder)
        return self.reward

    def rewards_with(self, folder: Path) -> Rewards:
        """All rewards; the reward model among them, if there is one, has the weights saved in `folder`."""
        if self.rewards.model is not None:
            self.rewards.model.restore(folder)
        return self.rewards

    def texts(self, completion_ids: Sequence[Sequence[int]]) -> list[str]:
        """The answers that sampled completions hold."""
        return self.rewards.texts(completion_ids)

    def remarks(self) -> Iterator[str]:
        """What is unusual about the model and its text, a line each."""
        yield from self.checked
        if self.policies.full and self.policies.config.lora_freeze_a:
            yield "lora_freeze_a: there is no adapter to freeze a part of (lora_r: 0), all parameters are trained"
        if getattr(self.judge, "model", None) is self.base:
            yield (
                "judge: the base model itself decides pairs and win rates; a small one is hardly better than chance. "
                "Better ones: model:PATH, openai:MODEL, python:MODULE:FUNCTION"
            )
        room = getattr(self.judge, "room", None)  # of a causal model
        if room is not None and room < 2 * self.policies.config.max_completion_length:
            yield f"judge: two answers of more than {room} tokens together do not fit in its context, and get no verdict"
        vocabulary = self.base.get_input_embeddings().weight.shape[0]
        if beyond := [token for token in self.eos_token_ids if token >= vocabulary]:
            yield f"the model declares stop tokens that its vocabulary of {vocabulary} does not have: {beyond}"
        if options := chat.turn_of(self.tokenizer).options:
            named = ", ".join(f"{name}={value}" for name, value in options.items())
            yield f"the chat template is rendered with {named}: else an answer would stand inside its reasoning"
        if "strftime_now" in str(self.tokenizer.chat_template):
            yield "the chat template writes the date: prompts of a run resumed on another day are not the same"


def load_models(
    config: RunConfig, tokenizer: PreTrainedTokenizerBase, data: Data, resumes: bool = True, before: Said | None = None
) -> Models:
    """The run's models; `resumes`: it can be continued where it stops. `before`: what its engine said as it began.

    Raises InputError: the model, the lengths or the data do not fit each other.
    """
    device = resolve_device(config.device)
    functions = _functions(config, device)
    check_own(config)
    base = _load_base(config, device)
    try:
        return _models(config, tokenizer, data, base, functions, resumes, before)
    except BaseException:
        end(base)
        raise


def _models(
    config: RunConfig,
    tokenizer: PreTrainedTokenizerBase,
    data: Data,
    base: Any,
    functions: dict[str, Any],
    resumes: bool,
    before: Said | None,
) -> Models:
    """`load_models`, of a base model that is loaded."""
    device = resolve_device(config.device)
    _check_context(base, config)
    frame = frame_of(tokenizer, declared_stops(base))
    check_trainable(base, config.lora_r)
    if config.lora_r:
        check_targets(base, config)

    def load(path: str) -> tuple[Any, PreTrainedTokenizerBase]:
        try:
            return _load(config, path, device), load_tokenizer(tokenizer_home(path), config.trust_remote_code)
        except InputError as error:
            raise InputError(f"judge: {str(error).removeprefix('model: ')}") from error

    judge = make_judge(config.judge, data.task, base, tokenizer, load, config) if config.trains_reward else None
    check_vocabulary(tokenizer, base, frame, data.texts(frame))
    policies, checked, said = Policies(base, config), list[str](), None
    with nullcontext(base) if policies.full else policies.open(None) as policy:  # what PEFT refuses, it refuses now
        check_own(config, _trained(policy, policies.full))
        if config.served:
            checked, said = look(config, policy, tokenizer, data, frame, before)
    try_method(config, policies, tokenizer, data.train)
    max_length = config.max_prompt_length + config.max_completion_length + len(frame.ending)
    reward = None
    if config.trains_reward:
        reward = RewardModel(_classifier(config, tokenizer, base), tokenizer, max_length, frame)
    weights = dict(zip(config.reward, config.weights, strict=True))

    def texts(completion_ids: Sequence[Sequence[int]]) -> list[str]:
        return [frame.read(ids) for ids in completion_ids]

    rewards = Rewards(weights, functions, reward, texts, config.eval_batch_size, config.reward_timeout, resumes)
    return Models(tokenizer, frame, base, policies, rewards, judge, max_length, checked, said)


def _trained(policy: Any, full: bool) -> tuple[str, torch.Tensor]:
    """A parameter that a policy stage trains, named as directions know it."""
    named = ((tensor_name(name), weight) for name, weight in policy.named_parameters())
    return next((name, weight) for name, weight in named if full or ".lora_" in name)


def _functions(config: RunConfig, device: torch.device) -> dict[str, Any]:
    """The rewards but for the run's own model, by name, as TRL calls them. Raises InputError: one cannot be made."""
    made: dict[str, Any] = {}
    for name in config.reward:
        choice = REWARDS[name]
        if choice.network:
            dtype, path = resolve_dtype(config.dtype, device), name.partition(":")[2]
            made[name] = choice.load()(path, dtype, device, config.eval_batch_size, config.trust_remote_code)
        elif not choice.trained:
            made[name] = reward_function(name)
    return made


def _load(config: RunConfig, path: str, device: torch.device) -> Any:
    return load_start(path, resolve_dtype(config.dtype, device), device, config.trust_remote_code)


def _load_base(config: RunConfig, device: torch.device) -> Any:
    base = open_base(config, device).requires_grad_(False)
    if not config.served:
        with torch.no_grad():
            abilities(causal_parts(base))  # refuses an architecture, or says what it costs, before anything runs
    return base


def _classifier(config: RunConfig, tokenizer: PreTrainedTokenizerBase, base: Any) -> Any:
    """The reward model's network, made while the base is without adapters: it shares weights by their plain names."""
    full = config.lora_r == 0
    shared = _load_base(config, base.device) if full else base
    classifier = sequence_classifier(shared, tokenizer, derived_seed(config.seed, "reward head"))
    with preserve_random_state():
        torch.manual_seed(derived_seed(config.seed, "reward adapter"))
        return new_adapter(classifier, replace(config, lora_r=FULL_REWARD_RANK) if full else config, "SEQ_CLS")


def _check_context(model: Any, config: RunConfig) -> None:
    context = context_of(model)
    needed = config.max_prompt_length + config.max_completion_length
    if context is not None and needed > context:
        note = getattr(model, "context_note", "")
        raise InputError(
            f"max_prompt_length: with max_completion_length must fit the model's context of {context} tokens{note}, "
            f"got {config.max_prompt_length} + {config.max_completion_length}. Lower one of them."
        )
