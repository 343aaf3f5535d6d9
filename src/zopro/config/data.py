"""The task and its rows: what is trained on, and what is held out."""

from __future__ import annotations

from dataclasses import dataclass

from zopro.choices import TASKS
from zopro.config.fields import check, check_choices, not_negative, option, positive


@dataclass
class DataOptions:
    """The task and its rows."""

    task: str = option("", f"What rows are: {TASKS.about()}.", TASKS)
    train_data: str = option(
        "",
        "Training rows: .jsonl, .json or .csv (each also with .gz), .parquet, a folder, or a Hub data set id.",
        path=True,
    )
    eval_data: str = option(
        "", "Held-out rows, same formats. Empty: eval_prompts rows are held out of train_data.", path=True
    )
    max_train_rows: int = option(0, "Use at most this many training rows (after shuffling by seed); 0 uses all.")
    max_prompt_length: int = option(
        256, "Longest prompt in tokens; rows with a longer one are dropped and counted. Verifiable: 512."
    )
    max_completion_length: int = option(48, "Longest sampled or trained completion in tokens. Verifiable: 256.")
    source_language: str = option("English", "Translation: language of the source, as named in the prompt.")
    target_language: str = option("German", "Translation: language of the target, as named in the prompt.")

    def __post_init__(self) -> None:
        check(bool(self.task), "task", "must be set", self.task, f"Give one of {', '.join(TASKS)}.")
        check_choices(self, DataOptions)
        check(bool(self.train_data), "train_data", "must be set", self.train_data, "Give a file, folder or Hub id.")
        not_negative(self, "max_train_rows")
        positive(self, "max_prompt_length", "max_completion_length")
