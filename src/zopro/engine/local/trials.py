"""What `abilities` asks about a model: every way that the engine runs rows, against plain passes over each.

Two prompts with two answers each. `plain_passes` runs the rows of one prompt without a cache and without padding; `Judge`
compares with that: hidden states, gradients with respect to the embeddings, and the states that a cache holds, since a
lost state may be too small to be seen in what a model gives until it is trained.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionCacheLayerMixin

from zopro.engine.local.causal import Decoder, positions, why_not_finite
from zopro.engine.local.reading import Cached
from zopro.engine.local.shared import hidden_shared
from zopro.errors import InputError

COPIES = 2  # answers to each prompt
SHAPES = ((5, 3), (2, 1))  # tokens of each prompt and of its answers; short ones do not fill a convolution's window
# Largest relative error of the hidden states, in full precision and in half, where deep models round a lot.
EXACT, ROUNDED = 1e-3, 0.15
OF_GRADIENTS = 3  # times as much for gradients
FAR = 32  # columns of padding behind a beginning: in half precision a distance that is off by one is not seen
# Of the first states, which no earlier layer of their kind has rounded. That is to find what is lost, 7e-2 and more here;
# Zamba2 and Nemotron-H step on with shorter times than they scan with, which makes 1e-3.
EXACT_STATES, ROUNDED_STATES = 1e-2, 3e-2


@dataclass(frozen=True)
class Plain:
    """Rows of one prompt, and what a pass without a cache gives."""

    ids: Tensor  # (K, P + C)
    split: int  # P
    hidden: Tensor  # (K, P + C, H)
    gradient: Tensor | None  # of `_weighted` of what answers it gives, by the embeddings (K, P + C, H)

    @property
    def answers(self) -> Tensor:
        """(K, C + 1, H), from the prompt's last token on."""
        return self.hidden[:, self.split - 1 :]


def plain_passes(parts: Decoder, device: torch.device, gradients: bool = True) -> list[Plain]:
    """The rows of each prompt, passed without a cache and without padding; and back where `gradients` are asked for."""
    return [_passed(parts, ids, split, gradients) for ids, split in _numbers(parts, device)]


def _numbers(parts: Decoder, device: torch.device) -> Iterator[tuple[Tensor, int]]:
    first = 3
    for prompt, answer in SHAPES:
        numbers = [torch.arange(first + 11 * i, first + 11 * i + n) * 7 for i, n in enumerate((prompt, answer, answer))]
        rows = [torch.cat([numbers[0], ending]) for ending in numbers[1:]]
        yield (torch.stack(rows) % parts.config.vocab_size).to(device), prompt
        first += 5


@contextmanager
def _leaves(parts: Decoder) -> Iterator[list[Tensor]]:
    """Embeddings (b, T, H) of each pass, as leaves of its graph; their gradients reach all that passes on a state."""
    leaves: list[Tensor] = []

    def begin(module: nn.Module, args: object, output: Tensor) -> Tensor:
        leaves.append(output.detach().requires_grad_())
        return leaves[-1]

    hook = parts.model.get_input_embeddings().register_forward_hook(begin)
    try:
        with torch.enable_grad():
            yield leaves
    finally:
        hook.remove()


def _weighted(answers: list[Tensor]) -> Tensor:
    """A sum in which every entry of (C + 1, H) of each row counts differently."""
    weights = [torch.arange(row.numel(), device=row.device).float().sin().view_as(row) for row in answers]
    return torch.stack([(row.float() * weight).sum() for row, weight in zip(answers, weights, strict=True)]).sum()


def _passed(parts: Decoder, ids: Tensor, split: int, gradients: bool) -> Plain:
    mask = torch.ones_like(ids)
    if not gradients:
        with torch.no_grad():
            return Plain(ids, split, parts.hidden(ids, mask, positions(mask), None), None)
    with _leaves(parts) as leaves:
        hidden = parts.hidden(ids, mask, positions(mask), None)
        (gradient,) = torch.autograd.grad(_weighted(list(hidden[:, split - 1 :])), leaves[:1])
    return Plain(ids, split, hidden.detach(), gradient)


class Judge:
    """Compares with the plain passes."""

    def __init__(self, parts: Decoder, plain: list[Plain]) -> None:
        self.parts, self.plain = parts, plain
        everything = torch.cat([group.hidden.flatten(0, 1) for group in plain]).float()
        self._mean = everything.mean(0)  # what all tokens have in common tells nothing
        if not everything.isfinite().all():
            raise InputError(f"model: its states are not finite; {why_not_finite(parts.model.dtype)}.")
        full = parts.model.dtype in (torch.float32, torch.float64)
        self.exact = full and torch.get_float32_matmul_precision() == "highest"
        self.limit = EXACT if self.exact else ROUNDED
        for group in plain:
            prompt = group.hidden[:, : group.split]
            if not self._near(prompt[0], prompt[1], self.limit, self._mean):
                raise InputError(
                    f"model: {type(parts.model).__name__} reads tokens that come later, or other rows; "
                    "choose a causal language model."
                )

    def _near(self, found: Tensor, expected: Tensor, limit: float, mean: Tensor | float) -> bool:
        found, expected = found.float(), expected.float()
        return found.shape == expected.shape and bool((found - expected).norm() <= limit * (expected - mean).norm())

    def like(self, run: Callable[[], list[Tensor]]) -> bool:
        """Whether `run` gives each row's states (C + 1, H) from the prompt's last token on."""
        with torch.no_grad():
            found = _tried(run)
        return found is not None and self._like(found, self.plain)

    def _like(self, found: list[Tensor], plain: list[Plain]) -> bool:
        expected = [row for group in plain for row in group.answers]
        return self._near(torch.cat(found), torch.cat(expected), self.limit, self._mean)

    def keeps_states(self, step: int | None) -> bool:
        """Whether states, taken on by the last two tokens, `step` at a time or both at once, end as the whole row's do.

        A lost state may be too small to be seen in what the model gives, until it is trained.
        """
        ids = self.plain[0].ids
        last = ids.shape[1]
        ends = [*range(last - 2, last, step or last), last]
        return self._same_states(lambda: _states(self.parts, ids, torch.ones_like(ids), ends), ids)

    def pads_states(self) -> bool:
        """Whether the states of a short row are the same behind padding."""
        ids = self.plain[-1].ids
        padded, mask = (nn.functional.pad(tensor, (3, 0)) for tensor in (ids, torch.ones_like(ids)))
        return self._same_states(lambda: _states(self.parts, padded, mask, [padded.shape[1]]), ids, unseen=True)

    def reads_beginnings(self) -> bool:
        """Whether rows of different lengths can go on from a beginning that was read once, padding between the two."""
        group = self.plain[0]
        ends = [group.ids.shape[1] - 1, group.ids.shape[1] - 2]  # of the two rows' prompts; one more token is read then

        def run() -> list[Tensor]:
            mask = torch.ones_like(group.ids[:, : ends[0]])
            mask[1, 0] = 0
            ids = torch.stack([group.ids[0, : ends[0]], group.ids[1].roll(1)[: ends[0]]])
            ids, mask = (nn.functional.pad(tensor, (FAR, 0)) for tensor in (ids, mask))
            reading = Cached(self.parts, ids, mask, 1, prefix=group.split)
            first = reading.hidden
            reading.read(group.ids[[0, 1], ends])
            return [*first, *reading.hidden]

        with torch.no_grad():
            found = _tried(run)
        places = [end + later - 1 for later in (0, 1) for end in ends]
        expected = [group.hidden[row, place] for row, place in zip((0, 1, 0, 1), places, strict=True)]
        return found is not None and self._near(torch.stack(found), torch.stack(expected), self.limit, self._mean)

    def _same_states(self, run: Callable[[], list[Tensor]], ids: Tensor, unseen: bool = False) -> bool:
        with torch.no_grad():
            found = _tried(run)
            expected = _tried(lambda: _states(self.parts, ids, torch.ones_like(ids), [ids.shape[1]]))
        if not found or not expected:  # they are kept elsewhere than in the cache
            return unseen
        limit = EXACT_STATES if self.exact else ROUNDED_STATES
        same = [self._near(*pair, limit, 0.0) for pair in zip(found, expected, strict=False)]
        return len(found) == len(expected) and all(same)

    def gradients_like(self, plain: list[Plain]) -> bool:
        """Whether shared prompts give the states of the plain passes under autograd, and their gradients."""
        given: list[Tensor] = []

        def run() -> list[Tensor]:
            _, mask, split = batch_of(plain, left=True)
            with _leaves(self.parts) as leaves:
                given.extend(shared(self.parts, plain))
                prompts, answers = torch.autograd.grad(_weighted(given), leaves)
            return [prompts[mask[::COPIES, :split].bool()], answers[mask[:, split:].bool()]]

        found = _tried(run)
        if found is None or not self._like([row.detach() for row in given], plain):
            return False
        true = [(group.gradient, group.split) for group in plain if group.gradient is not None]
        expected = [gradient[:, :split].sum(0) for gradient, split in true]
        expected += [row for gradient, split in true for row in gradient[:, split:]]
        return self._near(torch.cat(found), torch.cat(expected), OF_GRADIENTS * self.limit, 0.0)


def _tried(run: Callable[[], list[Tensor]]) -> list[Tensor] | None:
    """None where the architecture's code does not go that way, for whatever reason."""
    try:
        return run()
    except torch.OutOfMemoryError:
        raise
    except Exception:
        return None


def has_states(parts: Decoder) -> bool:
    """Whether something is kept beside keys and values."""
    layers = DynamicCache(config=parts.model.config).layers
    recurrent = any(isinstance(layer, LinearAttentionCacheLayerMixin) for layer in layers)
    return recurrent or bool(getattr(parts.model, "_is_stateful", False))


def _states(parts: Decoder, ids: Tensor, mask: Tensor, ends: list[int]) -> list[Tensor]:
    """What the first layer with states holds beside keys and values after passes that end at these columns."""
    cache, where, first = DynamicCache(config=parts.model.config), positions(mask), 0
    for last in ends:
        parts.hidden(ids[:, first:last], mask[:, :last], where[:, first:last], cache)
        first = last
    held = [[value for value in vars(layer).values() if isinstance(value, dict)] for layer in cache.layers]
    states = [[s for kind in kinds for s in kind.values() if isinstance(s, Tensor)] for kinds in held]
    return next((layer for layer in states if layer), [])


def batch_of(plain: list[Plain], left: bool) -> tuple[Tensor, Tensor, int]:
    """All rows in one batch: ids, mask and the columns of prompts, which are padded on the left only if asked to."""
    split = max(group.split for group in plain)
    width = split + max(group.ids.shape[1] - group.split for group in plain)
    rows, masks = [], []
    for group in plain:
        before = split - group.split if left else 0
        pad = before, width - before - group.ids.shape[1]
        rows.append(nn.functional.pad(group.ids, pad))
        masks.append(nn.functional.pad(torch.ones_like(group.ids), pad))
    return torch.cat(rows), torch.cat(masks), split


def padded(parts: Decoder, plain: list[Plain], left: bool) -> list[Tensor]:
    ids, mask, _ = batch_of(plain, left)
    hidden = parts.hidden(ids, mask, positions(mask), None)
    groups = [group for group in plain for _ in range(COPIES)]
    return [row[seen.bool()][group.split - 1 :] for row, seen, group in zip(hidden, mask, groups, strict=True)]


def shared(parts: Decoder, plain: list[Plain]) -> list[Tensor]:
    ids, mask, split = batch_of(plain, left=True)
    hidden = hidden_shared(parts, ids, mask, split, COPIES)
    return [row[: 1 + length] for row, length in zip(hidden, mask[:, split:].sum(1).tolist(), strict=True)]


def decoded(parts: Decoder, plain: list[Plain]) -> list[Tensor]:
    """Token by token; rows whose answers end leave the batch."""
    ids, mask, split = batch_of(plain, left=True)
    rows = torch.arange(len(ids), device=ids.device)
    reading = Cached(parts, ids[::COPIES, :split], mask[::COPIES, :split], COPIES)
    found = [[state] for state in reading.hidden]
    for column in range(split, ids.shape[1]):
        going = mask[rows, column].bool()
        if not going.all():
            reading.select(going.nonzero()[:, 0])
            rows = rows[going]
        reading.read(ids[rows, column])
        for row, state in zip(rows.tolist(), reading.hidden, strict=True):
            found[row].append(state)
    return [torch.stack(states) for states in found]
