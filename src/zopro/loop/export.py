"""A finished policy outside of its run: as a PEFT adapter or a model, and its answers beside those it started from.

Models are loaded here as the run loaded them, and nothing is trained.

    zopro export RUN --out DIR --merged
    zopro export RUN --out DIR --gguf             # llama-cli -m model.gguf --lora DIR/adapter.gguf
    zopro generate RUN --prompt "How do I boil an egg?"
"""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from zopro.config import RunConfig
from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.quantised import quantised
from zopro.engine.local.starts import joined, start_adapter, tokenizer_home
from zopro.engine.opening import generate, open_base, open_policy
from zopro.engine.servers.llamacpp.exporting import gguf_adapter, of_transformers
from zopro.errors import InputError
from zopro.loop.finished import Policy, check_answering, check_export, check_new, find_policy
from zopro.store.durable import read_json
from zopro.store.layout import Layout
from zopro.store.rundir import whole_folder
from zopro.system.random_state import preserve_random_state
from zopro.text import chat
from zopro.text.frame import check_vocabulary, declared_stops, frame_of, token_ids
from zopro.text.tokenizer import load_tokenizer
from zopro.weights.adapters import adapter_tensors
from zopro.weights.names import ADAPTER_CONFIG, ADAPTER_FILE, has_weights, is_adapter
from zopro.weights.saving import save_tensors, save_weights

GGUF_FILE = "adapter.gguf"


def export(
    run: str | Path, out: str | Path, *, iteration: int | None = None, merged: bool = False, gguf: bool = False
) -> dict[str, Any]:
    """Write a policy of `run` with its tokenizer to `out` and return what was written.

    `merged` adds the adapter to the base weights, in the dtype the run computed in, so that the model answers as the
    policy did. `gguf` also writes the adapter as llama.cpp reads it, adapter.gguf. Policies of full-parameter runs are
    models already and are copied. `out` appears complete or not at all.
    Raises `InputError` if `out` exists and is not an empty folder.
    """
    policy, out = find_policy(run, iteration), check_new(out)
    check_export(policy, merged, gguf)
    config, adapter = policy.config, is_adapter(policy.folder)
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
            save_weights(model.merge_and_unload(), partial)
        elif adapter:
            _copy_adapter(policy, partial)
            if gguf:
                (partial / GGUF_FILE).write_bytes(gguf_adapter(partial, *_as_llamacpp(config)))
        else:
            shutil.copytree(
                policy.folder, partial, dirs_exist_ok=True, ignore=shutil.ignore_patterns("trainer_state*", "*.pt")
            )
        tokenizer.save_pretrained(partial)
        _declare_stop(partial / "generation_config.json", tokenizer)
    return {
        "run": str(policy.run),
        "iteration": policy.iteration,
        "out": str(out),
        "kind": "adapter" if adapter and not merged else "model",
        "base": base_of(config.model),
    }


@preserve_random_state()  # PEFT draws initial weights before it loads the saved ones
def answer(
    run: str | Path,
    prompts: Sequence[str],
    *,
    iteration: int | None = None,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
) -> dict[str, Any]:
    """Answer each prompt, as a user's message, by the base model, the SFT policy and the aligned policy.

    The same `seed` is used for all three; `temperature` 0 takes the likeliest token. Returns `{"run", "iteration",
    "answers": [{"prompt", "base", "sft", "aligned"}, ...]}`.
    """
    check_answering(max_new_tokens, temperature, seed)
    policy = find_policy(run, iteration)
    length = policy.config.max_completion_length if max_new_tokens is None else max_new_tokens
    config = policy.config
    tokenizer = load_tokenizer(tokenizer_home(config.model), trust_remote_code=config.trust_remote_code)
    rendered = [chat.render_prompt(tokenizer, [{"role": "user", "content": prompt}]) for prompt in prompts]
    encoded = [tokenizer(text)["input_ids"] for text in rendered]
    table = {"prompt": list(prompts)}
    for name, model in _policies(policy):
        frame = frame_of(tokenizer, declared_stops(model))
        check_vocabulary(tokenizer, model, frame, rendered)
        drawn = generate(
            model,
            encoded,
            num_generations=1,
            max_new_tokens=length,
            eos_token_ids=sorted(frame.stops),
            pad_token_id=tokenizer.pad_token_id,
            do_sample=temperature > 0,
            temperature=temperature or 1.0,
            generator=torch.Generator(device=model.device).manual_seed(seed),
        )
        kept = [ids[mask.bool()].tolist() for ids, mask in zip(drawn.completion_ids, drawn.completion_mask, strict=True)]
        table[name] = [frame.read(ids) for ids in kept]
    rows = [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return {"run": str(policy.run), "iteration": policy.iteration, "answers": rows}


def side_by_side(answers: dict[str, Any], width: int | None = None) -> str:
    """Lay the rows of `answer` out for a terminal of `width` characters: three columns, or a list if it is narrow."""
    width = width or shutil.get_terminal_size((110, 24)).columns
    titles = {"base": "base", "sft": "SFT", "aligned": f"aligned (iteration {answers['iteration']})"}
    column = (width - 4) // len(titles)
    blocks = []
    for row in answers["answers"]:
        lines = [_printable(f"> {row['prompt']}")]
        if column < 24:
            for key, title in titles.items():
                lines.append(
                    textwrap.fill(_printable(row[key]), width, initial_indent=f"{title}: ", subsequent_indent="  ")
                )
        else:
            cells = [[title, "-" * len(title), *_wrap(row[key], column)] for key, title in titles.items()]
            for cut in zip_longest(*cells, fillvalue=""):
                lines.append("  ".join(text.ljust(column) for text in cut).rstrip())
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def _policies(policy: Policy) -> Iterator[tuple[str, Any]]:
    """Yield base, SFT and aligned model in turn; adapters share one base, models are loaded one at a time."""
    config, sft = policy.config, Layout(policy.run).sft()
    if not is_adapter(policy.folder):
        for name, folder in (("base", None), ("sft", sft if has_weights(sft) else None), ("aligned", policy.folder)):
            yield name, open_policy(config, folder)
        return
    model = open_adapter(open_policy(config), policy.folder, "aligned").eval()
    with model.disable_adapter():
        yield "base", model
    if has_weights(sft):
        open_adapter(model, sft, "sft")
        model.set_adapter("sft")
    with nullcontext() if has_weights(sft) else model.disable_adapter():
        yield "sft", model
    model.set_adapter("aligned")
    yield "aligned", model


def _copy_adapter(policy: Policy, target: Path) -> None:
    """Copy the adapter; a base that is a folder is named by its full path, so that PEFT finds it from anywhere."""
    start = start_adapter(policy.config.model)
    if start is None:
        adapter_tensors(policy.folder)
        shutil.copy(policy.folder / ADAPTER_FILE, target)
        settings, name = read_json(policy.folder / ADAPTER_CONFIG), policy.config.model
    else:
        tensors, settings = joined(start, policy.folder)
        save_tensors(tensors, target / ADAPTER_FILE)
        name = start.base
    settings["base_model_name_or_path"] = str(Path(name).resolve()) if Path(name).is_dir() else name
    (target / ADAPTER_CONFIG).write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", "utf-8")


def _as_llamacpp(config: RunConfig) -> tuple[str, tuple[int, int]]:
    if config.engine.startswith("llamacpp:"):
        file = open_base(config, torch.device("cpu")).served_by
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


def _wrap(text: str, width: int) -> list[str]:
    return [line for part in _printable(text).splitlines() for line in textwrap.wrap(part, width) or [""]]


def _printable(text: str) -> str:
    """`text` without control characters: a model's output must not steer the terminal."""
    return "".join(c for c in text if c.isprintable() or c == "\n")
