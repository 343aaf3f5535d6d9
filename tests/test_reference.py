"""The page that explains the algorithm (`zopro.reference`) and the code that runs it are the same algorithm."""

from __future__ import annotations

import doctest
import math
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from zopro import reference
from zopro.config import RunConfig
from zopro.loop.recording import origin_of
from zopro.reference import Tensors
from zopro.store.rundir import RunDirectory
from zopro.weights.updates import policy_update, reward_update
from zopro.zo import SPSA, Gaussian, Targeted, target_share

SHAPES = {"first": (3, 4), "second": (4, 2), "bias": (5,), "gate": (1,)}
SIZES = st.sampled_from([0.0, 1e-20, 1e-4, 1.0, 1e12])


def drawn(seed: int, sizes: dict[str, float]) -> Tensors:
    """Named tensors of normal entries times `sizes`, in float32; SHAPES without a size are left out."""
    generator = torch.Generator().manual_seed(seed)
    values = {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}
    return {name: values[name] * size for name, size in sizes.items()}


def wide(tensors: Tensors) -> Tensors:
    return {name: tensor.double() for name, tensor in tensors.items()}


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> bool:
    """Whether they differ by less than `tolerance` of their length."""
    return float((ours.double() - theirs).norm()) <= tolerance * float(theirs.norm())


sizes = st.dictionaries(st.sampled_from(list(SHAPES)), SIZES)


@settings(max_examples=200)
@given(sizes, sizes, st.integers(0, 99), st.integers(1, 9), st.booleans())
def test_targeted_draws_the_reference_s_direction(
    mu_sizes: dict[str, float], v_sizes: dict[str, float], seed: int, steps: int, normalize: bool
) -> None:
    mu, v = drawn(1, mu_sizes), drawn(2, v_sizes)
    params = [(name, torch.zeros(shape)) for name, shape in SHAPES.items()]
    targeted = Targeted(mu, v, steps, normalize=normalize)
    for t in range(steps):
        n = wide(Gaussian().sample(params, seed, t))
        _, z = reference.direction(n, wide(mu), wide(v), reference.share(t, steps), normalize)
        for name, ours in targeted.sample(params, seed, t).items():
            assert close(ours, z[name], 2e-6), (name, t, ours, z[name])


@settings(max_examples=60)
@given(
    sizes=st.fixed_dictionaries({name: st.sampled_from([0.0, 0.1, 1.0]) for name in SHAPES}),
    avoided=st.fixed_dictionaries({name: st.sampled_from([0.0, 1.0]) for name in SHAPES}),
    seed=st.integers(0, 99),
    decay=st.sampled_from([0.0, 0.1]),
    normalize=st.booleans(),
)
def test_spsa_takes_the_reference_s_steps(
    sizes: dict[str, float], avoided: dict[str, float], seed: int, decay: float, normalize: bool
) -> None:
    """z, g and theta over a whole iteration, on a loss that bends: g is a slope and not only a sign."""
    assume(any(sizes.values()))
    steps, eps, eta = 6, 1e-2, 0.05
    mu, v, start = drawn(1, sizes), drawn(2, avoided), wide(drawn(3, dict.fromkeys(SHAPES, 1.0)))

    def loss(theta: Tensors, t: int) -> Tensor:
        target = torch.randn(18, generator=torch.Generator().manual_seed(t), dtype=torch.float64)  # a batch of its own
        flat = torch.cat([theta[name].flatten() for name in SHAPES])[:18]
        return (flat * target).cos().sum() + 0.1 * (flat - target).square().sum()

    params = {name: torch.nn.Parameter(tensor.clone()) for name, tensor in start.items()}
    targeted = Targeted(mu, v, steps, normalize=normalize)
    optimizer = SPSA(params.items(), lr=eta, eps=eps, directions=targeted, weight_decay=decay, seed=seed)
    theta = start
    for t in range(steps):
        n = wide(Gaussian().sample(params.items(), seed, t))
        _, z = reference.direction(n, wide(mu), wide(v), reference.share(t, steps), normalize)
        g, theta = reference.spsa(theta, lambda at, t=t: float(loss(at, t)), z, eps, eta, decay)
        ours = optimizer.directions.sample(params.items(), seed, t)
        optimizer.step(lambda t=t: loss(params, t))
        assert all(close(ours[name], z[name], 1e-6) for name in SHAPES)
        assert optimizer.last is not None and optimizer.last.projected_gradient == pytest.approx(g, rel=1e-4, abs=1e-6)
        off = {name: params[name].detach() - theta[name] for name in SHAPES}
        moved = {name: theta[name] - start[name] for name in SHAPES}
        assert reference.norm(off) <= 1e-5 * reference.norm(moved), t


@given(st.integers(1, 500), st.data())
def test_the_share_falls_as_in_the_reference(steps: int, data: st.DataObject) -> None:
    t = data.draw(st.integers(0, steps - 1))
    assert reference.share(t, steps) == pytest.approx(target_share(t, steps), rel=1e-9, abs=1e-12)


ITERATIONS = 4


def write(folder: Path, name: str, tensors: Tensors) -> None:
    folder.mkdir(parents=True)
    save_file({f"base_model.model.{key}": tensor for key, tensor in tensors.items()} if "adapter" in name else tensors,
              folder / f"{name}.safetensors")  # fmt: skip


def random_tensors(seed: int, *names: str) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    shapes = {name: (2, 6) if "lora_A" in name else (4, 2) if "lora_B" in name else (4, 6) for name in names}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


@pytest.mark.parametrize("lora_r", [2, 0], ids=["lora", "all parameters"])
def test_a_run_chooses_mu_and_v_as_the_reference_does(tmp_path: Path, lora_r: int) -> None:
    """By the folders that iterations leave, whichever there are: policy/001 is what iteration 2 starts from."""
    model = tmp_path / "model"
    config = RunConfig(model=str(model), task="chat", train_data="x", output_dir=str(tmp_path / "run"), lora_r=lora_r,
                       lora_alpha=6, warm_start="sft")  # fmt: skip
    directory = RunDirectory(config, resume=False)
    factors = ("h.0.fc.lora_A.weight", "h.0.fc.lora_B.weight")
    policies = [random_tensors(i, *(factors if lora_r else ("h.0.fc.weight",))) for i in range(ITERATIONS)]
    rewards = [random_tensors(10 + i, *factors, "score.weight") for i in range(ITERATIONS)]
    kind = "adapter_model" if lora_r else "model"
    for i, (policy, reward) in enumerate(zip(policies, rewards, strict=True)):
        write(directory.policy(i - 1) if i else directory.sft(), kind, policy)
        write(directory.reward(i), "adapter_model", reward)
    if not lora_r:  # the reward model's adapter counts as the product that it adds to the weights; here r is 2
        rewards = [{"h.0.fc.weight": 6 / 2 * reward[factors[1]] @ reward[factors[0]]} for reward in rewards]
    for i in range(1, ITERATIONS):
        mu, v = reference.previous_updates(policies, rewards, i)
        origin = origin_of(config, directory, i, config.warm_start)
        assert origin.start == directory.policy(i - 1)
        assert origin.previous_update and origin.reward_update
        ours = (
            policy_update(*origin.previous_update, full=config.lora_r == 0),
            reward_update(*origin.reward_update, full=config.lora_r == 0, alpha=config.lora_alpha),
        )
        for found, expected in zip(ours, (mu, v), strict=True):
            common = {name: found[name] for name in found if name in mu}
            assert common.keys() == expected.keys()
            assert all(torch.allclose(common[name], expected[name], atol=1e-5) for name in expected)
    before = random_tensors(99, *policies[0])  # iteration 0 has nothing before it; of SFT's update one can make mu
    write(model if lora_r == 0 else directory.initial(), kind, before)
    origin = origin_of(config, directory, 0, "sft")
    assert origin.previous_update and origin.reward_update is None
    mu, _ = reference.previous_updates([before, policies[0]], [{}, {}], 1)
    found = policy_update(*origin.previous_update, full=config.lora_r == 0)
    assert found.keys() == mu.keys() and all(torch.equal(found[name], mu[name]) for name in mu)


def test_the_toy_s_reward_rises_in_every_iteration() -> None:
    lines = list(reference.toy(iterations=3, steps=20))
    rewards = [line["reward"] for line in lines]
    assert rewards == sorted(rewards) and rewards[-1] > rewards[0] + 0.3
    for line in lines[1:]:
        assert line["n_perp"] == pytest.approx(line["mu"], rel=1e-5) and math.isfinite(line["g"])
    assert lines[2]["v"] == pytest.approx(lines[1]["v"] * 2 / 3, rel=1e-5)


def test_the_examples_of_the_page() -> None:
    assert doctest.testmod(reference).failed == 0


def test_it_is_one_page_of_torch_alone() -> None:
    assert len(Path(reference.__file__).read_text(encoding="utf-8").splitlines()) < 170
