"""Whether two source trees do the same work to the bit: tiny runs by each, compared file by file.

For changes that must not change a value. A tree is a checkout, or a folder that holds `zopro`. Each runs the zeroth-order
methods and guided, with adapters and with all parameters, sequential and together, as one process and as two. Compared
are the journals, the tensors of all adapters and models, samples.jsonl, preferences.jsonl, the evaluations and
metrics.jsonl (without seconds, memory and versions). NEW also replays what OLD has journals of. Ends with 1 if anything
differs.

Runs are typed as users type them (`zopro run`), so the trees may differ in their modules. They are forked from one
process a tree, which has imported everything once. Takes about two minutes a tree on an idle core.

    git worktree add ../before main && python benchmarks/same_bits.py ../before .
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import importlib
import json
import os
import pkgutil
import re
import shutil
import socket
import subprocess
import sys
import time
from itertools import zip_longest
from pathlib import Path
from typing import Any

from forked_run import zopro_here

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "task": "preference", "judge": "python:tiny_runs:prefers_short", "device": "cpu", "seed": 1, "iterations": 2,
    "warm_start": "sft", "max_prompt_length": 48, "max_completion_length": 8, "lora_r": 4, "sft_steps": 2,
    "sft_batch_size": 4, "sft_learning_rate": 1e-2, "reward_steps": 2, "reward_batch_size": 4,
    "reward_learning_rate": 1e-2, "refine_steps": 1, "policy_steps": 3, "prompts_per_step": 2, "pair_prompts": 8,
    "eval_prompts": 6, "eval_batch_size": 4, "weight_decay": 0.01,
}  # fmt: skip
FULL, TOGETHER = {"lora_r": 0}, {"evaluation": "together"}
CASES: dict[str, dict[str, Any]] = {
    **{f"{method}{name}": {"method": method, **options}
       for method in ("zopro", "mezo")
       for name, options in ((", lora", {}), (", lora, together", TOGETHER), (", all", FULL))},
    # at the paper's eps, 1e-5, no loss of so small a model differs
    **{f"zopro-paper{name}": {"method": "zopro-paper", "eps": 0.1, **options}
       for name, options in ((", lora", {}), (", lora, together", TOGETHER), (", all", FULL))},
    "guided, lora": {"method": "guided"},
    "guided, all": {"method": "guided", **FULL},
    "guided spsa, lora": {"method": "guided", "guide": "spsa"},
    "guided mixed, lora, together": {"method": "guided", "guide": "mixed", **TOGETHER},
    "zopro, first-order start": {"warm_start": "first_order"},
    "zopro, one-sided, 2 queries": {"sides": 1, "queries": 2, "warm_start": "spsa", "decay": "exponential"},
    "mezo, low rank, all": {"method": "mezo", "noise": "low_rank", **FULL},
}  # fmt: skip
ON_TWO_RANKS = {
    name: options
    for name, options in CASES.items()
    if options.get("method", "zopro") != "guided" or name == "guided, lora"
} | {"zopro, 2 queries shared": {"queries": 2, "parallel": "queries"}}
KINDS = ("journals", "tensors", "samples", "preferences", "evaluations", "metrics")
VARIES = re.compile(r"time|seconds|_mb$|memory|^versions$|^crc32$")  # keys
SHOWN = 4  # differences of one run


def jobs(only: str) -> dict[str, tuple[int, dict[str, Any]]]:
    """Name -> (processes, options)."""
    every = {name: (1, options) for name, options in CASES.items()}
    every |= {f"{name}, 2 ranks": (2, options) for name, options in ON_TWO_RANKS.items()}
    return {name: job for name, job in every.items() if re.search(only, name)}


# In a tree's own process, which has that tree's zopro.


def work(inputs: Path, out: Path, only: str, old: Path | None) -> None:
    """Run all jobs into `out`, replay those of `old`, and write outcomes.json: name -> last line of those that failed."""
    import zopro

    print(f"  {Path(zopro.__file__).parent}", file=sys.stderr, flush=True)
    for module in pkgutil.walk_packages(zopro.__path__, "zopro."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    for name, module in list(sys.modules.items()):
        if name.startswith("zopro.analysis") and hasattr(module, "refresh") and hasattr(module, "finish"):
            module.refresh = module.finish = lambda run: None  # type: ignore[attr-defined]  # reports are slow
    gc.freeze()
    failed = {}
    for name, (ranks, options) in jobs(only).items():
        began = time.perf_counter()
        config = out / f"{folder_name(name)}.json"  # which is YAML too
        files = {"model": str(inputs / "model"), "train_data": str(inputs / "rows.jsonl")}
        config.write_text(json.dumps({**SETTINGS, **files, **options}), encoding="utf-8")
        log = config.with_suffix(".run")
        if line := run(ranks, ["run", str(config), "--output_dir", str(out / folder_name(name))], log):
            failed[name] = line
        earlier = old / folder_name(name) if old else None
        if earlier and not line and options.get("method") != "guided" and last_journal(earlier):
            replayed = out / f"{folder_name(name)}-replayed"
            if line := run(1, ["replay", str(earlier), "--out", str(replayed)], log):
                failed[f"{name}, replay"] = line
        print(f"  {name}: {time.perf_counter() - began:.1f} s {line}", file=sys.stderr, flush=True)
    (out / "outcomes.json").write_text(json.dumps(failed), encoding="utf-8")


def run(ranks: int, command: list[str], log: Path) -> str:
    """`zopro COMMAND` on so many forked processes; the last line of what a rank said that failed, or nothing."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    children = {}
    for rank in range(ranks):
        said = log.with_suffix(f".{rank}.txt")
        pid = os.fork()
        if pid == 0:
            launched = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks}
            launched |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            os.environ.update({key: str(value) for key, value in launched.items()} if ranks > 1 else {})
            descriptor = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
            os.dup2(descriptor, 1)
            os.dup2(descriptor, 2)
            os._exit(zopro_here(command))
        children[pid] = said
    failed = [said for pid, said in children.items() if os.waitpid(pid, 0)[1]]
    return (failed[0].read_text(errors="replace").strip().splitlines() or ["it crashed"])[-1] if failed else ""


# In the process that compares; it has no zopro.


def folder_name(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name)


def last_journal(run: Path) -> Path | None:
    return max(run.glob("iterations/*/journal.jsonl"), default=None)


def tensors(file: Path) -> dict[str, str]:
    """Name -> type, shape and sha256 of the bytes of each tensor in a safetensors file."""
    data = file.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    return {
        name: f"{entry['dtype']} {entry['shape']} "
        + hashlib.sha256(data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]).hexdigest()
        for name, entry in header.items()
        if name != "__metadata__"
    }


def lines(file: Path, ignored: set[str]) -> list[dict[str, Any]]:
    """The objects of a JSON or JSON-lines file, without what varies."""
    text = file.read_text(encoding="utf-8")
    rows = [json.loads(text)] if file.suffix == ".json" else [json.loads(line) for line in text.split("\n") if line]
    return [{k: v for k, v in row.items() if k not in ignored and not VARIES.search(k)} for row in rows]


def found(run: Path, ignored: set[str]) -> dict[str, dict[str, Any]]:
    """Kind -> name of a file in the run -> what is in it."""
    patterns = {
        "journals": "iterations/*/journal.jsonl",
        "samples": "iterations/*/samples.jsonl",
        "preferences": "iterations/*/preferences.jsonl",
        "evaluations": "evaluations/*.json*",
        "metrics": "metrics.jsonl",
    }
    named = {kind: {str(f.relative_to(run)): lines(f, ignored) for f in run.glob(p)} for kind, p in patterns.items()}
    return {**named, "tensors": {str(f.relative_to(run)): tensors(f) for f in run.rglob("*.safetensors")}}


def difference(one: Any, other: Any) -> str:
    """Where two files' contents first differ."""
    if one is None or other is None:
        return f"only {'NEW' if one is None else 'OLD'} has it"
    if isinstance(one, dict):
        names = [name for name in {**one, **other} if one.get(name) != other.get(name)]
        return f"{len(names)} of {len({**one, **other})} tensors, as {names[0]}"
    for number, (a, b) in enumerate(zip_longest(one, other, fillvalue={}), 1):
        keys = [key for key in {**a, **b} if a.get(key) != b.get(key)]
        if keys:
            return f"line {number}, {', '.join(keys[:5])}: {str(a.get(keys[0]))[:60]} / {str(b.get(keys[0]))[:60]}"
    return ""


def compare(name: str, old: Path, new: Path, ignored: set[str]) -> tuple[list[str], list[str]]:
    """The cells of a job's row (files that are equal, of how many), and a line for each file that differs."""
    ours, theirs = found(old / folder_name(name), ignored), found(new / folder_name(name), ignored)
    cells, differs = [], []
    for kind in KINDS:
        files = {**ours[kind], **theirs[kind]}
        unequal = [file for file in files if ours[kind].get(file) != theirs[kind].get(file)]
        differs += [f"{name}: {f}: {difference(ours[kind].get(f), theirs[kind].get(f))}" for f in sorted(unequal)]
        cells.append(f"{len(unequal)} of {len(files)} DIFFER" if unequal else f"{len(files)} equal" if files else "-")
    for file, steps in ours["journals"].items():
        if not any(any(step.get("projected_gradients", [])) for step in steps):
            differs.append(f"{name}: {file}: says nothing, no step has a projected gradient")
    replayed, journal = new / f"{folder_name(name)}-replayed", last_journal(old / folder_name(name))
    if not replayed.exists() or journal is None:
        return [*cells, "-"], differs
    trained = old / folder_name(name) / "policy" / journal.parent.name
    same = {f.name: tensors(f) for f in trained.glob("*.safetensors")} == {
        f.name: tensors(f) for f in replayed.glob("*.safetensors")
    }
    return [*cells, "equal" if same else "DIFFERS"], differs if same else [*differs, f"{name}: replayed: other tensors"]


def in_tree(tree: Path, *arguments: str) -> None:
    """`work` in a process of its own that sees `tree`'s zopro, and this checkout's tests/tiny_runs.py."""
    source = tree / "src" if (tree / "src").is_dir() else tree
    if not (source / "zopro").is_dir():
        raise SystemExit(f"same_bits: a tree must hold zopro or src/zopro, got {tree}")
    path = os.pathsep.join([str(source.absolute()), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    subprocess.run([sys.executable, __file__, *arguments], env=environment, check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="the tree before the change")
    parser.add_argument("new", type=Path, help="the tree after it")
    parser.add_argument("--only", default="", metavar="REGEX", help="jobs whose names match")
    parser.add_argument("--ignore", nargs="*", default=[], metavar="KEY", help="keys that may differ in JSON")
    parser.add_argument("--work", type=Path, default=Path("runs/same_bits"), help="scratch folder, emptied first")
    parser.add_argument("--inside", choices=["old", "new", "inputs"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    folder = args.work.absolute()
    inputs, old, new = folder / "inputs", folder / "old", folder / "new"
    if args.inside == "inputs":
        importlib.import_module("tiny_runs").write_inputs(inputs)
        return 0
    if args.inside:
        work(inputs, folder / args.inside, args.only, old if args.inside == "new" else None)
        return 0
    if not jobs(args.only):
        parser.error(f"--only: must match one of {'; '.join(jobs(''))}")
    shutil.rmtree(folder, ignore_errors=True)
    for path in (inputs, old, new):
        path.mkdir(parents=True)
    arguments = [str(args.old), str(args.new), "--work", str(folder), "--only", args.only]
    in_tree(args.old, *arguments, "--inside", "inputs")
    for name, tree in (("old", args.old), ("new", args.new)):
        print(f"{name}: {tree}", file=sys.stderr, flush=True)
        in_tree(tree, *arguments, "--inside", name)
    differs: list[str] = []
    print("\n| run | " + " | ".join((*KINDS, "OLD replayed by NEW")) + " |\n" + "|---" * (len(KINDS) + 2) + "|")
    for name in jobs(args.only):
        cells, more = compare(name, old, new, set(args.ignore))
        print(f"| {name} | " + " | ".join(cells) + " |")
        differs += more[:SHOWN] + ([f"{name}: {len(more) - SHOWN} more"] if len(more) > SHOWN else [])
    for side in (old, new):
        failed = json.loads((side / "outcomes.json").read_text(encoding="utf-8"))
        differs += [f"{name}: failed in {side.name.upper()}: {line}" for name, line in failed.items()]
    print("\n" + "\n".join(differs or ["no difference"]))
    return 1 if differs else 0


if __name__ == "__main__":
    sys.exit(main())
