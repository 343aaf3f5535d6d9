"""Verdicts that cannot be used, and judges that fail, hang or are stopped."""

from __future__ import annotations

import threading

import pytest
import torch

from pairs import NONE, PAIRS, PROMPTS
from zopro.errors import InputError
from zopro.judges import CallableJudge, MetricJudge, judge_pairs
from zopro.judges.verdicts import Verdicts

BAD = {
    "text": ("0", "verdict is not an integer but str"),
    "float": (1.0, "verdict is not an integer but float"),
    "bool": (True, "verdict is not an integer but bool"),
    "none": (None, "verdict is not an integer but NoneType"),
    "too large": (2, "verdict 2 is out of range"),
    "too small": (-2, "verdict -2 is out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_verdicts_are_counted_not_raised(case):
    verdict, reason = BAD[case]
    result = judge_pairs(lambda p, c, r: [verdict, 1, 0], PROMPTS, PAIRS, NONE)
    assert result.winners == [-1, 1, 0]
    assert (result.invalid, result.ties, result.reasons) == (1, 0, {reason: 1})


def test_numpy_and_torch_integers_are_verdicts():
    result = judge_pairs(lambda p, c, r: torch.tensor([0, 1, -1]), PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid, result.ties) == ([0, 1, -1], 0, 1)
    assert all(type(winner) is int for winner in result.winners)


def test_one_failing_pair_does_not_cost_the_others():
    def judge(prompts, completions, references):
        if "Dogs?" in prompts:
            raise KeyError("two\nlines")
        return [0] * len(prompts)

    result = judge_pairs(judge, PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid) == ([0, -1, 0], 1)
    assert len(result.reasons) == 1 and "KeyError" in next(iter(result.reasons))


def test_a_broken_judge_is_given_up_on():
    calls = []

    def judge(*arguments):
        calls.append(arguments)
        raise TimeoutError("gone")

    with pytest.raises(InputError, match=r"judge: .* judge failed on 3 pairs in a row, .* TimeoutError: gone.*--resume"):
        judge_pairs(judge, PROMPTS * 10, PAIRS * 10, NONE * 10)
    assert len(calls) == 1 + 3


def test_a_judge_without_any_usable_verdict_is_refused():
    with pytest.raises(InputError, match=r"no usable verdict on 3 pairs \(verdict 7 is out of range: 3\)"):
        judge_pairs(lambda p, c, r: [7] * len(p), PROMPTS, PAIRS, NONE)
    assert judge_pairs(lambda p, c, r: [-1] * len(p), PROMPTS, PAIRS, NONE).ties == 3


def test_a_judge_that_hangs_stops_the_run_and_loses_no_verdict(tmp_path):
    release, asked = threading.Event(), []

    def hangs(prompts, completions, references):
        return release.wait() if prompts == PROMPTS[2:] else [0]

    def works(prompts, completions, references):
        asked.extend(prompts)
        return [1] * len(prompts)

    path = tmp_path / "new" / "verdicts.jsonl"
    arguments = (PROMPTS, PAIRS, NONE)
    with pytest.raises(InputError, match=r"gave no answer within 0.1 seconds. Fix it or raise its timeout"):
        judge_pairs(CallableJudge(hangs, timeout=0.1), *arguments, Verdicts(path), batch_size=1)
    release.set()
    assert judge_pairs(CallableJudge(works, timeout=5), *arguments, Verdicts(path), batch_size=1).winners == [0, 0, 1]
    assert asked == PROMPTS[2:]


def test_only_usable_verdicts_are_kept_and_truncated_lines_are_not_read(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    judge_pairs(CallableJudge(lambda p, c, r: [1, "x", -1]), PROMPTS, PAIRS, NONE, Verdicts(path))
    assert len(path.read_text().splitlines()) == 2 and not any(word in path.read_text() for word in PROMPTS)
    path.write_bytes(path.read_bytes() + b'{"pair": 3}\n[1]\nnull\n{"pair')
    asked = []
    judge = CallableJudge(lambda p, c, r: asked.extend(p) or [0] * len(p))
    assert judge_pairs(judge, PROMPTS, PAIRS, NONE, Verdicts(path)).winners == [1, 0, -1]
    assert asked == PROMPTS[1:2]
    swapped = [[b, a] for a, b in PAIRS]
    assert judge_pairs(judge, PROMPTS, swapped, NONE, Verdicts(path)).winners == [0, 0, 0], "other pairs"


def test_metrics_are_not_worth_keeping(tmp_path):
    judge_pairs(MetricJudge("rouge"), PROMPTS, PAIRS, ["a"] * 3, Verdicts(tmp_path / "verdicts.jsonl"))
    assert not any(tmp_path.iterdir())


async def asks(prompts, completions, references):
    return [0] * len(prompts)


@pytest.mark.parametrize(
    ("judge", "kind"),
    [
        (lambda p, c, r: dict.fromkeys(range(len(p)), 0), "dict"),
        (lambda p, c, r: {0, 1, 2}, "set"),
        (lambda p, c, r: "010"[: len(p)], "str"),
        (lambda p, c, r: None, "NoneType"),
        (asks, "coroutine"),
    ],
)
@pytest.mark.parametrize("wrap", [CallableJudge, lambda judge: judge])
@pytest.mark.filterwarnings("error")
def test_what_is_no_list_is_never_taken_for_verdicts(judge, kind, wrap):
    """The keys of an object say nothing about its pairs."""
    with pytest.raises(
        InputError, match=rf"failed on 3 pairs .* \(judge returned {kind} in place of a list of verdicts\)"
    ):
        judge_pairs(wrap(judge), PROMPTS, PAIRS, NONE)


def test_what_a_judge_does_to_its_pairs_changes_none(tmp_path):
    """Asked one by one after a failure, and asked again later, it gets them as they are."""
    asked = []

    def sorts(prompts, completions, references):
        asked.append([list(pair) for pair in completions])
        for pair in completions:
            pair.sort()
        return [0] if len(prompts) == 1 else None

    path = tmp_path / "verdicts.jsonl"
    judge_pairs(CallableJudge(sorts), PROMPTS, PAIRS, NONE, Verdicts(path))
    assert asked == [PAIRS, *([pair] for pair in PAIRS)]
    judge_pairs(CallableJudge(sorts), PROMPTS, PAIRS, NONE, Verdicts(path))
    assert len(asked) == 4, "all verdicts were kept"


@pytest.mark.parametrize("answer", [[0], 5, None])
def test_wrong_lengths_are_invalid(answer):
    result = judge_pairs(lambda p, c, r: answer, PROMPTS[:2], PAIRS[:2], NONE[:2])
    expected = [0, 0] if answer == [0] else [-1, -1]  # [0] is right once pairs are asked one by one
    assert result.winners == expected
