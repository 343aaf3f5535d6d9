"""Every row format of every task: what a good row gives, and what becomes of a bad one."""

from __future__ import annotations

import pytest

from rows import ABSTRACT, MLQE, example, user
from zopro.errors import InputError
from zopro.tasks import DropRow

HH = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"


HH_PROMPT = [*user("Hi"), {"role": "assistant", "content": "Hello."}, *user("And?")]


# task, row, prompt (or a part of its text), chosen, rejected
GOOD = {
    "hh": ("chat", {"chosen": HH + " Yes.", "rejected": HH + " No. "}, HH_PROMPT, "Yes.", "No."),
    "hh of Windows": (
        "chat",
        {"chosen": (HH + " Yes.").replace("\n", "\r\n"), "rejected": (HH + " No.").replace("\n", "\r\n")},
        HH_PROMPT,
        "Yes.",
        "No.",
    ),
    "trojan": (
        "chat",
        {"prompt": HH, "chosen": " Yes.", "rejected": " No."},
        HH_PROMPT,
        "Yes.",
        "No.",
    ),
    "trojan, redundant prompt": (
        "chat",
        {"prompt": "\n\nHuman: Hi", "chosen": HH + " Yes.", "rejected": HH + " No."},
        HH_PROMPT,
        "Yes.",
        "No.",
    ),
    "repeated speaker": (
        "chat",
        {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nAssistant: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
        user("a"),
        "b\n\nc",
        "d",
    ),
    "safe-rlhf": (
        "chat",
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": 1, "safer_response_id": 0},
        user("p"),
        "b",
        "a",
    ),
    "safe-rlhf, safety only": (
        "chat",
        {"prompt": "p", "response_0": "a", "response_1": "b", "safer_response_id": 0},
        user("p"),
        "a",
        "b",
    ),
    "shp, A": ("chat", {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": 1}, user("p"), "a", "b"),
    "shp, B": ("chat", {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": "0"}, user("p"), "b", "a"),
    "cvalues": ("chat", {"prompt": "问", "pos_resp": "好", "neg_resp": "坏"}, user("问"), "好", "坏"),
    "feedback": (
        "summarization",
        {
            "info": {"post": "Long post.", "title": "Title", "article": None},
            "summaries": [{"text": " short", "policy": "ref"}, {"text": " best", "policy": "sup4"}],
            "choice": 1,
        },
        "Title\n\nLong post.",
        "best",
        "short",
    ),
    "feedback, article, lists": (
        "summarization",
        {
            "info": {"post": None, "article": "News."},
            "summaries": {"text": ["a", "b"], "policy": ["x", "y"]},
            "choice": 0,
        },
        "News.",
        "a",
        "b",
    ),
    "flat": ("summarization", {"post": "P.", "title": "T", "chosen": "a", "rejected": "b"}, "T\n\nP.", "a", "b"),
    "flat, numbered": (
        "summarization",
        {"article": "P.", "summary_0": "a", "summary_1": "b", "choice": "1"},
        "P.",
        "b",
        "a",
    ),
    "flat, numbered, half a pair": (
        "summarization",
        {"article": "P.", "chosen": 1, "summary_0": "a", "summary_1": "b", "choice": True},
        "P.",
        "b",
        "a",
    ),
    "flat, prompt": ("summarization", {"prompt": "TL;DR?", "chosen": "a", "rejected": "b"}, user("TL;DR?"), "a", "b"),
    "mlqe": ("translation", MLQE, "from English to German.\n\nHi.", "Hallo.", None),
    "mlqe, tsv columns": (
        "translation",
        {"original": "Hi.", "translation": "Hallo.", "z_mean": "0.5"},
        "Hi.",
        "Hallo.",
        None,
    ),
    "mlqe, flat": ("translation", {"en": "Hi.", "de": "Hallo.", "score": 0.5}, "Hi.", "Hallo.", None),
    "mlqe, dotted": (
        "translation",
        {"translation.en": "Hi.", "translation.de": "Hallo.", "z_mean": 0.5},
        "Hi.",
        "Hallo.",
        None,
    ),
    "trl standard": (
        "preference",
        {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
        None,
        "blue.",
        "green.",
    ),
    "trl implicit": (
        "preference",
        {"chosen": "The sky is blue.", "rejected": "The sky is black."},
        user("The sky is"),
        "blue.",
        "black.",
    ),
    "trl implicit, one starts the other": (
        "preference",
        {"chosen": "a b", "rejected": "a b c"},
        user("a"),
        "b",
        "b c",
    ),
    "trl conversational": (
        "preference",
        {
            "prompt": user("q"),
            "chosen": [{"role": "assistant", "content": "a"}],
            "rejected": [{"role": "assistant", "content": "b"}],
        },
        user("q"),
        "a",
        "b",
    ),
    "trl conversational, implicit": (
        "preference",
        {
            "chosen": [{"role": "system", "content": "s"}, *user("q"), {"role": "assistant", "content": "a"}],
            "rejected": [{"role": "system", "content": "s"}, *user("q"), {"role": "assistant", "content": "b"}],
        },
        [{"role": "system", "content": "s"}, *user("q")],
        "a",
        "b",
    ),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_rows(case):
    task, row, prompt, chosen, rejected = GOOD[case]
    got = example(task, row)
    assert (got.chosen, got.rejected, got.row) == (chosen, rejected, 7)
    if isinstance(prompt, str):
        assert len(got.prompt) == 1 and got.prompt[0]["content"].endswith(prompt)
    elif prompt:
        assert got.prompt == prompt


H, A = "\n\nHuman: q", "\n\nAssistant:"


DROPPED = {
    "equal answers": ("chat", {"chosen": H + A + " a", "rejected": H + A + " a"}, "chosen and rejected are equal"),
    "equal but for space": ("chat", {"prompt": "q", "chosen": "a", "rejected": "a "}, "chosen and rejected are equal"),
    "empty answer": ("chat", {"chosen": H + A + " ", "rejected": H + A + " b"}, "empty answer"),
    "empty prompt": (
        "chat",
        {"chosen": "\n\nHuman: " + A + " a", "rejected": "\n\nHuman: " + A + " b"},
        "empty prompt",
    ),
    "a tool's turn alone": (
        "preference",
        {"prompt": [{"role": "tool", "content": "x"}], "chosen": "a", "rejected": "b"},
        "the prompt has no turn of the user",
    ),
    "blank prompt": ("preference", {"prompt": " ", "chosen": "a", "rejected": "b"}, "empty prompt"),
    "nothing shared": ("preference", {"chosen": "a b", "rejected": "c d"}, "empty prompt"),
    "other prompts": ("chat", {"chosen": H + A + " a", "rejected": "\n\nHuman: r" + A + " b"}, "different prompts"),
    "no answer": ("chat", {"chosen": H, "rejected": "\n\nHuman: r"}, "last turn"),
    "assistant first": (
        "chat",
        {"prompt": A.strip() + " x" + H, "chosen": "a", "rejected": "b"},
        "the assistant speaks first",
    ),
    "no dialogue": ("chat", {"chosen": "a", "rejected": "b"}, "no prompt"),
    "null": ("chat", {"chosen": None, "rejected": H}, "chosen is null"),
    "unknown role": (
        "preference",
        {"prompt": [{"role": "critic", "content": "x"}], "chosen": "a", "rejected": "b"},
        "unknown role 'critic'",
    ),
    "ends with the assistant": (
        "preference",
        {"prompt": [*user("q"), {"role": "assistant", "content": "x"}], "chosen": "a", "rejected": "b"},
        "does not end with the user",
    ),
    "no messages": ("preference", {"prompt": [], "chosen": "a", "rejected": "b"}, "empty prompt"),
    "no winner": (
        "chat",
        {"prompt": "p", "response_0": "a", "response_1": "b", "better_response_id": -1},
        "better_response_id names no winner",
    ),
    "null winner": (
        "chat",
        {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": None},
        "labels is null",
    ),
    "null score": ("translation", {**MLQE, "z_mean": None}, "z_mean is null"),
    "blank score": ("translation", {**MLQE, "z_mean": " "}, "z_mean is null"),
    "score not finite": ("translation", {**MLQE, "z_mean": float("nan")}, "z_mean is not finite"),
    "empty source": ("translation", {**MLQE, "translation": {"en": "", "de": "x"}}, "empty prompt"),
    "one sentence": ("summarization", {"source": ["Cats purr."], "target": "Cats purr."}, "no sentence"),
    "no target": ("summarization", {"source": ABSTRACT, "target": []}, "empty answer"),
}


@pytest.mark.parametrize("case", DROPPED)
def test_rows_without_use_are_dropped_with_a_reason(case):
    task, row, reason = DROPPED[case]
    with pytest.raises(DropRow, match=reason):
        example(task, row)


REFUSED = {
    "columns": (
        "chat",
        {"text": "a", "label": 1},
        "has the columns text, label; task chat expects (chosen, rejected) or",
    ),
    "no columns": ("chat", {}, "has the columns (none)"),
    "number for text": ("chat", {"chosen": 3, "rejected": "b"}, "chosen: must be text, got int"),
    "message without content": (
        "preference",
        {"chosen": [{"role": "user"}], "rejected": []},
        "must have role and content",
    ),
    "content not text": (
        "preference",
        {"chosen": [{"role": "user", "content": [1]}], "rejected": []},
        "chosen.content: must be text",
    ),
    "winner not a number": (
        "chat",
        {"history": "p", "human_ref_A": "a", "human_ref_B": "b", "labels": "A"},
        "labels: must be a number, got 'A'",
    ),
    "language": (
        "translation",
        {**MLQE, "translation": {"ro": "x", "en": "y"}},
        "target_language: 'German' (de) is not in",
    ),
    "source column": ("translation", {"translation": "x", "z_mean": 1}, "stand beside original or source"),
    "one summary": (
        "summarization",
        {"info": {"post": "p"}, "summaries": [{"text": "a"}], "choice": 0},
        "two records",
    ),
    "no post": ("summarization", {"info": {}, "summaries": [], "choice": 0}, "info: must have post or article"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_rows_of_the_wrong_shape_are_refused_by_name(case):
    task, row, message = REFUSED[case]
    with pytest.raises(InputError) as error:
        example(task, row)
    assert str(error.value).startswith("train_data: 'f.jsonl' row 7")
    assert message in str(error.value) and "\n" not in str(error.value)


def test_feedback_reference_is_the_human_summary():
    assert example(*GOOD["feedback"][:2]).reference == "short"
    assert example(*GOOD["feedback, article, lists"][:2]).reference == "a"
