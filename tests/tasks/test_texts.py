"""What tasks make of a row's texts: turns, references, answers that are worse."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rows import ABSTRACT, MLQE, example
from zopro.tasks import DropRow
from zopro.tasks.base import as_text
from zopro.tasks.dialogue import parse_dialogue
from zopro.tasks.literals import spells_messages
from zopro.text.turns import turns

# Turns keep their text if it is stripped and holds no blank line (which could begin another turn).
TURN = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\n"), min_size=1).map(str.strip)


TURN = TURN.filter(bool)


@given(st.lists(st.tuples(TURN, TURN), min_size=1, max_size=4))
def test_dialogues_survive_a_round_trip(exchanges):
    turns = [(role, text) for pair in exchanges for role, text in zip(("Human", "Assistant"), pair, strict=True)]
    messages = parse_dialogue("".join(f"\n\n{role}: {text}" for role, text in turns))
    names = {"user": "Human", "assistant": "Assistant"}
    assert [(names[message["role"]], message["content"]) for message in messages] == turns


@given(st.lists(TURN, min_size=1, max_size=3), TURN, TURN)
def test_hh_answers_are_the_last_turns(prompts, chosen, rejected):
    start = "\n\nAssistant: ok".join(f"\n\nHuman: {text}" for text in prompts) + "\n\nAssistant: "
    row = {"chosen": start + chosen, "rejected": start + rejected}
    if chosen == rejected:
        with pytest.raises(DropRow):
            example("chat", row)
    else:
        got = example("chat", row)
        assert (got.chosen, got.rejected) == (chosen, rejected)
        assert [message["content"] for message in got.prompt[::2]] == prompts


def test_scitldr_worse_summary_is_a_stable_sentence_but_not_the_best_one():
    row = {"source": ABSTRACT, "target": ["Cats are liked.", "x"], "rouge_scores": [0.9, 0.1, 0.2]}
    got = example("summarization", row)
    assert (got.chosen, got.reference) == ("Cats are liked.", "Cats are liked.")
    assert got.rejected in ABSTRACT[1:]
    assert example("summarization", dict(row)).rejected == got.rejected
    drawn = {
        example("summarization", {**row, "source": [f"{text} {i}" for text in ABSTRACT]}).rejected.split()[0]
        for i in range(20)
    }
    assert drawn == {"Cats", "Dogs"}  # seeded by the text, not always the same place, never the nearest
    assert example("summarization", {"source": "Cats purr.", "target": "Purr."}).rejected == "Cats purr."


def test_translation_references_are_only_translations_rated_high():
    assert example("translation", MLQE).reference == "Hallo."
    low = example("translation", {**MLQE, "z_mean": -0.3})
    assert (low.reference, low.score) == (None, -0.3)


@pytest.mark.parametrize("row", [MLQE, {"en": "Hi.", "de": "Hallo."}])
def test_a_raw_score_makes_no_reference_and_a_column_of_its_own_does(row):
    raw = {name: value for name, value in row.items() if name != "z_mean"} | {"score": 92.0}
    assert (example("translation", raw).reference, example("translation", raw).score) == (None, 92.0)
    for scored in (raw, {**row, "z_mean": 0.5}, {**row, "z_mean": -1}):
        assert example("translation", {**scored, "reference": "Guten Tag."}).reference == "Guten Tag."


def test_white_space_is_read_in_linear_time():
    started, many = time.process_time(), 40_000
    assert as_text(" " * many + "hello", "prompt") == "hello"
    assert not spells_messages("[{'role':" + " " * many + "x, 'content': ''}]")
    with pytest.raises(DropRow):
        example("preference", {"chosen": "\n" * many + "x" * many + " a", "rejected": "\n" * many + "x" * many + "\nb"})
    same = "a" + "\n" * many + "x"
    assert example("preference", {"chosen": same + " b", "rejected": same + " c"}).chosen == "b"
    assert turns("<|user|>a" + " " * many + "b" + "<|end|>" * many) == [("user", "a" + " " * many + "b")]
    assert time.process_time() - started < 3  # seconds; quadratic, each would be more
