"""What a step leaves as it was: theta after a bad loss or an exception, random state, gradients."""

from __future__ import annotations

import contextlib
import copy
import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from tiny_problems import mlp, same, trainable, weights
from zopro.zo import SPSA, Gaussian


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_loss_skips_counts_and_says_so(bad: float, caplog: pytest.LogCaptureFixture) -> None:
    module, closure = mlp()
    before = weights(module)
    values = iter([1.0, bad])
    opt = SPSA(trainable(module), lr=0.1, weight_decay=0.1, second_moment_beta=0.9)
    with caplog.at_level(logging.WARNING):
        opt.step(lambda: torch.tensor(next(values)))
    assert same(before, weights(module)), "neither update nor decay"
    assert opt.last.skipped and opt.skipped_steps == 1 and opt.step_count == 1
    assert "step 0 skipped" in caplog.text and "not finite" in caplog.text
    opt.replay(opt.last)
    assert same(before, weights(module))
    opt.step(closure)
    assert not opt.last.skipped and opt.skipped_steps == 1
    assert all(torch.isfinite(p).all() for p in module.parameters())


def test_one_bad_micro_batch_skips_the_whole_step() -> None:
    module, closure = mlp()
    before = weights(module)
    opt = SPSA(trainable(module), lr=0.1)
    opt.estimate(closure)
    opt.estimate(lambda: torch.tensor(math.nan))
    assert opt.apply().skipped
    assert same(before, weights(module))
    opt.estimate(closure)
    assert not opt.apply().skipped, "the bad estimate must not stay behind"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("perturbation", ["in_place", "virtual"])
@pytest.mark.parametrize("call", [0, 1, 4])
def test_theta_is_restored_when_the_closure_raises(call: int, perturbation: str, dtype: torch.dtype) -> None:
    module, closure = mlp(dtype)
    before, calls = weights(module), iter(range(100))

    def failing() -> Tensor:
        loss = closure()
        if next(calls) == call:
            raise KeyboardInterrupt
        return loss

    opt = SPSA(trainable(module), lr=0.1, eps="auto", perturbation=perturbation)
    with pytest.raises(KeyboardInterrupt):
        opt.step(failing)
    assert same(before, weights(module))
    assert opt.step_count == 0
    opt.step(closure)
    assert not same(before, weights(module))


@pytest.mark.parametrize("at", range(9))
def test_theta_is_restored_when_ctrl_c_comes_while_it_is(at: int) -> None:
    """In any of the copies that displace four tensors or put them back."""
    tensors = [(str(n), torch.ones(2)) for n in range(4)]
    opt = SPSA(tensors, eps=0.3, directions=ByTensor(), perturbation="in_place", sides=1)

    class Interrupted(TorchDispatchMode):
        copies = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.ops.aten.copy_.default and any(args[0].data_ptr() == t.data_ptr() for _, t in tensors):
                self.copies += 1
                if self.copies == at + 1:
                    raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    with Interrupted() as interrupted, contextlib.suppress(KeyboardInterrupt):
        opt.measure(lambda: sum(t.sum() for _, t in tensors))
    assert interrupted.copies > 0 and all(torch.equal(tensor, torch.ones(2)) for _, tensor in tensors)
    assert at == 8 or interrupted.copies > at


class ByTensor(Gaussian):
    """Drawn one by one, so that they are copied one by one."""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_measuring_leaves_theta_to_the_bit(dtype: torch.dtype) -> None:
    for perturbation in ("in_place", "virtual"):
        module, closure = mlp(dtype)
        before = weights(module)
        SPSA(trainable(module), eps=0.3, perturbation=perturbation, queries=3, measure_noise=True).measure(closure)
        assert same(before, weights(module))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_virtual_equals_in_place_to_the_bit(dtype: torch.dtype) -> None:
    module, _ = mlp(dtype, dropout=0.3)
    twin = copy.deepcopy(module)
    x, y = torch.randn(12, 6, dtype=dtype), torch.randint(3, (12,))
    results = []
    for m, perturbation in ((module, "in_place"), (twin, "virtual")):
        torch.manual_seed(1)
        opt = SPSA(trainable(m), lr=0.05, eps="auto", queries=2, perturbation=perturbation)
        for _ in range(3):
            opt.step(lambda m=m: nn.functional.cross_entropy(m(x).float(), y))
        results.append((repr(opt.last), weights(m)))
    assert results[0][0] == results[1][0]
    assert same(results[0][1], results[1][1])


@pytest.mark.parametrize("eps", ["auto", 1e-3])
def test_global_random_state_moves_as_by_one_evaluation(eps: float | str) -> None:
    module, closure = mlp(dropout=0.5)
    state = torch.get_rng_state()
    closure()
    after_one = torch.get_rng_state()
    torch.set_rng_state(state)
    opt = SPSA(trainable(module), eps=eps, queries=3, measure_noise=True)
    assert torch.equal(torch.get_rng_state(), state)
    opt.step(closure)
    assert torch.equal(torch.get_rng_state(), after_one)


def test_no_parameter_gets_a_gradient_and_no_graph_is_built() -> None:
    module, closure = mlp()
    seen = []
    SPSA(trainable(module), lr=0.1).step(lambda: seen.append(closure()) or seen[-1])
    assert all(not loss.requires_grad for loss in seen)
    assert all(p.grad is None and p.requires_grad for p in module.parameters())
