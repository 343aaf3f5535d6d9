"""The answer nearer to the reference wins."""

from __future__ import annotations

from zopro.tasks.metrics import metric


class MetricJudge:
    """The answer with the higher `metric(name)` against the reference wins; -1 for a tie or no reference."""

    def __init__(self, name: str) -> None:
        self.measure = metric(name)

    def __call__(self, prompts: list[str], completions: list[list[str]], references: list[str | None]) -> list[int]:
        pairs = zip(completions, references, strict=True)
        return [self._best(self.measure(pair, [reference] * len(pair))) for pair, reference in pairs]

    @staticmethod
    def _best(scores: list[float | None]) -> int:
        known = [score for score in scores if score is not None]
        if len(known) < len(scores) or known.count(max(known)) > 1:
            return -1
        return known.index(max(known))
