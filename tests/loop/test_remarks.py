"""What a run says beforehand of its model and its text, where they are unusual."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from templates import SHAPES, with_template
from tiny import tiny_model
from zopro.judges import ModelJudge
from zopro.loop.models import Models
from zopro.text.frame import frame_of


def made(template: str | None = None, declared: tuple[int, ...] = (), context: int = 0, **options: Any) -> Models:
    """Models of a run over a tiny one, with another one as the judge if it has a context."""
    tokenizer = with_template(template)
    base = tiny_model("llama", tokenizer)
    config = SimpleNamespace(**{"lora_freeze_a": False, "max_completion_length": 8, **options})
    policies: Any = SimpleNamespace(full=True, config=config)
    nothing: Any = None
    judge = ModelJudge(tiny_model("llama", tokenizer), tokenizer, max_length=context) if context else None
    return Models(tokenizer, frame_of(tokenizer, declared), base, policies, nothing, judge, max_length=0)


def test_nothing_is_said_of_what_is_usual() -> None:
    assert not list(made(context=4096).remarks())


def test_adapters_that_are_not_there_have_no_frozen_part() -> None:
    (line,) = made(lora_freeze_a=True).remarks()
    assert line.startswith("lora_freeze_a: there is no adapter")


def test_stops_beyond_the_vocabulary_are_named() -> None:
    models = made(declared=(123_456,))
    (line,) = models.remarks()
    rows = models.base.get_input_embeddings().weight.shape[0]
    assert line == f"the model declares stop tokens that its vocabulary of {rows} does not have: [123456]"


def test_a_template_s_switch_and_its_date_are_named() -> None:
    (switched,) = made(SHAPES["reasoning left open, with a switch"].template).remarks()
    assert switched.startswith("the chat template is rendered with enable_thinking=False")
    (dated,) = made("{{ strftime_now('%d') }}" + SHAPES["phi"].template).remarks()
    assert dated.startswith("the chat template writes the date")


def test_a_base_model_that_is_its_own_judge_is_named() -> None:
    models = made(context=4096)
    models.judge.model = models.base  # type: ignore[union-attr]
    (line,) = models.remarks()
    assert line.startswith("judge: the base model itself decides pairs and win rates")


@pytest.mark.parametrize(("spare", "said"), [(15, 1), (16, 0)])
def test_answers_for_which_a_judge_has_no_room_are_named(spare: int, said: int) -> None:
    """Two answers of 8 tokens each."""
    models = made(context=4096)
    assert isinstance(models.judge, ModelJudge)
    question = 4096 - models.judge.room
    lines = list(made(context=question + spare).remarks())
    line = f"judge: two answers of more than {spare} tokens together do not fit in its context, and get no verdict"
    assert lines == [line] * said
