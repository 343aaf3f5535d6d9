"""Whatever models, data and folders are called or say, the report has the elements of a harmless one, and no other."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from walks import lora_walk
from zopro.analysis.analyse import analyse
from zopro.analysis.page.charts import Chart, Series
from zopro.analysis.page.drawing import inline
from zopro.analysis.page.report import write_report
from zopro.analysis.reading.checkpoints import of_folder
from zopro.config import RunConfig
from zopro.store.shown import place

HARMLESS = "a plain word"
EVIL = {
    "script": "<script>alert(1)</script>",
    "end of script": "</script><script>alert(1)</script>",
    "handler": '<img src=x onerror="alert(1)">',
    "out of an attribute": '" onmouseover="alert(1)" x="',
    "out of an attribute, single": "' autofocus onfocus='alert(1)",
    "end of page": "</td></table></main></body></html><svg onload=alert(1)>",
    "end of title": "</title><base href=//evil><meta http-equiv=refresh content=0>",
    "comment": "<!-- <![CDATA[ <plaintext> --!>",
    "template": "{{ 7 * 7 }}{% for x in y %}{# #}",
    "entities": "&lt;script&gt;&#60;b&#62;&quot;",
    "frame": "<iframe srcdoc='<script>alert(1)</script>'></iframe><style>*{display:none}</style>",
    "plotly": "<a href='javascript:alert(1)'>a</a><b>%{x}</b><br>${1}`",
    "controls": "a\0b\x08c\x1b[31m\u202ed\ufeff\ud800",
}


class Elements(HTMLParser):
    """Every tag with the names of its attributes, in order, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.found: list[Any] = []
        self.words: list[str] = []
        self.seen = True
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[Any]) -> None:
        self.found.append((tag, *(name for name, _ in attrs)))
        self.seen = tag not in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.found.append(tag)
        self.seen = True

    def handle_comment(self, data: str) -> None:
        self.found.append(f"comment {data}")

    def handle_data(self, data: str) -> None:
        self.words.append(data if self.seen else "")


@pytest.fixture(scope="module")
def numbers(tmp_path_factory) -> Any:
    folder = tmp_path_factory.mktemp("walks")
    found = analyse(
        *(of_folder(lora_walk(folder / n, seed=s, steps=2).folder, n) for s, n in enumerate(("policy", "reward")))
    )
    name = "update_angle_degrees"  # one chart is enough
    return {**found, "metrics": {name: found["metrics"][name]}}


def page(run: Path, text: str, numbers: Any) -> str:
    """The report of a run in which everything that can be a text is `text`."""
    shutil.rmtree(run, ignore_errors=True)
    (run / "evaluations").mkdir(parents=True)
    config = {
        **RunConfig(model="m", task="chat", train_data="x").to_dict(),
        "model": text,
        "train_data": text,
        "task": text,
    }
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "environment.json").write_text(json.dumps({"python": text, "packages": {"torch": text}}))
    (run / "summary.json").write_text(json.dumps({"seconds": 1.5}))
    lines = [
        {
            "stage": "evaluation",
            "iteration": i,
            "reward": 1.0,
            "n": 1,
            "kl_per_answer": 0.5,
            "metric": 1.0,
            "metric_name": text,
        }
        for i in (None, 0)
    ]
    lines.append({"stage": text, "iteration": None, "event": "end", "seconds": 2.0, "peak_rss_mb": 1.0})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = {"prompt": text, "completion": text, "reward": 1.0, "reference": text, "win": 1}
    for name in ("base", "sft", "000"):
        (run / "evaluations" / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    for view in numbers["trajectories"].values():
        for method in view.values():
            for side in ("policy", "reward"):
                method[side]["labels"] = [text] * len(method[side]["labels"])
    (run / "analysis.json").write_text(json.dumps(numbers))
    return write_report(run).read_text("utf-8")


@pytest.fixture(scope="module")
def pages(tmp_path_factory, numbers) -> dict[str, str]:
    """The report of each text, by its name."""
    folder = tmp_path_factory.mktemp("runs")
    return {name: page(folder / "run", text, numbers) for name, text in {**EVIL, HARMLESS: HARMLESS}.items()}


@pytest.mark.parametrize("name", EVIL)
def test_nothing_but_text_comes_of_a_text(name, pages):
    text = EVIL[name]
    ours, harmless = (Elements(pages[one]) for one in (name, HARMLESS))
    assert ours.found == harmless.found
    shown, usual = (" ".join("".join(one.words).split()) for one in (ours, harmless))
    expected = " ".join(text.replace("\ud800", "?").split())
    paths = place(text) != text  # the model's name, of a path only the last part
    assert usual.count(HARMLESS) > 12 and shown.count(expected) == usual.count(HARMLESS) - paths


@pytest.mark.parametrize("name", EVIL)
def test_a_chart_takes_names_as_text(name):
    def drawn(text: str) -> Elements:
        series = [Series(text, [(0.0, 1.0), (1.0, 2.0)], dots=True)]
        chart = Chart("t", series, text, y_label=text, x_names=[text, text], rule=(1.0, text), dividers=[(0.0, text)])
        return Elements(inline(chart))

    ours, harmless = drawn(EVIL[name]), drawn(HARMLESS)
    assert ours.found == harmless.found
    shown = "".join(ours.words).replace("\ud800", "?")
    assert shown.count(EVIL[name].replace("\ud800", "?")) == 6, "both axes, rule, divider, two dots; long names are cut"


@pytest.mark.parametrize("name", EVIL)
def test_the_plots_data_is_what_was_given(name, pages):
    html = pages[name]
    (data,) = re.findall(r'<script type="application/json" id="trajectory-data">(.*?)</script>', html, re.S)
    assert not set(data) & set("<>&")
    labels = json.loads(data)["product"]["pca"]["policy"]["labels"]
    assert labels[0] == EVIL[name]
    rule = unescape(re.search(r'Content-Security-Policy" content="([^"]+)"', html)[1])
    assert re.findall(r"script-src[^;]*", rule)[0].count("sha256-") == 2 and "'unsafe-inline'; script" in rule


@pytest.mark.skipif(shutil.which("node") is None, reason="runs the page's own function")
def test_labels_reach_plotly_as_text():
    script = (Path(__file__).parents[3] / "src/zopro/analysis/page/interplay.js").read_text("utf-8")
    (plain,) = re.findall(r"const plain = .*;", script)
    assert script.count("side.labels") == 1, "and only through it"
    given = base64.b64encode(json.dumps(EVIL["plotly"]).encode()).decode()
    code = f"{plain} console.log(JSON.stringify(plain(JSON.parse(Buffer.from('{given}', 'base64')))))"
    done = subprocess.run(["node", "-e", code], capture_output=True, text=True, check=True)
    escaped = json.loads(done.stdout)
    assert unescape(escaped) == EVIL["plotly"] and not set(escaped) & set("<>")
