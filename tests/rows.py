"""One row, made an example of a task."""

from __future__ import annotations

from types import SimpleNamespace

from zopro.choices import TASKS
from zopro.tasks import Row, convert

OPTIONS = SimpleNamespace(source_language="English", target_language="German")


def example(task, row):
    return convert(TASKS[task].load()(OPTIONS), Row(row, "f.jsonl", 7))


def user(text):
    return [{"role": "user", "content": text}]


ABSTRACT = ["We like cats.", "Cats purr.", "Dogs bark."]
MLQE = {"translation": {"en": "Hi.", "de": "Hallo."}, "z_mean": 0.5}
