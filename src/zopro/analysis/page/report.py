"""A run directory as one self-contained page: verdict, answers, curves, evaluations, costs, settings.

Reads files only, whatever of them is there yet: a run in progress gives a shorter page.

    python -c "from zopro.analysis.page.report import write_report; print(write_report('RUN'))"
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zopro.analysis.page.answers import samples
from zopro.analysis.page.curves import run_charts
from zopro.analysis.page.pages import curves, encoded, render, replace_file
from zopro.analysis.page.tables import evaluation_table, reward_models
from zopro.analysis.page.verdict import judge, verdict
from zopro.analysis.reading.records import (
    Record,
    costs,
    latest_evaluations,
    read_config,
    read_metrics,
    read_object,
    stage_seconds,
    start_of,
)
from zopro.config import GROUPS
from zopro.config.defaults import default_of
from zopro.errors import InputError
from zopro.store import shown
from zopro.store.layout import Layout

OPENING = 3  # prompts whose answers stand above everything else


def write_report(
    run: str | Path,
    target: Path | None = None,
    analysis: Record | None = None,
    summary: Record | None = None,
    reload: int = 0,
) -> Path:
    """Write `run`/report.html (or `target`) from what the run directory holds and return its path.

    The page replaces the previous one in one step, so a reader never sees half of it. `analysis` is what
    `zopro.analysis.analyse` gives, by default that in `run`/analysis.json; `summary` likewise, of `run`/summary.json.
    reload: seconds after which a browser loads the page again; 0 for a page that stays.
    Raises `InputError` if `run` is not a folder.
    """
    run = Path(run)
    if not run.is_dir():
        raise InputError(f"RUN: must be a run directory, got '{run}' (no such folder).")
    return replace_file(target or Layout(run).report(), encoded(report(run, analysis, summary, reload)))


def report(run: Path, analysis: Record | None = None, summary: Record | None = None, reload: int = 0) -> str:
    """Return the page of run directory `run`, as `write_report` writes it."""
    layout, metrics, config = Layout(run), read_metrics(run), read_config(run)
    summary = read_object(layout.summary()) if summary is None else summary
    found = {} if reload else read_object(layout.analysis()) if analysis is None else analysis
    evaluations, start, answers = latest_evaluations(metrics), start_of(config), samples(run)
    stages = stage_seconds(metrics, summary)
    newest = shown.policy(evaluations[-1].get("iteration"), start) if evaluations else start.name
    return render(
        "report.html.j2",
        run=run.resolve().name,
        about=[config[key] for key in ("task", "method") if config.get(key)]
        + [shown.place(str(config.get("model", "")))],
        reload=reload,
        start=start,
        newest=newest,
        verdict=verdict(run, config, evaluations),
        judge=judge(run, config),
        opening=[sample.of(start.name, newest) for sample in answers[:OPENING]],
        samples=answers,
        config=config,
        groups=_config_groups(config),
        environment=_flat(read_object(layout.environment())),
        summary=summary,
        evaluations=evaluations,
        table=evaluation_table(evaluations, start),
        reward_models=reward_models(metrics),
        stages=stages,
        costs=costs(stages),
        **curves(run_charts(metrics, start)),
        **_interplay(found),
    )


def _interplay(numbers: Record) -> dict[str, Any]:
    """What the template needs of an analysis; of none, only that there is none, without importing torch."""
    if "trajectories" not in numbers:
        return {"analysis": None, "script_policy": ""}
    from zopro.analysis.page.interplay import page_parts

    return page_parts(numbers)


def _config_groups(config: Record) -> list[tuple[str, list[Record]]]:
    """The run's keys under the titles of `zopro.config`, each with its help and whether it is the default."""
    groups = []
    for group in GROUPS:
        rows = []
        for name, field in group.__dataclass_fields__.items():
            if name in config:
                default = default_of(field, *(str(config.get(name, "")) for name in ("task", "engine")))
                rows.append(
                    {
                        "name": name,
                        "value": _typed(config[name]),
                        "help": field.metadata["help"],
                        "changed": config[name] != default,
                    }
                )
        groups.append(((group.__doc__ or "").rstrip("."), rows))
    return [(title, rows) for title, rows in groups if rows]


def _typed(value: Any) -> str:
    """As config.yaml has it: true, not True."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flat(tree: Record, prefix: str = "") -> Record:
    """Nested objects as one level of dotted names."""
    flat: Record = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
