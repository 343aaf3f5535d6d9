"""How much of the policy's gradient lies along its previous update, and in the spaces of signs around it.

Trains nothing: takes RLOO's gradient where a comparison's trainings start, on some batches, each sampled anew. Two
batches' gradients have no sampling noise in common, so the mean of their products is the energy of the true gradient;
what a batch's own has beyond it is noise. The comparison is a folder of `zopro compare --start iteration` that has begun
to train.

    python benchmarks/gradient_energy.py COMPARISON [--batches 10]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback

from zopro.compare.jobs import job_trainer
from zopro.compare.plan import Job
from zopro.compare.shared import shared_config
from zopro.config import RunConfig
from zopro.loop.opening import open_all
from zopro.system.statistics import Z95, mean_interval
from zopro.weights.adapters import tensor_name
from zopro.weights.updates import policy_update
from zopro.zo.directions import sublayer

STILL = 1e-12  # a learning rate at which the policy stays where it is


def _block(name: str) -> str:
    return sublayer(name).rpartition(".")[0]


GROUPS: dict[str, Callable[[str], str]] = {
    "model": lambda name: "",
    "block": _block,
    "sub-layer": sublayer,
    "linear layer": lambda name: name.partition(".lora_")[0],
    "tensor": lambda name: name,
}  # parameter's name -> what it shares a sign with


class Gradients(TrainerCallback):
    """Keeps every step's gradient."""

    def __init__(self) -> None:
        self.kept: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        named = kwargs["model"].named_parameters()
        self.kept.append({tensor_name(n): p.grad.detach().clone() for n, p in named if p.grad is not None})


def energies(vectors: Tensor) -> tuple[float, float, float]:
    """(energy of the mean that the rows are noisy copies of, its standard error, mean energy of a row) of [batches, n].

    The error is the jackknife's: what leaving each batch out changes.
    """
    products = vectors @ vectors.T
    batches = len(products)

    def energy(kept: list[int]) -> float:
        among = products[kept][:, kept]
        return float(among.sum() - among.diag().sum()) / (len(kept) * (len(kept) - 1))

    without = torch.tensor([energy([i for i in range(batches) if i != left]) for left in range(batches)])
    error = ((batches - 1) * without.var(correction=0)) ** 0.5
    return energy(list(range(batches))), float(error), float(products.diag().mean())


def coordinates(gradient: dict[str, Tensor], mu: dict[str, Tensor], group: Callable[[str], str]) -> Tensor:
    """The gradient's components along each group's part of mu, taken to norm 1: [groups]."""
    dots: dict[str, float] = {}
    squares: dict[str, float] = {}
    for name, update in mu.items():
        key = group(name)
        dots[key] = dots.get(key, 0.0) + float((gradient[name].double() * update.double()).sum())
        squares[key] = squares.get(key, 0.0) + float(update.double().square().sum())
    return torch.tensor([dot / squares[key] ** 0.5 for key, dot in dots.items()], dtype=torch.float64)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of zopro compare --start iteration")
    parser.add_argument("--batches", type=int, default=10, metavar="N")
    parser.add_argument("--seed", type=int, default=7, help="of the answers and of the prompts' order")
    options = parser.parse_args()
    if options.batches < 3:
        parser.error(f"--batches: must be at least 3 (the jackknife leaves one out), got {options.batches}")
    described = json.loads(next(options.comparison.glob("jobs/*/job.json")).read_text(encoding="utf-8"))
    config = shared_config(RunConfig.from_dict(described["config"]), options.comparison, "iteration")
    run, models, data = open_all(config, resume=True)
    job = Job("train", "iteration", "rloo", options.seed, STILL, options.batches)
    gradients = Gradients()
    with tempfile.TemporaryDirectory() as folder, job_trainer(run, models, data, job, Path(folder)) as (trainer, _):
        trainer.args.max_grad_norm = 0.0  # as they are, not clipped
        trainer.add_callback(gradients)
        trainer.train()
    mu = dict(policy_update(run.store.policy(0), run.store.sft(), full=config.lora_r == 0))
    whole = torch.stack([torch.cat([kept[name].flatten() for name in mu]) for kept in gradients.kept]).double()
    total, error, own = energies(whole)
    slopes = torch.stack([coordinates(kept, mu, GROUPS["model"]) for kept in gradients.kept]).flatten()
    slope, low, high = mean_interval(slopes.tolist())
    print(f"slope of the loss along the previous update, taken to norm 1: {slope:.2f} [{low:.2f}, {high:.2f}]")
    rows = [("entry", whole.shape[1], total, error, own)]
    for label, group in GROUPS.items():
        found = torch.stack([coordinates(kept, mu, group) for kept in gradients.kept])
        rows.append((label, found.shape[1], *energies(found)))
    print(f"{'a sign for each':15} {'dimensions':>10} {'energy':>10} {'+-':>9} {'of a batch':>10}")
    for label, size, energy, error, batch in rows:
        print(f"{label:15} {size:10} {energy:10.2f} {Z95 * error:9.2f} {batch:10.2f}")


if __name__ == "__main__":
    main()
