"""Who answers: the base model, the SFT policy and the aligned policy of a run, each on the same conversations.

    zopro generate RUN --prompt "How do I boil an egg?"

voices = Voices(find_policy("RUN"))
voices.answer("aligned", [[{"role": "user", "content": "How do I boil an egg?"}]], Manner(64, 0.7), seed=0)
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.models import context_of
from zopro.engine.local.starts import tokenizer_home
from zopro.engine.opening import generate, open_policy
from zopro.errors import InputError
from zopro.loop.finished import Policy, check_answering, find_policy
from zopro.store import shown
from zopro.store.layout import Layout
from zopro.system.random_state import preserve_random_state
from zopro.text import chat
from zopro.text.degenerate import called
from zopro.text.frame import check_vocabulary, declared_stops, frame_of
from zopro.text.tokenizer import load_tokenizer
from zopro.weights.names import has_weights, is_adapter

NAMES = ("base", "sft", "aligned")
_ACTIVE, _SFT = "default", "sft"  # names of the adapters

Messages = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Manner:
    """How answers are drawn: tokens of the longest, and the temperature; 0 takes the likeliest token."""

    max_new_tokens: int
    temperature: float = 0.0


class Voices:
    """The three models of a finished policy's run, loaded when they are first asked.

    Adapters share one base. Of runs that trained all parameters one model is in memory at a time, or `held` of them.
    """

    def __init__(self, policy: Policy, held: int = 1) -> None:
        self.policy, self._held, self._models = policy, held, dict[Path | None, Any]()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        config = self.policy.config
        return load_tokenizer(tokenizer_home(config.model), trust_remote_code=config.trust_remote_code)

    @cached_property
    def _adapted(self) -> Any:
        return open_policy(self.policy.config, self.policy.folder)

    @contextmanager
    def model(self, name: str) -> Iterator[Any]:
        """The model called `name`, one of `NAMES`, for as long as the context lasts."""
        if not is_adapter(self.policy.folder):
            yield self.whole(name)
            return
        model, sft = self._adapted, Layout(self.policy.run).sft()
        if name == "aligned" or (name == "sft" and has_weights(sft)):
            if name == "sft" and _SFT not in model.peft_config:
                with preserve_random_state():
                    open_adapter(model, sft, _SFT)
            model.set_adapter(_SFT if name == "sft" else _ACTIVE)
            try:
                yield model
            finally:
                model.set_adapter(_ACTIVE)
            return
        with model.disable_adapter():
            yield model

    def whole(self, name: str) -> Any:
        """The aligned model with its adapter, or of a run that trained all parameters the model called `name`."""
        if is_adapter(self.policy.folder):
            return self._adapted
        sft = Layout(self.policy.run).sft()
        folders = {"sft": sft if has_weights(sft) else None, "aligned": self.policy.folder}
        folder = folders.get(name)
        if folder not in self._models:
            while len(self._models) >= self._held:
                del self._models[next(iter(self._models))]
            self._models[folder] = open_policy(self.policy.config, folder)
        return self._models[folder]

    @preserve_random_state()
    def answer(self, name: str, conversations: Sequence[Messages], manner: Manner, seed: int = 0) -> list[str]:
        """What the model called `name` says next in each conversation.

        Raises `InputError`: a number out of range; the chat template refuses a conversation, a token has no embedding,
        or a conversation and its answer are longer than the model can read.
        """
        check_answering(manner.max_new_tokens, manner.temperature, seed)
        rendered = [chat.render_prompt(self.tokenizer, messages) for messages in conversations]
        encoded = [self.tokenizer(text)["input_ids"] for text in rendered]
        with self.model(name) as model:
            frame = frame_of(self.tokenizer, declared_stops(model))
            check_vocabulary(self.tokenizer, model, frame, rendered)
            _check_length(model, max(map(len, encoded), default=0), manner.max_new_tokens)
            drawn = generate(
                model,
                encoded,
                num_generations=1,
                max_new_tokens=manner.max_new_tokens,
                eos_token_ids=sorted(frame.stops),
                pad_token_id=self.tokenizer.pad_token_id,
                do_sample=manner.temperature > 0,
                temperature=manner.temperature or 1.0,
                generator=torch.Generator(device=model.device).manual_seed(seed),
            )
        return [frame.read(ids) for ids in drawn.answers()]


def answer(
    run: str | Path,
    prompts: Sequence[str],
    *,
    iteration: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Answer each prompt, as a user's message, by the base model, the SFT policy and the aligned policy.

    The same `seed` is used for all three; `temperature` 0 takes the likeliest token. Returns `{"run", "iteration",
    "sft_steps", "answers": [{"prompt", "base", "sft", "aligned"}, ...]}`.
    """
    policy = find_policy(run, iteration)
    manner, voices = manner_of(policy, max_new_tokens, temperature), Voices(policy)
    asked = [[{"role": "user", "content": prompt}] for prompt in prompts]
    table = {"prompt": list(prompts), **{name: voices.answer(name, asked, manner, seed) for name in NAMES}}
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    about = {"run": str(policy.run), "iteration": policy.iteration, "sft_steps": policy.config.sft_steps}
    return {**about, "answers": rows}


def manner_of(policy: Policy, max_new_tokens: int | None, temperature: float | None) -> Manner:
    """A way to answer; what is None is as in the run."""
    config = policy.config
    length = config.max_completion_length if max_new_tokens is None else max_new_tokens
    return Manner(length, config.temperature if temperature is None else temperature)


def side_by_side(answers: dict[str, Any], width: int | None = None) -> str:
    """Lay the rows of `answer` out for a terminal of `width` characters: three columns, or a list if it is narrow."""
    width = width or shutil.get_terminal_size((110, 24)).columns
    titles = {"base": "base", "sft": shown.start(answers.get("sft_steps")).name}
    column = (width - 4) // len(NAMES)
    blocks = []
    for row in answers["answers"]:
        titles["aligned"] = called(row["aligned"], answers["iteration"], row["prompt"])
        lines = [printable(f"> {row['prompt']}")]
        if column < 24:
            for key, title in titles.items():
                lines.append(
                    textwrap.fill(printable(row[key]), width, initial_indent=f"{title}: ", subsequent_indent="  ")
                )
        else:
            cells = [[title, "-" * len(title), *_wrap(row[key], column)] for key, title in titles.items()]
            for cut in zip_longest(*cells, fillvalue=""):
                lines.append("  ".join(text.ljust(column) for text in cut).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _check_length(model: Any, prompt: int, answer: int) -> None:
    context = context_of(model)
    if context is not None and prompt + answer > context:
        raise InputError(
            f"prompt: must with its answer fit the model's context of {context} tokens, got {prompt} + {answer}. "
            "Shorten the conversation or --max-new-tokens."
        )


def _wrap(text: str, width: int) -> list[str]:
    return [line for part in printable(text).splitlines() for line in textwrap.wrap(part, width) or [""]]


def printable(text: str) -> str:
    """`text` without control characters: a model's output must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c == "\n")
