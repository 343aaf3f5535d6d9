"""What is left of policies at the end of their trainings, and how soon each was where one of them ended."""

from __future__ import annotations

from typing import Any

import pytest

from zopro.compare.reached import column, reached
from zopro.compare.state import findings, notes, state, state_table
from zopro.compare.summary import markdown, text

START = {"known": [True, True, True, True, False]}
SEEDS = [
    {"known": [True, True, True, False, True], "other": [0.5, 1.5, 1.0], "degenerate": [True, False, False],
     "ended": [True, True, False], "length": [4, 5, 6]},
    {"known": [True, False, False, False, True], "other": [1.5, 2.5, 2.0], "degenerate": [False, False, False],
     "ended": [True, False, False], "length": [6, 7, 8]},
]  # fmt: skip


def curve(answers: int | None, *points: tuple[float, float]) -> dict[str, Any]:
    """Points of (seconds, reward), two steps apart."""
    rows = [
        {"step": 2 * i, "seconds": s, "reward": r, "reward_low": r, "reward_high": r, "kl_per_answer": 1.0 * i}
        for i, (s, r) in enumerate(points)
    ]
    made = {"curve": rows, "peak_mb": 9.0, "seconds_per_step": 0.5, "learning_rate": 1e-4, "seeds": 1, "search": []}
    return made if answers is None else {**made, "answers": answers}


METHODS = {
    "es": curve(80, (0, 0), (10, 4), (20, 2), (30, 12)),
    "rloo": curve(40, (0, 0), (4, 6), (8, 8), (12, 10)),
    "mezo": curve(None, (0, 0), (10, -1), (20, 8), (30, 10)),
    "zopro": curve(40, (0, 0), (10, 8.9)),
}


def test_seeds_are_pooled_by_question_and_by_prompt() -> None:
    found = state(SEEDS, START)
    asked = found["remembered"]
    assert (asked["known_before"], asked["known"], asked["forgotten"], asked["kept"]) == (4, 3, 2, 0.5)
    assert found["other_kl_per_answer"] == 1.5 and found["other_n"] == 3
    half = (4.302653**2 * 0.25 / 3 + 12.706205**2 * 0.5 / 2) ** 0.5  # prompts' means 1, 2, 1.5; seeds' means 1, 2
    assert found["other_kl_per_answer_high"] == pytest.approx(1.5 + half, abs=1e-5)
    assert found["degenerate"] == pytest.approx(1 / 6) and found["ended"] == 0.5 and found["length"] == 6
    assert 0 <= found["degenerate_low"] < 1 / 6 < found["degenerate_high"] <= 1


def test_an_interval_of_shares_holds_what_trainings_differ_by() -> None:
    few, most = ([True] * count + [False] * (120 - count) for count in (11, 85))
    apart = state([{"ended": few}, {"ended": most}], {})
    assert apart["ended"] == 0.4 and 0 <= apart["ended_low"] < 0.09 and 0.71 < apart["ended_high"] <= 1
    one, alike = (state([{"ended": few}] * count, {}) for count in (1, 2))
    assert one["ended_low"] > 0.04 and alike["ended_low"] <= one["ended_low"], "Wilson's over prompts, or wider"
    assert state([{"ended": [False] * 120}] * 2, {})["ended_high"] > 0.02, "not certain where all are alike"


def test_what_was_not_measured_is_left_out() -> None:
    assert state([{"rewards": [1.0]}], {}) == {} and "remembered" not in state(SEEDS, {})
    assert state([SEEDS[0], {"known": [], "other": []}], START) == {}
    result = {"methods": {"es": {**METHODS["es"], "final": state(SEEDS, {})}, "mezo": METHODS["mezo"]}}
    (start, es, mezo) = map(dict, state_table(result))
    assert list(start) == ["Policy", "KL, other prompts", "Degenerate", "Ended", "Tokens"]
    assert es["KL, other prompts"] == "1.50 [0.00, 7.97]" and set(mezo.values()) == {"mezo", ""}
    assert state_table({"methods": {"es": METHODS["es"]}}) == []


def test_a_metric_that_falls_while_the_reward_rises_is_named() -> None:
    start = {"quality": {"chrf": [30.0, 40.0, None, 50.0], "short": [1.0, 1.0, 1.0, 1.0]}}
    ends = [{"quality": {"chrf": [25.0, 34.0, 3.0, 45.0], "short": [1.0, 2.0, 1.0, None]}}]
    found = state(ends, start)
    assert found["quality"]["chrf"]["mean"] == pytest.approx(104 / 3) and found["quality"]["chrf"]["n"] == 3
    assert found["quality"]["chrf"]["gain"] == pytest.approx(-16 / 3) and found["quality"]["chrf"]["gain_high"] < 0
    assert found["quality"]["short"]["gain"] == pytest.approx(1 / 3)
    assert state(ends, {}) == {}, "the start was measured by an earlier version"

    es = {**METHODS["es"], "final": found, "gain": {"mean": 2.0, "low": 1.0, "high": 3.0}}
    result = {"methods": {"es": es, "mezo": METHODS["mezo"]}, "before": state([start], start)}
    rows = [dict(row) for row in state_table(result)]
    assert [row["chrf"] for row in rows] == ["40.000", "34.667, gain -5.333 [-6.768, -3.899]", ""]
    assert notes(result) == ["es: the reward rises and chrf falls."]
    es |= {"gain": {"mean": 2.0, "low": -1.0, "high": 5.0}, "bounded": 1}
    assert notes(result) == ["es: max_kl ended 1 of 1 trainings; their mean is 6.0 steps."]


def test_a_gain_of_nothing_is_said_but_of_the_start() -> None:
    quality = {"right": [0.0, 100.0, 0.0, 100.0]}
    es = {**METHODS["es"], "final": state([{"quality": {"right": [100.0, 0.0, 0.0, 100.0]}}], {"quality": quality})}
    result = {"methods": {"es": es}, "before": state([{"quality": quality}], {"quality": quality})}
    rows = [dict(row)["right"] for row in state_table(result)]
    assert rows[0] == "50.000" and rows[1].startswith("50.000, gain 0.000 [-")


def test_a_method_whose_steps_measure_no_kl_is_held_against_max_kl_at_its_end() -> None:
    methods = {name: {**METHODS[name], "bounded": 0} for name in ("es", "rloo")}
    methods["es"]["curve"] = [*methods["es"]["curve"][:-1], {**methods["es"]["curve"][-1], "kl_per_answer": 12.0}]
    for sft_steps, start in ((40, "SFT"), (0, "the start")):
        line = f"es: the policy is 12.00 nats an answer from {start}, above max_kl: 10."
        assert [*findings({"methods": methods, "max_kl": 10.0, "sft_steps": sft_steps})] == [line]
    assert [*findings({"methods": methods, "max_kl": 0.0})] == [*findings({"methods": methods})] == []


def test_what_all_start_from_has_its_own_name() -> None:
    """Iteration 0's policy is not the SFT policy, which KL is taken to."""
    es = {**METHODS["es"], "final": state(SEEDS, START)}
    result = {"methods": {"es": es}, "before": state([SEEDS[0]], SEEDS[0]), "sft_steps": 40}
    for plan, name in (("iteration", "iteration 0"), ("sft", "SFT")):
        found = {**result, "plan": {"start": plan}}
        assert [dict(row)["Policy"] for row in state_table(found)] == [name, "es"]
        told = notes(found)
        assert f"Easy questions kept: of those that {name} answers; the interval is over questions." in told
        assert any("KL on other prompts: to SFT" in line for line in told)
    none = {"remembered": {"known": 0, "of": 5, "known_before": 0, "kept": None, "kept_low": None, "kept_high": None}}
    found = {**result, "before": {**none, "ended": 1.0}, "methods": {}}
    (row,) = state_table(found)
    assert dict(row)["Easy questions known"] == "0 of 5" and "Easy questions kept" not in dict(row)


def test_how_soon_each_is_where_rloo_ends() -> None:
    found = reached(METHODS)
    assert (found["of"], found["share"], found["reward"]) == ("rloo", 0.9, 9.0)
    assert found["methods"]["rloo"] == {"seconds": 10.0, "step": 5.0, "answers": pytest.approx(40 * 5 / 6)}
    assert found["methods"]["es"] == {"seconds": 27.0, "step": 5.4, "answers": 72.0}
    assert found["methods"]["mezo"] == {"seconds": 25.0, "step": 5.0, "answers": None}
    assert found["methods"]["zopro"] is None
    assert reached(METHODS, "zopro")["methods"]["es"]["seconds"] == pytest.approx(20 + 10 * (8.01 - 2) / 10)
    others = {name: METHODS[name] for name in ("es", "mezo")}
    assert reached(others)["of"] == "es", "the largest gain"
    assert reached(METHODS, "gone")["of"] == "rloo"
    assert reached({"a": curve(1, (0, 1), (1, 0))}) == {} and column({}) == column({"reached": {}}) == {}


def test_both_are_in_the_tables() -> None:
    methods = {name: {**method, "final": state(SEEDS, START)} for name, method in METHODS.items()}
    result = {
        "methods": methods, "start": METHODS["es"]["curve"][0], "before": state([SEEDS[0]], SEEDS[0]),
        "gain_ratios": {}, "failed": {}, "differences": {}, "plan": {"steps": 6, "against": ""}, "prompts": 3,
        "inference_peak_mb": 8.0, "beta": 0.05, "out": "x", "sft_steps": 0, "reached": reached(METHODS),
    }  # fmt: skip
    page, terminal = markdown(result), text(result)
    assert "| To 90% of rloo's gain |" in page and page.count("not reached |") == 1
    assert "| 10.0 s, 5.0 steps, 33 answers |" in page and "| 25.0 s, 5.0 steps |" in page
    assert (
        "| start | 4 of 5 | 1.000 [0.510, 1.000] of 4 | 1.00 [0.00, 2.24] | 0.333 [0.061, 0.792] | 0.667 | 5.0 |" in page
    )
    assert "| es | 3 of 5 | 0.500 [0.150, 0.850] of 4 |" in page and "zopro.text.degenerate" in page
    assert "to the start, in nats" in page
    for said in ("10.0 s, 5.0 steps, 33 answers", "0.500 [0.150, 0.850] of 4"):
        assert said in terminal
