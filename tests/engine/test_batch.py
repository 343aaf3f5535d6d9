"""One batch type for prompts and completions: of rollouts and of TRL's inputs."""

from __future__ import annotations

import pytest
import torch

from zopro.engine import Batch, Rollouts
from zopro.engine.batch import uniform_numbers
from zopro.errors import InputError


def rollouts() -> Rollouts:
    prompts, prompt_mask = torch.tensor([[0, 5], [6, 7]]), torch.tensor([[0, 1], [1, 1]])
    answers, mask = torch.tensor([[8, 9, 1], [4, 1, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    return Rollouts(prompts, prompt_mask, answers, mask, torch.zeros(2, 3))


def test_parts_come_out_as_they_went_in() -> None:
    given = rollouts()
    batch = Batch.of(given)
    assert batch.input_ids.tolist() == [[0, 5, 8, 9, 1], [6, 7, 4, 1, 0]]
    assert batch.attention_mask.tolist() == [[0, 1, 1, 1, 1], [1, 1, 1, 1, 0]]
    for name in ("prompt_ids", "completion_ids", "completion_mask"):
        assert torch.equal(getattr(batch, name), getattr(given, name))
    same = Batch.of_inputs({**vars(given), "advantages": torch.ones(2)})
    assert torch.equal(same.input_ids, batch.input_ids) and same.completion_length == 3


def test_rows_and_sums() -> None:
    batch = Batch.of(rollouts())
    assert batch.rows(torch.tensor([1, 0])).input_ids.tolist() == batch.input_ids.flip(0).tolist()
    assert batch.twice().attention_mask.tolist() == batch.attention_mask.tolist() * 2
    assert batch.sums(torch.tensor([[1.0, 2.0, 4.0], [8.0, 16.0, 32.0]])).tolist() == [7.0, 24.0]


@pytest.mark.parametrize("count", [0, 2, 4])
def test_every_row_has_its_own_generator(count: int) -> None:
    own = [torch.Generator().manual_seed(row) for row in range(count)]
    with pytest.raises(InputError, match=rf"generator: must be one, or one for each of the 3 rows, got {count}\."):
        uniform_numbers(own, 3, 5, torch.device("cpu"))
