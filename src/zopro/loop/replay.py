"""Rebuild a policy from where it started and its journal: no base model, no data, no reward model, no forward pass.

A zeroth-order step is a seed and a few scalars, and a direction is a function of the seed and of earlier updates. So the
journal beside the starting adapter holds every policy in between, to the bit.

    zopro replay RUN --iteration 2 --to-step 17 --out DIR
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zopro.choices import DIRECTIONS
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.finished import check_new, check_step, find_journal, kept_config
from zopro.loop.recording import TARGETED, digest
from zopro.store.durable import whole_folder
from zopro.store.journal import Header, Journal, read
from zopro.store.layout import Layout
from zopro.system.progress import counted
from zopro.system.threads import torch_threads
from zopro.weights.adapters import tensor_files, tensor_name
from zopro.weights.saving import save_tensors
from zopro.weights.tensors import read_tensor, read_whole
from zopro.weights.updates import policy_update, reward_update
from zopro.zo import Directions, Targeted, Weights
from zopro.zo.directions import noise_source


def replay(
    run: str | Path, out: str | Path, *, iteration: int | None = None, to_step: int | None = None
) -> dict[str, Any]:
    """Write the policy after `to_step` steps of `iteration` (default: all, of the newest with a journal) to `out`.

    Returns:
        run, iteration, step, steps (in the journal), out, equal (to RUN/policy/NNN to the bit; None where that is not
        what was asked for or not there yet), journal_bytes, policy_bytes.

    Raises:
        InputError: `run` is no run directory; the iteration has no journal (it was first-order) or one whose
            directions are not functions of a seed; a file that the steps depend on is missing or has changed; `out`
            is not empty.
    """
    iteration, path = find_journal(run, iteration)
    run, out, layout = Path(run), check_new(out), Layout(run)
    config, journal = kept_config(run), read(path)
    if journal.truncated and to_step is None and layout.policy(iteration).exists():
        raise InputError(
            f"journal: {path} is damaged: its last line is cut off, though the iteration is finished. Restore the file, "
            f"or replay the steps before it: --to-step {len(journal.steps)}."
        )
    steps = len(journal.steps) if to_step is None else to_step
    check_step(steps, len(journal.steps))
    _check_files(run, config, journal.header)
    start = run / journal.header.start
    with _as_recorded(journal.header):
        tensors = rebuild(run, config, journal, steps)
    with whole_folder(out) as partial:
        _write(start, tensors, partial)
    last = layout.policy(iteration)
    compared = last.exists() and steps == len(journal.steps)
    return {
        "run": str(run),
        "iteration": iteration,
        "step": steps,
        "steps": len(journal.steps),
        "out": str(out),
        "equal": _equal(out, last) if compared else None,
        "journal_bytes": path.stat().st_size,
        "policy_bytes": sum(file.stat().st_size for file in set(tensor_files(out).values())),
    }


def describe(result: dict[str, Any]) -> str:
    """The result of `replay` as text."""
    equal = {True: ", equal to the trained one to the bit", False: ", NOT equal to the trained one", None: ""}
    share = result["journal_bytes"] / result["policy_bytes"]
    return (
        f"policy of iteration {result['iteration']} after step {result['step']} of {result['steps']} written to "
        f"{result['out']}{equal[result['equal']]}\n"
        f"journal {result['journal_bytes']:,} bytes, policy {result['policy_bytes']:,} bytes ({share:.2%})"
    )


def rebuild(run: Path, config: RunConfig, journal: Journal, steps: int) -> dict[str, Tensor]:
    """The tensors, by their names in the files, after the first `steps` steps. Raises InputError as `replay`."""
    header = journal.header
    directions = _directions(run, config, header)
    files = tensor_files(run / header.start)
    device = torch.device(header.device)
    tensors = {name: tensor.to(device) for file in set(files.values()) for name, tensor in read_whole(file).items()}
    trained = [
        (tensor_name(name), tensor) for name, tensor in tensors.items() if tensor_name(name) not in header.untrained
    ]
    try:
        weights = Weights.of(trained, directions)
    except ValueError as error:
        raise InputError(f"journal: does not fit the policy in '{run / header.start}': {error}.") from None
    for step in counted(journal.steps[:steps], "replaying", "steps"):
        weights.apply(step.record)
    return {name: tensor.cpu() for name, tensor in tensors.items()}


def _directions(run: Path, config: RunConfig, header: Header) -> Directions:
    made = header.directions
    if header.unsaved:
        raise InputError(
            f"--iteration: {header.iteration} trained {header.unsaved[0]!r}, which '{run / header.start}' does not hold: "
            "it cannot be replayed. Use zopro export."
        )
    noise = made.get("noise", {"kind": "gaussian"}) if made["kind"] == TARGETED else made
    if noise["kind"] not in DIRECTIONS:
        raise InputError(
            f"--iteration: {header.iteration} was trained along {noise['kind']} directions, which come from the data and "
            "not from a seed, so a journal cannot rebuild them. Use zopro export."
        )
    mu = _previous_update(run, config, *made["previous_update"]) if made.get("previous_update") else {}
    if made["kind"] != TARGETED:
        return _noise(noise, mu)
    folders = [run / folder for folder in made["reward_update"] or ()]
    v = reward_update(folders[0], folders[1], config.lora_r == 0, config.lora_alpha) if folders else {}
    return Targeted(mu, v, made["total_steps"], made["decay"], made["normalize"], _noise(noise, mu))


def _previous_update(run: Path, config: RunConfig, after: str, before: str) -> Mapping[str, Tensor]:
    base = not (run / before).exists()  # the base model, by its own name
    return policy_update(run / after, Path(config.model) if base else run / before, config.lora_r == 0)


def _noise(made: dict[str, Any], mu: Mapping[str, Tensor]) -> Directions:
    arguments = {key: made[key] for key in DIRECTIONS[made["kind"]].keeps}
    return noise_source(made["kind"], mu, **arguments)


def _check_files(run: Path, config: RunConfig, header: Header) -> None:
    for name, recorded in header.files.items():
        path = run / name  # an absolute name stays itself
        path = path if path.exists() else Path(name)
        if not path.is_file():
            raise InputError(f"RUN: must hold '{name}', from which iteration {header.iteration} began, and does not.")
        if digest(path) != recorded:
            raise InputError(
                f"RUN: '{name}' has changed since iteration {header.iteration} was trained from it (its sha256 differs "
                "from the journal's). Restore it."
            )


@contextmanager
def _as_recorded(header: Header) -> Iterator[None]:
    """The device and number of threads of the training: sums and generators depend on them."""
    if header.device == "cuda" and not torch.cuda.is_available():
        raise InputError("RUN: must be replayed on the kind of device it was trained on, a GPU, got a machine without.")
    with torch_threads(header.threads):
        yield


def _write(start: Path, tensors: dict[str, Tensor], target: Path) -> None:
    """`start`'s folder with other values in its tensor files; its permissions, of an archive perhaps, stay behind."""
    files = tensor_files(start)
    for file in {path for path in start.rglob("*") if path.is_file()} - set(files.values()):
        place = target / file.relative_to(start)
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, place)
    for file in set(files.values()):
        kept = {name: tensors[name] for name, where in files.items() if where == file}
        save_tensors(kept, target / file.name)


def _equal(one: Path, other: Path) -> bool:
    """Whether two saved policies have the same tensors, to the bit."""
    ours, theirs = tensor_files(one), tensor_files(other)
    return ours.keys() == theirs.keys() and all(
        _same_bits(read_tensor(file, name), read_tensor(theirs[name], name)) for name, file in ours.items()
    )


def _same_bits(a: Tensor, b: Tensor) -> bool:
    left, right = (tensor.contiguous().flatten().view(torch.uint8) for tensor in (a, b))
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(left, right)
