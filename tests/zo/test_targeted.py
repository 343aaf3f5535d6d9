"""Targeted directions: the equations of the paper as properties."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor, nn

from tiny_updates import PARAMS, SHAPES, random_update, same
from zopro.zo import SPSA, Directions, Gaussian, Signs, Targeted, target_share

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


def test_an_empty_tensor_has_an_empty_direction() -> None:
    params = [("full", torch.ones(3)), ("empty", torch.zeros(0, 4))]
    update = dict(params)
    for directions in (Targeted(update, update, 4), Signs(update)):
        assert directions.sample(params, 0, 1)["empty"].shape == (0, 4)


def test_what_an_update_lacks_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """As of experts, which transformers saves by other names than they have in memory."""
    params = [("a.weight", torch.zeros(3)), ("b.experts", torch.zeros(3, 3))]
    Targeted({"a.weight": torch.ones(3)}, {}, 4).check(params)
    said = "previous_update: lacks 1 of 2 tensors (75 % of what is trained), such as b.experts"
    assert said in caplog.text
    caplog.clear()
    Targeted({}, {}, 4).check(params)
    Targeted(dict(params), {}, 4).check(params)
    assert not caplog.text


def test_an_update_of_more_than_is_trained_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """Of a whole model, of which a part is frozen: its length would be that of all steps."""
    w, frozen = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)
    named, still = [("w", w), ("frozen", frozen)], {"w": torch.ones(2), "frozen": torch.zeros(2)}
    SPSA(named, directions=Targeted(still, {}, 10))
    assert not caplog.messages
    SPSA(named, directions=Targeted(still | {"frozen": torch.ones(2)}, {}, 10))
    assert caplog.text.count("previous_update: 1 of its tensors are not trained, such as frozen") == 1


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
        (lambda: Signs({"model.twin": ONES}), ["update", "layer.lora_A", "'model.twin'"]),
        (lambda: Signs({"twin": torch.ones(6)}), ["update", "'twin'", "(4, 6)", "(6,)"]),
    ],
)
def test_bad_updates_get_one_helpful_line(make: object, words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        make().sample(PARAMS, 0, 0)  # type: ignore[operator]
    message = str(error.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
