"""The rows of one run, as its model reads them: prompts rendered and encoded, what cannot be trained on left out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from transformers import PreTrainedTokenizerBase

from zopro import tasks
from zopro.choices import REWARDS
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.tasks import Example, Task
from zopro.tasks.columns import lacking
from zopro.text import chat
from zopro.text.frame import Frame, frame_of


@dataclass(frozen=True)
class Item:
    """An example with its prompt rendered: as text (what trainers get) and as token ids (what the engine gets)."""

    prompt: str
    ids: list[int]
    example: Example


@dataclass(frozen=True)
class Data:
    """train: items to learn from, in seeded order. eval: held-out items. rows: how many of each, and what was left out.
    remarks: lines on how the rows were read. other: prompts of another task (`other_data`)."""

    task: Task
    train: list[Item]
    eval: list[Item]
    rows: str
    remarks: list[str]
    other: Sequence[Item] = ()

    @property
    def regressed(self) -> bool:
        """Whether the first reward model learns scores, row by row, in place of pairs."""
        return self.task.reward == "regression"

    def texts(self, frame: Frame) -> Iterator[str]:
        """Prompts and answers as they are encoded."""
        for item in (*self.train, *self.eval, *self.other):
            for answer in (item.example.chosen, item.example.rejected):
                yield item.prompt + frame.write(answer or "")


def load_data(config: RunConfig, tokenizer: PreTrainedTokenizerBase) -> Data:
    """The run's data. Raises InputError: it cannot be read, or no row of it can be used."""
    item, frame = partial(_item, tokenizer), frame_of(tokenizer)

    def unfit(example: Example) -> str | None:
        answers = (example.chosen, example.rejected) if config.sft_steps or config.trains_reward else ()
        return lacking(example, config.reward) or _unfit(
            tokenizer, frame, item(example), answers, config.max_prompt_length
        )

    fit = tasks.Fit(partial(chat.render_prompt, tokenizer))
    columns = config.reward != ["model"]  # which reads prompts and answers alone
    found = tasks.load(config, config.eval_prompts, config.seed, refuse=unfit, fit=fit, columns=columns)
    _check_answers(config, found)
    rows, dropped = f"{len(found.train)} training rows, {len(found.eval)} held-out prompts", found.dropped
    other: list[Example] = []
    remarks = found.remarks()
    if config.other_data:
        trained = set(map(tasks.prompt_key, found.train))

        def unfit_other(example: Example) -> str | None:
            learned = "prompt is one of train_data" if tasks.prompt_key(example) in trained else None
            return learned or _unfit(tokenizer, frame, item(example), (), config.max_prompt_length)

        other, more, splits = tasks.load_prompts(config.other_data, config.eval_prompts, config.seed, unfit_other, fit)
        remarks += splits
        rows, dropped = f"{rows}, {len(other)} prompts of another task", {**dropped, **more}
    left_out = "".join(f"; left out {count}: {reason}" for reason, count in dropped.items())
    train, held_out, elsewhere = ([*map(item, examples)] for examples in (found.train, found.eval, other))
    return Data(found.task, train, held_out, rows + left_out, [*remarks, *_unjudged(config, found)], elsewhere)


def _unjudged(config: RunConfig, found: tasks.TaskData) -> Iterator[str]:
    """A line where a judge is named that nobody asks, or one that compares with references finds none."""
    if unused := config.unused():
        yield f"{', '.join(unused)}: of no effect, as no reward model is trained (reward: {', '.join(config.reward)})"
    judge = found.task.default_judge if config.judge == "auto" else config.judge
    if not config.trains_reward or judge not in tasks.METRICS:
        return
    if all(example.reference is None for example in (*found.train, *found.eval)):
        yield (
            f"judge: no row has a reference, so {judge} has no verdict: every win rate will be 0.5, and no reward model "
            "will be refined. Give rows with a reference, or take another judge: model, openai:MODEL, python:MODULE:NAME."
        )


def _check_answers(config: RunConfig, found: tasks.TaskData) -> None:
    """Raise InputError where a stage has nothing to learn from."""
    if config.sft_steps and all(example.chosen is None for example in found.train):
        raise InputError("sft_steps: must be 0 for rows without an answer to learn from. Set it, or give such rows.")
    if config.trains_reward and all(example.rejected is None and example.score is None for example in found.train):
        others = ", ".join(name for name in REWARDS if name != "model")
        raise InputError(f"reward: model must have rows with preferences or scores, got none. Take another: {others}.")


def _item(tokenizer: PreTrainedTokenizerBase, example: Example) -> Item:
    prompt = chat.render_prompt(tokenizer, example.prompt, example.tools)
    return Item(prompt, tokenizer(prompt)["input_ids"], example)


def _unfit(
    tokenizer: PreTrainedTokenizerBase, frame: Frame, item: Item, answers: Sequence[str | None], longest: int
) -> str | None:
    """Why a row is left out: its prompt is too long, the chat template does not give back what it is given, or a control
    token of the tokenizer stands in it: in the prompt or in the answers that are learned from."""
    example = item.example
    if not item.ids:
        return "prompt has no token"
    if len(item.ids) > longest:
        return "prompt is longer than max_prompt_length"
    if (role := chat.lost_message(example.prompt, item.prompt)) is not None:
        return f"the chat template leaves out or changes the {role}'s message"
    for answer in answers:
        if answer is not None:
            whole = chat.render_answered(tokenizer, example.prompt, answer, example.tools)
            if not whole.startswith(item.prompt + frame.write(answer)):
                return "the chat template changes the answer"
            if (token := frame.control_token(answer, answer=True)) is not None:
                return f"the answer has the control token {token} in it"
    for message in example.prompt:
        role = str(message["role"])
        if (token := frame.control_token(message.get("content") or "", answer=role == "assistant")) is not None:
            return f"the {role}'s message has the control token {token} in it"
    return None
