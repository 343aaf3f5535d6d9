"""The order of rows of a resumed epoch, also where several processes share them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from trl.trainer.utils import RepeatSampler

from zopro.train.epochs import CountedSteps, EpochSampler

ROWS = range(16)


def batches(processes: int, epoch: float, done: int = 0) -> list[list[int]]:
    """What the first process gets in an epoch of which it has had `done` batches, as transformers' loop has it."""
    sampler = EpochSampler(RepeatSampler(ROWS, mini_repeat_count=1, batch_size=1, seed=7), seed=7)
    loader: Any = DataLoader([*ROWS], batch_size=2, sampler=sampler)
    loader = prepare_data_loader(loader, num_processes=processes, process_index=0, put_on_device=False)
    CountedSteps(SimpleNamespace(order=sampler)).on_epoch_begin(None, SimpleNamespace(epoch=epoch), None)
    loader = skip_first_batches(loader, done) if done else loader
    loader.set_epoch(int(epoch))
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("processes", [1, 2])
def test_an_epoch_goes_on_in_its_own_order(processes: int) -> None:
    first, second = (batches(processes, epoch) for epoch in (0, 1.0))
    assert first != second
    assert batches(processes, epoch=1.25, done=2) == second[2:]


def test_a_stream_has_no_order() -> None:
    CountedSteps(SimpleNamespace(order=None)).on_epoch_begin(None, SimpleNamespace(epoch=None), None)


@pytest.mark.parametrize(
    ("step", "kept", "first", "said"),
    [
        (0, {}, True, False),
        (3, {}, True, True),
        (3, {}, False, False),
        (4, {}, True, False),
        (3, {"asks_logprobs": False}, True, False),
    ],
)
def test_answers_that_a_checkpoint_has_not_are_a_line(
    step: int, kept: dict[str, Any], first: bool, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    args = SimpleNamespace(gradient_accumulation_steps=2, steps_per_generation=2, num_iterations=2)
    trainer = SimpleNamespace(row_seeds=SimpleNamespace(begin=lambda mode: None), **kept)
    state = SimpleNamespace(global_step=step, is_world_process_zero=first)
    CountedSteps(trainer).on_train_begin(args, state, None)
    assert ("From a step that is a multiple of 2 it goes on" in caplog.text) == said
