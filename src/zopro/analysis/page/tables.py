"""The report's tables, as texts: a column is there if a policy has a value for it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from zopro.analysis.reading.records import Record
from zopro.store import shown


def evaluation_table(evaluations: Sequence[Record], start: shown.Start) -> list[list[tuple[str, str]]]:
    """A row for each policy: (name of the column, text)."""
    last = evaluations[-1] if evaluations else {}
    columns: list[tuple[str, Any]] = [
        ("Reward", lambda line: shown.reward(line.get("reward"))),
        ("95 %", lambda line: shown.bounds(line, "reward")),
        ("KL per answer", lambda line: shown.kl(line.get(shown.PER_ANSWER))),
        ("Win rate", lambda line: shown.share(line.get("win_rate"))),
        ("95 %", lambda line: shown.bounds(line, "win_rate")),
        (str(last.get("metric_name") or "Metric"), lambda line: shown.metric(line.get("metric"))),
        ("Accuracy", lambda line: shown.share(line.get("accuracy"))),
        ("95 %", lambda line: shown.bounds(line, "accuracy")),
        (f"pass@{last.get('samples', '')}", lambda line: shown.share(line.get("pass_at_k"))),
        ("Greedy reward", lambda line: shown.reward(line.get("greedy_reward"))),
        ("Greedy accuracy", lambda line: shown.share(line.get("greedy_accuracy"))),
        ("Easy questions", _known),
        ("Length", lambda line: shown.fixed(line.get("length"), 1)),
        ("Ended", lambda line: shown.share(line.get("ended"))),
        ("n", lambda line: str(line.get("n", shown.MISSING))),
    ]
    rows = [[text(line) for _, text in columns] for line in evaluations]
    kept = [i for i in range(len(columns)) if any(row[i] != shown.MISSING for row in rows)]
    return [
        [("Policy", shown.policy(line.get("iteration"), start)), *((columns[i][0], row[i]) for i in kept)]
        for line, row in zip(evaluations, rows, strict=True)
    ]


def _known(line: Record) -> str:
    record = line.get(shown.REMEMBERED)
    return f"{record['known']} of {record['of']}" if isinstance(record, dict) else shown.MISSING


@dataclass(frozen=True)
class Quality:
    """What a reward model is worth: its first number, and all of them with the rows that they are of."""

    name: str
    head: str
    words: str


def reward_models(metrics: Iterable[Record]) -> list[Quality]:
    """The first one on held-out rows, and each refined one on its pairs; after a resume the later line counts."""
    found: dict[str, Quality] = {}
    for line in metrics:
        if line.get("event") != "quality":
            continue
        if line.get("stage") == "reward":
            numbers = {key: line[key] for key in ("accuracy", "pearson", "spearman", "n") if line.get(key) is not None}
            head = shown.share(next(iter(numbers.values()), None))
            found["first"] = Quality("first", head, shown.held_out(numbers))
        elif line.get("stage") == "refine":
            before, after = (shown.share(line.get(f"accuracy_{when}")) for when in ("before", "after"))
            name = f"refined after iteration {line.get('iteration')}"
            words = f"accuracy {before} before, {after} after, on the {line.get('pairs')} pairs it was trained on"
            found[name] = Quality(name, after, words)
    return list(found.values())
