"""What a launcher (torchrun, accelerate launch) tells each of its processes by its environment. Read here alone.

WORLD_SIZE=2 RANK=1 python -c "from zopro.system.ranks import first, launched; print(launched(), first())"  # 2 False
"""

from __future__ import annotations

import os

from zopro.errors import InputError

VARIABLES = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
"""Their names, and what each is at least and where nothing is said; without them accelerate sees one process."""


def told(name: str) -> int:
    """The number in a launcher's variable. Raises `InputError`: it holds something else."""
    least = VARIABLES[name]
    text = os.environ.get(name, str(least))
    try:
        number = int(text)
    except ValueError:
        number = least - 1
    if number < least:
        rule = f"must be a whole number of at least {least}, as launchers set this environment variable"
        raise InputError(f"{name}: {rule}, got {text!r}. Unset it.")
    return number


def launched() -> int:
    """How many processes the launcher says there are; 1 without one."""
    return told("WORLD_SIZE")


def first() -> bool:
    """Whether this process is the one that writes: of one it is, whatever RANK was left behind by something else."""
    return launched() == 1 or told("RANK") == 0
