"""Measurements on held-out prompts: reward, KL to the SFT policy, task metric and win rate, with 95 % intervals.

The yardstick is the first reward model, whatever the later ones became, so that iterations can be compared. The win
rate is the configured judge's, against the SFT policy's answer to the same prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from zopro.loop.answers import ask_judge, batches, measure, sample_all, trimmed
from zopro.loop.data import Data, Item
from zopro.loop.divergence import kl_per_answer
from zopro.loop.models import Models
from zopro.loop.run import Run
from zopro.store.rundir import read_rows, write_text
from zopro.store.shown import PER_ANSWER
from zopro.system.statistics import mean_interval, win_interval
from zopro.tasks import Task, metric

EVALUATION_SEED = "evaluation"
BASE_ANSWERS = 20  # as many prompts as the report shows


def evaluate(run: Run, models: Models, data: Data, iteration: int | None = None) -> dict[str, Any]:
    """Answer the held-out prompts with one policy (None: the SFT policy) and measure the answers.

    Writes evaluations/NAME.jsonl (prompt, completion, reward, reference, win) and, last, evaluations/NAME.json.
    """
    store = run.store
    folder = store.sft() if iteration is None else store.policy(iteration)
    found = measure(run, models, data.eval, folder, run.seed(EVALUATION_SEED), models.reward_from(store.reward(0)))
    rows = _rows(models, data.eval, found.ids, found.rewards)
    reward, low, high = mean_interval(found.rewards)
    line: dict[str, Any] = {"stage": "evaluation", "iteration": iteration, "step": None}
    line |= {"reward": reward, "reward_low": low, "reward_high": high, "n": len(rows)}
    line[PER_ANSWER] = kl_per_answer(found.log_ratios)
    if iteration is not None:
        wins = _wins(run, models, iteration, rows)
        for row, win in zip(rows, wins, strict=True):
            row["win"] = win
        line["win_rate"], line["win_rate_low"], line["win_rate_high"] = win_interval(wins)
    line["length"] = fmean(len(row) for row in found.ids)
    line |= _metric(data.task, rows)
    store.write_rows(store.evaluation(iteration), rows)
    if iteration is None:
        _answer_by_base(run, models, data.eval[:BASE_ANSWERS])
    store.log(line)
    write_text(store.evaluation(iteration, ".json"), json.dumps(line, indent=2))
    return line


def _rows(models: Models, items: Sequence[Item], ids: list[list[int]], rewards: Sequence[float]) -> list[dict[str, Any]]:
    return [
        {"prompt": item.prompt, "completion": answer, "reward": reward, "reference": item.example.reference}
        for item, answer, reward in zip(items, models.texts(ids), rewards, strict=True)
    ]


def _answer_by_base(run: Run, models: Models, items: Sequence[Item]) -> None:
    """The base model's answers to the first held-out prompts, for the report: evaluations/base.jsonl."""
    size, reward = run.config.eval_batch_size, models.reward_from(run.store.reward(0))
    rows: list[dict[str, Any]] = []
    rollouts = sample_all(run, models, models.base, items, run.seed(EVALUATION_SEED))
    for batch, rollout in zip(batches(items, size), rollouts, strict=True):
        ids = trimmed(rollout)
        rows += _rows(models, batch, ids, reward.score([item.ids for item in batch], ids, size))
    for row, win in zip(rows, _wins(run, models, None, rows), strict=True):
        row["win"] = win
    run.store.write_rows(run.store.evaluation("base"), rows)


def _wins(run: Run, models: Models, iteration: int | None, rows: Sequence[dict[str, Any]]) -> list[float]:
    """1, 0 or (no verdict) 0.5 for each answer, against the SFT policy's."""
    sft = read_rows(run.store.evaluation(None))[: len(rows)]
    result = ask_judge(
        run,
        models,
        "evaluation",
        iteration,
        [row["prompt"] for row in rows],
        [[before["completion"], row["completion"]] for before, row in zip(sft, rows, strict=True)],
        [row["reference"] for row in rows],
    )
    return [0.5 if winner < 0 else float(winner) for winner in result.winners]


def _metric(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    name = task.metric
    if name is None:
        return {}
    values = metric(name)([row["completion"] for row in rows], [row["reference"] for row in rows])
    known = [value for value in values if value is not None]
    return {"metric_name": name, "metric": fmean(known) if known else None, "metric_n": len(known)}
