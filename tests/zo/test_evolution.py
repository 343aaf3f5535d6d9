"""The strategy of a population: what it asks, what it makes of rewards, and how sigma follows them."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

from zopro import reference
from zopro.choices import SHAPINGS
from zopro.zo import ES, ESStrategy, Gaussian, LowRank, Rademacher, Strategy, Weights
from zopro.zo.shaping import centred_rank, shape, spread, z_score
from zopro.zo.sigma import FARTHEST, FIRST

some = st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 3)), min_size=2, max_size=12)


@given(some)
def test_shaped_rewards_are_scipy_s(rewards: list[float]) -> None:
    ranks = [(rank - 1) / (len(rewards) - 1) - 0.5 for rank in stats.rankdata(rewards)]
    assert centred_rank(rewards) == pytest.approx(ranks)
    if len(set(rewards)) > 1:
        assert z_score(rewards) == pytest.approx(stats.zscore(rewards).tolist(), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("name", SHAPINGS)
@given(some)
def test_better_members_weigh_more_and_the_sum_is_nought(name: str, rewards: list[float]) -> None:
    shaped = shape(rewards, name)
    assert sum(shaped) == pytest.approx(0, abs=1e-6)
    assert all(
        f <= g for f, a in zip(shaped, rewards, strict=True) for g, b in zip(shaped, rewards, strict=True) if a < b
    )


def test_the_spread_is_the_two_way_layout_s() -> None:
    rows = torch.randn(5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    between, noise = spread(rows.tolist())
    rest = rows - rows.mean(1, keepdim=True) - rows.mean(0) + rows.mean()
    unit = 2.0 ** math.frexp(float(rows.abs().max()))[1]
    assert between == pytest.approx(float(7 * rows.mean(1).var()) / unit**2)
    assert noise == pytest.approx(float(rest.square().sum()) / 24 / unit**2)
    other, same = spread((rows + 100 * torch.arange(7)).tolist())
    assert other / same == pytest.approx(between / noise), "hard prompts cancel"
    assert all(map(math.isnan, spread([[1.0], [2.0]])))


def told(strategy: Strategy, rewards: Any, step: int = 0) -> Any:
    strategy.ask(step)
    return strategy.tell(rewards)


def test_members_are_asked_in_pairs_or_one_sided() -> None:
    pairs = ESStrategy(population=4, sigma=0.5, seed=3).ask(7)
    assert [(m.query, m.t, m.step, m.seed, m.eps) for m in pairs] == [
        (0, 1.0, 7, 3, (0.5,)), (0, -1.0, 7, 3, (0.5,)), (1, 1.0, 7, 3, (0.5,)), (1, -1.0, 7, 3, (0.5,))
    ]  # fmt: skip
    assert [(m.query, m.t) for m in ESStrategy(population=3, antithetic=False).ask(0)] == [(0, 1.0), (1, 1.0), (2, 1.0)]


named = {"w": torch.zeros(3, 4), "b": torch.zeros(4)}


@given(
    st.integers(0, 2**31),
    st.integers(1, 5),
    st.floats(1e-3, 1.0),
    st.sampled_from([Gaussian(), Rademacher(), LowRank(1)]),
)
def test_a_step_is_the_reference_s(seed: int, pairs: int, sigma: float, directions: Any) -> None:
    theta = {name: tensor.add(0.3) for name, tensor in named.items()}

    def reward(at: dict[str, Tensor]) -> float:
        return float(at["w"].sin().sum() - at["b"].double().square().sum())

    strategy = ESStrategy(lr=0.1, sigma=sigma, population=2 * pairs, seed=seed)
    weights = Weights.of(theta.items(), directions)
    members = strategy.ask(2)
    z = [directions.sample(theta.items(), member.direction_seed, 2) for member in members[::2]]
    _, expected = reference.evolution(theta, reward, z, sigma, 0.1)
    weights.apply(strategy.tell([reward(weights.at(member)) for member in members]))
    for name, tensor in weights.at(members[0]).items():
        assert tensor.shape == expected[name].shape
        assert torch.allclose(theta[name], expected[name], rtol=1e-3, atol=1e-4 / sigma)


@pytest.mark.parametrize("name", SHAPINGS)
@pytest.mark.parametrize("antithetic", [True, False])
def test_members_that_do_not_differ_take_no_step(name: str, antithetic: bool) -> None:
    strategy = ESStrategy(population=4, shaping=name, antithetic=antithetic, momentum=0.9, anchor=0.1)
    record = told(strategy, [[0.1, 0.7]] * 4)
    assert record.skipped and record.coefficients == [0.0] * len(record.coefficients)
    assert strategy.skipped_steps == 1 and record.loss == pytest.approx(-0.4)
    assert not told(strategy, [1.0, 2.0, 3.0, 5.0]).skipped


def test_rewards_may_be_numbers_of_any_kind() -> None:
    numbers = [0.5, 2.0]
    expected = repr(told(ESStrategy(population=2), numbers))
    arrays = torch.tensor(numbers), np.array(numbers, np.float32), [*torch.tensor(numbers)], [*np.float32(numbers)]
    for rewards in (*arrays, [[0.5], [2.0]], (torch.tensor([0.5]), torch.tensor([2.0]))):
        assert repr(told(ESStrategy(population=2), rewards)) == expected


def test_pairs_that_do_not_differ_take_no_step() -> None:
    assert told(ESStrategy(population=4), [1.0, 1.0, 2.0, 2.0]).skipped, "what is even in a direction is no slope"


def test_a_prompt_without_a_reward_counts_for_no_member() -> None:
    rewards = [[0.0, 1.0, 5.0], [1.0, math.nan, 2.0], [0.5, 1.0, 2.0], [0.1, 0.2, 3.0]]
    left = [[row[0], row[2]] for row in rewards]
    assert repr(told(ESStrategy(population=4), rewards)) == repr(told(ESStrategy(population=4), left))
    assert told(ESStrategy(population=2), [math.inf, 1.0]).skipped


def test_normalised_steps_have_the_learning_rate_s_length() -> None:
    for population, sigma in ((4, 0.1), (40, 1e-3)):
        theta = torch.zeros(100, 100)
        weights = Weights.of([("w", theta)], Gaussian())
        strategy = ESStrategy(lr=0.01, sigma=sigma, population=population, normalize=True)
        weights.apply(told(strategy, torch.randn(population, generator=torch.Generator().manual_seed(0))))
        assert float(theta.square().mean().sqrt()) == pytest.approx(0.01, rel=0.05)


# sigma


def settled(signal: float, noise: float, steps: int = 60, prompts: int = 8) -> float:
    """sigma after steps of members whose rewards have a slope and a noise, and a prompt's own part."""
    draw = torch.Generator().manual_seed(1)
    strategy = ESStrategy(sigma="auto", population=16)
    for step in range(steps):
        eps = strategy.ask(step)[0].eps[0]
        slopes = torch.randn(8, 1, generator=draw).repeat_interleave(2, 0) * torch.tensor([1.0, -1.0]).repeat(8)[:, None]
        cells = signal * eps * slopes + noise * torch.randn(16, prompts, generator=draw) + 9 * torch.arange(prompts)
        strategy.tell(cells)
    return strategy.ask(steps)[0].eps[0]


def test_sigma_goes_where_members_can_be_told_apart() -> None:
    assert settled(0.0, 1.0) > 10 * FIRST, "noise alone"
    assert settled(1e6, 1.0) < FIRST / 10, "far above the noise"
    # between / noise is 4 where 8 (signal sigma)^2 = 3 noise^2
    assert settled(20.0, 1.0) == pytest.approx(math.sqrt(3 / 8) / 20, rel=0.3)


def test_sigma_has_its_limits_and_stays_where_nothing_is_known() -> None:
    assert settled(0.0, 1.0, steps=200) == pytest.approx(FARTHEST * FIRST)
    assert settled(1e9, 1.0, steps=200) == pytest.approx(FIRST / FARTHEST)
    strategy = ESStrategy(sigma="auto", population=2)
    told(strategy, [[0.0, 0.0], [0.0, 0.0]])
    assert strategy.ask(1)[0].eps == (FIRST,), "no member scores"
    told(strategy, [[0.0, 1.0], [0.0, 1.0]])
    assert strategy.ask(2)[0].eps[0] > FIRST, "members that answer alike"
    assert told(strategy, [[0.0, 2.0], [1.0, 0.0]], 2).eps[0] > FIRST, "a record has the sigma that its members had"
    assert ES([torch.zeros(2)], sigma="auto", sigma_guess=0.3).ask()[0].eps == (0.3,)


def test_a_strategy_goes_on_from_its_state() -> None:
    draw = torch.Generator().manual_seed(0)
    rewards = [torch.randn(4, 3, generator=draw) for _ in range(4)]
    options: dict[str, Any] = {"population": 4, "sigma": "auto", "momentum": 0.5}
    whole, again = ESStrategy(**options), ESStrategy(**options, seed=9)
    for step in (0, 1):
        told(whole, rewards[step], step)
    again.load(whole.state())
    for step in (2, 3):
        assert repr(told(whole, rewards[step], step)) == repr(told(again, rewards[step], step))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"population": 3}, r"population: must be an even number of at least 2 \(members come in pairs\), got 3"),
        ({"population": 0}, "population: must be an even number of at least 2"),
        ({"population": 1, "antithetic": False}, "population: must be at least 2, got 1"),
        ({"sigma": 0}, "sigma: must be a number greater than 0 or 'auto', got 0"),
        ({"sigma": "wide"}, "sigma: must be a number greater than 0 or 'auto', got 'wide'"),
        ({"sigma": math.inf}, "sigma: must be a number greater than 0 or 'auto', got inf"),
        ({"sigma": "auto", "sigma_guess": 0.0}, "sigma_guess: must be None, or finite and above 0, got 0.0"),
        ({"shaping": "rank"}, "shaping: must be one of z_score, centred_rank, got 'rank'"),
        ({"momentum": 1.0}, r"momentum: must lie in \[0, 1\), got 1.0"),
        ({"second_moment": -0.1}, r"second_moment: must lie in \[0, 1\), got -0.1"),
        ({"anchor": math.nan}, r"anchor: must lie in \[0, 1\), got nan"),
    ],
)
def test_arguments_out_of_range_are_refused(options: dict[str, Any], said: str) -> None:
    for make in (ESStrategy, partial(ES, [torch.zeros(2)])):
        with pytest.raises(ValueError, match=said):
            make(**options)


@pytest.mark.parametrize(
    ("rewards", "said"),
    [
        ([1.0], r"rewards: must be one for each of 2 members, .* got 1 of lengths \[1\]"),
        ([[1.0, 2.0], [1.0]], r"got 2 of lengths \[1, 2\]"),
        ([[], []], r"got 2 of lengths \[0\]"),
    ],
)
def test_rewards_must_fit_the_population(rewards: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        told(ESStrategy(population=2), rewards)


def test_a_reward_that_is_none_is_one_that_is_missing() -> None:
    given = [[1.0, None], [2.0, 5.0]]
    records = [told(ESStrategy(population=2), rows) for rows in (given, [[1.0, math.nan], [2.0, 5.0]])]
    assert repr(records[0]) == repr(records[1])
    assert told(ESStrategy(population=2), [None, 1.0]).skipped
    rewards = iter(given)
    es = ES([torch.zeros(2)], population=2)
    assert es.step(lambda: next(rewards)) == 1.5
    with pytest.raises(ValueError, match=r"evaluate: must return a reward, or a list .*, got None"):
        es.step(lambda: None)


def test_sigma_auto_needs_rewards_of_prompts() -> None:
    with pytest.raises(ValueError, match="sigma: 'auto' must be told the rewards of at least 2 prompts"):
        told(ESStrategy(population=2, sigma="auto"), [1.0, 2.0])
