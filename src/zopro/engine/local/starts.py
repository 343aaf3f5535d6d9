"""A model to start from that is a PEFT adapter: what `zopro export` or PEFT wrote, given back as `model`.

The adapter is merged into its base in memory, so that everything after knows one ordinary model. A run's own adapters
then belong to the merged model; `joined` makes of both one adapter over the base that everybody has.

from zopro.engine.local.starts import load_start
model = load_start("exported", torch.float32, torch.device("cpu"))
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import LocalEntryNotFoundError, RemoteEntryNotFoundError
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils.peft_utils import find_adapter_config_file

from zopro.config.model import GGUF
from zopro.engine.local import models, targets
from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.quantised import quantised
from zopro.errors import InputError, one_line
from zopro.store.durable import disk_full
from zopro.store.layout import Layout
from zopro.system.random_state import preserve_random_state
from zopro.weights.adapters import adapter_state, adapter_tensors
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE

TOKENIZER_CONFIG = "tokenizer_config.json"
CHANGES_MORE = ("use_dora", "lora_bias", "use_qalora", "target_parameters", "modules_to_save", "trainable_token_indices")
"""PEFT's options of adapters that are more than scale * B A on some weights; so is any `bias` but none."""


@dataclass(frozen=True)
class StartAdapter:
    """An adapter that was given as the model.

    folder: its own or one in the Hub's cache, with its configuration and weights, and with tokenizer_config.json where it
    comes with a tokenizer.
    """

    folder: Path
    base: str  # as adapter_config.json names it
    settings: dict[str, Any]


def start_adapter(model: str) -> StartAdapter | None:
    """The PEFT adapter that `model`, a folder or a Hub id, is; None where it is a model, or nothing.

    Raises:
        InputError: its configuration cannot be read, it is no adapter of a language model, it names no base, or its files
            cannot be fetched.
    """
    if Layout(model).policies().is_dir() and Layout(model).config().is_file():
        raise InputError(f"model: must be a model or an adapter, got the run directory {model!r}. Use zopro export.")
    if model.endswith(GGUF):  # a file, which the Hub would be asked for in vain
        return None
    try:
        found = find_adapter_config_file(model)
    except (OSError, ValueError):
        return None  # whoever loads the model says what is wrong with its name
    if found is None:
        return None
    path = Path(found)
    try:
        settings = json.loads(path.read_text("utf-8"))
        kind, task, base = (settings.get(key) for key in ("peft_type", "task_type", "base_model_name_or_path"))
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"model: {str(path)!r} must be a PEFT adapter's configuration, but {error}.") from None
    on_hub = not Path(model).is_dir()
    if on_hub:
        _fetch(model, path, "config.json")
    if (path.parent / "config.json").is_file():
        raise InputError(
            f"model: must be a model or an adapter, got {model!r}, which is both. Move one of them away"
            f"{', in a copy of yours' if on_hub else ''}."
        )
    if task not in (None, "CAUSAL_LM"):
        raise InputError(f"model: must be a language model's adapter (CAUSAL_LM), got {model!r}, which is of {task}.")
    if kind != "LORA":
        raise InputError(f"model: must be a model or a LORA adapter, got {model!r} ({kind}). Merge it with PEFT.")
    if not base or not isinstance(base, str):
        raise InputError(f"model: the adapter {model!r} must name its base: set base_model_name_or_path in '{path}'.")
    if on_hub:
        _fetch(model, path, TOKENIZER_CONFIG)
        if not _fetch(model, path, ADAPTER_FILE):
            where = "in the Hub's cache, and HF_HUB_OFFLINE is set" if is_offline_mode() else "on the Hub"
            raise InputError(f"model: the adapter {model!r} must have {ADAPTER_FILE}, which is not {where}.")
    return StartAdapter(path.parent, base, settings)


def _fetch(model: str, config: Path, name: str) -> bool:
    """Whether a repository of the Hub has the file `name`, which is then in the cache beside its adapter's `config`.

    Raises InputError: the Hub cannot be asked. Offline a file that is not in the cache is one that it has not; so is one
    beside the weights where the Hub cannot be reached.
    """
    commit = config.parent.name
    if known := try_to_load_from_cache(model, name, revision=commit):
        return isinstance(known, str)  # else it is known to be missing
    try:
        hf_hub_download(model, name, revision=commit)
    except RemoteEntryNotFoundError:
        return False
    except Exception as error:  # of httpx, of the Hub's own kinds, and OSError
        if disk_full(error):
            raise
        if is_offline_mode() or (name != ADAPTER_FILE and isinstance(error, LocalEntryNotFoundError)):
            return False
        why = one_line(error.__cause__ or error)[:200].rstrip(".")
        raise InputError(f"model: {name} of the adapter {model!r} cannot be fetched ({why}). Try again.") from error
    return True


def tokenizer_home(model: str) -> str:
    """Where the tokenizer of `model` is: an adapter's folder often has none, and its base's is meant."""
    adapter = start_adapter(model)
    if adapter is None or (adapter.folder / TOKENIZER_CONFIG).is_file():
        return model
    return adapter.base


def start_note(model: str) -> str | None:
    """What there is to say about a model that is an adapter; None where it is none."""
    adapter = start_adapter(model)
    return None if adapter is None else f"model {model} is an adapter: merged into its base {adapter.base} in memory"


def load_start(
    model: str,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    stored: Mapping[str, Any] | None = None,
) -> PreTrainedModel:
    """The causal language model, as `models.load_base` gives it; an adapter is merged into its base.

    Raises:
        InputError: neither can be loaded, or the adapter does not fit its base.
    """
    adapter = start_adapter(model)
    if adapter is None:
        return models.load_base(model, dtype, device, trust_remote_code, stored)
    if stored:
        raise InputError(
            f"model: must be a model where it is quantised when loaded, got the adapter {model!r}. Merge it into its "
            "base first: zopro export --merged."
        )
    if start_adapter(adapter.base) is not None:
        raise InputError(f"model: the base of adapter {model!r} must be a model, got the adapter {adapter.base!r}.")
    try:
        base = models.load_base(adapter.base, dtype, device, trust_remote_code)
    except InputError as error:
        raise InputError(
            f"model: the adapter {model!r} needs its base, which adapter_config.json names: "
            f"{str(error).removeprefix('model: ')}"
        ) from error
    if quantised(base):
        raise InputError(
            f"model: the adapter {model!r} cannot be merged into its base {adapter.base!r}, which is quantised. Name the "
            "base before quantisation in its adapter_config.json, or give a model."
        )
    _check_tied(base, adapter)
    with preserve_random_state():  # PEFT draws initial weights before it loads the saved ones
        opened = open_adapter(base, adapter.folder)
        merged: PreTrainedModel = opened.merge_and_unload()
    # Adapters over the merged model say so: PEFT must not put them on the base alone.
    merged.__dict__["name_or_path"] = merged.config._name_or_path = f"{adapter.base} + {model}"
    return merged.requires_grad_(False).eval()


def _check_tied(base: PreTrainedModel, adapter: StartAdapter) -> None:
    """Raise InputError for an adapter of one end of a model whose ends share a matrix: merged it would move both."""
    ends = base.get_output_embeddings(), base.get_input_embeddings()
    if not targets.tied(*ends):
        return
    names = [name for name, module in base.named_modules() if any(module is end for end in ends)]
    if found := next((n for n in names if any(key.startswith(f"{n}.") for key in adapter_state(adapter.folder))), None):
        raise InputError(
            f"model: the adapter '{adapter.folder}' must not adapt {found}: embeddings and output head share its weights "
            f"in the base {adapter.base!r}. Train it on a base whose weights are untied, or leave it out."
        )


def joined(start: StartAdapter, policy: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and configuration of one adapter that adds to the start's base what both adapters add.

    scale B A + scale' B' A' = [scale B, scale' B'] [A; A']: exact, of the sum of their ranks.

    Raises:
        InputError: one of the two is more than that.
    """
    parts = [(adapter_tensors(folder), _settings(folder)) for folder in (start.folder, policy)]
    for _, settings in parts:
        more = [key for key in CHANGES_MORE if settings.get(key)]
        if settings.get("bias", "none") != "none" or more:
            what = more[0] if more else "bias"
            raise InputError(
                f"--out: the run began from the adapter '{start.folder}', which cannot be joined with the policy's into "
                f"one ({what}). Use --merged, which writes a model."
            )
    factors: dict[str, list[tuple[Tensor, Tensor]]] = {}
    sides: dict[str, tuple[str, str]] = {}
    for tensors, settings in parts:
        config = LoraConfig(
            **{k: settings[k] for k in ("r", "lora_alpha", "use_rslora", "alpha_pattern") if settings.get(k) is not None}
        )
        for name, a in tensors.items():
            for end_a, end_b in (("lora_A.weight", "lora_B.weight"), ("lora_embedding_A", "lora_embedding_B")):
                if name.endswith(f".{end_a}"):
                    module = name.removesuffix(f".{end_a}")
                    b, plain = tensors[f"{module}.{end_b}"], module.removeprefix("base_model.model.")
                    alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, plain), config.lora_alpha)
                    scale = alpha / (math.sqrt(len(a)) if config.use_rslora else len(a))
                    factors.setdefault(module, []).append((a.float(), scale * b.float()))
                    sides[module] = end_a, end_b
    result: dict[str, Tensor] = {}
    ranks: dict[str, int] = {}
    for module, pairs in factors.items():
        result[f"{module}.{sides[module][0]}"] = torch.cat([a for a, _ in pairs])
        result[f"{module}.{sides[module][1]}"] = torch.cat([b for _, b in pairs], 1)
        ranks["^" + module.removeprefix("base_model.model.").replace(".", r"\.")] = sum(len(a) for a, _ in pairs)
    rank, uneven = max(ranks.values()), len(set(ranks.values())) > 1
    settings = {
        **parts[1][1],
        "r": rank,
        "lora_alpha": rank,  # the scales are in B
        "use_rslora": False,
        "rank_pattern": ranks if uneven else {},
        "alpha_pattern": ranks if uneven else {},
        "target_modules": sorted(module.removeprefix("base_model.model.") for module in factors),
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "base_model_name_or_path": start.base,
    }
    return result, settings


def _settings(folder: Path) -> dict[str, Any]:
    return dict(json.loads((folder / ADAPTER_CONFIG).read_text("utf-8")))
