"""Both ends of what pyproject.toml allows: the oldest and the newest version of every dependency run the demo.

Each end is an environment of its own, made by uv (`pip install uv`) from the wheel that a user would get, in a folder
that is kept. Prints the versions that were installed, the lower bounds that other packages lift (raise those in
pyproject.toml), and how the demo ended.
Takes some gigabytes where torch brings CUDA's libraries, and Python 3.11 or later for itself.

    python benchmarks/bounds.py lowest --python python3.10 --folder bounds
    python benchmarks/bounds.py highest --python python3.13 --folder bounds
    python benchmarks/bounds.py lowest --resolve          # versions alone: seconds, nothing is installed
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import tomllib

ROOT = Path(__file__).parents[1]
ENDS = {"lowest": "lowest-direct", "highest": "highest"}


def bounds() -> dict[str, str]:
    """The lower bound of each dependency in pyproject.toml."""
    lines = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["dependencies"]
    return dict(line.split(">=") for line in lines)


def resolved(uv: list[str], end: str, python: str) -> dict[str, str]:
    """The version of each dependency at one end, by the resolver, for a Python."""
    options = ["--resolution", ENDS[end], "--python", python, "--quiet", "--no-header", "--no-annotate"]
    found = said([*uv, "pip", "compile", str(ROOT / "pyproject.toml"), *options])
    mine = bounds()
    return {name: version for name, version in re.findall(r"^([\w-]+)==(\S+)", found, re.M) if name in mine}


def lifted(versions: dict[str, str]) -> list[str]:
    """Bounds that cannot be had: other dependencies ask for more."""
    return [f"{name}: {bound} -> {versions[name]}" for name, bound in bounds().items() if not same(bound, versions[name])]


def same(bound: str, version: str) -> bool:
    """Whether a version is the bound, as 5.0.0 is 5.0.

    >>> same("5.0", "5.0.0"), same("2.6", "2.6.1")
    (True, False)
    """
    return re.sub(r"(\.0)*$", "", bound) == re.sub(r"(\.0)*$", "", version.partition("+")[0])


def said(command: list[str]) -> str:
    found = subprocess.run(command, capture_output=True, text=True)
    if found.returncode:
        sys.exit(f"{' '.join(command)}\n{found.stderr or found.stdout}")
    return found.stdout


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("end", choices=ENDS)
    parser.add_argument("--python", default=sys.executable, help="interpreter (default: this one)")
    parser.add_argument("--folder", type=Path, default=Path("bounds"), help="where the environments go (default: bounds)")
    parser.add_argument("--resolve", action="store_true", help="say which versions, and install nothing")
    args = parser.parse_args()
    uv = [sys.executable, "-m", "uv"]
    versions = resolved(uv, args.end, args.python)
    print(", ".join(f"{name} {version}" for name, version in versions.items()))
    if args.end == "lowest":
        print("bounds that others lift:", ", ".join(lifted(versions)) or "none")
    if args.resolve:
        return
    place = args.folder.absolute() / args.end
    began = time.perf_counter()
    said([*uv, "build", "--quiet", "--wheel", "--out-dir", str(place / "dist"), str(ROOT)])
    said([*uv, "venv", "--quiet", "--clear", "--python", args.python, str(place / "venv")])
    (wheel,) = (place / "dist").glob("*.whl")
    (python,) = [*(place / "venv").glob("bin/python"), *(place / "venv").glob("Scripts/python.exe")]
    pins = place / "pins.txt"
    pins.write_text("".join(f"{name}=={version}\n" for name, version in versions.items()), "utf-8")
    said([*uv, "pip", "install", "--quiet", "--python", str(python), str(wheel), "-r", str(pins)])
    print(f"installed in {time.perf_counter() - began:.0f} s")
    command = [str(python), "-m", "zopro", "demo", "--json", "--out", str(place / f"run-{int(time.time())}")]
    summary = json.loads(said(command).splitlines()[-1])
    numbers = ("reward_sft", "reward_final", "win_rate", "seconds", "peak_rss_mb")
    print(f"demo with the {args.end} versions:", ", ".join(f"{name} {summary[name]}" for name in numbers))


if __name__ == "__main__":
    main()
