"""The kinds of noise, each by its definition: Gaussian, Rademacher, low rank, signs."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from tiny_updates import PARAMS, SHAPES, random_update
from zopro.zo import Gaussian, LowRank, Rademacher, Signs, Targeted, target_share
from zopro.zo.directions import noise_source


def test_gaussian_is_the_seeded_normal_of_its_hash() -> None:
    """The definition, so that a journal written today replays tomorrow."""
    digest = hashlib.blake2b(b"7/3/w", digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    expected = torch.randn(4, 6, generator=generator)
    assert torch.equal(Gaussian().tensor("w", torch.empty(4, 6), seed=7, step=3), expected)


def test_gaussian_and_rademacher_have_unit_covariance() -> None:
    like = torch.zeros(50_000)
    normal = Gaussian().tensor("w", like, 0, 0)
    signs = Rademacher().tensor("w", like, 0, 0)
    assert set(signs.unique().tolist()) == {-1.0, 1.0}
    for z in (normal, signs):
        assert abs(float(z.mean())) < 5 / math.sqrt(len(like))
        assert abs(float(z.square().mean()) - 1) < 5 * math.sqrt(2 / len(like))
    assert abs(float(normal.pow(4).mean()) - 3) < 5 * math.sqrt(96 / len(like))


@pytest.mark.parametrize("rank", [1, 3])
def test_low_rank_matrices_have_that_rank_and_unit_covariance(rank: int) -> None:
    like = torch.zeros(5, 2, 3)
    drawn = torch.stack([LowRank(rank).tensor("w", like, 0, step).flatten() for step in range(4000)])
    assert drawn.shape == (4000, 30)
    assert all(int(torch.linalg.matrix_rank(z.view(5, 6))) == rank for z in drawn[:20])
    covariance = drawn.T @ drawn / len(drawn)
    spread = math.sqrt((8 if rank == 1 else 4) / len(drawn))  # of a variance's estimate: fourth moment 3 + 6 / r, less 1
    assert float((covariance - torch.eye(30)).abs().max()) < 5 * spread
    vector = torch.zeros(50)
    assert torch.equal(LowRank().tensor("b", vector, 0, 0), Gaussian().tensor("b", vector, 0, 0))
    with pytest.raises(ValueError, match="rank: must be at least 1, got 0"):
        LowRank(0)


def test_signs_are_fair_coins_one_a_tensor_on_the_update_at_root_mean_square_one() -> None:
    update = random_update(1, 1e-4) | {"bias": torch.zeros(5)}
    directions = Signs(update)
    moving = [name for name in SHAPES if name != "bias"]
    drawn = [directions.sample(PARAMS, seed, step) for seed in range(20) for step in range(20)]
    ratios = torch.tensor([[float((z[name] / update[name]).mean()) for name in moving] for z in drawn])
    for column, name in enumerate(moving):
        size = float(update[name].square().mean().sqrt())
        assert torch.allclose(ratios[:, column].abs(), torch.tensor(1 / size), rtol=1e-4)
        assert all(torch.allclose(z[name] / update[name], ratios[i, column]) for i, z in enumerate(drawn[:5]))
    signs = ratios.sign()
    assert float(signs.mean(0).abs().max()) < 5 / math.sqrt(len(signs)), "a coin that is not fair"
    products = signs.T @ signs / len(signs) - torch.eye(len(moving))
    assert float(products.abs().max()) < 5 / math.sqrt(len(signs)), "coins that are not independent"
    assert all(torch.equal(z["bias"], Gaussian().tensor("bias", torch.zeros(5), seed, step)) for z, (seed, step) in
               zip(drawn, ((seed, step) for seed in range(20) for step in range(20)), strict=True))  # fmt: skip


def test_the_tensors_of_a_sublayer_share_their_coin() -> None:
    layers = ("q_proj.lora_A", "q_proj.lora_B", "o_proj.lora_A", "o_proj.lora_B")
    parts = [f"model.layers.{block}.{part}" for block in (2, 3, 12) for part in ("self_attn", "mlp")]
    update = {name: torch.ones(3, 4) for name in (*(f"{p}.{layer}" for p in parts for layer in layers), "head.w")}
    directions = Signs(update)
    drawn = [directions.sample(update.items(), 0, step) for step in range(64)]
    coins = {name: tuple(float(z[name][0, 0].sign()) for z in drawn) for name in update}
    for part in parts:
        assert len({coins[f"{part}.{layer}"] for layer in layers}) == 1, part
    assert len(set(coins.values())) == len(parts) + 1, "two sub-layers share their coin"


def test_noise_source_of_signs_without_an_update_is_gaussian() -> None:
    assert isinstance(noise_source("signs", {}), Gaussian)
    assert isinstance(noise_source("signs", random_update(1)), Signs)
    assert isinstance(noise_source("low_rank", random_update(1)), LowRank)
    with pytest.raises(ValueError, match="update: must be finite, got NaN or infinity in 'twin'"):
        noise_source("signs", {"twin": torch.full((4, 6), math.nan)})


@pytest.mark.parametrize("factor", [2.0, -0.1])
def test_signs_of_an_update_along_the_reward_s_leave_the_update_alone(factor: float) -> None:
    mu = random_update(1)
    directions = Targeted(
        mu, {name: factor * tensor for name, tensor in mu.items()}, 10, normalize=False, noise=Signs(mu)
    )
    for step in (0, 4, 9):
        z = directions.sample(PARAMS, 0, step)
        d = target_share(step, 10)
        assert all(torch.allclose(z[name], d * mu[name], atol=1e-6) for name in SHAPES)
