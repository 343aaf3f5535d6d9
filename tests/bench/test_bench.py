"""`zopro bench step`: the step does the floor's forward passes and no others, and the command reports as documented."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from zopro.bench import command, kinds, measure
from zopro.bench.clock import Watch
from zopro.bench.command import bench_step, table
from zopro.bench.floor import floor_passes
from zopro.bench.work import Work, build
from zopro.engine.local import models
from zopro.errors import InputError, Stopped

TINY = Work(size="tiny", vocab_size=64, prompts=2, num_generations=3, prompt_length=7, completion_length=5, steps=2)
TINY = dataclasses.replace(TINY, dtype="float32")


class Counted(TorchDispatchMode):
    """Tokens through the backbone's layers, and logits from the output matrix or parts of it, whoever multiplies."""

    def __init__(self, setting: Any) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        for name, model in (("policy", setting.base), ("classifier", setting.classifier)):
            layer = model.base_model.layers[0]
            layer.register_forward_hook(lambda module, inputs, output, name=name: self.add(name, inputs[0]))
        self.head = setting.base.lm_head.weight.untyped_storage().data_ptr()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.counts["logits"] += result.numel() * (args[-1].untyped_storage().data_ptr() == self.head)
        return result

    def add(self, name: str, hidden: torch.Tensor) -> None:
        self.counts[name] += hidden[..., 0].numel()


@pytest.mark.parametrize(
    ("sides", "evaluation", "beta"),
    [(1, "sequential", 0.05), (2, "sequential", 0.0), (2, "together", 0.05)],
)
def test_a_step_passes_no_token_more_than_its_floor(sides: int, evaluation: str, beta: float, tmp_path: Any) -> None:
    setting = build(dataclasses.replace(TINY, sides=sides, evaluation=evaluation, beta=beta))
    watch = Watch(setting.policy.device)
    trainer = measure.step_trainer(setting, 3, str(tmp_path), watch)
    passes, counted, seen = floor_passes(setting), Counted(setting), []

    def after() -> None:
        step = counted.counts.copy()
        counted.counts.clear()
        passes(watch)
        seen.append((step, counted.counts.copy()))
        counted.counts.clear()

    trainer.add_callback(measure._Steps(watch, after))
    with counted:
        trainer.train()
    for step, floor in seen[1:]:  # the first one compares L(theta) with an evaluation
        assert step == floor and step["logits"] > 0


def test_phases_add_up_to_the_step() -> None:
    result = kinds.measure("step", TINY)
    assert set(result["phases"]) == {*measure.PHASES, "other"}
    assert all(seconds >= 0 for seconds in result["phases"].values())
    assert sum(result["phases"].values()) == pytest.approx(result["step_s"], rel=0.2)
    assert sum(result["floor_phases"].values()) == pytest.approx(result["floor_s"], rel=0.2)
    assert set(result["floor_phases"]) == {"rollout", "scoring", "reference", "log-probs"}


@pytest.mark.parametrize("kind", ["peer", "peer-plain"])
def test_the_peer_does_the_same_work(kind: str, tmp_path: Any) -> None:
    setting = build(TINY)
    trainer = measure.peer_trainer(setting, 1, str(tmp_path), checkpointing=kind == "peer")
    trainer.train()
    assert trainer.args.gradient_checkpointing == (kind == "peer")
    logged = next(line for line in trainer.state.log_history if "completions/mean_length" in line)
    assert logged["completions/min_length"] == logged["completions/max_length"] == TINY.completion_length
    assert logged["num_tokens"] == 6 * (7 + 5)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("kind", ["step", "peer"])
def test_a_step_over_quantised_weights(bits: int, kind: str) -> None:
    """Where bitsandbytes is installed: the same work, over weights that take fewer bytes."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    work = dataclasses.replace(TINY, steps=1, **{f"load_in_{bits}bit": True})
    modules = build(work).base.model.named_modules()
    linear = {type(module) for name, module in modules if isinstance(module, torch.nn.Linear) and "lora_" not in name}
    assert linear == {bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt}
    plain, measured = build(TINY), kinds.measure(kind, work)
    assert measured["step_s"] > 0 and measured["parameters"] == plain.parameters


@pytest.mark.parametrize("lora_r", [0, 4])
def test_the_command_reports_what_it_promises(lora_r: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of adapters with one memory measured in a process of its own, which takes most of the time to start."""
    apart = command._run

    def run(kind: str, work: Work) -> dict[str, Any]:
        return (apart if lora_r and kind == "inference-memory" else kinds.measure)(kind, work)

    monkeypatch.setattr(command, "_run", run)
    work = dataclasses.replace(TINY, lora_r=lora_r, beta=0.05 if lora_r else 0.0, threads=1)
    result = bench_step(work)
    names = {"step_s", "floor_s", "floor_ratio", "phases", "peak_mb", "inference_peak_mb", "memory_ratio"}
    assert names <= set(result)
    assert result["memory_ratio"] == result["peak_mb"] / result["inference_peak_mb"] > 0.5
    assert "step / floor" in table(result)
    assert ", 1 thread; " in table(result) and ": 0.1 M parameters" in table(result)


def test_on_a_gpu_all_kinds_run_here_and_say_their_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def measure(kind: str, work: Work) -> dict[str, Any]:
        measured.append(kind)
        return {"step_s": 1.5 + len(measured), "floor_s": 2.0, "floor_ratio": 1.25, "peak_mb": 100.0 * len(measured)}

    monkeypatch.setattr(models, "resolve_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(kinds, "measure", measure)
    monkeypatch.setattr(command.subprocess, "run", lambda *args, **options: pytest.fail("another process"))
    lines: list[str] = []
    result = bench_step(TINY, "trl-cb", lines.append)
    assert measured == ["step", "step-memory", "inference-memory", "peer-cb"]
    assert [line for line in lines if any(digit in line for digit in ("2.500", "300", "5.500"))] == lines[1::2]
    assert result["cb_speed_ratio"] == 5.5 / 2.5 and result["cb_peer_memory_ratio"] == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": "2b"}, "size: must be one of tiny, 0.1b, 1b, 3b, 8b, got '2b'"),
        ({"num_generations": 1}, "num_generations: must be at least 2, got 1"),
        ({"lora_r": 0}, "beta: must be 0 with lora_r=0"),
        ({"evaluation": "together", "sides": 1}, "evaluation: must be sequential or batched with sides: 1"),
        ({"evaluation": "batched", "lora_r": 0, "beta": 0.0}, "evaluation: must be sequential with lora_r: 0"),
        ({"seed": 2**32}, "seed: must be less than 2^32"),
        ({"threads": 10**6}, "threads: must be at most "),
        ({"beta": math.inf}, "beta: must be at most 3.4e+38, got inf"),
        ({"model": "no/such/folder", "prompts": 1}, "model: no folder and no Hub id"),
    ],
)
def test_bad_input_is_one_line(options: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "_measured", lambda kind, work: pytest.fail("it is measured"))
    with pytest.raises(InputError, match=re.escape(message)):
        bench_step(Work(**options))
    for peer, said in (("verl", "one of trl, trl-cb, got 'verl'"), ("trl-cb", "trl on a CPU, got 'trl-cb'")):
        with pytest.raises(InputError, match=f"peer: must be {said}"):
            bench_step(dataclasses.replace(TINY, device="cpu"), peer)


@pytest.mark.parametrize(
    ("does", "kind", "message"),
    [
        ("echo 'Loading weights: 100%' >&2; kill -9 $$", Stopped, "'step' was killed by SIGKILL; most likely the memory"),
        ("echo 'KeyError: 1' >&2; exit 1", Stopped, "'step' failed: KeyError: 1$"),
        ("""echo '{"code": 1, "error": "the memory is full"}'""", Stopped, "^the memory is full$"),
        ("""echo '{"code": 2, "error": "model: must be there"}'""", InputError, "^model: must be there$"),
    ],
)
def test_why_a_measurement_has_ended(
    does: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat > /dev/null\n{does}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(kind, match=message):
        command._apart("step", TINY)
