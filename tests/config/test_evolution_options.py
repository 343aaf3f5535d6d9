"""Options of evolution strategies, as a configuration has them."""

from __future__ import annotations

from typing import Any

import pytest

from zopro.config import RunConfig
from zopro.errors import InputError

NEEDED = {"model": "m", "task": "chat", "train_data": "x"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"population": 7},
            r"population: must be an even number of at least 2 with antithetic: true \(members .*\), got 7.",
        ),
        ({"population": 1, "antithetic": False}, "population: must be at least 2, got 1."),
        ({"sigma": "auto", "prompts_per_step": 1}, "sigma: must be a number with prompts_per_step: 1, .* got 'auto'."),
        ({"sigma": "-1"}, "sigma: must be a number greater than 0, or auto, got '-1'."),
        ({"shaping": "zscore"}, "shaping: must be one of z_score, centred_rank, got 'zscore'. Did you mean 'z_score'"),
        ({"second_moment": 1.0}, r"second_moment: must lie in \[0, 1\), got 1.0."),
        ({"es_learning_rate": 0.0}, "es_learning_rate: must be greater than 0, got 0.0."),
    ],
)
def test_what_is_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        RunConfig(**NEEDED, **options)


def test_sigma_is_the_same_however_it_is_written() -> None:
    assert RunConfig(**NEEDED, sigma="1e-3") == RunConfig(**NEEDED, sigma=0.001) != RunConfig(**NEEDED, sigma="auto")
