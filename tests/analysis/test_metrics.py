"""Every metric against a dense reference on small random trajectories."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from scipy.spatial import procrustes

from walks import MODULES, Walk, analysed, angles, cosines, defined_dcor, dense_walk, lora_walk
from zopro.analysis.numbers import chance, products
from zopro.analysis.numbers.shape import random_walks
from zopro.analysis.reading import streaming
from zopro.errors import InputError


@pytest.fixture(scope="module", autouse=True)
def _few_draws() -> Iterator[None]:
    """Intervals and chance levels, which are not looked at here, take most of an analysis."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chance, "DRAWS", chance.BATCH)
        yield


def expected(p: np.ndarray, r: np.ndarray) -> dict[str, Any]:
    """The metrics from dense trajectories [T, D]."""
    u, v = np.diff(p, axis=0), np.diff(r, axis=0)
    return {
        "update_angle_degrees": angles(u, v),
        "velocity_angle_degrees": [None, *angles(np.diff(u, axis=0), np.diff(v, axis=0))],
        "update_pearson": [np.corrcoef(a, b)[0, 1] for a, b in zip(u, v, strict=True)],
        "update_distance_correlation": [defined_dcor(a, b) for a, b in zip(u, v, strict=True)],
        "policy_momentum_cosine": [None, *cosines(u[1:], u[:-1])],
        "reward_momentum_cosine": [None, *cosines(v[1:], v[:-1])],
        "policy_extrapolation_error": [
            None,
            *(np.linalg.norm(2 * p[1:-1] - p[:-2] - p[2:], axis=1) / np.linalg.norm(u[1:], axis=1)),
        ],
        "policy_update_norm": np.linalg.norm(u, axis=1),
        "reward_update_norm": np.linalg.norm(v, axis=1),
        "procrustes_disparity": procrustes(p, r)[2],
    }


def assert_close(found: Any, wanted: Any) -> None:
    if not isinstance(found, list):
        assert found == pytest.approx(float(wanted), abs=1e-9)
        return
    assert [value is None for value in found] == [value is None for value in wanted]
    pairs = [(a, b) for a, b in zip(found, wanted, strict=True) if a is not None]
    np.testing.assert_allclose(*zip(*pairs, strict=True), rtol=1e-9, atol=1e-9)


@pytest.fixture(scope="module")
def walks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Walk, Walk]:
    folder = tmp_path_factory.mktemp("walks")
    head = {"base_model.model.score.weight": torch.ones(1, 10)}
    return lora_walk(folder / "policy", seed=1), lora_walk(folder / "reward", seed=2, extra=head)


@pytest.fixture(scope="module")
def numbers(walks: tuple[Walk, Walk]) -> dict[str, Any]:
    return analysed(*walks)


@pytest.mark.parametrize("view", ["factors", "product"])
def test_every_metric_equals_its_dense_reference(walks, numbers, view):
    wanted = expected(*(getattr(walk, view) for walk in walks))
    for name, values in wanted.items():
        assert_close(numbers["metrics"][name][view], values)
    assert numbers["dimension"][view] == getattr(walks[0], view).shape[1]
    assert numbers["left_out"] == {"reward": ["score.weight"]}


@pytest.mark.parametrize("view", ["factors", "product"])
def test_off_by_one_pairs_a_reward_update_with_the_next_policy_update(walks, numbers, view):
    p, r = (getattr(walk, view) for walk in walks)
    u, v = np.diff(p, axis=0), np.diff(r, axis=0)
    found = {name: values[view] for name, values in numbers["off_by_one"]["metrics"].items()}
    assert_close(found["update_angle_degrees"], [None, *angles(u[1:], v[:-1])])
    velocities = angles(np.diff(u, axis=0)[1:], np.diff(v, axis=0)[:-1])
    assert_close(found["velocity_angle_degrees"], [None, None, *velocities])
    assert_close(found["procrustes_disparity"], procrustes(p[1:], r[:-1])[2])


@pytest.mark.parametrize("pieces", [{"PIECE_BYTES": 600, "BLOCK_BYTES": 700, "BLOCK": 7}, {"PAIR_BYTES": 2000}])
def test_reading_in_pieces_changes_nothing(walks, numbers, pieces, monkeypatch):
    for name, value in pieces.items():
        monkeypatch.setattr(streaming if hasattr(streaming, name) else products, name, value)
    found = analysed(*walks)
    for name, views in numbers["metrics"].items():
        for view, values in views.items():
            assert_close(found["metrics"][name][view], values)


def test_layers_and_modules_are_metrics_of_their_own(walks, numbers):
    p, r = (walk.product.reshape(5, 3, 3, -1) for walk in walks)  # checkpoint, layer, module, coordinate
    u, v = np.diff(p, axis=0), np.diff(r, axis=0)
    by_layer = numbers["by_layer"]["product"]["update_angle_degrees"]
    assert list(by_layer) == ["layer 0", "layer 1", "layer 2"]
    for i, values in enumerate(by_layer.values()):
        assert_close(values, angles(u[:, i].reshape(4, -1), v[:, i].reshape(4, -1)))
    by_module = numbers["by_module"]["product"]["policy_momentum_cosine"]
    assert list(by_module) == ["down_proj", "q_proj", "up_proj"]
    mine = u[:, :, 1].reshape(4, -1)  # up_proj
    assert_close(by_module["up_proj"], [None, *cosines(mine[1:], mine[:-1])])


def test_whole_models_have_one_view(tmp_path):
    generator = np.random.default_rng(3)
    p, r = generator.normal(size=(2, 5, 60)).cumsum(1)
    found = analysed(dense_walk(tmp_path / "p", p), dense_walk(tmp_path / "r", r))
    assert found["views"] == ["product"]
    for name, values in expected(p, r).items():
        assert_close(found["metrics"][name]["product"], values)


@pytest.mark.parametrize("transposed", [False, True])
def test_a_whole_policy_against_a_lora_reward_model(tmp_path, transposed, monkeypatch):
    """fan_in_fan_out: the base model stores its weight as [in, out]."""
    import json

    from safetensors.torch import save_file

    reward = lora_walk(tmp_path / "reward", layers=1)
    generator = torch.Generator().manual_seed(1)
    names = [f"model.layers.0.{name}.weight" for name in ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")]
    rows = []
    for step in range(5):
        weights = torch.randn(3, 14, 10, generator=generator)
        place = tmp_path / "policy" / f"{step}"
        place.mkdir(parents=True)
        stored = weights.mT.contiguous() if transposed else weights
        save_file({n: w.clone() for n, w in zip(names, stored, strict=True)}, place / "model.safetensors")
        rows.append(weights.flatten().double())
    if transposed:
        for config in reward.folder.glob("*/adapter_config.json"):
            config.write_text(json.dumps({**json.loads(config.read_text()), "fan_in_fan_out": True}))
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1000)
    found = analysed(Walk(tmp_path / "policy", *2 * (torch.stack(rows).numpy(),)), reward)
    assert found["views"] == ["product"]
    wanted = expected(torch.stack(rows).numpy(), reward.product)
    for name, values in wanted.items():
        assert_close(found["metrics"][name]["product"], values)


def test_bfloat16_is_read_as_it_is(tmp_path):
    points = np.random.default_rng(0).normal(size=(2, 4, 30))
    p, r = (torch.from_numpy(x).bfloat16().double().numpy() for x in points)
    found = analysed(*(dense_walk(tmp_path / n, x, torch.bfloat16) for n, x in (("p", p), ("r", r))))
    assert_close(found["metrics"]["update_angle_degrees"]["product"], expected(p, r)["update_angle_degrees"])


def test_averaged_reward_models_are_taken_apart(tmp_path):
    generator = np.random.default_rng(5)
    p, r = generator.normal(size=(2, 5, 60)).cumsum(1)
    averaged = [r[0]]
    for point in r[1:]:
        averaged.append(0.3 * point + 0.7 * averaged[-1])
    walks = dense_walk(tmp_path / "p", p), dense_walk(tmp_path / "r", np.stack(averaged))
    found = analysed(*walks, reward_ema=0.3)
    for name, values in expected(p, r).items():
        assert_close(found["metrics"][name]["product"], values)


@pytest.mark.parametrize("rank", [3, 2])
def test_averaged_adapters_are_taken_apart_before_their_factors_are_multiplied(tmp_path, rank):
    """Of another rank than the policy's, so that there is the product alone, and of the same; whole and in pieces."""
    reward = lora_walk(tmp_path / "r", seed=2, ema=0.3, layers=2)
    policy = lora_walk(tmp_path / "p", seed=1, rank=rank, layers=2)
    views = ["factors", "product"] if rank == 3 else ["product"]
    wanted = {view: expected(*(getattr(walk, view) for walk in (policy, reward))) for view in views}
    for pieces in ({}, {"PIECE_BYTES": 600, "BLOCK_BYTES": 700, "BLOCK": 7}, {"PAIR_BYTES": 2000}):
        with pytest.MonkeyPatch.context() as patch:
            for name, value in pieces.items():
                patch.setattr(streaming if hasattr(streaming, name) else products, name, value)
            found = analysed(policy, reward, reward_ema=0.3)
        assert found["views"] == views
        for view in views:
            for name, values in wanted[view].items():
                assert_close(found["metrics"][name][view], values)


def test_averages_that_cannot_be_taken_apart_are_refused(tmp_path):
    adapters = lora_walk(tmp_path / "a", steps=1)
    whole = {name: torch.zeros(14, 10) for name in (f"model.layers.0.{module}.weight" for module in MODULES)}
    for step in range(2):
        (tmp_path / "w" / f"step{step}").mkdir(parents=True)
        save_file(whole, tmp_path / "w" / f"step{step}" / "model.safetensors")
    with pytest.raises(InputError, match="--reward-ema: must be 1 for adapters beside a policy of whole weights"):
        analysed(Walk(tmp_path / "w", *2 * (np.zeros(1),)), adapters, reward_ema=0.5)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 1000))
def test_random_walks_have_the_lengths_they_were_given(steps, dimension, seed):
    lengths = np.linspace(1, 2, steps)
    walks = random_walks(lengths, dimension, 4, np.random.default_rng(seed))
    assert walks.shape == (4, steps + 1, steps) and not walks[:, 0].any()
    np.testing.assert_allclose(np.linalg.norm(np.diff(walks, axis=1), axis=2), np.tile(lengths, (4, 1)))
    assert (np.linalg.matrix_rank(walks, tol=1e-8) <= dimension).all()


def test_large_analyses_multiply_float32_files_in_float32(tmp_path, monkeypatch):
    from zopro.analysis.numbers import gram

    generator = np.random.default_rng(3)
    p, r = (1 + 1e-3 * generator.normal(size=(2, 5, 4000)).cumsum(1)).astype(np.float32)
    sides = [dense_walk(tmp_path / name, x, torch.float32) for name, x in (("p", p), ("r", r))]
    exact = analysed(*sides)
    monkeypatch.setattr(gram, "FLOAT64_WORK", 0)
    monkeypatch.setattr(streaming, "BLOCK_BYTES", 10_000)
    found = analysed(*sides)
    for name, views in exact["metrics"].items():
        mine, wanted = (np.array(values["product"], float) for values in (found["metrics"][name], views))
        np.testing.assert_allclose(mine, wanted, rtol=1e-5, atol=1e-6)
    assert found["metrics"]["update_angle_degrees"] != exact["metrics"]["update_angle_degrees"], "float64 was used"
