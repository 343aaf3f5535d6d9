"""Pairs of answers put to a judge: single bad verdicts are counted, a judge that is broken is refused.

The protocol is TRL's pairwise one with references: judge(prompts, completions, references) -> index of each pair's
winner, -1 for no verdict.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Generator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Protocol

from zopro.errors import InputError
from zopro.judges.endpoint import NoVerdict
from zopro.judges.verdicts import Row, Verdicts
from zopro.system import guard, progress

_REMEDY = "Fix it or raise its timeout, then continue with --resume: verdicts it gave are not asked for again."
EQUAL = "equal answers"  # the reason of ties known beforehand
_GIVE_UP_AFTER = 3
"""Failures in a row after which a judge is taken to be broken; a remote one may take a minute to fail each time."""


class Judge(Protocol):
    """prompts [N], completions [N][2], references [N] -> winners [N]: 0, 1 or -1 (no verdict).

    One that finds its verdicts one by one may also have `each(prompts, completions, references)`, which yields
    (position, verdict) in any order. One whose verdicts are worth keeping has the attribute `kept` = True. One that
    has a `remedy` says in it what helps where it gives no verdicts.
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

    def unusable(self) -> str:
        """How many verdicts were invalid, with the reason of most.

        >>> JudgeResult([0, -1, -1], invalid=1, ties=1, reasons={EQUAL: 1, "judge raised KeyError": 1}).unusable()
        '1 of 3 verdicts could not be used (judge raised KeyError: 1)'
        """
        reason = _most(self.reasons)
        return f"{self.invalid} of {len(self.winners)} verdicts could not be used ({reason}: {self.reasons[reason]})"


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
    reasons: Counter[str] = Counter({EQUAL: len(equal)} if equal else {})
    remedies: dict[str, str] = {}
    due: list[int] = []
    for index, row in enumerate(rows):
        known = None if kept is None or index in equal else kept.get(row)
        if known is not None:
            winners[index] = known
        elif index not in equal:
            due.append(index)
    failures, asked = 0, _ask(judge, rows, due, batch_size)
    judged = progress.begin("judging", len(due), "pairs")
    try:
        for index, verdict in asked:
            judged.step()
            winner = _checked(verdict, len(rows[index][1]))
            if isinstance(winner, int):
                winners[index] = winner
                if kept is not None:
                    kept.keep(rows[index], winner)
            else:
                reasons[winner] += 1
                remedies[winner] = getattr(verdict, "remedy", "")
            failures = failures + 1 if isinstance(verdict, NoVerdict) and verdict.failed else 0
            if failures == _GIVE_UP_AFTER:
                raise _broken(judge, f"failed on {failures} pairs in a row, last on pair {index} ({winner})")
    except guard.Late as error:
        raise _broken(judge, f"gave {error}") from None
    finally:
        asked.close()
        progress.end(judged)
    invalid = reasons.total() - len(equal)
    if invalid == len(rows) - len(equal) >= _GIVE_UP_AFTER:
        reason = _most(reasons)
        what = f"gave no usable verdict on {invalid} pairs ({reason}: {reasons[reason]})"
        raise _broken(judge, what, remedies[reason])
    return JudgeResult(winners, invalid, winners.count(-1) - invalid, dict(reasons))


def _most(reasons: Mapping[str, int]) -> str:
    """The reason of most invalid verdicts."""
    return max((one for one in reasons if one != EQUAL), key=lambda one: reasons[one])


def _broken(judge: Judge, what: str, remedy: str = "") -> InputError:
    name = getattr(judge, "name", None) or getattr(judge, "__name__", type(judge).__name__)
    remedy = remedy or getattr(judge, "remedy", _REMEDY)
    return InputError(f"judge: must say which answer of a pair is better, but {name} {what}. {remedy}")


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
    return [row[0] for row in rows], [list(row[1]) for row in rows], [row[2] for row in rows]


def _call(judge: Judge, rows: list[Row]) -> list[Any] | NoVerdict:
    try:
        answer = guard.read(judge(*_columns(rows)))
    except guard.Late:
        raise
    except Exception as error:
        return NoVerdict(f"judge raised {guard.reason(error)}")
    if isinstance(answer, str | bytes | Mapping | Set) or not hasattr(answer, "__len__"):
        return NoVerdict(f"judge returned {type(answer).__name__} in place of a list of verdicts")
    verdicts = list(answer)
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
