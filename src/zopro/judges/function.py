"""Any Python callable as a judge."""

from __future__ import annotations

from collections.abc import Sequence

from zopro.choices import imported
from zopro.errors import InputError
from zopro.judges.endpoint import NoVerdict
from zopro.judges.pairs import Judge
from zopro.system import guard


class CallableJudge:
    """A Python callable, or the "module:function" that names one, called with (prompts, completions, references).

    Modules of the working directory are found as well. timeout: seconds for one call, 0 for no limit (see
    `zopro.system.guard.call`). in_summary: the callable's attribute of this name, if it has one: what a run's summary
    says of each evaluation besides, made of its rows. Raises `InputError` if there is no such callable.
    """

    kept = True

    def __init__(self, target: str | Judge, timeout: float = 0.0) -> None:
        self.function: Judge = imported(target, "judge") if isinstance(target, str) else target
        self.name = f"python:{target}" if isinstance(target, str) else ""
        self.timeout = timeout
        self.in_summary = getattr(self.function, "in_summary", None)
        if not callable(self.function):
            raise InputError(f"judge: must be callable, got {target!r}.")

    def __call__(
        self, prompts: list[str], completions: list[list[str]], references: list[str | None]
    ) -> Sequence[int | NoVerdict]:
        # A generator would do its work where it is read: not under the time limit.
        return guard.call(lambda: list(self.function(prompts, completions, references)), self.timeout)
