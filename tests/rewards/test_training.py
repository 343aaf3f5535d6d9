"""Training a reward model: it learns, reports, and leaves the random state and the terminal alone."""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tiny_rewards import make_model, make_pairs, make_scored
from zopro.errors import InputError
from zopro.rewards import Scored
from zopro.system.progress import reporting, task
from zopro.system.random_state import preserve_random_state
from zopro.train.callbacks import MetricsCallback


def test_pairwise_training_raises_held_out_accuracy_and_reports() -> None:
    model, held_out, lines = make_model(), make_pairs(60, seed=1), []
    before = model.accuracy(held_out)
    callback = MetricsCallback(lines.append, "reward")
    report = model.train_pairs(
        make_pairs(120, seed=0), steps=40, batch_size=16, learning_rate=1e-2, seed=0, callbacks=[callback]
    )
    after = model.accuracy(held_out)
    assert before["accuracy"] < 0.8 and after["accuracy"] >= 0.95 and after["n"] == 60
    assert report["pairs"] == 120 and report["dropped"] == 0 and report["cut"] == 0
    assert 0 < report["loss"] < math.log(2)
    assert [line["step"] for line in lines] == list(range(1, 41))
    first = lines[0]
    assert first["stage"] == "reward" and first["iteration"] is None and first["time"] > 0
    assert {"loss", "learning_rate", "accuracy"} <= first.keys() and "total_flos" not in first
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_regression_raises_held_out_correlation_in_standard_units() -> None:
    model, rows, held_out = make_model(), make_scored(150, seed=0), make_scored(60, seed=1)
    before = model.correlation(held_out)
    model.train_scores(rows, steps=60, batch_size=16, learning_rate=1e-2, seed=0)
    after = model.correlation(held_out)
    assert before["pearson"] < 0.6 and after["pearson"] > 0.9 and after["spearman"] > 0.85 and after["n"] == 60
    scores = torch.tensor([row.score for row in rows], dtype=torch.float64)
    assert model.score_mean == pytest.approx(float(scores.mean()))
    assert model.score_std == pytest.approx(float(scores.std(correction=0)))
    rewards = model.score_texts([row.prompt for row in rows], [row.answer for row in rows])
    errors = torch.tensor(rewards).double() * model.score_std + model.score_mean - scores
    assert float(errors.abs().mean()) < 5  # in the data's unit, where the scores' own deviation is 14


def test_correlation_ranks_ties_by_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(model, "score_texts", lambda *_: [1.0, 2.0, 2.0, 100.0])
    result = model.correlation([Scored("a :", " tea", score) for score in (1.0, 2.0, 3.0, 4.0)])
    assert result["spearman"] == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert result["pearson"] == pytest.approx(0.7798123297668083)  # scipy.stats.pearsonr


def test_training_leaves_random_states_alone_and_depends_on_its_seed_only() -> None:
    def train(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        model = make_model()
        random.seed(global_seed), np.random.seed(global_seed), torch.manual_seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
        model.train_pairs(make_pairs(32, seed=0), steps=2, batch_size=4, learning_rate=1e-2, seed=seed)
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.random.get_rng_state(), before[2])
        return model.state()

    first, again, other = train(0, 5), train(0, 6), train(1, 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_random_state_is_restored_after_an_exception() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError), preserve_random_state():
        torch.manual_seed(0)
        raise RuntimeError
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_writes_and_prints_nothing(tmp_path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, lines = make_model(), []
    quiet = MetricsCallback(lines.append, "refine", iteration=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train_pairs(make_pairs(4, seed=0), steps=1, batch_size=2, learning_rate=1e-2, seed=0, callbacks=[quiet])
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    shown = MetricsCallback(lines.append, "refine", iteration=2)
    with reporting(), task("refine 2"):
        model.train_scores(make_scored(4, seed=0), steps=1, batch_size=2, learning_rate=1e-2, seed=0, callbacks=[shown])
    out, err = capfd.readouterr()
    assert out == "" and "refine 2: 1/1 steps in " in err
    assert [(line["stage"], line["iteration"]) for line in lines] == [("refine", 2)] * 2


def test_lines_are_strict_json_numbers() -> None:
    lines: list[dict] = []
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    logs = {"loss": math.nan, "kl": 0.5, "note": "text", "flag": True, "total_flos": 1e9}
    MetricsCallback(lines.append, "policy", 1).on_log(None, state, None, logs=copy.copy(logs))
    assert lines[0] | {"time": 0} == {
        "time": 0, "stage": "policy", "iteration": 1, "step": 3, "loss": None, "kl_per_token": 0.5
    }  # fmt: skip
    json.dumps(lines[0], allow_nan=False)
    MetricsCallback(lines.append, "policy", 1).on_log(None, state, None, logs={"train_runtime": 1.0})
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Scored("a :", " tea", 1.0)] * 2, "at least two different scores"),
        ([Scored("a :", " tea", 1.0), Scored("a :", " cake", math.nan)], "got nan in row 1"),
    ],
)
def test_scores_that_cannot_be_learnt_from_are_refused(rows: list[Scored], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model().train_scores(rows, steps=1, batch_size=2, learning_rate=1e-3, seed=0)
