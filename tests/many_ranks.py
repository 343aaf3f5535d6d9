"""Jobs of several processes for tests: forked from a server that has imported everything once, met over gloo.

`results(program, size)` runs `program(*arguments)` on every rank, as a launcher would, and gives what each returned.
A program is a top-level function of this module or of a test file (the server imports it by name). A process costs a
second before its program begins: `in_turn` has the same ones do several jobs, each met anew.
"""

from __future__ import annotations

import faulthandler
import gc
import hashlib
import multiprocessing
import os
import queue
import socket
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    ["many_ranks", "pytest", "tiny_problems", "tiny_runs", "tiny_slopes", "warmed", "zopro.loop.pipeline"]
)
SECONDS = 120


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def launch(program: Callable[..., Any], size: int, *arguments: Any) -> tuple[list[Any], Any]:
    """The processes of a job, started, and the queue into which they put (rank, what `program` returned)."""
    answers, port = SERVER.Queue(), free_port()
    ranks = [SERVER.Process(target=_rank, args=(answers, port, size, rank, program, arguments)) for rank in range(size)]
    for rank in ranks:
        rank.start()
    return ranks, answers


def results(program: Callable[..., Any], size: int, *arguments: Any) -> list[Any]:
    """What `program` returned on each rank."""
    ranks, answers = launch(program, size, *arguments)
    try:
        found = dict(answers.get(timeout=SECONDS) for _ in ranks)
        for rank in ranks:
            rank.join(SECONDS)
    except queue.Empty:
        raise AssertionError(f"ranks ended without an answer: {[rank.exitcode for rank in ranks]}") from None
    finally:
        for rank in ranks:
            rank.kill()
    for answer in found.values():
        if isinstance(answer, BaseException):
            raise answer
    return [found[rank] for rank in range(size)]


Job = tuple[Callable[..., Any], tuple[Any, ...]]


def in_turn(size: int, jobs: dict[str, Job]) -> dict[str, list[Any]]:
    """`results` of several jobs, which are done one after another by the same processes."""
    ports = {name: free_port() for name in jobs}
    ranks = results(_in_turn, size, ports, jobs)
    return {name: [rank[name] for rank in ranks] for name in jobs}


def _in_turn(ports: dict[str, int], jobs: dict[str, Job]) -> dict[str, Any]:
    found = {}
    for name, (program, arguments) in jobs.items():
        os.environ["MASTER_PORT"] = str(ports[name])
        found[name] = program(*arguments)
        if dist.is_initialized():
            dist.barrier()  # the first rank's store serves until all are through
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    return found


def _rank(answers: Any, port: int, size: int, rank: int, program: Callable[..., Any], arguments: tuple) -> None:
    faulthandler.dump_traceback_later(SECONDS - 10, exit=True)
    gc.freeze()  # as in conftest.py
    torch.set_num_threads(1)
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update({name: str(value) for name, value in names.items()} if size > 1 else {})
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    try:
        answers.put((rank, program(*arguments)))
    except BaseException as error:
        answers.put((rank, error))
        raise


def bits(model: Any) -> str:
    """sha256 of all parameters."""
    total = hashlib.sha256()
    for _, parameter in sorted(model.named_parameters()):
        total.update(parameter.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def steps_of(trainer: Any) -> list[Any]:
    """The step records of a training, taken as it runs."""
    records: list[Any] = []
    make = trainer.create_optimizer

    def create_optimizer(model: Any = None) -> Any:
        optimizer = make(model)
        trainer.spsa.before_apply = records.append
        return optimizer

    trainer.create_optimizer = create_optimizer
    return records


def train(build: Callable[..., Any], rows: int, options: dict[str, Any]) -> dict[str, Any]:
    """Train on this rank's share of `rows` rows a step: records, bits, bytes and what the trainer logged."""
    share = rows // int(os.environ.get("WORLD_SIZE", "1"))
    with tempfile.TemporaryDirectory() as folder:
        trainer = build(Path(folder), per_device_train_batch_size=share, **options)
        records = steps_of(trainer)
        trainer.train()
    kind = type(trainer.model_wrapped).__name__
    return {
        "gradients": [g for record in records for g in record.projected_gradients],
        "losses": [record.loss for record in records],
        "bits": bits(trainer.model),
        "bytes": trainer.exchanged_bytes,
        "wrapped": kind,
        "parameters": sum(parameter.numel() for parameter in trainer.model.parameters()),
        "log": [line for line in trainer.state.log_history if "loss" in line],
        "group": dist.get_world_size() if dist.is_initialized() else 1,
    }
