"""A local causal model as the judge of pairs: the log-odds of the letters A and B, in both orders.

Each pair is read twice, once in either order, and the two log-odds are subtracted, so that a liking for the first
place or for a letter cancels. A reading costs one forward pass and no generation. Only the last position's hidden
state meets the output matrix, and only two of its rows: no logits of the whole vocabulary, no slice of hidden states.
"""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from zopro.errors import InputError
from zopro.judges.endpoint import NoVerdict
from zopro.text.chat import added, render_prompt, turn_of
from zopro.text.frame import check_embedded, control_tokens

_CONVERSATION, _A, _B = "<<conversation>>", "<<reply A>>", "<<reply B>>"
FRAME = f"""Here is a conversation and two replies to its last message.

Conversation:
{_CONVERSATION}

Reply A:
{_A}

Reply B:
{_B}

Which reply is better, A or B? Answer with one letter."""
_MOST_TOKENS = 2048
"""Longest reading unless asked otherwise or the answers need more, in tokens; conversations are cut to it."""


class ModelJudge:
    """Judge pairs with a causal model.

    model, tokenizer: transformers or PEFT. batch_size: readings in a forward pass (a pair takes two).
    max_length: tokens of a reading, 0 for the model's context but at most 2048; a conversation too long loses its
    beginning, answers are never cut (a pair whose answers alone do not fit the context or the length that was asked
    for gets no verdict). use_adapters: False switches a PEFT model's adapters off while judging.
    Raises `InputError` for a model without an output layer or too small for the question, and for a tokenizer that
    does not tell A from B.
    """

    remedy = "Start a run with another judge, or with a smaller max_completion_length."

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int = 8, max_length: int = 0, use_adapters: bool = True
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.batch_size = batch_size
        self.use_adapters = use_adapters
        self.config = model.config.get_text_config()
        context = getattr(self.config, "max_position_embeddings", None) or _MOST_TOKENS
        self.max_length = max_length or min(context, _MOST_TOKENS)
        self.context = max_length or context
        if model.get_output_embeddings() is None:
            raise InputError(f"judge: must be a causal language model, got {type(model).__name__}.")
        self._read_frame()

    def __call__(
        self, prompts: list[str], completions: list[list[str]], references: list[str | None]
    ) -> list[int | NoVerdict]:
        """Winners [N]: 0, 1, -1 where neither is more likely, or why there is none. References are not used."""
        odds = self.log_odds(prompts, completions)
        return [self._verdict(value, pair) for value, pair in zip(odds, completions, strict=True)]

    def _verdict(self, odds: float, pair: Sequence[str]) -> int | NoVerdict:
        if not math.isnan(odds):
            return -1 if odds == 0 else int(odds < 0)
        if self._reading([], *map(self._ids, pair)):
            return NoVerdict("log-odds are not a number", failed=False)
        return NoVerdict(f"the answers do not fit in {self.context} tokens", failed=False)

    @property
    def room(self) -> int:
        """Tokens that two answers may have together: what the question leaves of the context."""
        return self.context - len(self._start) - len(self._before_a) - len(self._before_b) - len(self._end)

    @torch.no_grad()
    def log_odds(self, prompts: Sequence[str], completions: Sequence[Sequence[str]]) -> list[float]:
        """[N]: log-odds that the first answer is better, averaged over both orders; nan where answers do not fit."""
        readings: list[list[int]] = []
        for prompt, (left, right) in zip(prompts, completions, strict=True):
            conversation, first, second = self._ids(prompt), self._ids(left), self._ids(right)
            readings.append(self._reading(conversation, first, second))
            readings.append(self._reading(conversation, second, first))
        odds = torch.full((len(readings),), math.nan)
        # Readings of like length share a batch: less padding.
        order = sorted((i for i, ids in enumerate(readings) if ids), key=lambda i: len(readings[i]))
        was_training = self.model.training
        self.model.eval()
        try:
            with self._adapters():
                for start in range(0, len(order), self.batch_size):
                    batch = order[start : start + self.batch_size]
                    odds[batch] = self._forward([readings[i] for i in batch])
        finally:
            self.model.train(was_training)
        by_pair = odds.view(-1, 2)  # [N, order]; in the second order A is the second answer
        return ((by_pair[:, 0] - by_pair[:, 1]) / 2).tolist()

    def _forward(self, readings: list[list[int]]) -> Tensor:
        """[batch]: log-odds of A against B after each reading. Padded on the right, where causal models never look."""
        device = next(self.model.parameters()).device
        lengths = torch.tensor([len(ids) for ids in readings], device=device)
        padded = [torch.tensor(ids, device=device) for ids in readings]
        ids = torch.nn.utils.rnn.pad_sequence(padded, batch_first=True)  # [batch, time]
        mask = (torch.arange(ids.shape[1], device=device) < lengths[:, None]).long()
        hidden = self.model.get_decoder()(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(readings), device=device), lengths - 1]  # [batch, hidden], contiguous
        head = self.model.get_output_embeddings()
        letters = torch.tensor(self.letters, device=device)
        bias = None if getattr(head, "bias", None) is None else head.bias[letters]
        logits = functional.linear(last.to(head.weight.dtype), head.weight[letters], bias).float()  # [batch, 2]
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap:
            logits = cap * torch.tanh(logits / cap)
        return (logits[:, 0] - logits[:, 1]).cpu()

    def _adapters(self) -> contextlib.AbstractContextManager[Any]:
        # PEFT's name; transformers' own mixin has `disable_adapters`, which is no context manager.
        if not self.use_adapters and hasattr(self.model, "disable_adapter"):
            return self.model.disable_adapter()
        return contextlib.nullcontext()

    def _read_frame(self) -> None:
        """Split the frame at its three slots into token pieces, and find the tokens of the two letters."""
        if self.tokenizer.chat_template:
            turn = turn_of(self.tokenizer)
            if turn.problem:
                raise InputError(f"judge: {turn.problem}. Choose another judge, or give it another template.")
            text = render_prompt(self.tokenizer, [{"role": "user", "content": FRAME}]) + turn.opening
            letters = ("A", "B")
        else:
            text, letters = f"{FRAME}\nAnswer:", (" A", " B")
        begins = bool(self.tokenizer.bos_token) and text.startswith(self.tokenizer.bos_token)
        text = text.removeprefix(self.tokenizer.bos_token) if begins else text
        slots = f"({'|'.join(map(re.escape, (_CONVERSATION, _A, _B)))})"
        start, _, before_a, _, before_b, _, end = re.split(slots, text)
        # The letter may be one token with what stands before it, so the end is what both whole texts share.
        with_a, with_b = (self._encode(end + letter) for letter in letters)
        same = next((i for i, (a, b) in enumerate(zip(with_a, with_b, strict=False)) if a != b), None)
        if same is None:
            raise InputError("judge: the tokenizer does not tell the letters A and B apart. Choose another judge.")
        self.letters = [with_a[same], with_b[same]]
        # What encoding puts before every text, else the BOS that the template itself has written.
        before = added(self.tokenizer)[0] or [self.tokenizer.bos_token_id] * begins
        self._start = before + self._encode(start)
        self._before_a, self._before_b, self._end = self._encode(before_a), self._encode(before_b), with_a[:same]
        frame = self._start + self._before_a + self._before_b + self._end + self.letters
        check_embedded(self.tokenizer, self.model, "the judge's question", frame)
        if self.room <= 0:
            raise InputError(
                f"judge: must have a context longer than its question of {self.context - self.room} tokens, got "
                f"{self.context}. Choose another judge."
            )

    def _reading(self, conversation: list[int], a: list[int], b: list[int]) -> list[int]:
        """Token ids of one reading; empty if the answers do not fit."""
        if len(a) + len(b) > self.room:
            return []
        replies = self._before_a + a + self._before_b + b + self._end
        left = max(self.max_length - len(self._start) - len(replies), 0)
        return self._start + conversation[max(len(conversation) - left, 0) :] + replies

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def _ids(self, text: str) -> list[int]:
        """Token ids of a conversation or an answer, without control tokens: text must not close the frame's turn."""
        before = ""
        while before != text:  # what is left and right of a token may be another one
            before = text
            for token in self._controls:
                text = text.replace(token, "")
        return self.tokenizer(text.strip(), add_special_tokens=False, split_special_tokens=True).input_ids

    @cached_property
    def _controls(self) -> list[str]:
        return list(control_tokens(self.tokenizer))
