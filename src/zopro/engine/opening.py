"""The model of a configuration, run by the engine that it names, and what any such model answers.

base = open_base(config, torch.device("cpu"))      # engine: transformers, or llamacpp:FILE.gguf
rollouts = generate(open_adapter(base, folder), prompts, max_new_tokens=32, eos_token_ids=[2], pad_token_id=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from zopro.choices import ENGINES
from zopro.config.model import ModelOptions
from zopro.engine import Batch, Engine, Rollouts, Sampling
from zopro.engine.local import rollouts
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.models import resolve_dtype
from zopro.engine.local.quantised import stored_in
from zopro.engine.local.starts import load_start


def open_base(options: ModelOptions, device: torch.device) -> Any:
    """The base model, which PEFT puts adapters on. Raises InputError: it cannot be loaded."""
    if options.served:
        return ENGINES[options.engine].load()(options.served)
    dtype = resolve_dtype(options.dtype, device)
    stored = stored_in(options, dtype, device)
    return load_start(options.model, dtype, device, options.trust_remote_code, stored)


def served(model: Any) -> Engine | None:
    """The engine that runs a model at its active adapter, whose tensors it reads; None where PyTorch runs it."""
    serve = getattr(model, "serve", None)
    engine: Engine | None = None if serve is None else serve(model)
    return engine


def generate(model: Any, prompts: Sequence[Sequence[int]], *, num_generations: int = 1, **options: Any) -> Rollouts:
    """As `zopro.engine.local.rollouts.generate`, by whatever runs the model."""
    engine = served(model)
    if engine is None:
        return rollouts.generate(model, prompts, num_generations=num_generations, **options)
    return engine.sample(prompts, num_generations, Sampling(**options))[0]


def logprobs(model: Any, batch: Batch, temperature: float) -> Tensor:
    """As `Engine.logprobs` at the model's own adapter, without a graph."""
    engine = served(model)
    with torch.no_grad():
        if engine is None:
            return completion_logprobs(model, *batch, temperature=temperature)
        return engine.logprobs(batch, temperature=temperature)[0]
