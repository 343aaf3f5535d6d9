"""What alignment made a model forget: easy questions, asked of the base model, after SFT and after every iteration.

A model can gain reward and lose its mind. Held-out prompts do not show that, since they are like those it was trained on.
So each evaluation also takes the likeliest answers to a few fixed questions that an instruct model knows, in the model's
own chat template. What the base model cannot answer it cannot forget: a model that knows none is not asked again.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from zopro.engine.local.models import context_of
from zopro.engine.opening import generate
from zopro.errors import InputError
from zopro.loop.answers import batches
from zopro.loop.correctness import Bounded, named
from zopro.loop.models import Models
from zopro.loop.run import Run
from zopro.rewards.functions.answer import has
from zopro.store.durable import read_json, read_json_lines
from zopro.store.shown import REMEMBERED
from zopro.system.statistics import win_interval
from zopro.text import chat
from zopro.text.tokenizer import CHATML

QUESTIONS: dict[str, tuple[str, ...]] = {
    row["question"]: tuple(row["answers"]) for row in read_json_lines(Path(__file__).with_name("easy_questions.jsonl"))
}
"""Each with what a right answer contains, as whole words: one of them. A run asks the first ones."""
LONGEST = 16  # tokens of an answer
TOGETHER = 8  # questions that are asked in one batch, at least

Answers = list[tuple[str, bool]]
"""The likeliest answer to each question, and whether it is right."""


class Memory:
    """What one evaluation finds out: `ask` the policy while it is open, then `found` is its record, or None.

    known_before: how many of the questions the base model could answer. known: how many the policy can. forgotten: of
    those that the base model could answer, how many the policy cannot. kept: the share of them that it can, with its 95 %
    interval. of: questions. answers: each question with the policy's answer, whether it is right, and whether the base
    model's was.

    Args:
        iteration: None for the SFT policy, before which the base model is asked.
    """

    def __init__(self, run: Run, models: Models, iteration: int | None) -> None:
        self.run, self.models = run, models
        self.found: dict[str, Any] | None = None
        self._before: list[bool] = []
        if not run.config.easy_questions:
            return
        if iteration is None:
            self._before = [right for _, right in ask(run, models, models.base) or ()]
        elif kept := read_json(run.store.evaluation(None, ".json")).get(REMEMBERED):
            self._before = [answer["right_before"] for answer in kept["answers"]]

    def ask(self, policy: Any) -> None:
        if not any(self._before):
            return
        answers = [
            {"question": question, "answer": answer, "right": right, "right_before": before}
            for question, (answer, right), before in zip(
                asked(self.run), ask(self.run, self.models, policy) or (), self._before, strict=True
            )
        ]
        right = [bool(answer["right"]) for answer in answers]
        self.found = {**counts([right], self._before), "answers": answers}


def counts(right: Sequence[Sequence[bool]], before: Sequence[bool]) -> Bounded:
    """How many questions were known and are, and the share kept of those that were, with its interval over questions.

    Args:
        right: [training][question], whether a policy answers it. Numbers are means over trainings.
        before: whether the model before them did.

    >>> counts([[True, False, True, True]], [True, True, True, False])["forgotten"]
    1
    """
    kept = [sum(of_one) / len(right) for of_one, known in zip(zip(*right, strict=True), before, strict=True) if known]
    known = sum(map(sum, right)) / len(right)
    found: Bounded = {"known_before": sum(before), "known": _whole(known)}
    found |= {"forgotten": _whole(len(kept) - sum(kept)), "of": len(before)}
    return found | (named("kept", win_interval(kept)) if kept else {})


def _whole(value: float) -> float:
    return round(value) if abs(value - round(value)) < 1e-9 else value


def asked(run: Run) -> dict[str, tuple[str, ...]]:
    """The questions that the run asks."""
    return dict(islice(QUESTIONS.items(), run.config.questions_asked))


def ask(run: Run, models: Models, model: Any) -> Answers | None:
    """A model's answers to the run's questions; None where it cannot be asked."""
    tokenizer, context = models.tokenizer, context_of(models.base)
    if str(tokenizer.chat_template).endswith(CHATML):  # zopro's own: this is no model that answers questions
        return None
    questions = asked(run)
    chats = [[{"role": "user", "content": question}] for question in questions]
    try:
        prompts = [tokenizer(chat.render_prompt(tokenizer, messages))["input_ids"] for messages in chats]
    except InputError as error:
        run.say(f"easy questions are not asked: {error}")
        return None
    # Each must show something, and there must be room for an answer.
    if not prompts or not all(prompts) or (context is not None and max(map(len, prompts)) + LONGEST > context):
        return None
    texts: list[str] = []
    for batch in batches(prompts, max(TOGETHER, run.config.eval_batch_size)):
        rollouts = generate(
            model,
            batch,
            max_new_tokens=LONGEST,
            eos_token_ids=models.eos_token_ids,
            pad_token_id=models.tokenizer.pad_token_id,
            do_sample=False,
            generator=torch.Generator(models.base.device).manual_seed(0),  # its own, though nothing is drawn
        )
        texts += models.texts(rollouts.answers())
    return [
        (text, any(has(text, words) for words in right)) for text, right in zip(texts, questions.values(), strict=True)
    ]
