"""What metrics and rewards compare a summary with: the row's own reference, in every form of row."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rows import ABSTRACT, example
from zopro.tasks.columns import columns_of

PAIR = {"chosen": "better", "rejected": "worse"}
NUMBERED = {"summary_0": "worse", "summary_1": "better", "choice": 1}
SUMMARIES = [{"text": "better", "policy": "ref"}, {"text": "worse", "policy": "sup4"}]
LISTED, NO_TEXT = ({"reference": ["", "first", "second"]}, "first"), ({"reference": 7}, "better")
ROWS: dict[str, dict[str, Any]] = {
    "a text": {"text": "P.", **PAIR},
    "a post": {"post": "P.", **NUMBERED},
    "a prompt": {"prompt": "TL;DR?", **PAIR},
    "feedback": {"info": {"post": "P."}, "summaries": SUMMARIES, "choice": 0},
    "SciTLDR": {"source": ABSTRACT, "target": ["better"]},
}


@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_a_summary_has_the_row_s_reference_else_the_better_one(row: dict[str, Any]) -> None:
    for own, wanted in (({}, "better"), ({"reference": " "}, "better"), ({"reference": "REF"}, "REF"), LISTED, NO_TEXT):
        made = example("summarization", row | own)
        assert made.reference == wanted and made.chosen == "better"
        assert columns_of(replace(made, columns=row | own))["answer"] == wanted
