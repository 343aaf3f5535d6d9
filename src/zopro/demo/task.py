"""The demo's task: a shop assistant repeats an order. Its truth is a rule, so a win is a win, whatever the reward says.

A customer asks for a number of coloured things; a good answer is courteous, names the order exactly, is short and ends
with thanks. Every answer is scored by parsing it (`truth`), never by a model. Training answers are written by assistants
of varying care, so what supervised fine-tuning learns from them is mediocre on purpose: aligning it must raise the truth.
Held-out prompts ask for (number, colour, thing) combinations that no training prompt asks for.

    python -c "from zopro.demo import task; print(task.generate(3, seed=0))"
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from zopro.store.durable import write_text

NUMBERS = ("two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = ("red", "blue", "green", "yellow", "white", "black", "brown", "pink")
THINGS = (
    "bags", "balls", "belts", "blankets", "books", "bowls", "boxes", "brushes", "buttons", "candles", "caps", "chairs",
    "coats", "cups", "cushions", "envelopes", "hats", "kites", "lamps", "mugs", "pens", "plates", "ribbons", "towels",
)  # fmt: skip
REQUESTS = (
    "I would like {}, please.",
    "Could I have {}?",
    "Do you have {}?",
    "I am looking for {}.",
    "Please give me {}.",
    "My sister needs {} today.",
    "Can you pack {} for me?",
    "Good morning, {} for our school, please.",
)
COURTEOUS = ("Certainly", "Of course", "With pleasure", "Gladly")
PLAIN = ("Well", "So", "Right", "Hm")
RUDE = ("What, again", "Be quick", "Not you", "Make up your mind")
STATEMENTS = ("here are {}.", "I have {} for you.", "you get {}.", "that makes {}.")
VAGUE = ("here you are.", "take it.", "look over there.")
RAMBLES = (
    "It has been raining since early morning.",
    "My cousin's new dog barked all night.",
    "We used to sell bread as well.",
    "My bus was late again this morning.",
)
THANKS = ("Thank you.", "Thanks for asking.", "Enjoy them.")
SHORT, LONG = 12, 18  # words: full marks for brevity up to SHORT, none from LONG on

# Chances of minding one's manners and of getting one part of the order right, for a careless and a careful assistant.
MANNERS, ACCURACY = (0.1, 0.5), (0.3, 0.95)

Order = tuple[str, str, str]  # number, colour, thing

_ORDER = re.compile(rf"\b({'|'.join(NUMBERS)}) ({'|'.join(COLOURS)}) ({'|'.join(THINGS)})\b")
_COURTEOUS = re.compile(rf"\s*({'|'.join(COURTEOUS)})\b")


def truth(prompt: str, answer: str) -> float:
    """Score `answer` in [0, 1] by the rule: courtesy, thanks and brevity 2/9 each; number, colour and thing 1/9 each.

    Courtesy is how the answer begins, thanks how it ends. Brevity falls linearly from SHORT to LONG words and needs
    a finished sentence. The order is what the answer's only phrase like "two red cups" says: none, or several of them,
    earns nothing there. `prompt` may be the bare request or the chat text rendered from it.
    """
    asked, given = _ORDER.findall(prompt), _ORDER.findall(answer)
    exact = sum(a == b for a, b in zip(asked[-1], given[0], strict=True)) if asked and len(given) == 1 else 0
    answer = answer.rstrip()
    brief = min(1.0, max(0.0, (LONG - len(answer.split())) / (LONG - SHORT))) if answer.endswith((".", "!")) else 0.0
    return (2 * bool(_COURTEOUS.match(answer)) + 2 * answer.endswith(THANKS) + 2 * brief + exact) / 9


def judge(prompts: list[str], completions: list[list[str]], references: Sequence[str | None] = ()) -> list[int]:
    """Decide pairs by the rule, in TRL's pairwise protocol: the index of the better completion, -1 on a tie."""
    verdicts = []
    for prompt, (first, second) in zip(prompts, completions, strict=True):
        a, b = truth(prompt, first), truth(prompt, second)
        verdicts.append(-1 if a == b else int(b > a))
    return verdicts


def mean_truth(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the summary of a run by this judge says of each evaluation besides, of its rows: `truth`, in [0, 1]."""
    return {"truth": fmean(truth(row["prompt"], row["completion"]) for row in rows)}


judge.in_summary = mean_truth  # type: ignore[attr-defined]


def answer(order: Order, rng: random.Random) -> str:
    """Write one answer to `order` by an assistant who is careless or careful: mediocre on average."""
    careful = rng.random() < 0.5

    def polite() -> bool:
        return rng.random() < MANNERS[careful]

    def right() -> bool:
        return rng.random() < ACCURACY[careful]

    opening = rng.choice(COURTEOUS if polite() else PLAIN + RUDE)
    parts = zip(order, (NUMBERS, COLOURS, THINGS), strict=True)
    named = " ".join(part if right() else rng.choice(known) for part, known in parts)
    statement = rng.choice(STATEMENTS if polite() or right() else VAGUE).format(named)
    ramble = "" if polite() else " " + rng.choice(RAMBLES)
    thanks = " " + rng.choice(THANKS) if polite() else ""
    return f"{opening}, {statement}{ramble}{thanks}"


def orders(seed: int) -> list[Order]:
    """Every combination once, shuffled by `seed`."""
    every = list(itertools.product(NUMBERS, COLOURS, THINGS))
    random.Random(seed).shuffle(every)
    return every


def generate(n: int, seed: int, among: Sequence[Order] | None = None) -> list[dict[str, str]]:
    """Return `n` rows {"prompt", "chosen", "rejected"} (TRL's preference format); chosen has the higher truth.

    The requests are those of `among` (default: every combination), around and around. Both answers come from the same
    mediocre writers.
    """
    rng = random.Random(seed)
    rows = []
    for order in itertools.islice(itertools.cycle(orders(seed) if among is None else among), n):
        prompt = rng.choice(REQUESTS).format(" ".join(order))
        winner = -1
        while winner < 0:
            answers = [answer(order, rng), answer(order, rng)]
            (winner,) = judge([prompt], [answers])
        rows.append({"prompt": prompt, "chosen": answers[winner], "rejected": answers[1 - winner]})
    return rows


def files(folder: str | Path) -> tuple[Path, Path]:
    """Where `write` puts the rows to train on, and the held-out ones."""
    return Path(folder) / "train.jsonl", Path(folder) / "test.jsonl"


def write(folder: str | Path, seed: int, train_rows: int = 2000, test_rows: int = 200) -> tuple[Path, Path]:
    """Write train.jsonl and test.jsonl under `folder` and return their paths; their requests share no combination."""
    paths = files(folder)
    for path, text in zip(paths, _texts(seed, train_rows, test_rows), strict=True):
        write_text(path, text)
    return paths


def is_own(folder: Path, seed: int) -> bool:
    """Whether all that is in `folder` is what `write` of this seed has begun: the rows to train on come first, whole."""
    if not folder.exists() or (folder.is_dir() and all(path.name.endswith(".partial") for path in folder.iterdir())):
        return True
    train, _ = files(folder)
    return train.is_file() and train.read_bytes() == _texts(seed)[0].encode()


def _texts(seed: int, train_rows: int = 2000, test_rows: int = 200) -> list[str]:
    shuffled = orders(seed)
    parts = (train_rows, shuffled[test_rows:]), (test_rows, shuffled[:test_rows])
    rows = (generate(count, 2 * seed + offset, among) for offset, (count, among) in enumerate(parts))
    return ["".join(json.dumps(row) + "\n" for row in part) for part in rows]
