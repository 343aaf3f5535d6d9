"""Measurements on held-out prompts: reward, KL to the SFT policy, task metric and win rate, with 95 % intervals.

The yardstick is the first reward model, whatever the later ones became, so that iterations can be compared. The win
rate is the configured judge's, against the SFT policy's answer to the same prompt. A run that trains no reward model has
no judge: there the higher reward wins, and accuracy, pass@k and what was gained, paired by prompt, are measured too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from zopro.judges import JudgeResult
from zopro.loop.answers import Measured, ask_judge, batches, divergences, ended, measure, sample_all
from zopro.loop.bound import beyond
from zopro.loop.correctness import gains, of_prompts, reward_interval, shares
from zopro.loop.data import Data, Item
from zopro.loop.divergence import elsewhere, kl_per_answer
from zopro.loop.models import Models
from zopro.loop.remembered import Memory
from zopro.loop.run import Run
from zopro.loop.unended import unended
from zopro.store import shown
from zopro.store.durable import plain
from zopro.store.rundir import read_rows, write_text
from zopro.system.statistics import known_mean, win_interval
from zopro.tasks import Task, metric

EVALUATION_SEED, OTHER_SEED = "evaluation", "other data"
BASE_ANSWERS = 20  # as many prompts as the report shows
TOLERATED = 0.1  # of all verdicts: so many may be unusable without a word

Rows = list[dict[str, Any]]


def evaluate(run: Run, models: Models, data: Data, iteration: int | None = None) -> dict[str, Any]:
    """Answer the held-out prompts with one policy (None: the SFT policy) and measure the answers.

    Writes evaluations/NAME.jsonl (prompt, completion, reward, reference, win, ...: the first answer to each prompt) and,
    last, evaluations/NAME.json.
    """
    store, config = run.store, run.config
    folder = store.sft() if iteration is None else store.policy(iteration)
    seed, count = run.seed(EVALUATION_SEED), config.eval_samples
    rewards = models.rewards_with(store.reward(0))
    memory = Memory(run, models, iteration)
    found = measure(run, models, data.eval, folder, seed, rewards, count, config.eval_greedy, memory.ask)
    rows = _rows(models, data.eval, found.ids[::count], found.scores.total[::count])
    prompts = of_prompts(found.scores, count)
    line: dict[str, Any] = {"stage": "evaluation", "iteration": iteration, "step": None}
    line |= {
        **reward_interval(prompts, "reward", "sampled_reward"),
        "n": sum("sampled_reward" in prompt for prompt in prompts),
        "prompts": len(prompts),
        shown.PER_ANSWER: kl_per_answer(found.log_ratios),
    }
    of = "evaluation" if iteration is None else f"evaluation {iteration}"
    before = rows if iteration is None else read_rows(store.evaluation(None))
    if iteration is not None:
        wins, judged = _wins(run, models, iteration, rows, before)
        for row, win in zip(rows, wins, strict=True):
            row["win"] = win
        pairs = [(row["reward"], old["reward"]) for row, old in zip(rows, before, strict=True)]
        told = [win for win, pair in zip(wins, pairs, strict=True) if models.judge is not None or None not in pair]
        line["win_rate"], line["win_rate_low"], line["win_rate_high"] = win_interval(told or wins)
        if judged is not None:
            line |= {"ties": judged.ties, "invalid": judged.invalid, "reasons": judged.reasons}
            if judged.invalid > TOLERATED * len(wins):
                run.say(f"{of}: {judged.unusable()}, each half a win. Read the win rate so, or take another judge.")
    line["length"] = fmean(len(row) for row in found.ids)
    line |= _metric(data.task, rows)
    if config.reward != ["model"] or count > 1 or config.eval_greedy:
        _add_prompts(models, rows, prompts, found)
        line |= _correctness(models, found, rows, prompts)
        line |= gains(before, rows) if iteration is not None else {}
    if note := unended(of, 1 - ended(models, found.ids), len(found.ids), config.max_completion_length):
        run.say(note)
    if note := beyond(line, config.max_kl, of, shown.start(config.sft_steps).the):
        run.say(note)
    if memory.found is not None:
        line[shown.REMEMBERED] = memory.found
        run.say(f"{of}: {shown.remembered(memory.found)}")
    if data.other and iteration is not None:
        line |= elsewhere([divergences(run, models, data.other, folder, run.seed(OTHER_SEED))])
        run.say(f"{of}: {shown.elsewhere(line)}")
    store.write_rows(store.evaluation(iteration), rows)
    if iteration is None and config.sft_steps:  # else the start is the base model
        _answer_by_base(run, models, data.eval[:BASE_ANSWERS])
    store.log(line)
    write_text(store.evaluation(iteration, ".json"), json.dumps(plain(line), indent=2))
    return line


def _rows(models: Models, items: Sequence[Item], ids: list[list[int]], rewards: Sequence[float]) -> Rows:
    return [
        {
            "prompt": item.prompt,
            "completion": answer,
            "reward": None if math.isnan(reward) else reward,
            "reference": item.example.reference,
        }
        for item, answer, reward in zip(items, models.texts(ids), rewards, strict=True)
    ]


def _add_prompts(models: Models, rows: Rows, prompts: Sequence[dict[str, float]], found: Measured) -> None:
    """Let each row say of its prompt: the mean reward and accuracy of all sampled answers, and the greedy answer."""
    for row, prompt in zip(rows, prompts, strict=True):
        row |= prompt
    if found.greedy_scores is not None:
        greedy = of_prompts(found.greedy_scores, 1)
        for row, answer, prompt in zip(rows, models.texts(found.greedy), greedy, strict=True):
            row["greedy"] = answer
            names = {"sampled_reward": "greedy_reward", "accuracy": "greedy_accuracy"}
            row |= {names[name]: value for name, value in prompt.items() if name in names}


def _correctness(models: Models, found: Measured, rows: Rows, prompts: Sequence[dict[str, float]]) -> dict[str, Any]:
    line: dict[str, Any] = {"samples": len(found.ids) // len(rows), "ended": ended(models, found.ids)}
    if len(found.scores.parts) > 1:
        means = {name: known_mean(values) for name, values in found.scores.parts.items()}
        line["rewards"] = {name: None if math.isnan(mean) else mean for name, mean in means.items()}
    line |= shares(prompts, "accuracy", "accuracy")
    if line["samples"] > 1:
        line |= shares(prompts, "pass_at_k", "passed")
    if found.greedy_scores is not None:
        if any("greedy_reward" in row for row in rows):
            line |= reward_interval(rows, "greedy_reward", "greedy_reward")
        line |= shares(rows, "greedy_accuracy", "greedy_accuracy")
        line |= {"greedy_length": fmean(map(len, found.greedy)), "greedy_ended": ended(models, found.greedy)}
    return line


def _answer_by_base(run: Run, models: Models, items: Sequence[Item]) -> None:
    """The base model's answers to the first held-out prompts, for the report: evaluations/base.jsonl."""
    rewards = models.rewards_with(run.store.reward(0))
    rows: Rows = []
    rollouts = sample_all(run, models, models.base, items, run.seed(EVALUATION_SEED))
    for batch, rollout in zip(batches(items, run.config.eval_batch_size), rollouts, strict=True):
        ids = rollout.answers()
        rows += _rows(models, batch, ids, rewards.score(batch, ids).total)
    wins, _ = _wins(run, models, None, rows, read_rows(run.store.evaluation(None)))
    for row, win in zip(rows, wins, strict=True):
        row["win"] = win
    run.store.write_rows(run.store.evaluation("base"), rows)


def _wins(
    run: Run, models: Models, iteration: int | None, rows: Rows, sft: Rows
) -> tuple[list[float], JudgeResult | None]:
    """1, 0 or (no verdict) 0.5 for each answer, against the SFT policy's; and what the judge said, if there is one."""
    sft = sft[: len(rows)]
    if models.judge is None:
        pairs = ((row["reward"], before["reward"]) for row, before in zip(rows, sft, strict=True))
        wins = [0.5 if None in pair else 0.5 + (pair[0] > pair[1]) / 2 - (pair[0] < pair[1]) / 2 for pair in pairs]
        return wins, None
    result = ask_judge(
        run,
        models,
        "evaluation",
        iteration,
        [row["prompt"] for row in rows],
        [[before["completion"], row["completion"]] for before, row in zip(sft, rows, strict=True)],
        [row["reference"] for row in rows],
    )
    return [0.5 if winner < 0 else float(winner) for winner in result.winners], result


def _metric(task: Task, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    name = task.metric
    if name is None:
        return {}
    values = metric(name)([row["completion"] for row in rows], [row["reference"] for row in rows])
    known = [value for value in values if value is not None]
    return {"metric_name": name, "metric": fmean(known) if known else None, "metric_n": len(known)}
