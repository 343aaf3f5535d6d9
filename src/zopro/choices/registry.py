"""A registry: the names that one configuration key takes, and what each stands for."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from zopro.errors import InputError, nearest


@dataclass(frozen=True)
class Choice:
    """One name and what it stands for.

    name: as configurations give it; of "model:PATH" the part after the colon is the user's. target: "module:attribute",
    or the thing itself. help: what it is, in a few words.
    """

    name: str
    target: Any
    help: str

    @property
    def prefix(self) -> str:
        """Of "model:PATH" the word before the colon; empty for a plain name."""
        kind, colon, _ = self.name.partition(":")
        return kind if colon else ""

    def load(self) -> Any:
        """What the name stands for."""
        return loaded(self.target)


def loaded(target: Any) -> Any:
    """What "module:attribute" names, or the thing itself."""
    if not isinstance(target, str):
        return target
    module, _, attribute = target.partition(":")
    return getattr(importlib.import_module(module), attribute)


C = TypeVar("C", bound=Choice)


class Registry(Generic[C]):
    """The choices of one configuration key.

    Args:
        key: of the configuration, which errors name.
        kind: what its choices are.
        choices: the first of them; `add` registers more.

    >>> from zopro.choices import TASKS
    >>> TASKS["chat"].help
    'a reply to a conversation'
    >>> "chat" in TASKS, "chess" in TASKS
    (True, False)
    """

    def __init__(self, key: str, kind: type[C], *choices: C) -> None:
        self.key, self.kind = key, kind
        self._choices: dict[str, C] = {}
        self._foreign: dict[str, C] = {}
        for choice in choices:
            self.add(choice)

    def add(self, choice: C) -> C:
        """Register a variant. Raises ValueError for a name that is taken."""
        if choice.name in self._choices:
            raise ValueError(f"name: must be new among {', '.join(self)}, got {choice.name!r}")
        self._choices[choice.name] = choice
        return choice

    def __iter__(self) -> Iterator[str]:
        return iter(self._choices)

    def __len__(self) -> int:
        return len(self._choices)

    def values(self) -> list[C]:
        return list(self._choices.values())

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and (self._find(name) is not None or _python(name))

    def check(self, name: str, key: str = "") -> None:
        """Raise `InputError` for an unknown name; of `python:MODULE:NAME` only the form is looked at."""
        if name not in self:
            known = [*self, *([] if self._find("python:M:N") else ["python:MODULE:NAME"])]
            forms = {form.partition(":")[0]: form for form in reversed(known)}  # "json" before "json:KEY,KEY"
            hint = nearest(name.partition(":")[0], forms, forms)
            raise InputError(f"{key or self.key}: must be one of {', '.join(known)}, got {name!r}.{hint}")

    def __getitem__(self, name: str) -> C:
        """The choice of a name. Raises `InputError`: unknown, or a `python:` one that cannot be imported."""
        self.check(name)
        found = self._find(name) or self._foreign.get(name)
        if found is None:
            thing = imported(name.removeprefix("python:"), self.key)
            given = thing if isinstance(thing, self.kind) else self.kind(name, thing, "")
            found = self._foreign[name] = given
        return found

    def name_of(self, thing: type) -> str | None:
        """The name of a class; None for one that has none."""
        target = f"{thing.__module__}:{thing.__qualname__}"
        named = (*self._choices.items(), *self._foreign.items())
        return next((name for name, choice in named if choice.target in (target, thing)), None)

    def about(self) -> str:
        """All names with their helps, for a help text."""
        return ", ".join(f"{choice.name} ({choice.help})" for choice in self.values())

    def _find(self, name: str) -> C | None:
        kind, colon, rest = name.partition(":")
        prefixed = (choice for choice in self.values() if kind and rest and choice.prefix == kind)
        return next(prefixed, None) if colon else self._choices.get(name)


def imported(path: str, key: str) -> Any:
    """What "MODULE:NAME" names; modules of the working directory are found as well, from now on too: it joins `sys.path`.

    Raises `InputError` that begins with `key`: not of this form, a module that cannot be imported, no such name in it.
    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise InputError(f"{key}: a Python {key} must be module:function, got {path!r}.")
    if "" not in sys.path:
        sys.path.append("")  # the last one and for good: what was imported may import more when it is called
    try:
        module = importlib.import_module(module_name)
    except (Exception, SystemExit) as error:  # whatever the user's module raises while it is imported
        remedy = f" Give {module_name[:-3]}:{attribute}." if module_name.endswith(".py") else ""
        raise InputError(f"{key}: cannot import {module_name!r} ({type(error).__name__}: {error}).{remedy}") from error
    if not hasattr(module, attribute):
        raise InputError(f"{key}: {module_name!r} has no {attribute!r}.{nearest(attribute, dir(module))}")
    return getattr(module, attribute)


def made_by(name: str, make: Callable[[], Any], kind: type, rule: str) -> Any:
    """What a class or function of the user's makes. Raises `InputError` that begins with `rule`: nothing of that kind.

    >>> made_by("python:math:sqrt", lambda: 2.0, str, "task: must make text")
    Traceback (most recent call last):
        ...
    zopro.errors.InputError: task: must make text, got 'python:math:sqrt', which made float.
    """
    try:
        made = make()
    except (Exception, SystemExit) as error:  # whatever the user's code raises
        found = f"raised {type(error).__name__}: {error}"
    else:
        if isinstance(made, kind):
            return made
        found = f"made {type(made).__name__}"
    raise InputError(f"{rule}, got {name!r}, which {found}.")


def _python(name: str) -> bool:
    kind, module, attribute = (*name.split(":", 2), "", "")[:3]
    return kind == "python" and bool(module and attribute)
