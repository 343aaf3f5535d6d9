"""How much reward lies along the policy's previous update: held-out reward, KL and metric at points of that line.

Trains nothing. The points are theta + c mu, where theta is the policy that a comparison's trainings start from and mu is
what its iteration 0 has added. A method whose directions are mu alone cannot gain more than the best of them. The
comparison is a folder of `zopro compare --start iteration` that has been prepared. Same prompts and uniform numbers at
every point; intervals are paired by prompt.

    python benchmarks/line.py COMPARISON [--reach 0.5 1 2 4]
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from safetensors.torch import load_file, save_file

from zopro.compare.jobs import measure
from zopro.compare.kept import SAMPLES
from zopro.compare.plan import Job
from zopro.compare.shared import shared_config
from zopro.config import RunConfig
from zopro.loop.opening import open_all
from zopro.store.shown import PER_ANSWER
from zopro.system.statistics import mean_interval

TENSORS = "adapter_model.safetensors"


def moved(after: Path, before: Path, reach: float, folder: Path) -> Path:
    """`folder`, made to hold the adapter after + reach (after - before)."""
    shutil.copytree(after, folder)
    new, old = load_file(after / TENSORS), load_file(before / TENSORS)
    save_file({name: (new[name] + reach * (new[name] - old[name])).contiguous() for name in new}, folder / TENSORS)
    return folder


def line(reach: float, found: dict[str, Any], start: Sequence[float]) -> str:
    """What one point of the line says."""
    gain, low, high = mean_interval([now - then for now, then in zip(found["rewards"], start, strict=True)])
    told = [f"c {reach:g}", f"reward {fmean(found['rewards']):.3f}", f"gain {gain:+.3f} [{low:.3f}, {high:.3f}]"]
    told.append(f"kl {fmean(found[PER_ANSWER]):.2f}")
    for name, values in found["quality"].items():
        told.append(f"{name} {fmean(value for value in values if value is not None):.1f}")
    told.append(f"degenerate {sum(found['degenerate']):g}, ends {fmean(found['ended']):.2f}")
    return ", ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of zopro compare --start iteration")
    parser.add_argument("--reach", type=float, nargs="+", default=[0.5, 1.0, 2.0, 4.0], metavar="C")
    options = parser.parse_args()
    described = next(options.comparison.glob("jobs/prepare-iteration-*"), None)
    if described is None or not (described / "result.json").exists():
        parser.error(f"'{options.comparison}' has no prepared start. Begin with zopro compare --start iteration.")
    start = json.loads((described / "result.json").read_text(encoding="utf-8"))["start"]
    job = json.loads((described / "job.json").read_text(encoding="utf-8"))
    config = shared_config(RunConfig.from_dict(job["config"]), options.comparison, "iteration")
    if config.lora_r == 0:
        parser.error("the comparison must train adapters, and trains the whole model (lora_r is 0)")
    run, models, data = open_all(config, resume=True)
    print(line(0, start, start["rewards"]), flush=True)
    for reach in options.reach:
        with tempfile.TemporaryDirectory() as folder:
            policy = moved(run.store.policy(0), run.store.sft(), reach, Path(folder) / "moved")
            found = measure(run, models, data, policy, Job(**job["job"]), start.get(SAMPLES, 1), whole=True)
        print(line(reach, found, start["rewards"]), flush=True)


if __name__ == "__main__":
    main()
