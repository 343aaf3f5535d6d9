"""How many answers of a comparison's policies are degenerate, and why: of its start and of each training's last point.

    python benchmarks/degenerate_answers.py COMPARISON --prompts 60

Held-out prompts are answered anew, one sampled answer to each, so that comparisons can be looked at by today's rule
(`zopro.text.degenerate`). The configuration is the comparison's own.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path

import torch

from zopro.config.reading import load_config
from zopro.engine.local.adapters import open_adapter
from zopro.engine.local.models import resolve_device, resolve_dtype
from zopro.engine.local.starts import load_start, tokenizer_home
from zopro.engine.opening import generate
from zopro.errors import InputError
from zopro.loop.data import Item, load_data
from zopro.store.layout import Layout
from zopro.text.degenerate import degenerate
from zopro.text.frame import Frame, declared_stops, frame_of
from zopro.text.tokenizer import load_tokenizer

BATCH = 20
SHOWN = 3  # answers of each policy


def policies(comparison: Path) -> dict[str, Path]:
    """Of the start, and of every training at its last point."""
    found = {"start": Layout(comparison / "shared").sft()}
    for points in sorted((comparison / "jobs").glob("*/points")):
        if kept := sorted(path for path in points.iterdir() if path.is_dir()):
            found[points.parent.name] = kept[-1]
    return found


def answers(model: torch.nn.Module, frame: Frame, pad: int, items: list[Item], longest: int) -> list[str]:
    texts: list[str] = []
    for start in range(0, len(items), BATCH):
        prompts = [item.ids for item in items[start : start + BATCH]]
        generator = torch.Generator(model.device).manual_seed(start)  # type: ignore[arg-type]
        stops = {"eos_token_ids": sorted(frame.stops), "pad_token_id": pad}
        drawn = generate(model, prompts, max_new_tokens=longest, generator=generator, **stops)
        texts += [frame.read(ids) for ids in drawn.answers()]
    return texts


@torch.no_grad()
def why(text: str, item: Item) -> str | None:
    return degenerate(text, item.example.asked, item.example.reference or "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("comparison", type=Path, help="folder of `zopro compare`")
    parser.add_argument("--prompts", type=int, default=60, help="held-out prompts to answer")
    args = parser.parse_args()
    config = load_config(Layout(args.comparison / "shared").config())
    device = resolve_device(config.device)
    tokenizer = load_tokenizer(tokenizer_home(config.model), config.trust_remote_code)
    items = load_data(config, tokenizer).eval[: args.prompts]
    for name, folder in policies(args.comparison).items():
        base = load_start(config.model, resolve_dtype(config.dtype, device), device, config.trust_remote_code)
        frame = frame_of(tokenizer, declared_stops(base))
        model = open_adapter(base, folder).eval()
        texts = answers(model, frame, int(tokenizer.pad_token_id), items, config.max_completion_length)
        reasons = Counter(filter(None, map(why, texts, items)))
        said = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common()) or "none"
        print(f"{name}: degenerate {sum(reasons.values())} of {len(items)}: {said}", flush=True)
        for text in texts[:SHOWN]:
            print(f"    {text}", flush=True)


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"degenerate_answers: {error}")
