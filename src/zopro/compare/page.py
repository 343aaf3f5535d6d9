"""A comparison as one self-contained page, of the report's building blocks: compare.html.

from zopro.compare.page import write_page
write_page(json.loads(Path("OUT/compare.json").read_text()), Path("OUT"))
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from zopro.analysis.page.answers import SAMPLED, Answer, Sample
from zopro.analysis.page.charts import Chart, Series
from zopro.analysis.page.drawing import method_style
from zopro.analysis.page.pages import curves, encoded, render, replace_file
from zopro.compare.differences import paired_by, trainings
from zopro.compare.reached import answers_at
from zopro.compare.state import notes, origin, state_table
from zopro.compare.summary import length, reward_model, table
from zopro.store import shown
from zopro.store.shown import PER_ANSWER

Result = Mapping[str, Any]


def write_page(result: Result, folder: Path) -> Path:
    """Write compare.html to `folder`, in one step, and return its path."""
    start = shown.start(result.get("sft_steps"))
    styles = {name: method_style(i) for i, name in enumerate(result["methods"])}
    page = render(
        "compare.html.j2",
        Path(__file__).parent,
        name=Path(str(result["out"])).name,
        length=length(result["plan"]),
        prompts=result["prompts"],
        start=start,
        reward_model=reward_model(result),
        verdict=list(verdict(result)),
        table=table(result),
        states=state_table(result),
        notes=notes(result),
        bars=_bars(result, styles),
        inference=result["inference_peak_mb"],
        samples=samples(result),
        failed=result["failed"],
        **curves(charts(result, styles)),
    )
    return replace_file(folder / "compare.html", encoded(page))


def verdict(result: Result) -> Iterator[str]:
    """Which method has the highest reward at the end, and from which others that is more.

    Clearly more is what several trainings of both say: one each says nothing about the next one.
    """
    methods = result["methods"]
    best = max(methods, key=lambda name: _final(methods[name]))
    end = methods[best]["curve"][-1]
    gains = f", from {shown.reward(result['start']['reward'])} at the start"
    yield f"Highest reward: {best}, {shown.interval(end, 'reward')}{gains}; KL {shown.kl(end[PER_ANSWER])}."
    more: dict[bool, list[str]] = {}  # by whether both have several trainings
    level = []
    for name, gap in result["differences"].get(best, {}).items():
        if gap["low"] is None or gap["low"] <= 0:
            level.append(name)
            continue
        more.setdefault(min(trainings(methods[one]) for one in (best, name)) > 1, []).append(name)
    for several, names in more.items():
        said = "Clearly more" if several else "More"
        yield f"{said} than {', '.join(names)} (95 %), {paired_by(several)}."
    if level:
        yield f"No clear difference from {', '.join(level)}."


def _final(method: Mapping[str, Any]) -> float:
    """Reward at the ends of all trainings; earlier versions had left out the end of one that took longer."""
    rewards = method.get("final_rewards")
    return fmean(map(fmean, rewards)) if rewards else float(method["curve"][-1]["reward"])


def charts(result: Result, styles: Mapping[str, str]) -> list[Chart]:
    """Reward against seconds, answers sampled and KL, a line for each method in a style of its own."""
    start = shown.start(result.get("sft_steps"))

    def chart(title: str, x_label: str, x: Any, banded: bool = True) -> Chart:
        series = []
        for name, method in result["methods"].items():
            points = [(x(method, point), point["reward"]) for point in method["curve"]]
            if any(value is None for value, _ in points):
                continue
            band = [(point["reward_low"], point["reward_high"]) for point in method["curve"]] if banded else []
            band = [] if any(None in edges for edges in band) else band
            series.append(Series(name, points, band, styles[name], dots=True))
        return Chart(title, series, x_label)

    return [
        chart("Reward against seconds of training, 95 % interval", "seconds", lambda _, point: point["seconds"]),
        chart(
            "Reward against answers sampled, 95 % interval",
            "answers",
            lambda method, point: answers_at(method, point["step"]),
        ),
        chart(f"Reward against KL to {start.the}", "KL, nats per answer", lambda _, point: point[PER_ANSWER], False),
    ]


def _bars(result: Result, styles: Mapping[str, str]) -> list[dict[str, Any]]:
    """Peak memory of each method, and of sampling alone, with `share` of the largest."""
    lines = [("sampling alone", result["inference_peak_mb"], "muted")]
    lines += [(name, method["peak_mb"], styles[name].split()[0]) for name, method in result["methods"].items()]
    most = max(peak for _, peak, _ in lines)
    return [{"name": name, "peak_mb": peak, "style": style, "share": peak / most} for name, peak, style in lines]


def samples(result: Result) -> list[Sample]:
    """The same prompts answered by what all start from and, at the end of its training, by each method."""
    files = {origin(result).name: result.get("texts", [])}
    files |= {name: method.get("texts", []) for name, method in result["methods"].items()}
    answers: dict[str, list[Answer]] = {}
    for name, rows in files.items():
        for row in rows:
            answers.setdefault(row["prompt"], []).append(Answer(name, SAMPLED, row["completion"], row["reward"]))
    return [Sample(prompt, None, found) for prompt, found in answers.items()]
