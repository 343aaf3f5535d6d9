"""The table of docs/interplay.md: what `analysis.json` of some runs says, iteration by iteration.

    zopro run examples/interplay_gemma.yaml --method rloo --output_dir runs/rloo
    python benchmarks/interplay_table.py runs/rloo runs/online-dpo runs/zopro

One Markdown table a view: value, then what lies within the permutation interval (no relation can be seen) and what not.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

from zopro.store.layout import Layout

METRICS = {
    "update_angle_degrees": ("angle, policy to reward model", 2),
    "update_pearson": ("Pearson", 4),
    "update_distance_correlation": ("distance correlation", 3),
    "policy_momentum_cosine": ("policy's momentum cosine", 3),
    "reward_momentum_cosine": ("reward model's momentum cosine", 3),
}


def cell(value: float | None, band: list[float] | None, digits: int) -> str:
    """The value; bold outside its permutation interval."""
    if value is None or math.isnan(value):
        return ""
    text = f"{value:.{digits}f}"
    inside = band is None or band[0] <= value <= band[1]
    return text if inside else f"**{text}**"


def rows(run: Path, analysis: dict[str, Any], view: str) -> list[str]:
    lines = []
    for source, label in ((analysis, ""), (analysis["off_by_one"], ", off by one")):
        for name, (title, digits) in METRICS.items():
            if label and not name.startswith("update_angle"):
                continue
            values = source["metrics"][name][view]
            bands = (source.get("permutation") or {}).get(name, {}).get(view) or [None] * len(values)
            cells = [cell(value, band, digits) for value, band in zip(values, bands, strict=True)]
            lines.append(f"| {run.name} | {title}{label} | " + " | ".join(cells) + " |")
    disparity = cell(analysis["metrics"]["procrustes_disparity"][view], None, 3)
    lines.append(f"| {run.name} | Procrustes disparity | {disparity} |" + " |" * (len(analysis["iterations"]) - 1))
    return lines


def main() -> None:
    runs = {Path(name): json.loads(Layout(name).analysis().read_text("utf-8")) for name in sys.argv[1:]}
    if not runs:
        raise SystemExit(__doc__)
    for view in ("factors", "product"):
        iterations = max((analysis["iterations"] for analysis in runs.values()), key=len)
        dimension = next(iter(runs.values()))["dimension"][view]
        print(f"\nView {view} (D = {dimension}):\n")
        print("| run | | " + " | ".join(map(str, iterations)) + " |")
        print("|---|---|" + "---|" * len(iterations))
        for run, analysis in runs.items():
            print("\n".join(rows(run, analysis, view)))


if __name__ == "__main__":
    main()
