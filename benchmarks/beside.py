"""Comparisons from one start, with plans or settings of their own, beside each other: the tables of `zopro compare`.

    python benchmarks/beside.py FOLDER FOLDER ... [--against rloo]

Each FOLDER is of a finished `zopro compare`. All must have found the same start, answer by answer, which they do on one
machine with the same settings of what comes before. A method of several of them has its folder behind its name.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from zopro.compare.summary import beside, markdown

SAME = ("beta", "prompts", "start")


def merged(results: dict[str, dict[str, Any]], against: str) -> dict[str, Any]:
    """One result of all; `results` by their folders."""
    first = next(iter(results.values()))
    for name, other in results.items():
        for key in SAME:
            if other[key] != first[key]:
                sys.exit(
                    f"{name}: must have the same {key} as {next(iter(results))}, got another. Compare from one start."
                )
    count = Counter(method for result in results.values() for method in result["methods"])
    methods = {
        method if count[method] == 1 else f"{method} ({name})": found
        for name, result in results.items()
        for method, found in result["methods"].items()
    }
    return {
        **first,
        **beside(methods, against),
        "failed": {f"{method} ({name})": why for name, of in results.items() for method, why in of["failed"].items()},
        "plan": {**first["plan"], "against": against},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", nargs="+", type=Path, metavar="FOLDER")
    parser.add_argument("--against", default="", help="whose gain others are held to")
    args = parser.parse_args()
    results = {str(folder): json.loads((folder / "compare.json").read_text("utf-8")) for folder in args.folders}
    print(markdown(merged(results, args.against)).split("\n", 2)[2])  # whose first line is of one plan


if __name__ == "__main__":
    main()
