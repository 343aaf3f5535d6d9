"""From a configuration to what the stages of its run are given: the run, its models and its data, opened in order.

run, models, data = open_all(config)
train_sft(run, models, data)
"""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from zopro.config import RunConfig
from zopro.engine.local.starts import start_note, tokenizer_home
from zopro.engine.opening import end
from zopro.loop import rows
from zopro.loop.data import Data, load_data
from zopro.loop.learned import check_answers, check_answers_early
from zopro.loop.models import Models, load_models
from zopro.loop.run import Run, open_run
from zopro.loop.served import keep, kept
from zopro.system.launch import Processes
from zopro.system.progress import task
from zopro.text.frame import frame_of
from zopro.text.tokenizer import load_tokenizer


def open_all(
    config: RunConfig,
    *,
    resume: bool = False,
    processes: Processes | None = None,
    began: float | None = None,
    writes: bool = True,
) -> tuple[Run, Models, Data]:
    """Open what the stages of a run are given.

    Everything that can be refused is refused here, before the run directory is written to; and what takes seconds,
    before the base model is loaded.

    Args:
        config: the run's configuration.
        resume: continue a run directory of the same configuration.
        processes: those that work on the run; by default this one.
        began: when this process began to work on the run, by `time.perf_counter()`; by default now.
        writes: False leaves the disk as it is, and the run directory unseen; no stage can be worked on then.

    Raises:
        InputError: data, model, lengths or run directory do not fit; see the message.
    """
    run = open_run(config, resume, processes or Processes(), began, writes)
    with ExitStack() as opened:
        opened.callback(run.store.lock.release)
        with task("loading the tokenizer"):
            tokenizer = load_tokenizer(tokenizer_home(config.model), trust_remote_code=config.trust_remote_code)
        with task("reading the data"):
            data = load_data(config, tokenizer)
            if writes:
                known = rows.told(data)
                rows.check_same(run.store, config, known)
            check_answers_early(config, data, frame_of(tokenizer))
        with task(f"loading {Path(config.model).name}"):
            models = load_models(config, tokenizer, data, resumes=writes, before=kept(run.store))
            opened.callback(end, models.base)
            check_answers(config, data, models.frame)
        if writes:
            run.store.create()
            rows.keep(run.store, known)
            if models.said is not None:
                keep(run.store, models.said)
        run.processes.wait()
        for line in filter(None, (start_note(config.model), data.rows, *data.remarks, *models.remarks())):
            run.say(line)
        opened.pop_all()
    return run, models, data
