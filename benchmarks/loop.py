"""The iterated loop by several methods: reward, win rate and KL of each iteration's policy, over seeds.

    python benchmarks/loop.py CONFIG.yaml --methods zopro,zopro-paper,mezo,rloo --rates zopro=2.7e-3,mezo=8.1e-3 \
        --iterations 4 --seeds 3 --out FOLDER

`zopro compare` sets trainings of one iteration beside each other; here every method goes on by itself, with its own
samples, judged pairs and refined reward models. What comes before iteration 1 is trained once a seed
(`FOLDER/SEED/start`) and copied: fine-tuning, the first reward model and iteration 0, which is `warm_start`'s. All that
is done is kept, so that the same command goes on where it was; methods, seeds and iterations can be added. Every
training is an ordinary run in `FOLDER/SEED/METHOD`. Rewards are the seed's first reward model's; intervals are 95 %,
differences paired by prompt and seed.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml

from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.store import shown
from zopro.store.layout import LOCK, OWNER, Layout
from zopro.store.rundir import check_folder, read_metrics, read_rows, whole_folder, write_text
from zopro.system.statistics import crossed_interval, paired_interval

START = "start"


def begun(config: RunConfig) -> None:
    """Run or continue `config` in its folder, as a user would; the program ends where that fails."""
    layout = Layout(config.output_dir)
    folder, there = layout.path.parent, layout.config().exists()
    if there:
        check_folder(layout.path, config, resume=True)
    written = layout.config() if there else folder / f"{layout.path.name}.yaml"
    write_text(written, yaml.safe_dump(config.to_dict(), sort_keys=False))
    asked = [str(written), *(["--resume"] if there else [])]
    print(f"{layout.path}", file=sys.stderr, flush=True)
    with (folder / f"{layout.path.name}.log").open("a") as log:
        code = subprocess.run([sys.executable, "-m", "zopro", "run", *asked], stdout=log, stderr=log).returncode
    if code:
        sys.exit(f"{layout.path}: ended with code {code}; see {log.name}")


def copied(start: Path, config: RunConfig) -> None:
    """The run of `start` in the folder of `config`, as if it had been begun with `config`; what is there stays."""
    if Path(config.output_dir).exists():
        return
    with whole_folder(Path(config.output_dir)) as partial:
        shutil.copytree(start, partial, ignore=shutil.ignore_patterns(LOCK, OWNER), dirs_exist_ok=True)
        Layout(partial).summary().unlink()
        write_text(Layout(partial).config(), yaml.safe_dump(config.to_dict(), sort_keys=False))


def of_method(config: RunConfig, method: str, rate: float | None) -> RunConfig:
    """`config` by another method, at a rate that is its own."""
    config = replace(config, method=method, preset=config.preset_of(method))
    return config if rate is None else replace(config, **{METHODS[method].rate: rate})


class Found:
    """One method's runs, a seed each.

    rewards: [iteration][seed][prompt], of the start (None) and of all iterations that every seed has.
    """

    def __init__(self, runs: Sequence[Path]) -> None:
        self.runs = [Layout(run) for run in runs]
        done = min(sum(run.evaluation(i).exists() for i in range(1000)) for run in self.runs)
        self.iterations: list[int | None] = [None, *range(done)]
        self.rewards = {i: [self._rewards(run, i) for run in self.runs] for i in self.iterations}

    @staticmethod
    def _rewards(run: Layout, iteration: int | None) -> list[float]:
        rows = read_rows(run.evaluation(iteration))
        return [row["reward"] for row in sorted(rows, key=lambda row: str(row["prompt"]))]

    def measured(self, iteration: int | None, name: str) -> list[float]:
        """A number of an iteration's evaluation, by seed; none of those that lack it."""
        lines = [shown.named(json.loads(run.evaluation(iteration, ".json").read_text("utf-8"))) for run in self.runs]
        return [line[name] for line in lines if line.get(name) is not None]

    def row(self, title: str, iteration: int | None) -> str:
        reward, low, high = crossed_interval(self.rewards[iteration])
        each = ", ".join(f"{fmean(rewards):.2f}" for rewards in self.rewards[iteration])
        wins, kl = self.measured(iteration, "win_rate"), self.measured(iteration, shown.PER_ANSWER)
        metric = self.measured(iteration, "metric")
        cells = [
            title,
            "SFT" if iteration is None else str(iteration),
            f"{reward:.2f} [{low:.2f}, {high:.2f}]",
            each,
            f"{fmean(wins):.3f}" if wins else "",
            ", ".join(f"{value:.1f}" for value in kl),
            f"{fmean(metric):.3f}" if metric else "",
            self.seconds(iteration),
        ]
        return "| " + " | ".join(cells) + " |"

    def seconds(self, iteration: int | None) -> str:
        """Of the policy's training, the mean over seeds."""
        ends = [
            line["seconds"]
            for run in self.runs
            for line in read_metrics(run.metrics())
            if (line["stage"], line["iteration"], line.get("event")) == ("policy", iteration, "end")
        ]
        return f"{fmean(ends):.0f}" if ends else ""


def table(methods: dict[str, list[Path]]) -> str:
    found = {name: Found(runs) for name, runs in methods.items()}
    head = "Method", "Iteration", "Reward [95 %]", "of each seed", "Win rate", "KL, nats an answer", "Metric", "Seconds"
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    first = next(iter(found.values()))
    lines += [first.row("start", iteration) for iteration in first.iterations[:2]]
    for name, method in found.items():
        lines += [method.row(name, iteration) for iteration in method.iterations[2:]]
    last = min(len(method.iterations) for method in found.values()) - 2
    lines += ["", f"Reward of the row's method less the column's after iteration {last}:", ""]
    lines += ["| | " + " | ".join(found) + " |", "|---|" + "---|" * len(found)]
    for name, method in found.items():
        cells = ["" if name == other else _less(method, of, last) for other, of in found.items()]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _less(one: Found, other: Found, iteration: int) -> str:
    mean, low, high = paired_interval(one.rewards[iteration], other.rewards[iteration])
    return f"{mean:+.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path, help="YAML file of configuration keys")
    parser.add_argument("--methods", default="zopro,zopro-paper,mezo,rloo", help="with commas")
    parser.add_argument("--rates", default="", help="METHOD=RATE with commas; by default the configuration's")
    parser.add_argument("--iterations", type=int, default=4, help="iteration 0 included")
    parser.add_argument("--seeds", default="3", help="how many, or which, as 0,2 or 2,")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER")
    args = parser.parse_args()
    values: dict[str, Any] = yaml.safe_load(args.config.read_text("utf-8"))
    rates = {name: float(rate) for name, _, rate in (pair.partition("=") for pair in args.rates.split(",") if pair)}
    chosen = [int(seed) for seed in args.seeds.split(",") if seed]
    seeds = chosen if "," in args.seeds else range(*chosen)
    methods = {name: [args.out / str(seed) / name for seed in seeds] for name in args.methods.split(",")}
    for seed in seeds:
        folder = args.out / str(seed)
        config = replace(RunConfig.from_dict(values), seed=seed, iterations=1, output_dir=str(folder / START))
        begun(config)
        for method in methods:
            whole = replace(config, iterations=args.iterations, output_dir=str(folder / method))
            copied(folder / START, own := of_method(whole, method, rates.get(method)))
            begun(own)
    print(table(methods))


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"loop: {error}")
