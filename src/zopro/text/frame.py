"""An answer's frame in tokens: what a model is trained to write, where sampling stops, what a reward model reads.

    prompt + opening + answer + ending        the ending's last token is the one that ends the turn

The ending is the template's own, up to the first token that stops sampling; whichever token ended a sampled answer,
it is scored with this one, as in training.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from zopro.errors import InputError
from zopro.text.chat import ANSWER, Turn, turn_of
from zopro.text.tokenizer import CHATML


@dataclass(frozen=True)
class Frame:
    """opening: text before an answer. ending: token ids after it. stops: ids that end a sampled answer. trims: what of
    " \\n" is stripped from an answer's beginning and end, both standing for all white space."""

    tokenizer: PreTrainedTokenizerBase
    opening: str
    ending: tuple[int, ...]
    stops: frozenset[int]
    trims: tuple[str, str] = ("", "")

    @property
    def stop(self) -> int:
        """The token that ends a turn in training and scoring."""
        return self.ending[-1]

    def write(self, answer: str) -> str:
        """The answer as it follows a prompt, without its ending; an answer that brings an opening keeps its own."""
        left, right = (None if len(trimmed) == 2 else trimmed for trimmed in self.trims)
        answer = answer.lstrip(left).rstrip(right)
        return answer if self._mark and self._mark in answer else self.opening + answer

    @cached_property
    def _mark(self) -> str:
        """What tells that a text has an opening: the opening up to its first special token, or all of it."""
        mark = self.opening.strip()
        return mark[: _first_end(mark, _special(self.tokenizer))]

    def control_token(self, text: str, answer: bool = False) -> str | None:
        """The first control token that a row's text would be encoded to, or None. An answer may bring an opening."""
        tokenizer = self.tokenizer
        if not any(token in text for token in self._controls):  # far quicker than to encode it
            return None
        allowed = {*self._opening_ids} if answer else set()
        if tokenizer.unk_token and tokenizer.unk_token not in text:  # what the vocabulary has no token for
            allowed.add(tokenizer.unk_token_id)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        numbers = {*self._controls.values()} - allowed
        found = next((number for number in ids if number in numbers), None)
        return None if found is None else str(tokenizer.convert_ids_to_tokens(found))

    @cached_property
    def _controls(self) -> dict[str, int]:
        return control_tokens(self.tokenizer)

    @cached_property
    def _opening_ids(self) -> frozenset[int]:
        return frozenset(self.tokenizer(self.opening, add_special_tokens=False)["input_ids"])

    def length(self, answer: str) -> int:
        """Tokens of an answer as it is written, with its ending."""
        return len(self.tokenizer(self.write(answer), add_special_tokens=False)["input_ids"]) + len(self.ending)

    def body(self, completion: Sequence[int]) -> list[int]:
        """A sampled completion's ids without its ending and what follows it (padding)."""
        end = next((i for i, token in enumerate(completion) if token in self.stops), len(completion))
        return self._without_rest(list(completion[:end]))

    def without_ending(self, ids: list[int]) -> list[int]:
        """Token ids without the token that ends them, if one does."""
        return self._without_rest(ids[:-1]) if ids and ids[-1] in self.stops else ids

    def _without_rest(self, body: list[int]) -> list[int]:
        rest = list(self.ending[:-1])
        return body[: -len(rest)] if rest and body[-len(rest) :] == rest else body

    def read(self, completion: Sequence[int]) -> str:
        """A sampled completion's answer as text. What does not begin as the frame says is given whole, tokens too."""
        body, mark = self.body(completion), "".join(self.opening.split())
        if not mark:
            return self.tokenizer.decode(body, skip_special_tokens=True).strip()
        for count in range(1, len(body) + 1):
            begun = "".join(self.tokenizer.decode(body[:count]).split())  # decoders add spaces beside special tokens
            if begun == mark:
                return self.tokenizer.decode(body[count:], skip_special_tokens=True).strip()
            if not mark.startswith(begun):
                break
        return self.tokenizer.decode(body).strip()


def plain_frame(tokenizer: PreTrainedTokenizerBase) -> Frame:
    """An answer that ends with EOS, and nothing else around it."""
    return Frame(tokenizer, "", (tokenizer.eos_token_id,), frozenset({tokenizer.eos_token_id}))


def frame_of(tokenizer: PreTrainedTokenizerBase, declared: Iterable[int] = ()) -> Frame:
    """The frame of the tokenizer's chat template, for a model that declares these tokens as its stops.

    Raises:
        InputError: the template has no place of its own for an answer.
    """
    turn, eos = turn_of(tokenizer), int(tokenizer.eos_token_id)
    if turn.problem:
        raise InputError(f"model: {turn.problem}. Give the model a template that renders both alike.")
    stops = {eos, *declared}
    ending = _ending_ids(tokenizer, *_ending(tokenizer, turn, stops))
    return Frame(tokenizer, turn.opening, ending, frozenset(stops | {ending[-1]}), turn.trims)


def declared_stops(model: Any) -> list[int]:
    """The tokens that a model's generation configuration (or, without one, its configuration) says end an answer."""
    settings = getattr(model, "generation_config", None) or model.config.get_text_config()
    return token_ids(getattr(settings, "eos_token_id", None))


def token_ids(setting: int | list[int] | None) -> list[int]:
    """A configuration's `eos_token_id`, one token, several or none, as a list; `InputError` for anything else."""
    tokens = setting if isinstance(setting, list) else [] if setting is None else [setting]
    if not all(isinstance(token, int) for token in tokens):
        raise InputError(f"model: eos_token_id in its generation_config.json must be token ids, got {setting!r}.")
    return tokens


def _ending(tokenizer: PreTrainedTokenizerBase, turn: Turn, stops: set[int]) -> tuple[str, bool]:
    """The text that ends an answer's turn, and whether EOS must follow it."""
    special = _special(tokenizer)
    stopping = [token for token, number in special.items() if number in stops]
    for tokens in (stopping, list(special)):
        if (end := _first_end(turn.closing, tokens)) is not None:
            return turn.closing[:end], False
    # Some templates leave the last turn open: the next speaker's token is what ends it.
    follows = turn.following[: _first_end(turn.following, stopping)].strip()
    if not turn.closing.strip() and follows in stopping:
        return follows, False
    ours = str(tokenizer.chat_template).endswith(CHATML)  # on a model that has never seen it
    return "" if ours else turn.closing.rstrip(), True


def _first_end(text: str, tokens: Iterable[str]) -> int | None:
    """Where the first of the tokens in the text ends, the longest of those that begin there."""
    found = [(text.find(token), -len(token)) for token in tokens if token in text]
    return None if not found else min(found)[0] - min(found)[1]


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens by their text that stand for no text of their own; some vocabularies add white space, which does."""
    named = {token: tokenizer.convert_tokens_to_ids(token) for token in tokenizer.all_special_tokens}
    everything = {**tokenizer.get_added_vocab(), **named}
    return {token: number for token, number in everything.items() if token.replace("\u2581", " ").strip()}


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Tokens by their text that are no text of a message: those that the tokenizer names or marks as special, and those
    with which its template ends an answer."""
    marked = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named, closing = {*tokenizer.all_special_tokens, *marked}, turn_of(tokenizer).closing
    return {token: number for token, number in _special(tokenizer).items() if token in named or token in closing}


def _ending_ids(tokenizer: PreTrainedTokenizerBase, text: str, add_eos: bool) -> tuple[int, ...]:
    alone, whole = (tokenizer(words, add_special_tokens=False)["input_ids"] for words in (ANSWER, ANSWER + text))
    ids = whole[len(alone) :]
    if whole[: len(alone)] != alone:  # an ending that begins with plain text, which merges with the answer's
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return (*ids, int(tokenizer.eos_token_id)) if add_eos else tuple(ids)


def check_vocabulary(tokenizer: PreTrainedTokenizerBase, model: Any, frame: Frame, texts: Iterable[str]) -> None:
    """Refuse tokens that the model has no embedding for.

    Raises:
        InputError: the pad token, a token of the frame or one of the texts is beyond the embedding's rows.
    """
    pad = [] if tokenizer.pad_token_id is None else [tokenizer.pad_token_id]
    check_embedded(tokenizer, model, "the pad token", pad)
    check_embedded(tokenizer, model, "the token that ends an answer", [tokenizer.eos_token_id, *frame.ending])
    if max(tokenizer.get_vocab().values()) >= model.get_input_embeddings().weight.shape[0]:
        for text in texts:
            check_embedded(tokenizer, model, "every token of prompts and answers", tokenizer(text)["input_ids"])


def check_embedded(tokenizer: PreTrainedTokenizerBase, model: Any, what: str, ids: Iterable[int]) -> None:
    """Raise InputError for a token id that is beyond the embedding's rows."""
    rows, beyond = model.get_input_embeddings().weight.shape[0], max(ids, default=0)
    if beyond >= rows:
        raise InputError(
            f"model: must have an embedding for {what}, got {tokenizer.convert_ids_to_tokens(beyond)!r} with the id "
            f"{beyond} and {rows} rows. Resize the embedding and save the model, or use another token."
        )
