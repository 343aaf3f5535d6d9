"""Which GPU each process takes, and what processes that share one exchange tensors by. No GPU is needed."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from zopro.errors import InputError
from zopro.store.lock import RunLock
from zopro.system import launch, ranks
from zopro.system.launch import Processes, backend_of, exchanging, see_one_gpu

NCCL, GLOO = "cpu:gloo,cuda:nccl", "cpu:gloo,cuda:gloo"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Called with the number of GPUs, this process's rank of how many, and what it sees of the GPUs."""

    def begin(gpus: int, rank: int, size: int, visible: str | None = None) -> None:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("binds the process to the first GPU"))
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
        for name, value in (("LOCAL_RANK", rank), ("LOCAL_WORLD_SIZE", size), ("RANK", rank), ("WORLD_SIZE", size)):
            monkeypatch.setenv(name, str(value))
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible or "")
        if visible is None:
            monkeypatch.delenv("CUDA_VISIBLE_DEVICES")

    return begin


@pytest.mark.parametrize(
    ("gpus", "rank", "size", "visible", "taken"),
    [
        (4, 2, 4, None, "2"),
        (2, 1, 2, "5,7", "7"),
        (1, 3, 4, "6", "6"),  # the scheduler has seen to it
        (2, 3, 4, None, "1"),  # two share each
        (1, 0, 1, None, "0"),
    ],
)
def test_each_process_sees_one_gpu(gpus: int, rank: int, size: int, visible: Any, taken: str, machine: Any) -> None:
    machine(gpus, rank, size, visible)
    see_one_gpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == taken and os.environ["LOCAL_RANK"] == "0"


@pytest.mark.parametrize(
    ("others", "backend"),
    [
        (["a/GPU-1", "a/GPU-2"], NCCL),
        (["a/GPU-1", "b/GPU-1"], NCCL),
        (["a/GPU-1", "a/GPU-1"], GLOO),
        (["a/GPU-1", "a/GPU-2", "b/GPU-1", "b/GPU-1"], GLOO),  # another machine's share one
    ],
)
def test_nccl_where_each_has_a_gpu_of_its_own(
    others: list[str], backend: str, machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every rank learns which GPU the others have before the group is made, so that all choose the same."""
    machine(2, 0, len(others))
    store = dist.HashStore()
    for rank, gpu in enumerate(others):
        store.set(f"gpu/{rank}", gpu)
    made: list[Any] = []
    monkeypatch.setattr(launch, "own_gpu", lambda: others[0])
    monkeypatch.setattr(launch, "rendezvous", lambda *args, **kwargs: iter([(store, 0, len(others))]))
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda name, **kwargs: made.append((name, kwargs["world_size"])))
    monkeypatch.setattr(dist, "new_group", lambda **kwargs: None)
    Processes.join("auto", 1)
    assert made == [(backend, len(others))]


def test_without_nccl_it_is_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "is_nccl_available", lambda: False)
    assert backend_of(["a/1", "a/2"]) == GLOO


@pytest.mark.parametrize("device", ["cuda:1", "mps"])
def test_one_gpu_for_all_is_refused(device: str, machine: Any) -> None:
    machine(2, 0, 2)
    with pytest.raises(InputError, match=f"device: must be auto, cpu or cuda where a launcher .* got '{device}'"):
        Processes.join(device, 1)


def test_numbers_are_exchanged_where_the_backend_is(monkeypatch: pytest.MonkeyPatch) -> None:
    for config, where in ((NCCL, "cuda"), ("nccl", "cuda"), (GLOO, "cpu"), ("gloo", "cpu")):
        monkeypatch.setattr(dist, "get_backend_config", lambda config=config: config)
        assert exchanging(torch.device("cuda")).type == where


def test_a_gpu_is_known_by_its_machine(machine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    machine(1, 0, 1, "3")
    for about, end in ((SimpleNamespace(uuid="GPU-77"), "/GPU-77"), (SimpleNamespace(), "/3")):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device, about=about: about)
        assert launch.own_gpu().endswith(end) and launch.own_gpu() != end


def test_a_rank_left_behind_is_the_first_process(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without WORLD_SIZE this process is alone, and locks the run that it writes to."""
    monkeypatch.setenv("RANK", "1")
    assert ranks.launched() == 1 and ranks.first()
    lock = RunLock(tmp_path)
    lock.acquire()
    assert (tmp_path / ".lock.owner").exists()
    lock.release()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert ranks.launched() == 2 and not ranks.first()


@pytest.mark.parametrize("name", ranks.VARIABLES)
def test_a_launcher_s_variable_is_a_number(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(name, raising=False)
    assert ranks.told(name) == ranks.VARIABLES[name]
    for value in ("", "x", "-1"):
        monkeypatch.setenv(name, value)
        with pytest.raises(InputError, match=f"^{name}: must be a whole number of at least ., .* got '{value}'. Unset"):
            ranks.told(name)
