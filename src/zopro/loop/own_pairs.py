"""Preference rows of a model's own answers: of several to a prompt the one with the highest reward, and the lowest.

Both have one author, so that a reward model that learns from them cannot go by style alone, as it can where people wrote
one answer and a model or an excerpt is the other.

    rows, found = own_pairs(load_config("summaries.yaml", {"reward": "rouge", "num_generations": "8"}))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from zopro.config import RunConfig
from zopro.engine.opening import end
from zopro.errors import InputError
from zopro.loop.answers import batches, ended, sample_all
from zopro.loop.beforehand import check_own_pairs
from zopro.loop.data import Item
from zopro.loop.learned import ending_within
from zopro.loop.opening import open_all
from zopro.loop.unended import unended
from zopro.tasks.columns import answer_as_given, prompt_as_given


def own_pairs(config: RunConfig, count: int = 0, held_out: bool = False) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Sample `config.num_generations` answers to each prompt from the model that a run would begin with, and rank them.

    Args:
        config: model, data, rewards and lengths. Nothing is trained, and nothing is written.
        count: prompts, the first of the training rows in their seeded order; 0: all.
        held_out: take the held-out prompts instead.

    Returns:
        Rows in TRL's preference format (prompt, chosen, rejected: texts, or messages where the row has messages), with
        reference, chosen_reward and rejected_reward; and numbers: prompts, pairs, cut_off (pairs with an answer that does
        not end within max_completion_length, from which a run of this length does not learn), the mean of both rewards.

    Raises:
        InputError: what a run would refuse, a reward that has to be trained, or no prompt whose answers differ in reward.
    """
    check_own_pairs(config, count)
    run, models, data = open_all(replace(config, sft_steps=0), writes=False)
    items = (data.eval if held_out else data.train)[: count or None]
    if len(items) < count:
        why = f": eval_prompts is {config.eval_prompts}" if held_out else ""
        run.say(f"pairs: {count} prompts were asked for, and there are {len(items)}{why}")
    each, rows, ids, scored = config.num_generations, list[dict[str, Any]](), list[list[int]](), False
    try:
        with models.policies.open(None) as model:
            sampled = sample_all(run, models, model, items, run.seed("own pairs"), each)
            for part in batches(items, max(1, config.eval_batch_size // each)):
                answers = list[list[int]]()
                while len(answers) < len(part) * each:
                    answers += next(sampled).answers()
                scores = models.rewards.score([item for item in part for _ in range(each)], answers).total
                for item, texts, rewards in zip(
                    part, batches(models.texts(answers), each), batches(scores, each), strict=True
                ):
                    scored = scored or not all(map(math.isnan, rewards))
                    rows += filter(None, [_row(item, texts, rewards)])
                ids += answers
            assert next(sampled, None) is None
    finally:
        end(models.base)
    if not scored:
        raise InputError("reward: must give a number to some answers, and gave None to all of them. Let it score more.")
    if not rows:
        raise InputError(
            f"reward: must differ between the answers to a prompt, and did so for none of {len(items)} prompts. Sample "
            "more answers (num_generations), warmer ones (temperature), or take another reward."
        )
    if note := unended("pairs", 1 - ended(models, ids), len(ids), config.max_completion_length):
        run.say(note)
    fits = ending_within(models.frame, config)
    cut = sum(not fits(_text(row["chosen"]), _text(row["rejected"])) for row in rows)
    means = {name: fmean(row[name] for row in rows) for name in ("chosen_reward", "rejected_reward")}
    return rows, {"prompts": len(items), "pairs": len(rows), "cut_off": cut, **means}


def _text(answer: Any) -> str:
    """Of an answer as a row has it: a text, or messages."""
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def _row(item: Item, texts: Sequence[str], rewards: Sequence[float]) -> dict[str, Any] | None:
    """The best and the worst of the answers to one prompt; None where there are no two of different reward."""
    known = [
        (reward, text) for reward, text in zip(rewards, texts, strict=True) if text.strip() and not math.isnan(reward)
    ]
    if not known:
        return None
    (high, chosen), (low, rejected) = max(known, key=lambda pair: pair[0]), min(known, key=lambda pair: pair[0])
    if high == low or chosen.strip() == rejected.strip():
        return None
    example = item.example
    return {
        "prompt": prompt_as_given(example),
        "chosen": answer_as_given(example, chosen),
        "rejected": answer_as_given(example, rejected),
        **({"tools": example.tools} if example.tools else {}),
        **({"reference": example.reference} if example.reference else {}),
        "chosen_reward": high,
        "rejected_reward": low,
    }
