"""Reference-based metrics of single answers, from 0 to 100, by the libraries people compare numbers with.

rouge: the mean of the F-measures of ROUGE-1, ROUGE-2 and ROUGE-L with stemming (rouge-score), over words of any script
(`zopro.tasks.words`). A reference of one word has no pair of words: there ROUGE-2 is left out. One without a word has no
score, rather than a false 0.
chrf: chrF2 as sacrebleu defines it by default; any script.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from statistics import fmean
from typing import Any

from zopro.errors import InputError, nearest
from zopro.tasks.words import Words

Metric = Callable[[Sequence[str], Sequence[str | None]], list[float | None]]


def metric(name: str) -> Metric:
    """The metric called `name`: metric(answers, references) -> one score in [0, 100] each, None without a reference.

    Raises `InputError` for an unknown name.
    """
    if name not in METRICS:
        raise InputError(f"metric: must be one of {', '.join(METRICS)}, got {name!r}.{nearest(name, METRICS)}")
    score = METRICS[name]

    def measure(answers: Sequence[str], references: Sequence[str | None]) -> list[float | None]:
        pairs = zip(answers, references, strict=True)
        return [score(answer, reference) if reference else None for answer, reference in pairs]

    return measure


def _rouge(answer: str, reference: str) -> float | None:
    words = Words().tokenize(reference)
    if not words:
        return None
    scores = _rouge_scorer().score(reference, answer)
    return 100 * fmean(score.fmeasure for name, score in scores.items() if len(words) > 1 or name != "rouge2")


def _chrf(answer: str, reference: str) -> float:
    return _chrf_scorer().sentence_score(answer, [reference]).score


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], tokenizer=Words())


@cache
def _chrf_scorer() -> Any:
    from sacrebleu.metrics.chrf import CHRF

    return CHRF()


METRICS: dict[str, Callable[[str, str], float | None]] = {"rouge": _rouge, "chrf": _chrf}
