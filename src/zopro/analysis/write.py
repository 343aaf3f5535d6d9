"""What an analysis leaves on disk: analysis.json, report.html, share.png, and figures/ (a PNG and an SVG of each).

from zopro.analysis import write
write.refresh("RUN")        # while a run is going on: numbers and PCA
write.finish("RUN")         # at its end: also t-SNE where installed, and the figures
write.page("RUN", summary)  # the report of the finished run, with its seconds and memory
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

from zopro.analysis.analyse import analyse
from zopro.analysis.numbers.projection import available
from zopro.analysis.page.pages import encoded, replace_file
from zopro.analysis.page.report import write_report
from zopro.analysis.reading.checkpoints import of_run
from zopro.analysis.reading.records import unread
from zopro.errors import InputError
from zopro.store.layout import Layout

log = logging.getLogger(__name__)


def refresh(run: str | Path) -> None:
    """Bring analysis.json and report.html of a run up to date. A checkpoint that cannot be read costs the numbers,
    with a warning, and never the run."""
    _of_run(Path(run), ["pca"])
    write_report(run)


def finish(run: str | Path) -> None:
    """The numbers with t-SNE where it is installed, and the figures; the report waits for the summary (`page`). UMAP,
    whose compilation takes longer than a short run, is `zopro analyse`'s to add."""
    run = Path(run)
    numbers = _of_run(run, [method for method in available() if method != "umap"])
    _figures(run, run, numbers)


def page(run: str | Path, summary: dict[str, Any]) -> None:
    """The report of a run that is finished but for its summary.json, which says that all is there and is written last."""
    write_report(run, summary=summary)
    _share(Path(run), Path(run))


def everything(out: Path, numbers: dict[str, Any], source: Path | None = None) -> dict[str, str]:
    """Write `numbers`, their report and figures to `out`; with `source`, a run directory, the rest of the run too.

    A warning names the run's files that are damaged, and what the report lacks for it.
    """
    if damaged := unread(source or out):
        log.warning("the report lacks what cannot be read in %s: %s. Restore it.", source or out, ", ".join(damaged))
    _write(out, numbers)
    report = write_report(source or out, target=Layout(out).report(), analysis=numbers)
    _figures(source or out, out, numbers)
    layout = Layout(out)
    written = {
        "report": report,
        "analysis": layout.analysis(),
        "figures": layout.figures(),
        "share": _share(source or out, out),
    }
    return {name: str(path) for name, path in written.items() if path is not None}


def _of_run(run: Path, projections: list[str]) -> dict[str, Any] | None:
    try:
        numbers = analyse(*of_run(run), projections=projections)
    except InputError as error:
        log.warning("no analysis of the trajectories: %s", error)
        Layout(run).analysis().unlink(missing_ok=True)
        return None
    _write(run, numbers)
    return numbers


def _write(out: Path, numbers: dict[str, Any]) -> None:
    replace_file(Layout(out).analysis(), encoded(json.dumps(numbers, allow_nan=False, ensure_ascii=False) + "\n"))


def _figures(run: Path, out: Path, numbers: dict[str, Any] | None) -> None:
    from zopro.analysis.page.static import write_figures

    write_figures(run, Layout(out).figures(), numbers)


def _share(run: Path, out: Path) -> Path | None:
    from zopro.analysis.page.share import write_share

    return write_share(run, Layout(out).share())
