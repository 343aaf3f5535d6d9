"""Intervals over prompts and seeds, gains at equal seconds and KL, and the table."""

from __future__ import annotations

import math
from typing import Any

import pytest

from zopro.compare.plots import write_plots
from zopro.compare.summary import (
    differences,
    gain_ratios,
    markdown,
    method_summary,
    reward_at,
    reward_within,
    start_point,
    text,
)


def curve(*points: tuple[float, float, float]) -> dict[str, Any]:
    """Points of (seconds, reward, kl)."""
    rows = [
        {"step": i, "seconds": s, "reward": r, "reward_low": r - 1, "reward_high": r + 1, "kl_per_answer": k}
        for i, (s, r, k) in enumerate(points)
    ]
    return {"curve": rows, "peak_mb": 1000.0, "seconds_per_step": 0.5, "learning_rate": 1e-4, "seeds": 1, "search": []}


def test_a_method_s_seeds_are_pooled() -> None:
    start = {"rewards": [0.0, 1.0], "kl_per_answer": [0.0, 0.0]}
    results = [
        {
            "points": [{"step": 4, "seconds": s, "rewards": [r, r + 1], "kl_per_answer": [1.0, 3.0]}],
            "peak_mb": 10 * s, "seconds": s, "steps": 4,
        }
        for s, r in ((2.0, 1.0), (4.0, 2.0))
    ]  # fmt: skip
    found = method_summary(results, start)
    assert found["peak_mb"] == 40 and found["seconds_per_step"] == 6 / 8
    first, last = found["curve"]
    assert first == start_point(start) and first["reward"] == 0.5
    assert (last["step"], last["seconds"], last["reward"], last["kl_per_answer"]) == (4, 3.0, 2.0, 2.0)
    assert last["reward_low"] < 2 < last["reward_high"]
    assert found["final_rewards"] == [[1.0, 2.0], [2.0, 3.0]]
    half = 1.95996 * math.sqrt(0 / 2 + 0.5 / 2)  # each prompt gained alike: only the seeds differ
    assert found["gain"] == pytest.approx({"mean": 1.5, "low": 1.5 - half, "high": 1.5 + half}, rel=1e-4)


def test_differences_are_paired_by_prompt_and_seed() -> None:
    """Prompts of very unequal rewards, and a difference that all of them show."""
    easy, noise = [0.0, 50.0, 100.0, 7.0], [0.1, -0.1, 0.2, -0.2]
    better = [
        [r + 1 + n for r, n in zip(easy, noise, strict=True)],
        [r + 1 - n for r, n in zip(easy, noise, strict=True)],
    ]
    methods = {"a": {"final_rewards": [*better, easy]}, "b": {"final_rewards": [easy, easy]}, "old": {}}
    found = differences(methods)
    assert found.keys() == {"a", "b"} and found["a"].keys() == {"b"}, "a's third seed has no partner"
    assert found["a"]["b"] == pytest.approx({"mean": 1.0, "low": 1.0, "high": 1.0})
    assert found["b"]["a"]["mean"] == pytest.approx(-1.0)
    worse = differences({"a": {"final_rewards": [better[0]]}, "b": {"final_rewards": [easy]}})["a"]["b"]
    assert 0.1 < worse["high"] - worse["mean"] < 0.25, "one seed: what the prompts differ by"


def test_gains_are_read_where_both_have_been() -> None:
    fast, slow = curve((0, 0, 0), (10, 4, 2)), curve((0, 0, 0), (10, 1, 1), (20, 2, 2))
    table = gain_ratios({"fast": fast, "slow": slow})
    assert table["fast"]["slow"] == {"equal_seconds": 4.0, "equal_kl": 2.0}
    assert table["slow"]["fast"]["equal_seconds"] == 0.25
    assert gain_ratios({"a": fast, "b": curve((0, 0, 0), (9, -1, 1))})["a"]["b"]["equal_seconds"] is None
    assert reward_at(slow["curve"], 5) == 0.5 and reward_within(slow["curve"], 9) == 2


def test_a_training_whose_kl_falls_again_is_read_at_its_best() -> None:
    falls, steady = curve((0, 1, 0), (1, 2, 8), (2, 5, 4)), curve((0, 1, 0), (1, 3, 2), (2, 4, 6))
    assert reward_within(falls["curve"], 6) == 5 and reward_within(falls["curve"], 2) == 1.25
    ratio = gain_ratios({"falls": falls, "steady": steady})["steady"]["falls"]["equal_kl"]
    assert ratio == pytest.approx(3 / 4)  # at KL 6


def test_table_and_plots(tmp_path: Any) -> None:
    methods = {"guided": curve((0, 0, 0), (10, 4, 2)), "rloo": curve((0, 0, 0), (20, 4, 3))}
    paired = {"mean": 1, "low": 0.5, "high": 1.5}
    methods["guided"]["search"] = [{"learning_rate": 1e-4, "reward": 1.0, "kl_per_answer": 0.5, "objective": 0.975}]
    result = {
        "methods": methods, "start": methods["rloo"]["curve"][0], "gain_ratios": gain_ratios(methods), "failed": {},
        "differences": {"guided": {"rloo": paired}, "rloo": {"guided": paired}},
        "plan": {"steps": 40, "budget_minutes": 0.0, "seeds": 1}, "prompts": 100, "inference_peak_mb": 800.0,
        "beta": 0.05, "out": "x",
    }  # fmt: skip
    page = markdown(result)
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert len({row.count("|") for row in rows[:3]}) == 1 and len({row.count("|") for row in rows[3:]}) == 1
    assert len(rows) == 3 + 3 and "| guided |  | +1.000 [0.500, 1.500] |" in rows
    assert (
        "| guided | 1 |  | 0.0001 | 4.000 [3.000, 5.000] | +4.000 | 2.00 | 0.500 | 1000 | 1.250 | 2.00 | 1.50 |" in page
    )
    assert "- guided: 0.0001 gave 0.975; chosen 0.0001" in page and "- rloo: 0.0001 as configured" in page
    terminal = text({**result, "failed": {"mezo": "no memory"}})
    row = next(line.split() for line in terminal.splitlines() if line.startswith("guided"))
    assert row == ["guided", "4.000", "[3.000,", "5.000]", "2.00", "0.500", "1000", "0.0001"], "as in the page's row"
    paths = write_plots(result, tmp_path)
    assert len(paths) == 6 and all(path.stat().st_size > 2000 for path in paths)
