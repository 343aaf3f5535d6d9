"""`zopro.ES`: its estimate against autograd, learning against a random walk, state and replay to the bit."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from many_ranks import results
from tiny_problems import DIRECTIONS, flat, gradient, mlp, previous, same, trainable, weights
from zopro.choices import SHAPINGS
from zopro.errors import InputError
from zopro.zo import ES, SPSA, Gaussian, Ranks, shaping

DENSE = ("gaussian", "rademacher", "low_rank")
MOMENTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "momentum": {"momentum": 0.9},
    "adam": {"momentum": 0.9, "second_moment": 0.99},
    "anchor": {"anchor": 0.05, "second_moment": 0.9, "weight_decay": 0.1},
    "auto": {"sigma": "auto", "momentum": 0.5, "normalize": True},
    "one-sided": {"antithetic": False, "shaping": "centred_rank"},
}


def rewarding(closure: Callable[[], Tensor], rows: int = 3) -> Callable[[], Tensor]:
    """A reward for each of some prompts: minus a loss, and a part that is the prompt's own."""
    return lambda: -closure().detach() + torch.arange(rows) * torch.tensor([1.0, -2.0, 0.5])[:rows]


@pytest.mark.parametrize(("directions", "antithetic"), [*((name, True) for name in DENSE), ("gaussian", False)])
def test_the_estimate_is_the_slope_of_the_reward(directions: str, antithetic: bool) -> None:
    """Of raw rewards, which z-scores divide by their deviation: many members' sum is along autograd's gradient."""
    torch.manual_seed(0)
    module, closure = mlp()
    sought = gradient(module, closure)
    before, population = weights(module), 900
    es = ES(trainable(module), 1.0, 1e-3, population, DIRECTIONS[directions](module), antithetic=antithetic)
    rewards: list[float] = []
    es.step(lambda: rewards.append(-float(closure())) or rewards[-1])
    deviation = float(torch.tensor(rewards, dtype=torch.float64).std(unbiased=False))
    moved = flat({name: (p.detach() - before[name]) * deviation for name, p in module.named_parameters()})
    slope = -flat(sought)
    # the mean of z z^T is the identity within sqrt(d / directions) of the vector's length
    independent = population / 2 if antithetic else population
    assert float((moved - slope).norm() / slope.norm()) < 1.5 * math.sqrt(len(slope) / independent)


@pytest.mark.parametrize(
    ("name", "shaping"), sorted({*((name, "z_score") for name in DIRECTIONS), *(("gaussian", name) for name in SHAPINGS)})
)
def test_it_climbs_where_a_random_walk_does_not(name: str, shaping: str) -> None:
    for seed in range(2):
        torch.manual_seed(seed)
        module, closure = mlp()
        directions = DIRECTIONS[name](module)
        walker, first = copy.deepcopy(module), float(closure().detach())
        es = ES(trainable(module), 0.02, 0.02, 16, directions, shaping=shaping, normalize=True, momentum=0.5, seed=seed)
        for _ in range(12):
            es.step(lambda c=closure: -c())
        climbed = first - float(closure().detach())
        walk = ES(trainable(walker), 0.02, 0.02, 16, directions, normalize=True, momentum=0.5, seed=seed)
        draw = torch.Generator().manual_seed(seed)
        for _ in range(12):
            walk.tell(torch.randn(16, generator=draw))
        with torch.no_grad():
            for p, q in zip(module.parameters(), walker.parameters(), strict=True):
                p.copy_(q)
        assert climbed > 0.02 and climbed > 2 * (first - float(closure().detach()))


def test_adam_s_steps_are_torch_s() -> None:
    """Also of a tensor that is unfrozen later, whose moments begin then."""
    ours, theirs = ([nn.Parameter(torch.zeros(4, 3)) for _ in "vw"] for _ in "ab")
    draw = torch.Generator().manual_seed(0)
    es = ES([*zip("vw", ours, strict=True)], 0.1, 0.5, 4, Gaussian(), momentum=0.8, second_moment=0.95)
    adam = torch.optim.Adam(theirs, lr=0.1, betas=(0.8, 0.95), eps=1e-8)
    for step in range(8):
        ours[1].requires_grad_(step >= 5)
        rewards = torch.randn(4, generator=draw)
        members = es.ask()
        record = es.tell(rewards)
        for name, theta, other in zip("vw", ours, theirs, strict=True):
            z = [Gaussian().tensor(name, theta, member.direction_seed, record.step) for member in members[::2]]
            moved = sum(c * d for c, d in zip(record.coefficients, z, strict=True))
            other.grad = moved if theta.requires_grad else None
        adam.step()
        assert all(torch.allclose(a, b, rtol=1e-4, atol=1e-6) for a, b in zip(ours, theirs, strict=True))
    assert bool(ours[1].any())


def test_the_anchor_pulls_back_to_the_start() -> None:
    theta = torch.tensor([5.0, -3.0])
    start = theta.clone()
    es = ES([("w", theta)], 0.5, 0.1, 4, anchor=0.25)
    es.step(lambda: theta.sum())
    away = theta - start
    assert float(away.norm()) > 0.1
    es.param_groups[0]["lr"] = 0.0
    es.step(lambda: theta.sum())
    assert torch.allclose(theta - start, 0.75 * away, rtol=1e-5)


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_records_replay_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    module, closure = mlp(dtype)
    start, directions, records = copy.deepcopy(module), previous(module), []
    options = {"population": 4, "seed": 5, **MOMENTS[kind]}
    es = ES(trainable(module), 0.05, directions=directions, before_apply=records.append, **options)
    for _ in range(4):
        es.step(rewarding(closure))
    es.tell([1.0] * 4 if kind != "auto" else [[1.0, 2.0]] * 4)
    es.step(rewarding(closure))
    assert [record.skipped for record in records] == [False] * 4 + [True, False]
    player = ES(trainable(start), lr=99.0, directions=directions, population=2)
    for _ in range(2):  # step 0 begins anew
        restart = copy.deepcopy(start)
        player = ES(trainable(restart), lr=99.0, directions=directions, population=2)
        for record in records:
            player.replay(type(record)(**dataclasses.asdict(record)))
        assert same(weights(restart), weights(module))


@pytest.mark.parametrize("kind", MOMENTS)
@pytest.mark.parametrize("how", ["state_dict", "deepcopy", "pickle"])
def test_it_goes_on_in_the_middle_to_the_bit(kind: str, how: str, tmp_path: Any) -> None:
    module, closure = mlp()
    options = {"population": 4, "directions": Gaussian(), **MOMENTS[kind]}
    es = ES(trainable(module), 0.05, **options)
    for _ in range(3):
        es.step(rewarding(closure))
    if how == "state_dict":
        torch.save([module.state_dict(), es.state_dict()], tmp_path / "state.pt")
        saved, state = torch.load(tmp_path / "state.pt", weights_only=True)
        for _ in range(2):
            es.step(rewarding(closure))
        expected = weights(module)
        module.load_state_dict(saved)
        again = ES(trainable(module), **{**options, "seed": 8})
        again.load_state_dict(state)
        for _ in range(2):
            again.step(rewarding(closure))
        assert same(weights(module), expected) and repr(again.last) == repr(es.last)
        return
    told: list[Any] = []
    es.before_apply = told.append
    other = copy.deepcopy(es) if how == "deepcopy" else pickle.loads(pickle.dumps(es))
    draw = torch.Generator().manual_seed(0)
    for rewards in torch.randn(2, 4, 3, generator=draw):
        es.tell(rewards)
        other.tell(rewards)
    ours, theirs = (opt.param_groups[0]["params"] for opt in (es, other))
    assert len(told) == 2 and all(p is not q and torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_states_of_other_optimisers_are_refused() -> None:
    module, _ = mlp()
    for other in (torch.optim.SGD(module.parameters(), lr=1.0), SPSA(trainable(module))):
        with pytest.raises(ValueError, match="state_dict: must come from ES"):
            ES(trainable(module)).load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="state_dict: must come from SPSA"):
        SPSA(trainable(module)).load_state_dict(ES(trainable(module)).state_dict())


@pytest.mark.parametrize("perturbation", ["in_place", "virtual"])
def test_theta_is_never_left_displaced(perturbation: str) -> None:
    module, closure = mlp()
    before, calls = weights(module), []

    def evaluate() -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("broke")
        return -closure()

    es = ES(trainable(module), population=4, perturbation=perturbation)
    with pytest.raises(RuntimeError, match="broke"):
        es.step(evaluate)
    assert same(before, weights(module)) and es.step_count == 0
    es.before_apply = lambda record: (_ for _ in ()).throw(OSError("disk"))
    with pytest.raises(OSError, match="disk"):
        es.step(lambda: -closure())
    assert same(before, weights(module)), "the record is on the disk before a parameter changes"


@pytest.mark.parametrize("scale", [1e-250, 2.0**-40, 1.0, 2.0**300, 1e250])
def test_the_unit_of_rewards_means_nothing(scale: float) -> None:
    rewards = [[0.2, 0.5, -0.1], [0.3, 0.7, 0.2], [0.1, 0.4, 0.3], [0.5, 0.9, 0.0]]
    scaled = [[scale * value for value in row] for row in rewards]
    between, noise = shaping.spread(rewards)
    other, rest = shaping.spread(scaled)
    assert other / rest == pytest.approx(between / noise)
    for name in SHAPINGS:
        assert shaping.shape([max(row) for row in scaled], name) == pytest.approx(
            shaping.shape([0.5, 0.7, 0.4, 0.9], name)
        )


def test_members_see_the_same_random_numbers() -> None:
    module, _ = mlp()
    drawn: list[float] = []
    es = ES(trainable(module), population=6)
    es.step(lambda: drawn.append(float(torch.rand(()))) or drawn[-1])
    assert len(set(drawn)) == 1 and es.last is not None and es.last.skipped


def test_micro_batches_are_one_step() -> None:
    module, _ = mlp()
    twin = copy.deepcopy(module)
    es, other = ES(trainable(module), population=4), ES(trainable(twin), population=4)
    draw = torch.Generator().manual_seed(0)
    first, second = torch.randn(2, 4, 2, generator=draw).tolist()
    for batch in (first, second):
        assert es.ask() == other.ask()
        es.accumulate(batch)
    assert es.step() is None
    other.tell([[*a, *b] for a, b in zip(first, second, strict=True)])
    assert same(weights(module), weights(twin))
    with pytest.raises(RuntimeError, match="step: nothing to apply"):
        es.step()


def test_a_learning_rate_that_leaves_nothing_is_refused() -> None:
    module, closure = mlp()
    before = weights(module)
    with pytest.raises(InputError, match="lr: must leave weights that a network can work with, got 1e"):
        ES(trainable(module), lr=1e12, population=4).step(lambda: -closure())
    assert same(before, weights(module))


# Ranks.


def shared(parallel: str, population: int) -> tuple[list[Any], list[Any], int]:
    """Three steps on this rank: the parameters, the records and the largest exchange."""
    torch.manual_seed(0)
    module, closure = mlp()
    if not dist.is_initialized():
        ranks, size, rank = None, 1, 0
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            dist.init_process_group("gloo")
    if dist.is_initialized():
        ranks, size, rank = Ranks(parallel), dist.get_world_size(), dist.get_rank()
    largest = [0]
    if ranks is not None:
        gather = ranks._gather
        ranks._gather = lambda values: largest.append(values.nbytes) or gather(values)  # type: ignore[method-assign]
    mine = slice(None) if parallel == "queries" else slice(rank * 4 // size, (rank + 1) * 4 // size)
    own = torch.tensor([0.3, -1.0, 2.0, 0.0])
    es = ES(trainable(module), 0.05, "auto", population, momentum=0.9, ranks=ranks)
    asked = [0]
    records = []
    es.before_apply = records.append

    def evaluate() -> Tensor:
        asked[0] += 1
        return (-closure() * (1 + own) + own)[mine]

    for _ in range(3):
        es.step(evaluate)
    return [p.tolist() for p in module.parameters()], [repr(record) for record in records], max(largest), asked[0]


@pytest.mark.parametrize("parallel", ["data", "queries"])
def test_ranks_share_the_work_and_exchange_scalars(parallel: str) -> None:
    one, two = results(shared, 1, parallel, 6)[0], results(shared, 2, parallel, 6)
    for rank in two:
        assert rank[:2] == one[:2]
        assert rank[2] == 8 * 6 * 4 // 2, "its own rewards, as float64"
        assert rank[3] == (18 if parallel == "data" else 9)


def test_a_rank_without_a_member_takes_the_step_too() -> None:
    one, many = results(shared, 1, "queries", 2)[0], results(shared, 3, "queries", 2)
    assert all(rank[:2] == one[:2] for rank in many)
