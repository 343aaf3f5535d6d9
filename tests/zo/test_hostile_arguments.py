"""Arguments and parameters that SPSA refuses, with one line each."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from zopro.zo import ES, SPSA, ESStrategy, Targeted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, ["lr", "not be negative", "-1.0"]),
        ({"lr": math.nan}, ["lr", "nan"]),
        ({"lr": "1e-3"}, ["lr", "'1e-3'"]),
        ({"eps": 0}, ["eps", "greater than 0", "'auto'", "0"]),
        ({"eps": "tiny"}, ["eps", "'tiny'"]),
        ({"eps": math.inf}, ["eps", "greater than 0", "inf"]),
        ({"eps": torch.ones(2)}, ["eps", "greater than 0"]),
        ({"weight_decay": math.inf}, ["weight_decay", "finite", "inf"]),
        ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
        ({"queries": 0}, ["queries", "at least 1"]),
        ({"queries": 2.0}, ["queries", "whole number", "2.0"]),
        ({"sides": 3}, ["sides", "1 or 2", "3"]),
        ({"seed": 1.5}, ["seed", "whole number", "1.5"]),
        ({"second_moment_beta": 1.0}, ["second_moment_beta", "[0, 1)", "1.0"]),
        ({"perturbation": "copy"}, ["perturbation", "in_place", "virtual", "'copy'"]),
        ({"directions": Targeted({"v": torch.ones(2)}, {}, 3)}, ["previous_update", "'w'", "'v'"]),
        ({"directions": Targeted({"w": torch.ones(3)}, {}, 3)}, ["previous_update", "'w'", "(2,)", "(3,)"]),
    ],
)
def test_bad_arguments_get_one_line(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        SPSA([("w", nn.Parameter(torch.ones(2)))], **options)
    assert "\n" not in str(error.value)
    assert all(word in str(error.value) for word in words), error.value


def test_bad_parameters_get_one_line() -> None:
    for dtype in (torch.int8, torch.float8_e4m3fn):
        with pytest.raises(ValueError, match=rf"params: 'q' must be floating point of 16 bits or more, got {dtype}"):
            SPSA([("q", torch.ones(2).to(dtype))])
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"params: names must differ.*'w' twice"):
        SPSA([{"params": [("w", a)]}, {"params": [("w", b)]}])


@pytest.mark.parametrize("optimizer", [SPSA, ES])
@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (torch.ones(2, device="meta"), "on meta: load or initialise it first"),
        (torch.eye(2).to_sparse(), r"torch.sparse_coo: call to_dense\(\) on it"),
        (torch.ones(1, 2).expand(3, 2), r"an expanded tensor: call contiguous\(\) on it"),
    ],
    ids=["meta", "sparse", "expanded"],
)
def test_a_tensor_that_cannot_be_written_to_gets_one_line(optimizer: Any, tensor: torch.Tensor, words: str) -> None:
    with pytest.raises(ValueError, match=rf"^params: 'w' must be dense, .*, got .*{words}\.$"):
        optimizer([("w", nn.Parameter(tensor))])
    optimizer([("w", nn.Parameter(tensor, requires_grad=False)), ("v", nn.Parameter(torch.ones(2)))])


def test_one_memory_is_trained_once() -> None:
    """Displaced along one direction it would move along two. Parts of one buffer are tensors of their own."""
    buffer = torch.ones(4, 4)
    tied = nn.Parameter(buffer), nn.Parameter(buffer.view(2, 8))
    with pytest.raises(ValueError, match=r"params: tensors must not share memory, .*, got 'a', 'b'\. Name one"):
        SPSA([*zip("ab", tied, strict=True)])
    tied[1].requires_grad_(False)
    SPSA([*zip("ab", tied, strict=True)])
    parts = buffer[:, :2], buffer[:, 2:], torch.empty(0), torch.empty(0)
    SPSA([*zip("abcd", parts, strict=True)]).step(buffer.sum)


@pytest.mark.parametrize("eps", [np.float32(0.5), torch.tensor(0.5)])
def test_numbers_of_any_kind_are_numbers(eps: Any) -> None:
    opt = SPSA([torch.ones(2)], lr=torch.tensor(0.1), eps=eps, measure_noise=True, queries=np.int64(2))
    assert opt.param_groups[0]["eps"] == 0.5 and type(opt.param_groups[0]["eps"]) is float
    assert type(ESStrategy(sigma=eps).groups[0]["eps"]) is float  # weights_only reads no state with a NumPy number


@pytest.mark.parametrize("options", [{"lr": "1e-3"}, {"lr": -1}, {"eps": object()}])
def test_a_group_that_is_refused_is_not_kept(options: dict[str, Any]) -> None:
    opt = SPSA([torch.ones(2)])
    with pytest.raises(ValueError, match="must"):
        opt.add_param_group({"params": [torch.ones(2)], **options})
    assert len(opt.param_groups) == 1


def test_a_group_that_directions_do_not_fit_is_not_kept() -> None:
    update = {"a": torch.ones(2), "b": torch.ones(5)}
    opt = SPSA([{"params": [("a", nn.Parameter(torch.ones(2)))]}], directions=Targeted(update, {}, 3))
    with pytest.raises(ValueError, match=r"previous_update: 'b' must have its parameter's shape \(3,\), got \(5,\)"):
        opt.add_param_group({"params": [("b", nn.Parameter(torch.ones(3)))]})
    assert len(opt.param_groups) == 1


def test_what_a_population_is_told_is_a_number() -> None:
    with pytest.raises(ValueError, match="evaluate: must return a reward, or a list of one for each prompt, got str"):
        ES([torch.ones(2)], population=2).step(lambda: "x")
    with pytest.raises(ValueError, match="seed: must be a whole number, got '1'"):
        ES([torch.ones(2)], seed="1")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("closure", "said"),
    [
        (lambda w: None, "closure: must return one number, the loss, got NoneType. Return the mean over the batch."),
        (lambda w: w.square(), "closure: must return one number, the loss, got a tensor of shape (2,). Return the mean"),
        (
            lambda w: w.sum().backward(),
            "closure: must need no gradient, as no graph is built. Return loss or rewards",
        ),
    ],
)
def test_what_a_closure_must_do_is_said(closure: Any, said: str) -> None:
    w = nn.Parameter(torch.ones(2))
    with pytest.raises((ValueError, RuntimeError)) as error:
        SPSA([w]).step(lambda: closure(w))
    assert str(error.value).startswith(said)
    assert torch.equal(w, torch.ones(2))
