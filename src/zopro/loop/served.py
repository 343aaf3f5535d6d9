"""A first look at an engine that is not PyTorch: does it do what it says, and is its model the one the run began with.

lines, said = look(config, policy, tokenizer, data, frame, before=kept(store))
keep(store, said)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from operator import index
from typing import Any

import torch
from torch.nn.utils.rnn import pad_sequence

from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.engine import Batch, Engine, Sampling
from zopro.engine.opening import served
from zopro.engine.servers.check import AGREE, OTHER_WEIGHTS, apart, check_engine
from zopro.errors import InputError
from zopro.loop.data import Data
from zopro.store.durable import read_json
from zopro.store.rundir import RunDirectory, write_text
from zopro.text.frame import Frame

CHECKED_TEXTS, CHECKED_PROMPTS = 50, 2  # of the training rows

_OTHER = (
    "engine: must hold the model that the run began with, got one whose {}. Start it with the same weights, or begin a "
    "run in another output_dir."
)

Said = dict[str, Any]
"""`tokens` of a few prompts and the `logprobs` of all but their first, in nats, under the model before training; `exact`:
the engine repeats them to the bit."""


def look(
    config: RunConfig, policy: Any, tokenizer: Any, data: Data, frame: Frame, before: Said | None = None
) -> tuple[list[str], Said | None]:
    """What was found out, a line each, and what the model says of a few prompts (None of one without log-probs).

    Args:
        before: what it said as the run began, of prompts that may be others today (a template writes the date, rows have
            changed): it is asked about those again.

    Raises `InputError`: the engine does not do what it says, or its model is not the one the run was begun with.
    """
    lines: list[str] = policy.check_tokens(tokenizer, [item.prompt for item in data.train[:CHECKED_TEXTS]])
    engine = served(policy)
    assert engine is not None
    prompts = [item.ids for item in sorted(data.train, key=lambda item: len(item.ids))[:CHECKED_PROMPTS]]
    pad = int(tokenizer.pad_token_id)
    options = Sampling(config.max_completion_length, sorted(frame.stops), pad, temperature=config.temperature)
    lines += check_engine(engine, prompts, options, differences=not METHODS[config.method].population)
    if before is None:
        return lines, _said(engine, prompts, pad)
    vocabulary = policy.get_input_embeddings().weight.shape[0]
    if max(map(max, before["tokens"])) >= vocabulary:
        raise InputError(_OTHER.format(f"vocabulary of {vocabulary} does not have the tokens of the run's prompts"))
    said = _said(engine, before["tokens"], pad)
    if said is not None:
        _check_same(before, said)
    return lines, said


@torch.no_grad()
def _said(engine: Engine, prompts: Sequence[Sequence[int]], pad: int) -> Said | None:
    rows = [list(prompt) for prompt in prompts if len(prompt) > 1]
    if not engine.abilities.logprobs or not rows:
        return None
    ids = pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=pad)
    mask = pad_sequence([torch.ones(len(row), dtype=torch.long) for row in rows], batch_first=True)
    (tokens,) = engine.logprobs(Batch(ids, mask, ids.shape[1] - 1), [None])
    numbers = [[round(x, 6) for x in line[: len(row) - 1]] for line, row in zip(tokens.tolist(), rows, strict=True)]
    return {"tokens": rows, "logprobs": numbers, "exact": engine.abilities.exact}


def kept(store: RunDirectory) -> Said | None:
    """What the model said as the run began; None of a new one. Raises `InputError`: the record is damaged."""
    path = store.layout.engine()
    if not path.exists():
        return None
    said = read_json(path)
    try:
        rows = list(zip(said["tokens"], said["logprobs"], strict=True))
        whole = all(len(row) == len(numbers) + 1 > 1 and min(map(index, row)) >= 0 for row, numbers in rows)
        if not (rows and whole and all(isinstance(x, float | int) for _, numbers in rows for x in numbers)):
            raise ValueError
    except (TypeError, ValueError, LookupError):
        raise InputError(f"'{path}': must hold tokens and logprobs, and is damaged. Restore it.") from None
    return {"tokens": said["tokens"], "logprobs": said["logprobs"]}


def _check_same(before: Said, said: Said) -> None:
    between = apart(*([number for row in one["logprobs"] for number in row] for one in (before, said)))
    if not between <= (OTHER_WEIGHTS if said["exact"] else AGREE):
        raise InputError(_OTHER.format(f"log-probs differ by {between:.2g} nats a token on the run's prompts"))


def keep(store: RunDirectory, said: Said) -> None:
    """What the model said as the run began."""
    if store.writes and not store.layout.engine().exists():
        write_text(store.layout.engine(), json.dumps(said))
