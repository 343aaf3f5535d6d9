"""Tasks: rows of a data set -> prompts, answers, scores and references.

python -c "from zopro.tasks import load_rows; print(load_rows('train.jsonl.gz')[0])"
"""

from zopro.tasks.base import DropRow, Example, Format, Message, Task
from zopro.tasks.loading import TaskData, TaskOptions, convert, load, load_prompts, prompt_key
from zopro.tasks.metrics import METRICS, Metric, metric
from zopro.tasks.rows import Row, load_rows
from zopro.tasks.shown import Fit

__all__ = [
    "METRICS",
    "DropRow",
    "Example",
    "Fit",
    "Format",
    "Message",
    "Metric",
    "Row",
    "Task",
    "TaskData",
    "TaskOptions",
    "convert",
    "load",
    "load_prompts",
    "load_rows",
    "metric",
    "prompt_key",
]
