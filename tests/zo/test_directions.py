"""One table for what every kind of direction must hold: a new kind is held to it by being registered."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tiny_updates import PARAMS, SHAPES, random_update, same
from zopro.choices import DIRECTIONS
from zopro.zo import Directions, LowRank, Signs, Targeted


def targeted(**options: object) -> Targeted:
    # A one-element tensor has no noise orthogonal to its reward update: see `test_one_element_tensors`.
    reward_update = random_update(2, names=("layer.lora_A.weight", "layer.lora_B.weight", "twin", "bias"))
    return Targeted(random_update(1, 0.01), reward_update, **{"total_steps": 10, **options})  # type: ignore[arg-type]


KINDS = {
    **{choice.name: choice.load() for choice in DIRECTIONS.values() if not choice.of_update},
    "targeted": targeted,
    "targeted, low-rank noise": lambda: targeted(noise=LowRank(1)),
    "targeted, exponential": lambda: targeted(decay="exponential"),
    "targeted, the paper's scale": lambda: targeted(normalize=False),
    "targeted, no previous update": lambda: Targeted({}, random_update(2, names=("twin", "bias")), total_steps=10),
    "targeted, no reward update": lambda: Targeted(random_update(1), {}, total_steps=10),
}


COINS = {
    **{c.name: partial(c.load(), random_update(1)) for c in DIRECTIONS.values() if c.of_update},
    "targeted, signs": lambda: targeted(noise=Signs(random_update(1, 0.01))),
}  # one coin a sub-layer, which may well fall alike twice


@pytest.fixture(params=[*KINDS.values(), *COINS.values()], ids=[*KINDS, *COINS])
def directions(request: pytest.FixtureRequest) -> Directions:
    return request.param()


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
