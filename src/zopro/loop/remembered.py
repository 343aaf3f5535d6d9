"""What alignment made a model forget: five easy questions, asked of the base model, after SFT and after every iteration.

A model can gain reward and lose its mind. Held-out prompts do not show that, since they are like those it was trained on.
So each evaluation also takes the likeliest answers to a few fixed questions that an instruct model knows, in the model's
own chat template. What the base model cannot answer it cannot forget: a model that knows none is not asked again.
"""

from __future__ import annotations

from typing import Any

import torch

from zopro.engine.local.models import context_of
from zopro.engine.opening import generate
from zopro.errors import InputError
from zopro.loop.models import Models
from zopro.loop.run import Run
from zopro.rewards.functions.answer import has
from zopro.store.durable import read_json
from zopro.store.shown import REMEMBERED
from zopro.text import chat
from zopro.text.tokenizer import CHATML

QUESTIONS: dict[str, tuple[str, ...]] = {
    "What is the capital of France?": ("Paris",),
    "What is 2 + 2?": ("4", "four"),
    "How many days are there in a week?": ("7", "seven"),
    "What is the opposite of hot?": ("cold",),
    "What is the largest ocean on Earth?": ("Pacific",),
}
"""Each with what a right answer contains, as whole words: one of them. SmolLM2 135M Instruct knows all five."""
LONGEST = 16  # tokens of an answer


class Memory:
    """What one evaluation finds out: `ask` the policy while it is open, then `found` is its record, or None.

    known_before: how many of the questions the base model could answer. known: how many the policy can. forgotten: of
    those that the base model could answer, how many the policy cannot. of: questions. answers: each question with the
    policy's answer, whether it is right, and whether the base model's was.

    Args:
        iteration: None for the SFT policy, before which the base model is asked.
    """

    def __init__(self, run: Run, models: Models, iteration: int | None) -> None:
        self.models = models
        self.found: dict[str, Any] | None = None
        self._before: list[bool] = []
        if not run.config.easy_questions:
            return
        if iteration is None:
            self._before = [right for _, right in self._answers(models.base)] if self._can_be_asked(run) else []
        elif kept := read_json(run.store.evaluation(None, ".json")).get(REMEMBERED):
            self._before = [answer["right_before"] for answer in kept["answers"]]

    def ask(self, policy: Any) -> None:
        if not any(self._before):
            return
        answers = [
            {"question": question, "answer": answer, "right": right, "right_before": before}
            for question, (answer, right), before in zip(QUESTIONS, self._answers(policy), self._before, strict=True)
        ]
        self.found = {
            "known_before": sum(self._before),
            "known": sum(answer["right"] for answer in answers),
            "forgotten": sum(answer["right_before"] and not answer["right"] for answer in answers),
            "of": len(QUESTIONS),
            "answers": answers,
        }

    def _can_be_asked(self, run: Run) -> bool:
        """Whether the model has a chat template of its own, which takes a question, and room for an answer."""
        tokenizer, context = self.models.tokenizer, context_of(self.models.base)
        if str(tokenizer.chat_template).endswith(CHATML):  # zopro's own: this is no model that answers questions
            return False
        try:
            asked = self._encoded()
        except InputError as error:
            run.say(f"easy questions are not asked: {error}")
            return False
        return all(asked) and (context is None or max(map(len, asked)) + LONGEST <= context)

    def _encoded(self) -> list[list[int]]:
        tokenizer = self.models.tokenizer
        chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
        return [tokenizer(chat.render_prompt(tokenizer, messages))["input_ids"] for messages in chats]

    def _answers(self, model: Any) -> list[tuple[str, bool]]:
        """The likeliest answer to each question, and whether it is right."""
        rollouts = generate(
            model,
            self._encoded(),
            max_new_tokens=LONGEST,
            eos_token_ids=self.models.eos_token_ids,
            pad_token_id=self.models.tokenizer.pad_token_id,
            do_sample=False,
            generator=torch.Generator(self.models.base.device).manual_seed(0),  # its own, though nothing is drawn
        )
        texts = self.models.texts(rollouts.answers())
        return [
            (text, any(has(text, words) for words in right))
            for text, right in zip(texts, QUESTIONS.values(), strict=True)
        ]
