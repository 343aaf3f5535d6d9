"""The served model as PEFT and TRL see it: transformers' own modules of its configuration, without weights.

base = open_servers(config)            # engine: vllm:http://127.0.0.1:8000
served(get_peft_model(base, LoraConfig(...))).sample(...)
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from typing import Any, NoReturn

import torch
from peft.tuners.tuners_utils import check_target_module_exists
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from zopro.config.model import ModelOptions
from zopro.engine.local.models import lora_config
from zopro.engine.local.starts import start_adapter
from zopro.engine.local.targets import check_targets
from zopro.engine.servers.adapters import hollow, lora_tensors
from zopro.engine.servers.vllm.client import HIDDEN, Failed, Server
from zopro.engine.servers.vllm.engine import VLLMEngine
from zopro.engine.servers.vllm.publishing import tidy
from zopro.engine.servers.vllm.sharing import Fleet
from zopro.engine.servers.vllm.started import start
from zopro.errors import InputError
from zopro.text.tokenizer import cannot_load
from zopro.zo import Gaussian, Weights


def open_servers(options: ModelOptions) -> PreTrainedModel:
    """What `engine: vllm:URLS` stands for: `options.model` in names and shapes, whose passes the servers make.

    `engine: vllm` starts a server of it first, which ends with `model.end()` or the process.
    It counts as bfloat16, in which sampling and scoring differ, unless `dtype` says that the servers compute in float32.
    Raises InputError: a server does not answer, or the model's configuration cannot be read.
    """
    if start_adapter(options.model) is not None:
        raise InputError(f"model: must be the model that the servers hold, got the adapter {options.model!r}.")
    dtype = torch.float32 if options.dtype == "float32" else torch.bfloat16
    try:
        config = AutoConfig.from_pretrained(options.model, trust_remote_code=options.trust_remote_code)
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(
                config, dtype=dtype, trust_remote_code=options.trust_remote_code
            )
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        raise cannot_load("configuration", options.model, error) from error
    with suppress(OSError):  # it may have none
        model.generation_config = GenerationConfig.from_pretrained(options.model)
    hollow(model)
    if options.starts_server:
        check_targets(model, options)
        servers: list[Server] = [start(options, _modules(model, options))]
    else:
        servers = [Server(url, options.engine_timeout) for url in options.served.split(",")]
    fleet = Fleet(servers, options.engine_timeout)
    fleet.greet()
    tidy(options.adapter_folder)
    context = min(server.context for server in fleet.servers) - 1  # scoring has one token generated
    text = model.config.get_text_config()
    for server in servers:
        server.vocabulary = text.vocab_size
    text.max_position_embeddings = min(context, getattr(text, "max_position_embeddings", context))
    model.name_or_path = model.config._name_or_path = options.model
    kind = type(model)
    model.__class__ = type(kind.__name__, (kind,), {"forward": _refuse, "__module__": kind.__module__})
    model.served_by, model.serve = fleet, partial(served, folder=options.adapter_folder)
    model.check_tokens, model.end = partial(check_tokens, fleet), fleet.end
    found: PreTrainedModel = model.requires_grad_(False).eval()
    return found


def served(model: Any, folder: str = "") -> VLLMEngine:
    """The engine at the active adapter of a model of `open_servers`, whose tensors it reads."""
    tensors, alpha = lora_tensors(model)
    return VLLMEngine(model.served_by, Weights.of(tensors.items(), Gaussian()), alpha, folder)


def check_tokens(fleet: Fleet, tokenizer: Any, texts: Sequence[str]) -> list[str]:
    """A line for each server that cannot be asked how it encodes a text: what stands before it lets /v1 through alone.

    Raises InputError: a server encodes one differently from `tokenizer`, which every prompt comes from, or not at all.
    """
    lines = []
    for server in fleet.servers:
        for text in texts:
            try:
                theirs = server.tokens(text)
            except Failed as error:
                if error.status in HIDDEN:
                    lines.append(f"engine: {server.url} lets no /tokenize through: whether it encodes alike is not known")
                    break
                raise InputError(f"engine: must encode a text, got {server.url}: {error}.") from None
            if theirs != tokenizer(text, add_special_tokens=False)["input_ids"]:
                raise InputError(
                    f"model: must be the model that {server.url} serves ({server.base}), got one whose tokenizer encodes "
                    f"a prompt otherwise: {text[:60]!r}."
                )
    return lines


def _modules(model: PreTrainedModel, options: ModelOptions) -> list[str]:
    """Kinds of modules that the run's adapters are on, by their names in transformers; never the head, which vLLM cannot.

    vLLM computes an adapter's products wherever it may have one, with zeros too: on a CPU that is most of its time. All
    kinds where no linear layer is named: all-linear, and embeddings, which are refused later.
    """
    layers = (nn.Linear, Conv1D)
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, layers) and module is not head]
    config = lora_config(options, "CAUSAL_LM", model)
    named = [name for name in linear if check_target_module_exists(config, name)]
    return list(dict.fromkeys(name.rpartition(".")[2] for name in named or linear))


def _refuse(*args: Any, **kwargs: Any) -> NoReturn:
    raise InputError("engine: vllm has no network in PyTorch, which this needs. Use engine: transformers.")
