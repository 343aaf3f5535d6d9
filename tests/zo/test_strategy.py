"""Displacements out, numbers in, a record applied: a strategy drives an engine that knows no torch optimiser."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from zopro import reference
from zopro.zo import SPSA, Directions, Displacement, Gaussian, SPSAStrategy, StepRecord, Strategy, Targeted, Weights

Tensors = dict[str, Tensor]
GOAL = {"w": torch.arange(12.0).view(3, 4).sin(), "b": torch.arange(4.0).cos()}


def start() -> Tensors:
    return {name: torch.full_like(goal, 0.1) for name, goal in GOAL.items()}


def loss(theta: Tensors) -> float:
    return float(sum((theta[name] - goal).square().sum() + theta[name].sum().sin() for name, goal in GOAL.items()))


class ToyEngine:
    """Holds two tensors, answers with numbers, and notes what it is asked in a call. It displaces copies, as a server."""

    def __init__(self, directions: Directions) -> None:
        self.theta = start()
        self.weights = Weights.of(self.theta.items(), directions)
        self.calls: list[list[Displacement]] = []

    def losses(self, at: Sequence[Displacement]) -> list[float]:
        self.calls.append(list(at))
        return [loss(self.weights.at(displacement)) for displacement in at]

    def apply(self, record: StepRecord) -> None:
        self.weights.apply(StepRecord(**json.loads(json.dumps(asdict(record)))))  # as it comes over a wire


def drive(strategy: Strategy, engine: ToyEngine, steps: int) -> list[StepRecord]:
    records = []
    for step in range(steps):
        at = strategy.ask(step)
        records.append(strategy.tell(engine.losses(at)))
        engine.apply(records[-1])
    return records


def targeted() -> Directions:
    draw = torch.Generator().manual_seed(1)
    mu, v = ({name: torch.randn(goal.shape, generator=draw) for name, goal in GOAL.items()} for _ in range(2))
    return Targeted(mu, v, 5)


@pytest.mark.parametrize("directions", [Gaussian, targeted])
@pytest.mark.parametrize(
    "options", [{}, {"sides": 1, "queries": 3}, {"queries": 2, "weight_decay": 0.1}, {"second_moment_beta": 0.9}]
)
def test_a_step_is_the_optimiser_s_to_the_bit(options: dict[str, Any], directions: Callable[[], Directions]) -> None:
    common = {"lr": 1e-2, "eps": 1e-2, "seed": 4, **options}
    engine, theta = ToyEngine(directions()), start()
    records = drive(SPSAStrategy(**common), engine, 5)
    opt = SPSA(theta.items(), directions=directions(), **common)
    for record in records:
        opt.step(lambda: loss(theta))
        assert repr(opt.last) == repr(record)
    assert all(torch.equal(engine.theta[name], theta[name]) for name in GOAL)
    queries, sides = options.get("queries", 1), options.get("sides", 2)
    assert [len(call) for call in engine.calls] == [2 * queries if sides == 2 else queries + 1] * 5, "one call a step"


def test_a_step_is_the_reference_s() -> None:
    engine, theta = ToyEngine(Gaussian()), start()
    for step, record in enumerate(drive(SPSAStrategy(lr=1e-2, eps=1e-2, weight_decay=0.1, seed=4), engine, 4)):
        z = Gaussian().sample([*theta.items()], seed=4, step=step)
        g, theta = reference.spsa(theta, loss, z, eps=1e-2, eta=1e-2, decay=0.1)
        assert record.projected_gradient == pytest.approx(g, rel=1e-3)
    assert all(torch.allclose(engine.theta[name], theta[name], atol=1e-4) for name in GOAL)


def test_eps_is_calibrated_as_the_optimiser_does() -> None:
    engine, theta = ToyEngine(Gaussian()), start()
    strategy = SPSAStrategy(lr=1e-2, eps="auto", seed=4)
    assert strategy.ask(0) == [] and not strategy.calibrated
    strategy.calibrate(0, engine.losses, engine.weights.scale)
    assert strategy.calibrated and 1e-7 < strategy.groups[0]["eps"] < 0.1
    opt = SPSA(theta.items(), lr=1e-2, eps="auto", seed=4)
    opt.step(lambda: loss(theta))
    assert repr(drive(strategy, engine, 1)[0]) == repr(opt.last) and opt.last.signal_to_noise > 3
    asked = len(engine.calls)
    strategy.calibrate(1, engine.losses, engine.weights.scale)
    assert len(engine.calls) == asked, "once a run"


def test_a_strategy_goes_on_from_its_state() -> None:
    options: dict[str, Any] = {"lr": 1e-2, "eps": 1e-2, "second_moment_beta": 0.9}
    engine, whole = ToyEngine(Gaussian()), SPSAStrategy(**options, seed=4)
    drive(whole, engine, 2)
    again = SPSAStrategy(**options, seed=9)
    again.load(whole.state())
    values = [0.3, 0.1]
    assert whole.ask(2) == again.ask(2)
    assert repr(whole.tell(values)) == repr(again.tell(values))


def test_a_known_loss_is_not_asked_for_once_it_was_right() -> None:
    strategy = SPSAStrategy(eps=0.1, sides=1, queries=2)
    assert [d.t for d in strategy.ask(0, loss_at_theta=1.0)] == [0.0, 1.0, 1.0]
    strategy.tell([1.0, 1.5, 0.5])
    assert [d.t for d in strategy.ask(1, loss_at_theta=2.0)] == [1.0, 1.0]
    assert strategy.tell([2.5, 1.0]).projected_gradients == pytest.approx([5.0, -10.0])
    assert len(strategy.ask(2)) == 3, "where it is not known"


@pytest.mark.parametrize("first", [[0.02, 0.02, 0.02], [0.02, math.nan, 0.1]])
def test_a_first_batch_without_slopes_says_nothing_of_a_known_loss(first: list[float]) -> None:
    """All rewards may be 0 at first: that no loss moves does not show that the known one is right."""
    strategy = SPSAStrategy(eps=1e-3, sides=1, queries=2)
    strategy.ask(0, loss_at_theta=0.0)
    strategy.tell(first)
    assert len(strategy.ask(1, loss_at_theta=0.0)) == 3, "it is looked at again"
    assert strategy.tell([0.02, 0.0215, 0.0195]).projected_gradients == pytest.approx([1.5, -0.5])
    assert len(strategy.ask(2, loss_at_theta=0.0)) == 3, "it was wrong"


def test_estimates_without_any_weight_are_no_step() -> None:
    strategy = SPSAStrategy(eps=0.1)
    strategy.ask(0)
    strategy.accumulate(strategy.estimate([1.0, 0.5]), weight=0.0)
    assert strategy.conclude(0).projected_gradients == [0.0]


def test_values_must_be_one_for_each_displacement() -> None:
    strategy = SPSAStrategy(queries=2)
    with pytest.raises(ValueError, match="values: must be one for each of 0 displacements, got 1"):
        strategy.tell([1.0])
    strategy.ask(0)
    with pytest.raises(ValueError, match=r"values: must be one for each of 4 displacements, got 3"):
        strategy.tell([1.0, 2.0, 3.0])


def test_a_loss_that_is_not_finite_skips_the_step() -> None:
    engine, before = ToyEngine(Gaussian()), start()
    strategy = SPSAStrategy(weight_decay=0.1)
    strategy.ask(0)
    record = strategy.tell([math.nan, 1.0])
    engine.apply(record)
    assert record.skipped and strategy.skipped_steps == 1
    assert all(torch.equal(engine.theta[name], before[name]) for name in GOAL)


@dataclass
class Population:
    """The simplest evolution strategy: mirrored members, the difference of rewards pulls."""

    members: int
    lr: float
    eps: float
    step: int = 0

    def ask(self, step: int) -> list[Displacement]:
        self.step = step
        plus = [Displacement(0, query, step, 1.0, (self.eps,)) for query in range(self.members // 2)]
        return [member for one in plus for member in (one, one.mirrored)]

    def tell(self, values: Sequence[float]) -> StepRecord:
        sides = zip(values[::2], values[1::2], strict=True)
        pulls = [(minus - plus) / (self.members * self.eps) for plus, minus in sides]
        loss = -sum(values) / len(values)
        return StepRecord(self.step, 0, pulls, pulls, [self.lr], [self.eps], [0.0], loss, math.nan, False)


def test_a_population_of_rewards_needs_nothing_else() -> None:
    engine = ToyEngine(Gaussian())
    engine.losses = lambda at: [-loss(engine.weights.at(d)) for d in at]  # type: ignore[method-assign]
    before = loss(engine.theta)
    drive(Population(16, lr=0.03, eps=0.05), engine, 40)
    assert loss(engine.theta) < before - 3


def test_a_displaced_policy_is_read_as_it_would_be_published() -> None:
    """In place and virtually, in half precision too, with an eps for each group."""
    for dtype in (torch.float32, torch.bfloat16):
        module = nn.Linear(4, 3).to(dtype)
        named = list(module.named_parameters())
        groups = [{"params": [p], "param_names": [name]} for name, p in named]
        at = Displacement(seed=3, query=1, step=7, t=-0.5, eps=(0.1, 0.2))
        published = Weights(groups, Gaussian()).at(at)
        for way in ("in_place", "virtual"):
            weights, seen = Weights(groups, Gaussian(), way), {}
            with torch.no_grad(), weights.reading().at(weights.offset(at)):
                seen = {name: p.clone() for name, p in module.named_parameters()}
            assert all(torch.equal(seen[name], published[name]) for name, _ in named)
            assert all(not torch.equal(published[name], p) for name, p in named)
        z = Gaussian().tensor("bias", module.bias, SPSA.query_seed(1, 3), 7)
        expected = (module.bias.detach().float() - 0.5 * 0.2 * z).to(dtype)
        assert torch.allclose(published["bias"], expected, rtol=0, atol=1e-2 if dtype == torch.bfloat16 else 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"queries": 0}, "queries: must be a whole number of at least 1"), ({"sides": 3}, "sides: must be 1 or 2")],
)
def test_bad_options_get_one_line(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SPSAStrategy(**options)
