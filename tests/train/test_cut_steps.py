"""A population's step on many ranks is one rank's to the bit, also where gradient accumulation cuts it."""

from __future__ import annotations

from typing import Any

from many_ranks import results, train
from tiny_trainers import es, with_adapter


def cut(parts: int) -> Any:
    options = {"num_generations": 2, "population": 4, "sigma": "auto", "gradient_accumulation_steps": parts}
    found = train(es, 8 // parts, {"model": with_adapter(), "max_steps": 2, **options})
    return found["bits"], found["gradients"]


def test_ranks_draw_what_one_would() -> None:
    (whole,) = results(cut, 1, 1)
    assert results(cut, 1, 4) == [whole]
    assert results(cut, 2, 2) == [whole, whole]
