"""The tables of docs/performance.md: `zopro bench step` over one changed setting at a time.

    python benchmarks/step_cost.py goals --model gemma-3-270m --threads 2 --peer
    python benchmarks/step_cost.py growth --model gemma-3-270m --threads 2 --out growth.jsonl

Each row is a full `zopro bench step` (fresh processes for memory); one JSON object a row goes to --out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

from zopro.bench.command import bench_step
from zopro.bench.work import Work

Row = tuple[str, dict[str, Any]]  # label, what differs from the command line


def goals() -> Iterator[Row]:
    yield "two-sided", {}
    yield "one-sided", {"sides": 1}
    yield "K = 8", {"num_generations": 8}


def growth() -> Iterator[Row]:
    for length in (128, 256, 512, 1024):
        yield f"prompt {length}", {"prompt_length": length}
    for length in (32, 64, 128, 256):
        yield f"completion {length}", {"completion_length": length}
    for prompts in (8, 16, 32, 64):
        yield f"batch {prompts} prompts", {"prompts": prompts}


def vocabulary() -> Iterator[Row]:
    for size in (8192, 32768, 131072, 262144):
        yield f"vocabulary {size}", {"model": "", "size": "0.1b", "vocab_size": size}


def sizes() -> Iterator[Row]:
    yield "1B", {"model": "", "size": "1b"}


def full() -> Iterator[Row]:
    for directions in ("gaussian", "rademacher", "low_rank"):
        yield f"all parameters, {directions}", {"lora_r": 0, "beta": 0.0, "directions": directions}


TABLES = {"goals": goals, "growth": growth, "vocabulary": vocabulary, "sizes": sizes, "full": full}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=TABLES)
    parser.add_argument("--model", default="")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--steps", type=int, default=5)
    for name in ("prompts", "num_generations", "prompt_length", "completion_length"):
        parser.add_argument(f"--{name}", type=int, default=getattr(Work, name), help="of the rows that do not change it")
    parser.add_argument("--peer", action="store_true", help="measure TRL beside the two-sided goals")
    parser.add_argument("--out", default="")
    args = vars(parser.parse_args())
    table, out, peer = TABLES[args.pop("table")], args.pop("out"), args.pop("peer")
    for label, changes in table():
        with_peer = peer and not changes
        result = bench_step(Work(**{**args, **changes}), "trl" if with_peer else None)
        beside = f"  TRL {result['peer_step_s']:.2f} s, {result['peer_peak_mb']:.0f} MB" if with_peer else ""
        print(
            f"{label:<24} step {result['step_s']:8.2f} s  floor {result['floor_s']:8.2f} s  "
            f"ratio {result['floor_ratio']:.3f}  peak {result['peak_mb']:6.0f} MB  "
            f"of inference {result['memory_ratio']:.3f}{beside}",
            flush=True,
        )
        if out:
            with open(out, "a", encoding="utf-8") as stream:
                stream.write(json.dumps({"label": label, **result}) + "\n")


if __name__ == "__main__":
    sys.exit(main())
