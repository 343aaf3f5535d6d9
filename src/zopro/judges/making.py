"""From a name in `zopro.choices.JUDGES` to the judge that it stands for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from zopro.choices import JUDGES
from zopro.config.judging import PairOptions
from zopro.errors import InputError
from zopro.judges.endpoint import OpenAIJudge, api_key
from zopro.judges.function import CallableJudge
from zopro.judges.metric import MetricJudge
from zopro.judges.model import ModelJudge
from zopro.judges.pairs import Judge
from zopro.tasks.base import Task


@dataclass(frozen=True)
class Asked:
    """What judges are made of. name: as asked for; rest: what follows its colon. The others as in `make_judge`."""

    name: str
    task: Task
    model: Any = None
    tokenizer: Any = None
    load: Callable[[str], tuple[Any, Any]] | None = None
    options: PairOptions = field(default_factory=PairOptions)

    @property
    def rest(self) -> str:
        return self.name.partition(":")[2]


def make_judge(
    name: str,
    task: Task,
    model: Any = None,
    tokenizer: Any = None,
    load: Callable[[str], tuple[Any, Any]] | None = None,
    options: PairOptions | None = None,
) -> Judge:
    """The judge that `name` stands for: one of `zopro.choices.JUDGES`.

    model, tokenizer: the base model, for "model"; if it is a PEFT model its adapters are switched off while judging.
    load: path -> (model, tokenizer), for "model:PATH". options: the keys judge_* of a configuration.
    Raises `InputError` for an unknown name, with the nearest one, and for an endpoint without a key.
    """
    judge: Judge = JUDGES[name].load()(Asked(name, task, model, tokenizer, load, options or PairOptions()))
    return judge


def by_task(asked: Asked) -> Judge:
    return make_judge(asked.task.default_judge, asked.task, asked.model, asked.tokenizer, asked.load, asked.options)


def by_metric(asked: Asked) -> Judge:
    return MetricJudge(asked.name)


def by_base(asked: Asked) -> Judge:
    if asked.model is None or asked.tokenizer is None:
        raise InputError("judge: 'model' needs a model and its tokenizer. Give model:PATH instead.")
    return ModelJudge(asked.model, asked.tokenizer, use_adapters=False)


def by_model(asked: Asked) -> Judge:
    if asked.load is None:
        raise InputError(f"judge: {asked.name!r} needs a loader for the model.")
    return ModelJudge(*asked.load(asked.rest))


def by_callable(asked: Asked) -> Judge:
    return CallableJudge(asked.rest, asked.options.judge_timeout)


def by_endpoint(asked: Asked) -> Judge:
    options = asked.options
    return OpenAIJudge(
        asked.rest,
        api_key(options.judge_api_key_env),
        options.judge_base_url,
        timeout=options.judge_request_timeout,
        max_retries=options.judge_max_retries,
        concurrency=options.judge_concurrency,
    )
