"""One run on many processes: what a launcher (torchrun, accelerate launch) started, seen from inside each of them.

Zeroth-order stages are worked on by all ranks; everything else is done by the first one, alone, while the others wait.

    processes = Processes.join("cpu", timeout_minutes=30)
    if processes.first:
        with alone():           # accelerate and transformers see a single process here
            train_sft()
    processes.wait()            # for the first rank's output
"""

from __future__ import annotations

import logging
import os
import platform
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from torch.distributed.rendezvous import rendezvous

from zopro.errors import InputError, Stopped
from zopro.system.ranks import VARIABLES, launched, told

T = TypeVar("T")
logger = logging.getLogger(__name__)

_PATIENCE = timedelta(days=30)  # with the first rank's own stages; that it has crashed is noticed at once
_LOST = re.compile(r"gloo|nccl|connection (closed|reset|refused)|broken pipe|timed? ?out", re.IGNORECASE)
_IN_SOURCE = re.compile(r"^\[\S+:\d+\] ")  # where in gloo's source an error is raised
# Of each collective the argument that this rank hands over: its place and its name.
_GIVEN = {
    "all_gather": (1, "tensor"),
    "all_gather_into_tensor": (1, "input_tensor"),
    "all_gather_object": (1, "obj"),
    "all_reduce": (0, "tensor"),
    "broadcast": (0, "tensor"),
}


class Processes:
    """The processes that work on one run.

    Args:
        group: for what the ranks say to each other between stages, over the CPU; None for a single process.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    @classmethod
    def join(cls, device: str, timeout_minutes: int) -> Processes:
        """Meet the launcher's other processes, with one GPU for each, or as few as there are; else this one alone.

        Over NCCL where every process has a GPU of its own, which it takes for granted; over gloo where some share one.

        Args:
            device: as configured: auto, cpu or cuda.
            timeout_minutes: after which a rank that waits for another in a step gives up.

        Raises:
            InputError: `device` names one GPU for all (cuda:N, mps).
        """
        if launched() == 1:
            return cls()
        if device.startswith(("cuda:", "mps")):
            raise InputError(f"device: must be auto, cpu or cuda where a launcher starts many processes, got {device!r}.")
        timeout = timedelta(minutes=timeout_minutes)
        gpu = device != "cpu" and torch.cuda.device_count() > 0  # is_available would bind this process to the first one
        if gpu:
            see_one_gpu()
        if gpu and not dist.is_initialized():
            store, rank, size = next(rendezvous("env://", timeout=timeout))
            store.set(f"gpu/{rank}", own_gpu())
            found = [store.get(f"gpu/{other}").decode() for other in range(size)]
            dist.init_process_group(backend_of(found), store=store, rank=rank, world_size=size, timeout=timeout)
        elif not dist.is_initialized():
            dist.init_process_group("gloo", timeout=timeout)
        return cls(dist.new_group(backend="gloo", timeout=_PATIENCE))

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def settle(self, value: T) -> T:
        """The first rank's value, on every rank."""
        if self.group is None:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def agree(self, given: Mapping[str, Any]) -> None:
        """Raise `InputError` on every rank where one was given something else than the first, by its name."""
        if self.group is None:
            return
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, dict(given), group=self.group)
        for rank, theirs in enumerate(found):
            for name, value in found[0].items():
                if theirs[name] != value:
                    raise InputError(
                        f"{name}: must be the same for all processes, got {value!r} for rank 0 and {theirs[name]!r} for "
                        f"rank {rank}. Start all of them with one command."
                    )

    def wait(self) -> None:
        """Until every rank is here."""
        if self.group is not None:
            dist.barrier(group=self.group)

    def leave(self) -> None:
        """The end of work in which all went well."""
        if self.group is not None:
            self.wait()
            dist.destroy_process_group()

    @contextmanager
    def lost_ranks(self, remedy: str) -> Iterator[None]:
        """Raise `Stopped` in place of what the backend raises when another rank has crashed or does not answer."""
        try:
            yield
        except RuntimeError as error:
            lost = isinstance(error, dist.DistError) or _LOST.search(str(error))
            if self.group is None or not lost or isinstance(error, Stopped):
                raise
            reason = _IN_SOURCE.sub("", str(error).strip().splitlines()[0].split(". ")[0])
            raise Stopped(
                f"rank {self.rank} has lost another one: {reason}. Nothing finished is lost. {remedy}"
            ) from error


@contextmanager
def alone() -> Iterator[None]:
    """Inside, transformers and accelerate see this process only, though the process group stays.

    Trainers and their arguments must be made and used inside. On many GPUs each process must see one of them only.
    """
    ours = {name: os.environ.pop(name) for name in VARIABLES if name in os.environ}
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        yield
    finally:
        os.environ.update(ours)
        AcceleratorState._reset_state(reset_partial_state=True)


@contextmanager
def counted(add: Callable[[int], None]) -> Iterator[None]:
    """Inside, `add` gets the bytes that this rank hands to each collective of `torch.distributed`, whoever calls it.

    TRL and accelerate exchange rewards and lengths of their own accord, so they are counted where all exchanges pass.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        yield
        return

    from torch.distributed.distributed_c10d import _object_to_tensor  # what torch makes of an object to send it

    def counting(collective: Callable[..., Any], place: int, keyword: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            given = args[place] if len(args) > place else kwargs[keyword]
            data = given if isinstance(given, torch.Tensor) else _object_to_tensor(given, torch.device("cpu"), None)[0]
            add(data.nbytes)
            return collective(*args, **kwargs)

        return call

    collectives = {name: getattr(dist, name) for name in _GIVEN}
    for name, collective in collectives.items():
        setattr(dist, name, counting(collective, *_GIVEN[name]))
    try:
        yield
    finally:
        for name, collective in collectives.items():
            setattr(dist, name, collective)


def backend_of(gpus: Sequence[str]) -> str:
    """What processes exchange tensors by, given which GPU each has, by machine and number.

    >>> backend_of(["a/1", "a/1"])
    'cpu:gloo,cuda:gloo'
    """
    distinct = len(set(gpus)) == len(gpus) and dist.is_nccl_available()
    return f"cpu:gloo,cuda:{'nccl' if distinct else 'gloo'}"


def own_gpu() -> str:
    """Machine and number of cuda:0, as the maker numbers it: the same whatever a process sees of the machine."""
    about = torch.cuda.get_device_properties(0)
    return f"{platform.node()}/{getattr(about, 'uuid', '') or os.environ.get('CUDA_VISIBLE_DEVICES', '')}"


def exchanging(device: torch.device) -> torch.device:
    """Where the tensors lie that ranks exchange: on the device over NCCL, else on the CPU."""
    return device if "nccl" in str(dist.get_backend_config()) else torch.device("cpu")


def see_one_gpu() -> None:
    """Leave this process the GPU of its local rank, which is cuda:0 then; where they are fewer, ranks take turns."""
    count, local = torch.cuda.device_count(), told("LOCAL_RANK")
    names = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")
    if len(names) > 1 or told("LOCAL_WORLD_SIZE") == 1:  # else the scheduler has seen to it
        if local >= len(names):
            logger.warning("launcher: rank %d here shares one of %d GPUs: one process for each would be faster.", local,
                           len(names))  # fmt: skip
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local % len(names)]
    os.environ["LOCAL_RANK"] = "0"
