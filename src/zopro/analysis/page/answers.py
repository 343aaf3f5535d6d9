"""Held-out prompts with what each policy answered, and which answers are broken."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean

from zopro.analysis.reading.records import Record, is_number, read_config, read_jsonl, start_of
from zopro.store import shown
from zopro.store.layout import Layout, numbered
from zopro.system.statistics import win_interval
from zopro.text.degenerate import degenerate
from zopro.text.turns import turns

SAMPLE_PROMPTS = 20
BASE, SAMPLED, GREEDY = "base model", "sampled", "greedy"


@dataclass(frozen=True)
class Answer:
    """One answer by the policy `name` to the prompt `asked`, which has a `reference`; `how` it was drawn. broken: why
    nothing good can be said of it, or None."""

    name: str
    how: str
    text: str
    reward: float | None = None
    win: float | None = None
    asked: str = ""
    reference: str = ""

    @property
    def broken(self) -> str | None:
        return degenerate(self.text, self.asked, self.reference)


@dataclass(frozen=True)
class Sample:
    """A held-out prompt with every policy's answers to it. messages: role and text of each."""

    prompt: str
    reference: str | None
    answers: Sequence[Answer]

    @property
    def messages(self) -> list[tuple[str, str]]:
        return turns(self.prompt)

    @property
    def title(self) -> str:
        """What is asked, on one line."""
        return " ".join(self.messages[-1][1].split())

    def of(self, *names: str) -> Sample:
        """With the answers of these policies alone."""
        return replace(self, answers=[answer for answer in self.answers if answer.name in names])


def samples(run: Path) -> list[Sample]:
    """The first held-out prompts with the answers of the base model, of the start and of each iteration."""
    config = read_config(run)
    files = _files(run, start_of(config))
    if config.get("sft_steps") == 0:  # then the base model is what the run starts from
        files.pop(BASE)
    answers: dict[str, list[Answer]] = {}
    references: dict[str, str | None] = {}
    for name, path in files.items():
        for row in read_jsonl(path):
            prompt = str(row.get("prompt", ""))
            if prompt not in answers:
                if len(answers) == SAMPLE_PROMPTS:
                    continue
                answers[prompt], references[prompt] = [], row.get("reference")
            if not any(answer.name == name for answer in answers[prompt]):
                answers[prompt] += _answers(name, row)
    return [Sample(prompt, references[prompt], rows) for prompt, rows in answers.items()]


def _files(run: Path, start: shown.Start) -> dict[str, Path]:
    layout = Layout(run)
    iterations = numbered(layout.evaluations(), ".jsonl")
    names = {shown.policy(iteration, start): path for iteration, path in iterations.items()}
    return {BASE: layout.evaluation("base"), start.name: layout.evaluation(None), **names}


def _answers(name: str, row: Record) -> list[Answer]:
    def number(key: str) -> float | None:
        return row[key] if is_number(row.get(key)) else None

    asked, reference = turns(str(row.get("prompt", "")))[-1][1], str(row.get("reference") or "")
    text = str(row.get("completion", ""))
    found = [Answer(name, SAMPLED, text, number("reward"), number("win"), asked, reference)]
    if isinstance(row.get("greedy"), str):
        found.append(replace(found[0], how=GREEDY, text=row["greedy"], reward=number("greedy_reward"), win=None))
    return found


def broken(run: Path, iteration: int | None) -> tuple[int, int]:
    """Of the held-out answers of a policy how many are broken, and how many there are."""
    rows = read_jsonl(Layout(run).evaluation(iteration))
    return sum(_answers("", row)[0].broken is not None for row in rows), len(rows)


def agreement(run: Path, iterations: Iterable[int]) -> Record:
    """How often the judge prefers the answer with the higher reward, with its 95 % interval, over all pairs that it
    decided and whose rewards differ; none without such a pair. Rows are paired by place, as they were judged.

    It is over the `n` held-out prompts, each with the mean of its pairs: an iteration has one, against the same answer of
    the start.
    """
    layout = Layout(run)
    before = read_jsonl(layout.evaluation(None))
    found: dict[int, list[float]] = defaultdict(list)
    for iteration in iterations:
        for place, (row, start) in enumerate(zip(read_jsonl(layout.evaluation(iteration)), before, strict=False)):
            if (
                row.get("prompt") == start.get("prompt")  # else a line is lost
                and is_number(row.get("win"))
                and row["win"] != 0.5
                and is_number(row.get("reward"))
                and is_number(start.get("reward"))
                and row["reward"] != start["reward"]
            ):
                found[place].append(float((row["win"] > 0.5) == (row["reward"] > start["reward"])))
    if not found:
        return {}
    share, low, high = win_interval([*map(fmean, found.values())])
    return {"agreement": share, "agreement_low": low, "agreement_high": high, "n": len(found)}
