"""Judges by name, and how pairs are put to any of them."""

from __future__ import annotations

import sys
import time

import pytest
import torch

from pairs import NONE, PAIRS, PROMPTS, TASK
from zopro.errors import InputError
from zopro.judges import CallableJudge, MetricJudge, judge_pairs, make_judge


def test_metric_judge_takes_the_nearer_answer():
    judge = MetricJudge("rouge")
    completions = [["a cat sat", "dogs"], ["dogs", "a cat sat"], ["x", "y"], ["a cat", "dog"]]
    assert judge(["p"] * 4, completions, ["a cat sat", "a cat sat", "a cat sat", None]) == [0, 1, -1, -1]


def test_pairs_are_asked_in_batches():
    sizes = []
    judge = lambda p, c, r: sizes.append(len(p)) or [0] * len(p)  # noqa: E731
    assert judge_pairs(judge, PROMPTS, PAIRS, NONE, batch_size=2).winners == [0] * 3
    assert sizes == [2, 1]


def test_equal_answers_are_ties_without_asking():
    asked = []
    result = judge_pairs(lambda p, c, r: asked.extend(c) or [1] * len(p), PROMPTS, [["x", "x"], *PAIRS[1:]], NONE)
    assert asked == PAIRS[1:]
    assert (result.winners, result.ties, result.reasons) == ([-1, 1, 1], 1, {"equal answers": 1})
    assert judge_pairs(lambda p, c, r: 1 / 0, [], [], []).winners == []


def test_unequal_arguments_are_the_callers_mistake():
    with pytest.raises(ValueError):
        judge_pairs(lambda p, c, r: [0], PROMPTS, PAIRS, [None])


def test_python_judges_are_found_in_the_working_directory(monkeypatch, tmp_path):
    (tmp_path / "my_judge_module.py").write_text(
        "def longest(p, c, r):\n    return [int(len(b) > len(a)) for a, b in c]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_judge_module", raising=False)
    path = [folder for folder in sys.path if folder]
    monkeypatch.setattr(sys, "path", [*path])
    judge = make_judge("python:my_judge_module:longest", TASK)
    assert sys.path == [*path, ""], "after all others"
    assert judge_pairs(judge, PROMPTS, PAIRS, NONE).winners == [1, 0, 1]
    with pytest.raises(InputError, match=r"has no 'longst'. Did you mean 'longest'"):
        CallableJudge("my_judge_module:longst")
    with pytest.raises(InputError, match="cannot import 'no_such_module_here'"):
        CallableJudge("no_such_module_here:f")
    with pytest.raises(InputError, match="must be module:function"):
        CallableJudge("json")
    with pytest.raises(InputError, match="must be callable"):
        CallableJudge("json:__name__")
    with pytest.raises(InputError, match="must be a function or an object, got 'json:JSONDecoder', a class"):
        CallableJudge("json:JSONDecoder")


@pytest.mark.parametrize(
    ("measure", "got"),
    [
        (lambda rows: {"x": rows[0]["nothing"]}, "but raised KeyError: 'nothing'"),
        (lambda rows: 3.5, "got 3.5"),
        (lambda rows: {"x": "3"}, "got '3' as 'x'"),
        (lambda rows: time.sleep(1), "but raised Late: no answer within 0.01 seconds"),
        (7, "but raised TypeError: 'int' object is not callable"),
    ],
)
def test_what_an_in_summary_does_wrong_is_one_line(measure, got):
    def first(prompts, completions, references): ...

    first.in_summary = measure
    with pytest.raises(InputError, match=f"^judge: in_summary of first must return numbers by name, {got}. Fix it"):
        CallableJudge(first, timeout=0.01).in_summary([{"prompt": "a"}])
    first.in_summary = lambda rows: {"rows": len(rows), "share": torch.tensor(0.5), "unknown": None}
    assert CallableJudge(first).in_summary([{}]) == {"rows": 1, "share": 0.5, "unknown": None}


def test_only_a_function_of_ones_own_adds_to_the_summary() -> None:
    """A built-in judge's own attributes are not taken for numbers of a run."""
    assert not any(hasattr(judge, "in_summary") for judge in (MetricJudge("rouge"), MetricJudge("chrf")))
