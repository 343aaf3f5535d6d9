"""What of a run can be refused by names and paths alone: in a moment, before the libraries are imported.

check_beforehand(config)        # then import torch, and open the run
"""

from __future__ import annotations

import os
from pathlib import Path

from zopro.config import RunConfig
from zopro.config.fields import check
from zopro.config.model import GGUF, check_bitsandbytes, check_there
from zopro.errors import InputError
from zopro.rewards.functions import reward_function
from zopro.store.layout import Layout
from zopro.store.rundir import check_folder, followed, is_run
from zopro.system import progress, ranks
from zopro.tasks.rows import check_source


def check_beforehand(config: RunConfig, resume: bool = False) -> None:
    """Raise `InputError` for a model, data or a run directory that cannot be what is meant.

    What is at an engine's address, on the Hub or in a Python module is looked at by whoever loads it.
    """
    if config.output_dir and ranks.first():  # of many processes the first one writes
        check_folder(Path(config.output_dir), config, resume)
    if resume:
        config = followed(config, Path(config.output_dir))
    fits = config.queries == 1 or config.guide != "spsa" or "guided" not in config.methods
    check(fits, "queries", "must be 1 with guide: spsa, which has one direction a step", config.queries)
    check_base(config)
    check_bitsandbytes(config)
    check_source(config.train_data, "train")
    if config.eval_data:
        check_source(config.eval_data, "eval")
    if config.other_data:
        check_source(config.other_data, "other")
    for name in config.reward:
        if name.startswith("model:"):
            check_there(name.removeprefix("model:"), "reward")
        elif name != "model" and not name.startswith("python:"):
            reward_function(name)  # one whose parameter cannot be read
    if config.trains_reward and config.judge.startswith("model:"):
        check_there(config.judge.removeprefix("model:"), "judge")


def check_base(config: RunConfig) -> None:
    """Raise `InputError` for a base model that is neither on the disk nor can be elsewhere."""
    if config.served.endswith(GGUF):
        check_there(config.served)
    elif not config.of_servers or config.starts_server:
        check_there(config.model)


def own_folder(file: str | os.PathLike[str]) -> dict[str, str]:
    """The `output_dir` of a run that is continued by its own file: the folder it is in now, whatever the file says."""
    folder = Path(file).parent
    own = Path(file).name == Layout(folder).config().name and is_run(folder)
    return {"output_dir": str(folder.resolve())} if own else {}


def check_resumed(config: RunConfig) -> None:
    """Say that a run begins anew where there is none to continue: it was stopped before it wrote its configuration.

    Raises `InputError`: no output_dir is named.
    """
    if not config.output_dir:
        raise InputError("--resume: must be given with the output_dir of the run, got none. Give RUN/config.yaml.")
    if not Layout(config.output_dir).config().exists():
        progress.say(f"nothing to continue in {config.output_dir}: the run begins anew")


def check_own_pairs(config: RunConfig, count: int) -> None:
    """Raise `InputError` for a reward that only a run can train, or a number of rows that is none."""
    check(count >= 0, "rows", "must not be negative", count)
    rule = "must be there before a run, and so not be model"
    check(not config.trains_reward, "reward", rule, config.reward, "Take a function, such as rouge, or model:PATH.")
