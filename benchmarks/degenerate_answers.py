"""How many answers of a comparison's policies are degenerate, and why: of its start and of each training's last point.

    python benchmarks/degenerate_answers.py COMPARISON --prompts 60 [--easy_questions 200] [--shown 20]

Held-out prompts are answered anew, one sampled answer to each, so that comparisons can be looked at by today's rule
(`zopro.text.degenerate`), and asked easy questions that they were not asked. The configuration is the comparison's own.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from zopro.config.reading import load_config
from zopro.engine.opening import generate
from zopro.errors import InputError
from zopro.loop.data import Item
from zopro.loop.models import Models
from zopro.loop.opening import open_all
from zopro.loop.remembered import ask, counts
from zopro.store.durable import read_json
from zopro.store.layout import Layout
from zopro.text.degenerate import degenerate

BATCH = 20


def policies(comparison: Path) -> dict[str, Path]:
    """Of what all trainings start from, and of every training at its last point."""
    described = map(read_json, sorted((comparison / "jobs").glob("*/job.json")))
    starts, shared = {job["job"].get("start", "sft") for job in described}, Layout(comparison / "shared")
    found = {"iteration 0": shared.policy(0)} if "iteration" in starts else {}
    if starts != {"iteration"}:
        found["start"] = shared.sft()
    for points in sorted((comparison / "jobs").glob("*/points")):
        if kept := sorted(path for path in points.iterdir() if path.is_dir()):
            found[points.parent.name] = kept[-1]
    return found


def answers(models: Models, model: Any, items: Sequence[Item], longest: int) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(items), BATCH):
        prompts = [item.ids for item in items[start : start + BATCH]]
        generator = torch.Generator(models.base.device).manual_seed(start)
        stops: dict[str, Any] = {"eos_token_ids": models.eos_token_ids, "pad_token_id": models.tokenizer.pad_token_id}
        drawn = generate(model, prompts, max_new_tokens=longest, generator=generator, **stops)
        texts += models.texts(drawn.answers())
    return texts


def why(text: str, item: Item) -> str | None:
    return degenerate(text, item.example.asked, item.example.reference)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path)
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts that are answered")
    parser.add_argument("--easy_questions", type=int, default=0, help="asked of the base model and of each policy")
    parser.add_argument("--shown", type=int, default=3, help="answers of each policy that are printed, to be read")
    args = parser.parse_args()
    config = load_config(Layout(args.comparison / "shared").config())
    with tempfile.TemporaryDirectory() as folder:
        nowhere = str(Path(folder) / "run")  # nothing is written there
        asked = {"easy_questions": args.easy_questions or False}
        run, models, data = open_all(replace(config, output_dir=nowhere, **asked), writes=False)
    before = [right for _, right in ask(run, models, models.base) or ()] if args.easy_questions else []
    items = data.eval[: args.prompts]
    for name, policy in policies(args.comparison).items():
        with models.policies.open(policy) as model:
            texts = answers(models, model, items, config.max_completion_length)
            right = [right for _, right in ask(run, models, model) or ()] if any(before) else []
        reasons = Counter(filter(None, map(why, texts, items)))
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
        print(f"{name}: degenerate {sum(reasons.values())} of {len(items)}: {said}", flush=True)
        if right:
            print(f"    easy questions: {counts([right], before)}", flush=True)
        for text in texts[: args.shown]:
            print(f"    {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"degenerate_answers: {error}")
