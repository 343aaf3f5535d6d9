"""Any Python callable as a judge."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from zopro.choices import imported
from zopro.errors import InputError
from zopro.judges.endpoint import NoVerdict
from zopro.judges.pairs import Judge
from zopro.system import guard


class CallableJudge:
    """A Python callable, or the "module:function" that names one, called with (prompts, completions, references).

    Modules of the working directory are found as well. timeout: seconds for one call, 0 for no limit (see
    `zopro.system.guard.call`). in_summary: the callable's attribute of this name, if it has one, with its answers
    checked: what a run's summary says of each evaluation besides, made of its rows. Raises `InputError`: there is no such
    callable.
    """

    kept = True

    def __init__(self, target: str | Judge, timeout: float = 0.0) -> None:
        self.function: Judge = imported(target, "judge") if isinstance(target, str) else target
        self.name = f"python:{target}" if isinstance(target, str) else ""
        self.timeout = timeout
        measure = getattr(self.function, "in_summary", None)
        self.in_summary = None if measure is None else self._checked(measure)
        if not callable(self.function):
            raise InputError(f"judge: must be callable, got {target!r}.")
        if isinstance(self.function, type):
            raise InputError(f"judge: must be a function or an object, got {target!r}, a class. Name an object of it.")

    def __call__(
        self, prompts: list[str], completions: list[list[str]], references: list[str | None]
    ) -> Sequence[int | NoVerdict]:
        # A generator would do its work where it is read: not under the time limit.
        return guard.call(lambda: guard.read(self.function(prompts, completions, references)), self.timeout)

    def _checked(self, measure: Callable[..., Any]) -> Callable[..., dict[str, float | None]]:
        def numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float | None]:
            try:
                said = guard.call(measure, self.timeout, rows)
            except Exception as error:
                raise self._unusable(f"but raised {guard.reason(error)}") from error
            if not isinstance(said, Mapping):
                raise self._unusable(f"got {said!r:.60}")
            return {str(name): self._number(name, value) for name, value in said.items()}

        return numbers

    def _number(self, name: object, value: Any) -> float | None:
        if value is None or type(value) in (int, float):
            return value
        try:
            if isinstance(value, str):
                raise TypeError
            return float(value)
        except Exception:  # whatever the conversion of the user's object raises
            raise self._unusable(f"got {value!r:.60} as {name!r}") from None

    def _unusable(self, found: str) -> InputError:
        who = self.name or getattr(self.function, "__name__", type(self.function).__name__)
        return InputError(
            f"judge: in_summary of {who} must return numbers by name, {found}. Fix it, then continue with --resume."
        )
