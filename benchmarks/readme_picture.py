"""README's picture: held-out reward and peak memory of each method, from the table "More prompts and smaller steps".

python benchmarks/readme_picture.py docs/lab/chat.md docs/images/reward_and_memory.png
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

SECTION = "### More prompts and smaller steps"
OURS, THEIRS = "#2563eb", "#9ca3af"


def rows(page: str) -> list[list[str]]:
    """The cells of the section's table, without its head."""
    lines = page.partition(SECTION)[2].partition("\n### ")[0].splitlines()
    table = [[cell.strip(" *") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    return table[2:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    start, *methods = rows(args.page.read_text(encoding="utf-8"))
    names = [row[0] for row in methods]
    rewards = [[float(number) for number in re.findall(r"-?[\d.]+", row[2])] for row in methods]
    colours = [OURS if name == "guided" else THEIRS for name in names]

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 2.9), sharey=True, layout="constrained")
    means = [mean for mean, *_ in rewards]
    reach = [[mean - low for mean, low, _ in rewards], [high - mean for mean, _, high in rewards]]
    left.barh(names, means, color=colours, xerr=reach, ecolor="#374151", capsize=3)
    left.axvline(float(start[2].split()[0]), color="#374151", linestyle=":", label="start")
    left.set_xlabel("held-out reward, 95 % (8 steps, 270M chat model)")
    right.barh(names, [float(row[6]) for row in methods], color=colours)
    right.axvline(float(start[6]), color="#374151", linestyle=":", label="sampling alone")
    right.set_xlabel("peak memory, MB")
    for axis in (left, right):
        axis.invert_yaxis() if axis is left else None
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), borderaxespad=0.2)
    figure.savefig(args.picture, dpi=150)


if __name__ == "__main__":
    main()
