"""Any data set of pairs: TRL's preference format, standard or conversational, with an explicit or an implicit prompt.

It is the chat task that also reads the standard format with an implicit prompt: two plain texts that begin with it.
"""

from __future__ import annotations

from typing import Any

from zopro.tasks import chat
from zopro.tasks.base import Task


def task(options: Any) -> Task:
    """The preference task; a model judges its pairs unless told otherwise."""
    return Task("preference", chat.formats(implicit=True), default_judge="model")
