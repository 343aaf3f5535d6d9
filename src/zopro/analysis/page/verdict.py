"""What a run has come to, in words: the first thing that its report says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from zopro.analysis.page.answers import agreement, broken
from zopro.analysis.reading.records import Record, is_number, start_of
from zopro.choices import REWARDS
from zopro.store import shown
from zopro.store.layout import Layout

MANY = 0.05  # of the answers: as many more broken ones than before are said beside the verdict


@dataclass(frozen=True)
class Verdict:
    """word: better, worse, or neither, and what is broken. sentence: the numbers for it. details: one line each."""

    word: str
    sentence: str
    details: Sequence[str]


def verdict(run: Path, config: Record, evaluations: Sequence[Record]) -> Verdict | None:
    """Of the newest policy; None before one is evaluated."""
    if not evaluations or evaluations[-1].get("iteration") is None:
        return None
    last, start = evaluations[-1], start_of(config)
    before = evaluations[0] if evaluations[0].get("iteration") is None else {}
    word = _word(last, start)
    (lost, of), (lost_before, _) = broken(run, last["iteration"]), broken(run, None)
    if lost - lost_before > MANY * of:
        word += f", but {lost} of {of} answers are broken"
    parts = []
    if is_number(last.get("win_rate")):
        parts.append(f"Win rate {shown.interval(last, 'win_rate')} against {start.the} by {judge(run, config)}")
    if is_number(last.get(shown.PER_ANSWER)):
        parts.append(f"KL {shown.kl(last[shown.PER_ANSWER])} nats per answer")
    if record := last.get(shown.REMEMBERED):
        parts.append(shown.remembered(record))
    if elsewhere := shown.elsewhere(last):
        parts.append(elsewhere)
    details = list(_details(run, config, before, last, evaluations))
    if of:
        kinds = "empty, repeating themselves or the prompt, or in another language than the reference"
        details.append(f"Broken answers ({kinds}): {lost} of {of}, before {lost_before}.")
    return Verdict(word, "; ".join(parts) + ".", details)


def judge(run: Path, config: Record) -> str:
    """Who decides the win rate, named."""
    if _by_reward(config):
        return "the reward itself (the higher one wins)"
    name = str(config.get("judge", "auto"))
    if Layout(run).demo().is_dir():
        return f"the true rule ({name})"
    return shown.judge(name, str(config.get("task", "")))


def _by_reward(config: Record) -> bool:
    """Whether no judge was asked: a run that trains no reward model compares rewards."""
    rewards = config.get("reward")
    names = rewards if isinstance(rewards, list) else []
    return bool(names) and not any(REWARDS[name].trained for name in map(str, names) if name in REWARDS)


def _word(last: Record, start: shown.Start) -> str:
    low, high = (last.get(f"win_rate_{edge}") for edge in ("low", "high"))
    if is_number(low) and low > 0.5:
        return f"Better than {start.the}"
    if is_number(high) and high < 0.5:
        return f"Worse than {start.the}"
    return f"No clear difference from {start.the}"


def _details(run: Path, config: Record, before: Record, last: Record, evaluations: Sequence[Record]) -> Iterator[str]:
    n = shown.several(last.get("n", "some"), "held-out prompt")
    for key, name in (("reward", "Reward"), ("accuracy", "Accuracy"), ("greedy_reward", "Reward of greedy answers")):
        if is_number(before.get(key)) and is_number(last.get(key)):
            gain = f", gained {shown.interval(last, f'{key}_gain')}" if is_number(last.get(f"{key}_gain")) else ""
            values = f"{shown.reward(before[key])} before, {shown.interval(last, key)} after"
            yield f"{name} {values}{gain} ({n})."
    iterations = [line["iteration"] for line in evaluations if isinstance(line.get("iteration"), int)]
    found = {} if _by_reward(config) else agreement(run, iterations)
    if found:
        said, rewards = shown.interval(found, "agreement"), config.get("reward")
        preferred = "that the first reward model prefers" if rewards in (None, ["model"]) else "with the higher reward"
        over = shown.several(found["n"], "prompt")
        yield f"The judge prefers the answer {preferred} in {said} of the pairs (mean of {over})."
