"""Does a trainer's step take its loss from `compute_loss`? Read from the source, before any model is loaded.

`zeroth_order` measures where a trainer computes its loss. A `training_step` that computes one of its own would run its
backward pass instead, and leave no difference to step along.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import Any

STEP, LOSS = "training_step", "compute_loss"


def unreached(trainer_cls: type) -> str:
    """What to say of a trainer whose step computes a loss of its own."""
    owner = trainer_cls
    for owner in trainer_cls.__mro__:
        calls = _calls(vars(owner)[STEP]) if STEP in vars(owner) else (set(), {STEP}, False)
        if calls is None or STEP not in calls[1]:
            break
    return (
        f"trainer_cls: must take its loss from {LOSS}, but {owner.__name__}.{STEP} computes one of its own, with a "
        f"backward pass. Train it as it is, or move its loss to {LOSS}"
    )


def reaches_loss(trainer_cls: type) -> bool:
    """Whether `training_step` may call `compute_loss`; true where the source does not tell."""
    return _reaches(trainer_cls, STEP, 0, set())


def _reaches(trainer_cls: type, name: str, start: int, seen: set[tuple[str, int]]) -> bool:
    """Follows the trainer's own methods from the one that `name` finds in the MRO from `start` on."""
    mro = trainer_cls.__mro__
    place = next((index for index in range(start, len(mro)) if name in vars(mro[index])), None)
    if place is None or (name, place) in seen:
        return False
    seen.add((name, place))
    method = vars(mro[place])[name]
    if isinstance(method, property | staticmethod | classmethod) or not callable(method):
        return False
    calls = _calls(method)
    if calls is None:
        return True
    own, inherited, given_away = calls
    if LOSS in own | inherited or (name == STEP and given_away):
        return True
    follow = [(called, 0) for called in own] + [(called, place + 1) for called in inherited]
    return any(_reaches(trainer_cls, called, first, seen) for called, first in follow)


def _calls(method: Any) -> tuple[set[str], set[str], bool] | None:
    """Names read from `self` and from `super()` (or a class by name), and whether `self` is passed on as it is."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(method))))
    except (OSError, TypeError, SyntaxError):
        return None
    definition = next((node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)), None)
    if definition is None or not (definition.args.posonlyargs or definition.args.args):
        return None
    me = (definition.args.posonlyargs + definition.args.args)[0].arg
    own, inherited, given_away = set(), set(), False
    for node in ast.walk(definition):
        if isinstance(node, ast.Call):
            given_away |= any(isinstance(arg, ast.Name) and arg.id == me for arg in node.args)
        if not isinstance(node, ast.Attribute):
            continue
        value = node.value
        if isinstance(value, ast.Name) and value.id == me:
            own.add(node.attr)
        elif isinstance(value, ast.Call) and isinstance(value.func, ast.Name) and value.func.id == "super":
            inherited.add(node.attr)
    return own, inherited, given_away
