"""Directions: one table for what every kind must hold, then the paper's targeted ones as properties.

A new kind of direction is a new row of `KINDS`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from zopro.zo import Directions, Gaussian, LowRank, Rademacher, Signs, Targeted, target_share
from zopro.zo.directions import noise_source

SHAPES = {"layer.lora_A.weight": (4, 6), "layer.lora_B.weight": (6, 4), "twin": (4, 6), "bias": (5,), "gate": (1,)}
PARAMS = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]


def random_update(seed: int, scale: float = 1.0, names: tuple[str, ...] = tuple(SHAPES)) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(SHAPES[name], generator=generator) for name in names}


def targeted(**options: object) -> Targeted:
    # A one-element tensor has no noise orthogonal to its reward update: see `test_one_element_tensors`.
    reward_update = random_update(2, names=("layer.lora_A.weight", "layer.lora_B.weight", "twin", "bias"))
    return Targeted(random_update(1, 0.01), reward_update, **{"total_steps": 10, **options})  # type: ignore[arg-type]


KINDS = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "low rank": LowRank,
    "targeted": targeted,
    "targeted, low-rank noise": lambda: targeted(noise=LowRank(1)),
    "targeted, exponential": lambda: targeted(decay="exponential"),
    "targeted, the paper's scale": lambda: targeted(normalize=False),
    "targeted, no previous update": lambda: Targeted({}, random_update(2, names=("twin", "bias")), total_steps=10),
    "targeted, no reward update": lambda: Targeted(random_update(1), {}, total_steps=10),
}
COINS = {
    "signs": lambda: Signs(random_update(1)),
    "targeted, signs": lambda: targeted(noise=Signs(random_update(1, 0.01))),
}  # one coin a sub-layer, which may well fall alike twice


@pytest.fixture(params=[*KINDS.values(), *COINS.values()], ids=[*KINDS, *COINS])
def directions(request: pytest.FixtureRequest) -> Directions:
    return request.param()


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_z_has_the_parameters_names_shapes_and_single_precision(directions: Directions) -> None:
    bf16 = [(name, tensor.bfloat16()) for name, tensor in PARAMS]
    z = directions.sample(bf16, seed=0, step=3)
    assert {name: tuple(tensor.shape) for name, tensor in z.items()} == SHAPES
    assert all(tensor.dtype == torch.float32 and torch.isfinite(tensor).all() for tensor in z.values())
    assert same(z, directions.sample(PARAMS, seed=0, step=3))


def test_same_arguments_give_the_same_z_whatever_the_global_state_and_the_order(directions: Directions) -> None:
    state = torch.get_rng_state()
    z = directions.sample(PARAMS, seed=5, step=2)
    assert torch.equal(torch.get_rng_state(), state), "the global random state must not move"
    torch.rand(7)
    directions.sample(PARAMS, seed=9, step=9)
    assert same(z, directions.sample(reversed(PARAMS), seed=5, step=2))
    for name, tensor in PARAMS:
        assert torch.equal(directions.tensor(name, tensor, 5, 2), z[name])


def test_each_draw_is_a_tensor_of_its_own(directions: Directions) -> None:
    first = directions.sample(PARAMS, seed=5, step=2)
    for tensor in first.values():
        tensor.mul_(3)
    second = directions.sample(PARAMS, seed=5, step=2)
    assert all(torch.equal(first[name], 3 * second[name]) for name in first)


@pytest.mark.parametrize("directions", [kind() for kind in KINDS.values()], ids=KINDS)
def test_seeds_and_steps_give_different_z(directions: Directions) -> None:
    z = [directions.sample(PARAMS, seed, step) for seed, step in ((0, 4), (1, 4), (0, 5))]
    for other in z[1:]:
        assert not torch.equal(z[0]["layer.lora_A.weight"], other["layer.lora_A.weight"])


def test_tensors_of_equal_shape_do_not_share_noise(directions: Directions) -> None:
    z = directions.sample(PARAMS, seed=0, step=9)  # the last step: noise alone for linear decay
    a, b = z["layer.lora_A.weight"].flatten(), z["twin"].flatten()
    transposed = z["layer.lora_B.weight"].T.flatten()
    for other in (b, transposed):
        assert abs(float(torch.corrcoef(torch.stack([a, other]))[0, 1])) < 0.8


def test_every_tensor_moves_at_every_step(directions: Directions) -> None:
    for step in range(10):
        z = directions.sample(PARAMS, seed=0, step=step)
        assert all(float(tensor.norm()) > 0 for tensor in z.values())


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


# Targeted: the equations of the paper as properties.

values = st.floats(-10, 10, width=32).filter(lambda x: x == 0 or abs(x) > 1e-3)
scales = st.sampled_from([1e-20, 1e-4, 1.0, 1e15])


@st.composite
def updates(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, int]:
    """(mu, v, seed, step, total_steps) of one tensor with at least two elements."""
    shape = draw(st.sampled_from([(2,), (7,), (3, 4), (40, 20)]))
    mu, v = (torch.from_numpy(draw(arrays.arrays("float32", shape, elements=values)) * draw(scales)) for _ in "mv")
    total = draw(st.integers(1, 50))
    return mu.float(), v.float(), draw(st.integers(0, 2**31)), draw(st.integers(0, total - 1)), total


NOISY: dict[str, Callable[[Tensor], Directions]] = {
    "gaussian": lambda mu: Gaussian(),
    "signs": lambda mu: Signs({"w": mu}),
}


def noise_of(z: Tensor, mu: Tensor, d: float) -> Tensor:
    return (z.double() - d * mu.double()) / math.sqrt(1 - d * d)


@pytest.mark.parametrize("kind", NOISY)
@settings(max_examples=150, deadline=None)
@given(case=updates())
def test_noise_is_orthogonal_to_v_and_as_long_as_mu(kind: str, case: tuple[Tensor, Tensor, int, int, int]) -> None:
    mu, v, seed, step, total = case
    assume(kind == "gaussian" or angle(mu, v) > 1e-5)  # signs of parallel updates: the test below
    z = Targeted({"w": mu}, {"w": v}, total, normalize=False, noise=NOISY[kind](mu)).tensor("w", mu, seed, step)
    assert torch.isfinite(z).all()
    d = target_share(step, total, "linear")
    noise = noise_of(z, mu, d) if float(mu.abs().max()) > 0 else z.double()
    rounding = 1e-6 * (float(z.double().norm()) + float(mu.double().norm())) / math.sqrt(1 - d * d)
    if float(mu.abs().max()) > 0:
        assert float(noise.norm()) == pytest.approx(float(mu.double().norm()), rel=1e-4, abs=2 * rounding)
    if float(v.abs().max()) > 0:
        along = float((noise * v.double()).sum() / v.double().norm())
        assert abs(along) <= 1e-6 * float(noise.norm()) + rounding


def angle(mu: Tensor, v: Tensor) -> float:
    """Sine of the angle between two tensors' lines; 1 where one is zero."""
    a, b = (x.double() / x.double().abs().max() if float(x.abs().max()) > 0 else x.double() for x in (mu, v))
    if not (float(a.norm()) > 0 and float(b.norm()) > 0):
        return 1.0
    b = b / b.norm()
    return float((a - (a * b).sum() * b).norm() / a.norm())


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


@settings(max_examples=60, deadline=None)
@given(updates())
def test_normalised_directions_have_root_mean_square_one(case: tuple[Tensor, Tensor, int, int, int]) -> None:
    """Exactly at both ends; between them z is a little longer or shorter, as the noise leans towards mu or away."""
    mu, v, seed, _, total = case
    total = max(2, total)
    directions = Targeted({"w": mu}, {"w": v}, total)
    for step in (0, total - 1):
        z = directions.tensor("w", mu, seed, step)
        if float(mu.abs().max()) > 0:
            assert float(z.double().square().mean().sqrt()) == pytest.approx(1, rel=0.05)
    paper = Targeted({"w": mu}, {"w": v}, total, normalize=False)
    for step in range(total):
        a, b = directions.tensor("w", mu, seed, step).double(), paper.tensor("w", mu, seed, step).double()
        assert torch.allclose(a / a.norm(), b / b.norm(), atol=1e-5), "normalising must change the length only"


@given(st.integers(2, 500), st.sampled_from(["linear", "exponential"]))
def test_share_starts_high_falls_and_stays_in_range(total: int, decay: str) -> None:
    shares = [target_share(step, total, decay) for step in range(total + 3)]
    assert shares[0] == 1 - 1e-3
    assert all(later <= earlier for earlier, later in pairwise(shares))
    assert min(shares) >= 0
    assert shares[total - 1] == pytest.approx(0 if decay == "linear" else 1e-3)
    assert shares[total:] == [shares[total - 1]] * 3, "past the end it must stay, never turn negative"


def test_both_decays_depend_on_the_number_of_steps() -> None:
    for decay in ("linear", "exponential"):
        assert target_share(5, 10, decay) < target_share(5, 100, decay)
        middle = target_share(50, 101, decay)
        assert middle == pytest.approx(0.999 / 2 if decay == "linear" else math.sqrt(0.999 * 1e-3))


def test_first_step_follows_mu_and_last_step_is_noise() -> None:
    mu, directions = random_update(1)["twin"], Targeted({"twin": random_update(1)["twin"]}, {}, 10)
    cosines = [
        float(torch.cosine_similarity(directions.tensor("twin", mu, 0, step).flatten(), mu.flatten(), dim=0))
        for step in range(10)
    ]
    assert cosines[0] > 0.99
    assert abs(cosines[-1]) < 0.6


def test_v_of_zero_leaves_the_noise_as_it_is() -> None:
    mu = random_update(1)
    zero = {name: torch.zeros_like(tensor) for name, tensor in mu.items()}
    assert same(Targeted(mu, zero, 4).sample(PARAMS, 0, 2), Targeted(mu, {}, 4).sample(PARAMS, 0, 2))


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("missing", [True, False])
def test_tensor_without_previous_update_moves_at_the_mean_scale(normalize: bool, missing: bool) -> None:
    mu = random_update(1, 0.01) | {"twin": torch.zeros(4, 6)}
    sizes = [float(mu[name].square().mean().sqrt()) for name in SHAPES if name != "twin"]
    if missing:
        del mu["twin"]
    directions = Targeted(mu, random_update(2), 10, normalize=normalize)
    whole = torch.cat([mu[name].flatten() for name in SHAPES if name != "twin"])
    expected = sum(sizes) / len(sizes) / (float(whole.square().mean().sqrt()) if normalize else 1)
    for step in (0, 5, 9):
        z = directions.tensor("twin", torch.zeros(4, 6), 0, step)
        assert float(z.square().mean().sqrt()) == pytest.approx(expected, rel=1e-4)
        v = random_update(2)["twin"]
        assert abs(float(torch.cosine_similarity(z.flatten(), v.flatten(), dim=0))) < 1e-6


def test_all_previous_updates_zero_is_plain_gaussian() -> None:
    zero = {name: torch.zeros(shape) for name, shape in SHAPES.items()}
    for update in (zero, {}):
        assert same(Targeted(update, {}, 4).sample(PARAMS, 3, 1), Gaussian().sample(PARAMS, 3, 1))


def test_one_element_tensors() -> None:
    gate = torch.zeros(1)
    free = Targeted({"gate": torch.tensor([0.3])}, {}, 10, normalize=False).tensor("gate", gate, 0, 9)
    assert float(free.abs()) == pytest.approx(0.3)
    bound = Targeted({"gate": torch.tensor([0.3])}, {"gate": torch.tensor([2.0])}, 10, normalize=False)
    assert float(bound.tensor("gate", gate, 0, 0)) == pytest.approx(0.999 * 0.3)
    assert float(bound.tensor("gate", gate, 0, 9)) == 0, "no noise is orthogonal to v in one dimension"


def test_updates_may_be_bf16_and_hold_names_that_the_policy_lacks() -> None:
    mu = {name: tensor.bfloat16() for name, tensor in random_update(1).items()}
    z = Targeted(mu, random_update(2) | {"score.weight": torch.ones(3)}, 10).sample(PARAMS, 0, 5)
    assert all(tensor.dtype == torch.float32 for tensor in z.values())


NAN, ONES = torch.full((4, 6), torch.nan), torch.ones(4, 6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Targeted({}, {}, 0), ["total_steps", "at least 1", "got 0"]),
        (lambda: Targeted({}, {}, 5, decay="cosine"), ["decay", "linear", "'cosine'"]),
        (lambda: Targeted({"twin": NAN}, {}, 5), ["previous_update", "finite", "'twin'"]),
        (lambda: Targeted({}, {"twin": NAN}, 5), ["reward_update", "finite", "'twin'"]),
        (lambda: Targeted({"twin": torch.ones(6)}, {}, 5), ["previous_update", "'twin'", "(4, 6)", "(6,)"]),
        (lambda: Targeted({}, {"bias": torch.ones(4, 5)}, 5), ["reward_update", "'bias'", "(5,)", "(4, 5)"]),
        (lambda: Targeted({"model.twin": ONES}, {}, 5), ["previous_update", "layer.lora_A", "'model.twin'"]),
        (lambda: Targeted({}, {"model.twin": ONES}, 5), ["reward_update", "layer.lora_A", "'model.twin'"]),
    ],
)
def test_bad_updates_get_one_helpful_line(make: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make().sample(PARAMS, 0, 0)  # type: ignore[operator]
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
