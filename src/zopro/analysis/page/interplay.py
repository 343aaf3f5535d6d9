"""The part of the page about trajectories: charts, tables, heat maps, and the plotly bundle with the script that uses it.

The bundle comes from the installed `plotly` package and lies in the page compressed (4.8 MB become 2 MB); the browser
inflates it. The page's content security policy names both scripts by their hashes, so that nothing else can run.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from markupsafe import Markup

from zopro.analysis.page.figures import heat_maps, metric_charts, table
from zopro.analysis.page.findings import findings
from zopro.analysis.page.pages import curves

SCRIPT = "interplay.js"


def page_parts(numbers: dict[str, Any]) -> dict[str, Any]:
    """What the template needs of an analysis."""
    bundle, bundle_hash = plotly_bundle()
    script = (Path(__file__).parent / SCRIPT).read_text("utf-8")
    return {
        "analysis": numbers,
        "findings": findings(numbers),
        "metrics": curves(metric_charts(numbers)),
        "heat_maps": heat_maps(numbers),
        "tables": [
            ("Update i of the reward model against update i of the policy", table(numbers, numbers)),
            ("Off by one: update i - 1 of the reward model against update i", table(numbers, numbers["off_by_one"])),
        ],
        "trajectories": embedded(numbers["trajectories"]),
        "bundle": Markup(bundle),
        "script": Markup(script),
        "script_policy": f" script-src {bundle_hash} {source_hash(script)}; img-src data: blob:;",
    }


def embedded(value: Any) -> Markup:
    """JSON that can stand inside a script element: no `<` ends or begins anything there."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False)
    return Markup(text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026"))


@lru_cache(maxsize=1)
def plotly_bundle() -> tuple[str, str]:
    """plotly.js, gzip and base64, and its hash for the content security policy."""
    from plotly.offline import get_plotlyjs

    source = get_plotlyjs()
    return base64.b64encode(gzip.compress(source.encode("utf-8"), 9, mtime=0)).decode("ascii"), source_hash(source)


def source_hash(script: str) -> str:
    digest = hashlib.sha256(script.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
