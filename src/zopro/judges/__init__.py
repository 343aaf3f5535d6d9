"""Who wins a pair of answers: a metric, a model, an endpoint or any Python callable, behind one small protocol.

It is TRL's pairwise protocol with references: judge(prompts, completions, references) -> index of each pair's winner,
-1 for no verdict. `judge_pairs` runs any judge: single bad verdicts are counted, a judge that is broken is refused.

    python -c "from zopro.judges import MetricJudge; print(MetricJudge('rouge')(['?'], [['a cat', 'dogs']], ['cat']))"
"""

from __future__ import annotations

import contextlib
import importlib
import operator
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from zopro.config.judging import PairOptions
from zopro.errors import InputError, nearest
from zopro.judges.endpoint import NoVerdict, OpenAIJudge, api_key
from zopro.judges.model import ModelJudge
from zopro.judges.verdicts import Row, Verdicts
from zopro.system import guard
from zopro.tasks.base import Task
from zopro.tasks.metrics import METRICS, metric

__all__ = [
    "CallableJudge",
    "Judge",
    "JudgeResult",
    "MetricJudge",
    "ModelJudge",
    "OpenAIJudge",
    "judge_pairs",
    "make_judge",
]

_GIVE_UP_AFTER = 3
"""Failures in a row after which a judge is taken to be broken; a remote one may take a minute to fail each time."""


class Judge(Protocol):
    """prompts [N], completions [N][2], references [N] -> winners [N]: 0, 1 or -1 (no verdict).

    One that finds its verdicts one by one may also have `each(prompts, completions, references)`, which yields
    (position, verdict) in any order. One whose verdicts are worth keeping has the attribute `kept` = True.
    """

    def __call__(
        self, prompts: list[str], completions: list[list[str]], references: list[str | None]
    ) -> Sequence[int | NoVerdict]: ...


@dataclass(frozen=True)
class JudgeResult:
    """winners [N]: 0, 1 or -1. ties: pairs without a verdict. invalid: pairs whose verdict was unusable (their winner
    is -1 too). reasons: why, with counts, for ties known beforehand and for invalid verdicts."""

    winners: list[int]
    invalid: int
    ties: int
    reasons: dict[str, int]


def judge_pairs(
    judge: Judge,
    prompts: Sequence[str],
    completions: Sequence[Sequence[str]],
    references: Sequence[str | None],
    verdicts: Verdicts | None = None,
    batch_size: int = 0,
) -> JudgeResult:
    """Ask `judge` about every pair, `batch_size` in a call (0: all).

    Pairs of equal answers are ties without asking. A judge that raises or returns the wrong number of verdicts is
    asked again pair by pair, so that one bad pair does not cost the others; a bad verdict is counted and dropped.
    With `verdicts`, those of a judge that wants them kept are taken from there, and added to it as they come.

    Raises:
        InputError: the judge is broken: it is late, fails on three pairs in a row, or has no usable verdict on any of
            three or more. What it said before is in `verdicts`.
        ValueError: the three arguments differ in length, which is the caller's mistake.
    """
    rows: list[Row] = list(zip(prompts, map(list, completions), references, strict=True))
    kept = verdicts if getattr(judge, "kept", False) else None
    equal = {index for index, (_, answers, _) in enumerate(rows) if len(set(answers)) == 1}
    winners = [-1] * len(rows)
    reasons: Counter[str] = Counter({"equal answers": len(equal)} if equal else {})
    due: list[int] = []
    for index, row in enumerate(rows):
        known = None if kept is None or index in equal else kept.get(row)
        if known is not None:
            winners[index] = known
        elif index not in equal:
            due.append(index)
    failures, asked = 0, _ask(judge, rows, due, batch_size)
    try:
        for index, verdict in asked:
            winner = _checked(verdict, len(rows[index][1]))
            if isinstance(winner, int):
                winners[index] = winner
                if kept is not None:
                    kept.keep(rows[index], winner)
            else:
                reasons[winner] += 1
            failures = failures + 1 if isinstance(verdict, NoVerdict) and verdict.failed else 0
            if failures == _GIVE_UP_AFTER:
                raise _broken(judge, f"failed on {failures} pairs in a row, last on pair {index} ({winner})")
    except guard.Late as error:
        raise _broken(judge, f"gave {error}") from None
    finally:
        asked.close()
    invalid = reasons.total() - len(equal)
    if invalid == len(rows) - len(equal) >= _GIVE_UP_AFTER:
        most, count = (reasons - Counter({"equal answers": len(equal)})).most_common(1)[0]
        raise _broken(judge, f"gave no usable verdict on {invalid} pairs ({most}: {count})")
    return JudgeResult(winners, invalid, winners.count(-1) - invalid, dict(reasons))


def _broken(judge: Judge, what: str) -> InputError:
    name = getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__)
    return InputError(
        f"judge: must say which answer of a pair is better, but {name} {what}. Fix it or raise its timeout, then "
        "continue with --resume: verdicts it gave are not asked for again."
    )


def _ask(judge: Judge, rows: list[Row], due: list[int], batch_size: int) -> Generator[tuple[int, Any], None, None]:
    """(index, verdict or `NoVerdict`) of every row that is due, in any order."""
    each = getattr(judge, "each", None)
    if each is not None:
        asked = [rows[index] for index in due]
        for position, verdict in each(*_columns(asked)):
            yield due[position], verdict
        return
    size = batch_size or len(due) or 1
    for start in range(0, len(due), size):
        batch = due[start : start + size]
        answer = _call(judge, [rows[index] for index in batch])
        if isinstance(answer, list):
            yield from zip(batch, answer, strict=True)
        elif len(batch) == 1:
            yield batch[0], answer
        else:
            for index in batch:
                one = _call(judge, [rows[index]])
                yield index, one[0] if isinstance(one, list) else one


def _columns(rows: list[Row]) -> tuple[list[Any], list[Any], list[Any]]:
    return [row[0] for row in rows], [row[1] for row in rows], [row[2] for row in rows]


def _call(judge: Judge, rows: list[Row]) -> list[Any] | NoVerdict:
    try:
        verdicts = list(judge(*_columns(rows)))
    except guard.Late:
        raise
    except Exception as error:
        return NoVerdict(f"judge raised {guard.reason(error)}")
    if len(verdicts) != len(rows):
        return NoVerdict("judge returned the wrong number of verdicts")
    return verdicts


def _checked(verdict: Any, answers: int) -> int | str:
    """The verdict as an index or -1, or the reason why it is neither."""
    if isinstance(verdict, NoVerdict):
        return verdict.reason
    try:
        winner = operator.index(verdict)
    except TypeError:
        return f"verdict is not an integer but {type(verdict).__name__}"
    if isinstance(verdict, bool):
        return "verdict is not an integer but bool"
    return winner if -1 <= winner < answers else f"verdict {winner} is out of range"


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


class CallableJudge:
    """A Python callable, or the "module:function" that names one, called with (prompts, completions, references).

    Modules of the working directory are found as well. timeout: seconds for one call, 0 for no limit (see
    `zopro.system.guard.call`). Raises `InputError` if there is no such callable.
    """

    kept = True

    def __init__(self, target: str | Judge, timeout: float = 0.0) -> None:
        self.function: Judge = _resolve(target) if isinstance(target, str) else target
        self.name = f"python:{target}" if isinstance(target, str) else ""
        self.timeout = timeout
        if not callable(self.function):
            raise InputError(f"judge: must be callable, got {target!r}.")

    def __call__(
        self, prompts: list[str], completions: list[list[str]], references: list[str | None]
    ) -> Sequence[int | NoVerdict]:
        # A generator would do its work where it is read: not under the time limit.
        return guard.call(lambda: list(self.function(prompts, completions, references)), self.timeout)


def _resolve(name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    if not module_name or not attribute:
        raise InputError(f"judge: a Python judge must be module:function, got {name!r}.")
    try:
        with _working_directory_importable():
            module = importlib.import_module(module_name)
    except Exception as error:  # whatever the user's module raises while it is imported
        raise InputError(f"judge: cannot import {module_name!r} ({type(error).__name__}: {error}).") from error
    if not hasattr(module, attribute):
        raise InputError(f"judge: {module_name!r} has no {attribute!r}.{nearest(attribute, dir(module))}")
    return getattr(module, attribute)


@contextlib.contextmanager
def _working_directory_importable() -> Iterator[None]:
    sys.path.append("")
    try:
        yield
    finally:
        sys.path.remove("")


def make_judge(
    spec: str,
    task: Task,
    model: Any = None,
    tokenizer: Any = None,
    load: Callable[[str], tuple[Any, Any]] | None = None,
    options: PairOptions | None = None,
) -> Judge:
    """The judge that `spec` names: auto (the task's), rouge, chrf, model, model:PATH, openai:MODEL or
    python:module:function.

    model, tokenizer: the base model, for "model"; if it is a PEFT model its adapters are switched off while judging.
    load: path -> (model, tokenizer), for "model:PATH". options: the keys judge_* of a configuration.
    Raises `InputError` for an unknown spec, with the nearest one, and for an endpoint without a key.
    """
    options = options or PairOptions()
    spec = task.default_judge if spec == "auto" else spec
    kind, _, rest = spec.partition(":")
    if spec in METRICS:
        return MetricJudge(spec)
    if spec == "model":
        if model is None or tokenizer is None:
            raise InputError("judge: 'model' needs a model and its tokenizer. Give model:PATH instead.")
        return ModelJudge(model, tokenizer, use_adapters=False)
    if kind == "model" and rest:
        if load is None:
            raise InputError(f"judge: {spec!r} needs a loader for the model.")
        return ModelJudge(*load(rest))
    if kind == "python" and rest:
        return CallableJudge(rest, options.judge_timeout)
    if kind == "openai" and rest:
        return OpenAIJudge(
            rest,
            api_key(options.judge_api_key_env),
            options.judge_base_url,
            timeout=options.judge_request_timeout,
            max_retries=options.judge_max_retries,
            concurrency=options.judge_concurrency,
        )
    known = ("auto", *METRICS, "model", "model:PATH", "openai:MODEL", "python:module:function")
    raise InputError(f"judge: must be one of {', '.join(known)}, got {spec!r}.{nearest(kind, known)}")
