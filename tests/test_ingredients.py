"""benchmarks/ingredients.py: what each row of the ablation leaves out of zopro-paper's direction."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from scripts import benchmark
from zopro.zo import Targeted


@pytest.fixture(scope="module")
def ingredients() -> Any:
    return benchmark("ingredients")


@pytest.mark.parametrize(("trainer", "along"), [("NoiseAloneTrainer", 0.0), ("UpdateAloneTrainer", 0.999)])
def test_the_share_of_the_previous_update_is_held(ingredients: Any, trainer: str, along: float) -> None:
    """At every step, by either way to draw, as long as mu and with noise orthogonal to v."""
    generator = torch.Generator().manual_seed(0)
    mu, v, like = ({"w": torch.randn(2000, generator=generator)} for _ in range(3))
    v["w"] -= (v["w"] @ mu["w"]) / (mu["w"] @ mu["w"]) * mu["w"]
    kind = getattr(ingredients, trainer)
    directions: Targeted = kind.held(mu, v, kind.total_steps, "linear", False)
    for step in (0, 1, 7):
        z = directions.tensor("w", like["w"], 0, step)
        assert torch.cosine_similarity(z, mu["w"], 0) == pytest.approx(along, abs=0.06)
        assert torch.cosine_similarity(z, v["w"], 0) == pytest.approx(0, abs=1e-5)
        assert z.norm() == pytest.approx(float(mu["w"].norm()), rel=0.01)
        assert torch.equal(z, directions.tensors(list(like.items()), 0, step)[0])
    again = directions.tensor("w", like["w"], 0, 8)
    assert not torch.equal(again, z), "noise of its own at each step"


def test_every_row_is_a_method(ingredients: Any) -> None:
    methods = [getattr(ingredients, name) for name in ("no_v", "no_mu", "neither", "mu_alone")]
    assert [(method.name, method.preset) for method in methods] == [
        ("no_v", "paper"), ("no_mu", "paper"), ("neither", "paper"), ("mu_alone", "paper"),
    ]  # fmt: skip
