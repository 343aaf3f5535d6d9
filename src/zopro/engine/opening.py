"""The model of a configuration, run by the engine that it names, and what any such model answers.

policy = open_policy(config, find_policy("runs/a").folder)      # by the engine of that configuration
rollouts = generate(policy, prompts, max_new_tokens=32, eos_token_ids=[2], pad_token_id=0)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zopro.choices import ENGINES, made_by
from zopro.config.model import ModelOptions
from zopro.engine import Batch, Engine, Rollouts, Sampling
from zopro.engine.local import rollouts
from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.models import resolve_device, resolve_dtype
from zopro.engine.local.quantised import stored_in
from zopro.engine.local.starts import load_start
from zopro.system.random_state import preserve_random_state
from zopro.weights.names import is_adapter


def open_base(options: ModelOptions, device: torch.device) -> Any:
    """The base model, which PEFT puts adapters on. Raises InputError: it cannot be loaded."""
    if options.served:
        engine = ENGINES[options.engine]
        if not options.engine.startswith("python:"):
            return engine.load()(options)
        rule = "engine: must be a function from the options to a model"
        return made_by(options.engine, lambda: engine.load()(options), torch.nn.Module, rule)
    dtype = resolve_dtype(options.dtype, device)
    stored = stored_in(options, dtype, device)
    return load_start(options.model, dtype, device, options.trust_remote_code, stored)


def open_policy(options: ModelOptions, folder: str | Path | None = None) -> Any:
    """What `generate` answers by: the policy saved in `folder`, an adapter or a whole model; None: the base itself.

    Its device is `policy.device`, where a `generator` has to be, its stop tokens are
    `frame_of(tokenizer, declared_stops(policy)).stops`. Raises InputError: it cannot be loaded.
    """
    device = resolve_device("cpu" if options.served else options.device)
    if folder is None or is_adapter(Path(folder)):
        base = open_base(options, device)
        with preserve_random_state():  # PEFT draws initial weights before it loads the saved ones
            return (base if folder is None else open_adapter(base, folder)).eval()
    return load_start(str(folder), resolve_dtype(options.dtype, device), device, options.trust_remote_code).eval()


def served(model: Any) -> Engine | None:
    """The engine that runs a model at its active adapter, whose tensors it reads; None where PyTorch runs it."""
    serve = getattr(model, "serve", None)
    engine: Engine | None = None if serve is None else serve(model)
    return engine


def end(model: Any) -> None:
    """Stop what was started to run a model, which answers no more; of another one nothing."""
    getattr(model, "end", lambda: None)()


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
