"""A first look at an engine that is not PyTorch: does it do what it says, and is its model the one the run began with.

lines, said = look(config, policy, tokenizer, data, frame)
check_same(store, said)         # as what is kept with the run
keep(store, said)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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

Said = dict[str, Any]
"""`tokens` of a few prompts and the `logprobs` of all but their first, in nats, under the model before training; `exact`:
the engine repeats them to the bit."""


def look(config: RunConfig, policy: Any, tokenizer: Any, data: Data, frame: Frame) -> tuple[list[str], Said | None]:
    """What was found out, a line each, and what the model says of a few prompts (None of one without log-probs).

    Raises `InputError`: the engine does not do what it says.
    """
    policy.check_tokens(tokenizer, [item.prompt for item in data.train[:CHECKED_TEXTS]])
    engine = served(policy)
    assert engine is not None
    prompts = [item.ids for item in sorted(data.train, key=lambda item: len(item.ids))[:CHECKED_PROMPTS]]
    pad = int(tokenizer.pad_token_id)
    options = Sampling(config.max_completion_length, sorted(frame.stops), pad, temperature=config.temperature)
    lines = check_engine(engine, prompts, options, differences=not METHODS[config.method].population)
    return lines, _said(engine, prompts, pad)


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


def check_same(store: RunDirectory, said: Said) -> None:
    """Raise `InputError` where the run was begun with a model that said other things, or its record is damaged."""
    path = store.layout.engine()
    if not path.exists():
        return
    kept = read_json(path)
    try:
        if kept["tokens"] != said["tokens"]:  # other rows, or another template: nothing to compare
            return
        between = apart(*([float(number) for row in one["logprobs"] for number in row] for one in (kept, said)))
    except (TypeError, ValueError, LookupError):
        raise InputError(f"'{path}': must hold tokens and logprobs, and is damaged. Restore it.") from None
    if not between <= (OTHER_WEIGHTS if said["exact"] else AGREE):
        raise InputError(
            f"engine: must hold the model that the run began with, got one whose log-probs differ by {between:.2g} nats "
            "a token on the run's prompts. Start it with the same weights, or begin a run in another output_dir."
        )


def keep(store: RunDirectory, said: Said) -> None:
    """What the model said as the run began."""
    if store.writes and not store.layout.engine().exists():
        write_text(store.layout.engine(), json.dumps(said))
