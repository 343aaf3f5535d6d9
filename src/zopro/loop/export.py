"""A finished policy outside of its run: as a PEFT adapter or a model, with a card that says where it comes from.

Models are loaded here as the run loaded them, and nothing is trained.

    zopro export RUN --out DIR --merged
    zopro export RUN --out DIR --gguf             # llama-cli -m model.gguf --lora DIR/adapter.gguf
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from zopro.config import RunConfig
from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.quantised import quantised
from zopro.engine.local.starts import joined, load_start, start_adapter, tokenizer_home
from zopro.engine.opening import open_policy
from zopro.engine.servers.llamacpp import published
from zopro.engine.servers.llamacpp.exporting import gguf_adapter, of_transformers
from zopro.engine.servers.llamacpp.model import Model
from zopro.errors import InputError
from zopro.loop.card import write_card
from zopro.loop.finished import Policy, check_export, check_new, find_policy
from zopro.store.durable import read_json
from zopro.store.rundir import whole_folder
from zopro.system.progress import say
from zopro.text import chat
from zopro.text.frame import frame_of, token_ids
from zopro.text.tokenizer import load_tokenizer
from zopro.weights.adapters import adapter_tensors, tensor_files
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE, is_adapter
from zopro.weights.saving import publish, save_tensors
from zopro.weights.tensors import read_tensor

GGUF_FILE = "adapter.gguf"


def export(
    run: str | Path, out: str | Path, *, iteration: int | None = None, merged: bool = False, gguf: bool = False
) -> dict[str, Any]:
    """Write a policy of `run` with its tokenizer and a model card to `out` and return what was written.

    `merged` adds the adapter to the base weights, in the dtype the run computed in, so that the model answers as the
    policy did. `gguf` also writes the adapter as llama.cpp reads it, adapter.gguf. Policies of full-parameter runs are
    models already, and are written as others know them. `out` appears complete or not at all.
    Raises `InputError` if `out` exists and is not an empty folder.
    """
    policy, out = find_policy(run, iteration), check_new(out)
    check_export(policy, merged, gguf)
    config, adapter, peft = policy.config, is_adapter(policy.folder), True
    tokenizer = load_tokenizer(tokenizer_home(config.model), config.trust_remote_code, as_published=True)
    with whole_folder(out) as partial:
        if adapter and merged:
            base = open_policy(config)
            if quantised(base):
                raise InputError(
                    "--merged: must not be given, the run's model is quantised: rounded to its weights an adapter "
                    "would be lost. Export the adapter, and merge it into the model before quantisation with PEFT."
                )
            model = open_adapter(base, policy.folder)
            publish(model.merge_and_unload(), partial)
        elif adapter:
            _copy_adapter(policy, partial)
            if gguf:
                (partial / GGUF_FILE).write_bytes(gguf_adapter(partial, *_as_llamacpp(config)))
            peft = _for_peft(config, partial)
        else:
            publish(_whole(policy), partial)
        tokenizer.save_pretrained(partial)
        _declare_stop(partial / "generation_config.json", tokenizer)
        write_card(policy, base_of(config.model), partial, adapter and not merged, peft)
    if not peft:
        say("export: this adapter is for llama.cpp alone (--gguf): its names in transformers are not known here")
    return {
        "run": str(policy.run),
        "iteration": policy.iteration,
        "out": str(out),
        "kind": "adapter" if adapter and not merged else "model",
        "base": base_of(config.model),
    }


def _whole(policy: Policy) -> Any:
    """A full-parameter policy in its base, whose files tell transformers the names that others know."""
    config = policy.config

    def loaded(model: str) -> Any:
        dtype = AutoConfig.from_pretrained(policy.folder, trust_remote_code=config.trust_remote_code).dtype
        return load_start(model, dtype or torch.float32, torch.device("cpu"), config.trust_remote_code)

    model, files = loaded(config.model), tensor_files(policy.folder)
    own = model.state_dict()
    if not files.keys() <= own.keys():
        return loaded(str(policy.folder))  # of a run of 0.1.0, which has those names itself
    for name, file in files.items():
        own[name].copy_(read_tensor(file, name))
    return model


def _copy_adapter(policy: Policy, target: Path) -> None:
    """Copy the adapter; a base that is a folder is named by its full path, so that PEFT finds it from anywhere."""
    start = start_adapter(policy.config.model)
    if start is None:
        adapter_tensors(policy.folder)
        shutil.copyfile(policy.folder / ADAPTER_FILE, target / ADAPTER_FILE)
        settings, name = read_json(policy.folder / ADAPTER_CONFIG), policy.config.model
    else:
        tensors, settings = joined(start, policy.folder)
        save_tensors(tensors, target / ADAPTER_FILE)
        name = start.base
    settings["base_model_name_or_path"] = str(Path(name).resolve()) if Path(name).is_dir() else name
    (target / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _for_peft(config: RunConfig, folder: Path) -> bool:
    """Give the adapter in `folder` the names by which PEFT finds its modules; False: they are not known."""
    if not config.engine.startswith("llamacpp:"):
        return True
    if not Path(config.served).is_file():
        say(f"export: {config.served!r} is not here: names of modules are left as in Llama's family")
        return True
    return published.publish(folder, *_as_llamacpp(config))


def _as_llamacpp(config: RunConfig) -> tuple[str, tuple[int, int]]:
    if config.engine.startswith("llamacpp:"):
        file = Model(config.served, head_only=True)
        return file.architecture, file.heads
    return of_transformers(AutoConfig.from_pretrained(base_of(config.model), trust_remote_code=config.trust_remote_code))


def _declare_stop(path: Path, tokenizer: Any) -> None:
    """A model that was trained to end its turns as its template does says so, or it would run on elsewhere."""
    if not path.is_file() or chat.turn_of(tokenizer).problem:
        return
    settings = json.loads(path.read_text("utf-8"))
    declared = token_ids(settings.get("eos_token_id"))
    stop = frame_of(tokenizer, declared).stop
    if stop not in declared:
        settings["eos_token_id"] = [stop, *declared]
        path.write_text(json.dumps(settings, indent=2) + "\n", "utf-8")


def base_of(model: str) -> str:
    """What an exported adapter belongs to: the model of the run, or its base where that was an adapter itself."""
    start = start_adapter(model)
    return model if start is None else start.base
