"""What is measured in a process of its own: steps and their floor, a step's peak memory, generating's, a peer's steps."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from typing import Any

import torch

from zopro.bench import measure as steps  # by every kind, so that the libraries are in every kind's memory
from zopro.bench.work import Work, build
from zopro.engine.local.rollouts import generate
from zopro.system.heap import give_back
from zopro.system.memory import PeakMemory


def measure(kind: str, work: Work) -> dict[str, Any]:
    """The result of one kind of measurement; `peak_mb` counts from after the model is loaded."""
    if kind == "step-memory":
        work = dataclasses.replace(work, steps=1)
    setting = build(work, classifier=kind != "inference-memory")
    device = setting.policy.device
    about = {"parameters": setting.parameters, "dtype": str(setting.policy.dtype).removeprefix("torch."),
             "device": device.type, "threads": torch.get_num_threads()}  # fmt: skip
    gc.collect()
    give_back()  # of a model that was quantised the wide weights
    memory = PeakMemory(device)
    result: dict[str, Any] = {}
    if kind == "inference-memory":
        _generate(setting)
    elif kind == "step":
        result = steps.measure_step(setting)
    elif kind == "step-memory":
        with tempfile.TemporaryDirectory() as folder:
            steps.step_trainer(setting, 2, folder).train()
    else:
        result = steps.measure_peer(setting, checkpointing=kind != "peer-plain", batching=kind == "peer-cb")
    return {**about, **result, "peak_mb": memory.peak_mb()}


def _generate(setting: Any) -> None:
    for _ in range(2):
        generate(
            setting.policy,
            setting.prompt_ids,
            num_generations=setting.work.num_generations,
            max_new_tokens=setting.work.completion_length,
            eos_token_ids=-1,
            pad_token_id=setting.tokenizer.pad_token_id,
        )
