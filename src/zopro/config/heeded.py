"""Keys that a method has no use for, though a configuration may set them: for a line that says so.

python -c "from zopro.config.heeded import *; print([*own_keys(METHODS['rloo'], guide='adam')])"
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields

from zopro.choices import METHODS, Method
from zopro.config.evolution import EvolutionOptions
from zopro.config.guided import GuidedOptions
from zopro.config.step import DirectionOptions, StepOptions

GROUPS = {"step": StepOptions, "directions": DirectionOptions, "evolution": EvolutionOptions, "guided": GuidedOptions}
"""Option groups that not every method has a use for, as `Method.heeds` names them."""


def rates(methods: Iterable[str]) -> list[str]:
    """The keys of their learning rates.

    >>> rates(["es", "zopro", "mezo"])
    ['es_learning_rate', 'learning_rate']
    """
    return [*dict.fromkeys(METHODS[name].rate for name in methods)]


def own_keys(method: Method, guide: str) -> dict[str, str]:
    """Keys whose value a method does not take -> the only value of which this is so; empty: it takes none.

    >>> own_keys(METHODS["fzoo"], "adam")["evaluation"], own_keys(METHODS["rloo"], "adam")["queries"]
    ('together', '')
    """
    found = dict(entry.partition("=")[::2] for entry in method.fixed)
    heeds = method.heeds
    if heeds is None:
        return found
    if "guided" in heeds and guide == "adam":
        heeds = ("guided",)  # it follows a gradient, along no direction
    heeded = {method.rate, *_names(heeds)}
    return found | {name: "" for name in (*rates(METHODS), *_names(GROUPS)) if name not in heeded}


def _names(groups: Iterable[str]) -> list[str]:
    return [key.name for group in groups for key in fields(GROUPS[group])]
