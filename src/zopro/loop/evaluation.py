"""Measurements on held-out prompts: reward, KL to the SFT policy, task metric and win rate, with 95 % intervals.

The yardstick is the first reward model, whatever the later ones became, so that iterations can be compared. The win
rate is the configured judge's, against the SFT policy's answer to the same prompt.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from torch import Tensor

from zopro.engine.local.rollouts import Rollouts
from zopro.loop.divergence import kl_per_answer, log_ratios, policy_logprobs
from zopro.loop.session import Session, batches, trimmed
from zopro.store.rundir import read_rows, write_text
from zopro.store.shown import PER_ANSWER
from zopro.system.statistics import mean_interval, win_interval
from zopro.tasks import metric

EVALUATION_SEED = "evaluation"
BASE_ANSWERS = 20  # as many prompts as the report shows


def evaluate(session: Session, iteration: int | None = None) -> dict[str, Any]:
    """Answer the held-out prompts with one policy (None: the SFT policy) and measure the answers.

    Writes evaluations/NAME.jsonl (prompt, completion, reward, reference, win) and, last, evaluations/NAME.json.
    """
    directory, config = session.directory, session.config
    folder = directory.sft() if iteration is None else directory.policy(iteration)
    rollouts: list[Rollouts] = []
    logprobs: list[Tensor] = []
    with session.policies.open(folder) as model:
        for number, batch in enumerate(batches(session.eval, config.eval_batch_size)):
            rollouts.append(session.sample(model, batch, session.seed(EVALUATION_SEED) + number))
            logprobs.append(policy_logprobs(model, rollouts[-1], config.temperature))
    ids = [row for rollout in rollouts for row in trimmed(rollout)]
    answers = session.texts(ids)
    rewards = session.reward_model(0).score([item.ids for item in session.eval], ids, config.eval_batch_size)
    rows = [
        {"prompt": item.prompt, "completion": answer, "reward": reward, "reference": item.example.reference}
        for item, answer, reward in zip(session.eval, answers, rewards, strict=True)
    ]
    reward, low, high = mean_interval(rewards)
    line: dict[str, Any] = {"stage": "evaluation", "iteration": iteration, "step": None}
    line |= {"reward": reward, "reward_low": low, "reward_high": high, "n": len(rows)}
    line[PER_ANSWER] = kl_per_answer(log_ratios(session, folder, rollouts, logprobs))
    if iteration is not None:
        wins = _wins(session, iteration, rows)
        for row, win in zip(rows, wins, strict=True):
            row["win"] = win
        line["win_rate"], line["win_rate_low"], line["win_rate_high"] = win_interval(wins)
    line["length"] = fmean(len(row) for row in ids)
    line |= _metric(session, rows)
    directory.write_rows(directory.evaluation(iteration), rows)
    if iteration is None:
        _answer_by_base(session, rows[:BASE_ANSWERS])
    directory.log(line)
    write_text(directory.evaluation(iteration, ".json"), json.dumps(line, indent=2))
    return line


def _answer_by_base(session: Session, sft: Sequence[dict[str, Any]]) -> None:
    """The base model's answers to the first held-out prompts, for the report: evaluations/base.jsonl."""
    items = session.eval[: len(sft)]
    rows: list[dict[str, Any]] = []
    for number, batch in enumerate(batches(items, session.config.eval_batch_size)):
        ids = trimmed(session.sample(session.base, batch, session.seed(EVALUATION_SEED) + number))
        rewards = session.reward_model(0).score([item.ids for item in batch], ids, session.config.eval_batch_size)
        rows += [
            {"prompt": item.prompt, "completion": answer, "reward": reward, "reference": item.example.reference}
            for item, answer, reward in zip(batch, session.texts(ids), rewards, strict=True)
        ]
    for row, win in zip(rows, _wins(session, None, rows), strict=True):
        row["win"] = win
    session.directory.write_rows(session.directory.path / "evaluations" / "base.jsonl", rows)


def _wins(session: Session, iteration: int | None, rows: Sequence[dict[str, Any]]) -> list[float]:
    """1, 0 or (no verdict) 0.5 for each answer, against the SFT policy's."""
    sft = read_rows(session.directory.evaluation(None))[: len(rows)]
    result = session.judged(
        "evaluation",
        iteration,
        [row["prompt"] for row in rows],
        [[before["completion"], row["completion"]] for before, row in zip(sft, rows, strict=True)],
        [row["reference"] for row in rows],
    )
    return [0.5 if winner < 0 else float(winner) for winner in result.winners]


def _metric(session: Session, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    name = session.task.metric
    if name is None:
        return {}
    values = metric(name)([row["completion"] for row in rows], [row["reference"] for row in rows])
    known = [value for value in values if value is not None]
    return {"metric_name": name, "metric": fmean(known) if known else None, "metric_n": len(known)}
