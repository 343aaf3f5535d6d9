"""The section of docs/results.md about one run, from its run directory alone.

python benchmarks/run_results.py runs/chat-gemma >> docs/results.md
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml

SAMPLES = 3
SHOWN = (
    "max_prompt_length", "max_completion_length", "lora_r", "sft_steps", "sft_batch_size", "reward_steps",
    "reward_batch_size", "policy_steps", "prompts_per_step", "num_generations", "beta", "pair_prompts", "refine_steps",
)  # fmt: skip


def interval(line: dict[str, Any], name: str, digits: int = 3) -> str:
    return f"{line[name]:.{digits}f} [{line[f'{name}_low']:.{digits}f}, {line[f'{name}_high']:.{digits}f}]"


def section(run: Path) -> str:
    config = yaml.safe_load((run / "config.yaml").read_text("utf-8"))
    summary = json.loads((run / "summary.json").read_text("utf-8"))
    lines = summary["evaluations"]
    quality = summary["reward_quality"]
    rows = ["| | " + " | ".join("SFT" if x["iteration"] is None else f"iteration {x['iteration']}" for x in lines) + " |"]
    rows.append("|---" * (len(lines) + 1) + "|")
    rows.append("| reward | " + " | ".join(interval(line, "reward") for line in lines) + " |")
    rows.append("| KL to SFT, nats an answer | " + " | ".join(f"{line['kl']:.2f}" for line in lines) + " |")
    wins = [interval(line, "win_rate", 2) if "win_rate" in line else "" for line in lines]
    rows.append("| wins against SFT (judge) | " + " | ".join(wins) + " |")
    rows.append("| answer's length, tokens | " + " | ".join(f"{line['length']:.1f}" for line in lines) + " |")
    if lines[0].get("metric") is not None:
        name, n = lines[0]["metric_name"], lines[0]["metric_n"]
        rows.append(f"| {name} (n = {n}) | " + " | ".join(f"{line['metric']:.1f}" for line in lines) + " |")
    stages = ", ".join(f"{name} {seconds:.0f}" for name, seconds in summary["stages"].items())
    read = ", ".join(f"{name} {value:.3g}" for name, value in quality.items())
    sizes = ", ".join(f"{name} {config[name]}" for name in SHOWN)
    parts = [
        "\n".join(rows),
        f"Held-out prompts: {lines[0]['n']}. First reward model on held-out rows: {read}. Sizes: {sizes}.",
        f"Seconds: {summary['seconds']:.0f} in all ({stages}); peak memory {summary['peak_rss_mb'] / 1000:.2f} GB.",
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
