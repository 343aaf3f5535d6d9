"""The section of docs/lab/runs.md about one run, from its run directory alone.

python benchmarks/run_results.py runs/chat-gemma >> docs/lab/runs.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import yaml

from zopro.store import shown
from zopro.store.layout import Layout

SAMPLES = 3
SHOWN = (
    "max_prompt_length", "max_completion_length", "lora_r", "sft_steps", "sft_batch_size", "reward_steps",
    "reward_batch_size", "policy_steps", "prompts_per_step", "num_generations", "beta", "pair_prompts", "refine_steps",
)  # fmt: skip


def section(run: Path) -> str:
    config = yaml.safe_load(Layout(run).config().read_text("utf-8"))
    summary = json.loads(Layout(run).summary().read_text("utf-8"))
    lines = [shown.named(line) for line in summary["evaluations"]]
    rows = ["| | " + " | ".join("SFT" if x["iteration"] is None else f"iteration {x['iteration']}" for x in lines) + " |"]
    rows.append("|---" * (len(lines) + 1) + "|")
    rows.append("| reward | " + " | ".join(shown.interval(line, "reward") for line in lines) + " |")
    rows.append("| KL to SFT, nats an answer | " + " | ".join(shown.kl(line[shown.PER_ANSWER]) for line in lines) + " |")
    wins = [shown.interval(line, "win_rate") for line in lines]
    rows.append("| wins against SFT (judge) | " + " | ".join(wins) + " |")
    rows.append("| answer's length, tokens | " + " | ".join(f"{line['length']:.1f}" for line in lines) + " |")
    if lines[0].get("metric") is not None:
        name, n = lines[0]["metric_name"], lines[0]["metric_n"]
        rows.append(f"| {name} (n = {n}) | " + " | ".join(shown.metric(line["metric"]) for line in lines) + " |")
    stages = ", ".join(f"{name} {shown.seconds(seconds)}" for name, seconds in summary["stages"].items())
    sizes = ", ".join(f"{name} {config[name]}" for name in SHOWN)
    quality, seconds = shown.quality(summary["reward_quality"]), shown.seconds(summary["seconds"])
    parts = [
        "\n".join(rows),
        f"Held-out prompts: {lines[0]['n']}. First reward model on held-out rows: {quality}. Sizes: {sizes}.",
        f"Seconds: {seconds} in all ({stages}); peak memory {shown.megabytes(summary['peak_rss_mb'])} MB.",
        *(sample(sample_) for sample_ in summary["samples"][:SAMPLES]),
    ]
    return "\n\n".join(parts) + "\n"


def sample(texts: dict[str, str]) -> str:
    def quoted(name: str) -> str:
        return f"- {name}: {' '.join(texts[name].split())}"

    prompt = texts["prompt"].split("user\n", 1)[-1].split("<|im_end|>")[0]
    return f"> {' '.join(prompt.split())}\n\n{quoted('sft')}\n{quoted('aligned')}"


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    sys.stdout.write(section(Path(sys.argv[1])))
