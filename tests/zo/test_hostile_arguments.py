"""Arguments and parameters that SPSA refuses, with one line each."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from zopro.zo import SPSA, Targeted


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"lr": -1.0}, ["lr", "not be negative", "-1.0"]),
        ({"lr": math.nan}, ["lr", "nan"]),
        ({"eps": 0}, ["eps", "greater than 0", "'auto'", "0"]),
        ({"eps": "tiny"}, ["eps", "'tiny'"]),
        ({"weight_decay": -0.1}, ["weight_decay", "-0.1"]),
        ({"queries": 0}, ["queries", "at least 1"]),
        ({"sides": 3}, ["sides", "1 or 2", "3"]),
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
    with pytest.raises(ValueError, match=r"params: 'q' must be floating point, got torch.int8"):
        SPSA([("q", torch.ones(2, dtype=torch.int8))])
    a, b = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    with pytest.raises(ValueError, match=r"params: names must differ.*'w' twice"):
        SPSA([{"params": [("w", a)]}, {"params": [("w", b)]}])
