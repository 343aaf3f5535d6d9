"""The report: complete from a finished run, shorter from one in progress, and safe whatever a model says."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import math
import re
from html import unescape
from pathlib import Path

import pytest
import yaml
from matplotlib.figure import Figure

from pages import Page, read
from walks import lora_walk
from zopro.analysis.analyse import analyse
from zopro.analysis.numbers import chance
from zopro.analysis.page.answers import samples
from zopro.analysis.page.charts import MAX_POINTS, Chart, Series, running_mean
from zopro.analysis.page.curves import training_charts
from zopro.analysis.page.drawing import draw, inline
from zopro.analysis.page.report import write_report
from zopro.analysis.reading.checkpoints import of_folder
from zopro.analysis.reading.records import latest_evaluations, stage_seconds
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.store import shown

EVIL = "<script>alert('x')</script>"


SFT = shown.start(40)


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def evaluation(iteration: int | None, reward: float, **more: float) -> dict:
    line = {"stage": "evaluation", "iteration": iteration, "reward": reward, "n": 40, "kl_per_answer": 0.5}
    return {**line, "reward_low": reward - 0.1, "reward_high": reward + 0.1, **more}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return written(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with its report, made once: for tests that only read them."""
    folder = written(tmp_path_factory.mktemp("finished"))
    write_report(folder)
    return folder


def written(tmp_path: Path) -> Path:
    """A finished run of two iterations."""
    config = RunConfig(model=f"base{EVIL}", task="chat", train_data="rows.jsonl", seed=7)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    (tmp_path / "environment.json").write_text(json.dumps({"packages": {"torch": f"2.13{EVIL}"}}))
    summary = {"seconds": 12.5, "peak_rss_mb": 900, "reward_quality": {"accuracy": 0.83, "n": 40}}
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    lines = [
        {"stage": "reward", "iteration": None, "event": "quality", "accuracy": 0.83, "n": 40},
        evaluation(None, -0.5),
    ]
    for i in range(2):
        policy = {"stage": "policy", "iteration": i}
        for step in range(1, 11):
            lines.append({**policy, "step": step, "loss": -0.1, "reward": 0.1 * step, "signal_to_noise": 20.0 * step})
        lines.append({**policy, "event": "end", "seconds": 3.0 + i, "peak_rss_mb": 800})
        lines.append(evaluation(i, 0.25 + i, win_rate=0.6 + i / 10, win_rate_low=0.5, win_rate_high=0.8))
    write_jsonl(tmp_path / "metrics.jsonl", lines)
    for name, win in (("base", 0), ("sft", None), ("000", 0), ("001", 1)):
        rows = [
            {
                "prompt": f"question {k} {EVIL}",
                "completion": f"{name} answer {k} {EVIL}",
                "reward": k / 2,
                "reference": EVIL,
            }
            for k in range(25)
        ]
        write_jsonl(
            tmp_path / "evaluations" / f"{name}.jsonl", rows if win is None else [{**r, "win": win} for r in rows]
        )
    return tmp_path


def page_of(run: Path) -> Page:
    write_report(run)
    return read(run)


def test_a_finished_run_gives_every_part(finished):
    page = read(finished)
    assert "-0.500 → 1.250" in page.text
    assert "Win rate against SFT 0.700 95 % [0.500, 0.800], by the judge of task chat" in page.text
    assert "Time 7.0 s peak memory 800 MB" in page.text, "as the table of stages under it"
    assert "accuracy 0.830 on 40 held-out rows" in page.text and "finished" in page.text
    assert page.count("svg") == 7  # reward, win rate, KL; training reward, loss, signal to noise; memory
    assert "question 19" in page.text and "question 20" not in page.text
    assert page.text.count("▲ beats SFT") == 20 + 3 and page.text.count("▼ loses to SFT") == 40, "3 above the contents"
    samples = page.text[page.text.index("The first 20 held-out prompts") :]
    assert samples.index("base answer 0") < samples.index("sft answer 0") < samples.index("001 answer 0")
    assert "eval_greedy false " in page.text and not re.search(r"\b(True|False|None)\b", page.text)
    assert "set by this run" in page.text and "packages.torch" in page.text
    assert [p.name for p in finished.glob("report*")] == ["report.html"]


def test_what_models_and_data_say_is_escaped(finished):
    page = read(finished)
    assert page.count("script") == 0
    assert page.text.count(EVIL) > 20 * 4
    assert "{{" not in page.text


def test_the_page_stands_alone(finished):
    page = read(finished)
    for tag, attributes in page.elements:
        assert tag not in {"script", "link", "img", "iframe"}
        assert not {"src", "onclick"} & set(attributes)
        for name in ("href", "xlink:href"):
            assert str(attributes.get(name, "#")).startswith("#"), "a place in the page"
    html = (finished / "report.html").read_text("utf-8")
    assert "@import" not in html and "url(" not in html
    assert "prefers-color-scheme: dark" in html and "width=device-width" in html
    assert "@media print" in html and "print-color-adjust: exact" in html, "bars and heat maps are backgrounds"


@pytest.fixture(scope="module")
def analysed(tmp_path_factory):
    """The run with an analysis, whose checkpoints have a name of their own making, and the report of both."""
    run, folder = written(tmp_path_factory.mktemp("run")), tmp_path_factory.mktemp("walks")
    policy, reward = (lora_walk(folder / name, seed=seed, steps=2).folder for seed, name in enumerate("pr"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chance, "DRAWS", chance.BATCH)
        numbers = analyse(of_folder(policy, "policy"), of_folder(reward, "reward"))
    numbers["trajectories"]["product"]["pca"]["policy"]["labels"][0] = f"</script>{EVIL}&"
    (run / "analysis.json").write_text(json.dumps(numbers))
    write_report(run)
    return run


def test_an_analysis_adds_trajectories_metrics_and_heat_maps(analysed):
    page = read(analysed)
    assert page.count("svg") == 7 + 10
    assert "update_angle_degrees" in page.text and "procrustes_disparity" in page.text
    assert "Angle between updates, degrees, by layer" in page.text and "layer 2" in page.text
    assert page.count("select") == 3 and page.count("button") == 7
    labels = [attributes.get("aria-label") for _, attributes in page.elements]
    scrolled = [attributes for _, attributes in page.elements if attributes.get("class") == "scroll"]
    assert len(scrolled) > 4 and all(one.get("tabindex") == "0" and one.get("aria-label") for one in scrolled)
    assert "turn left" in labels and "Turn the plot" in labels
    assert (analysed / "report.html").stat().st_size < 3e6


def test_only_our_own_scripts_can_run(analysed):
    """The content security policy names two scripts by their hash: ours, and the inflated plotly bundle."""
    html = (analysed / "report.html").read_text("utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html).group(1)
    policy = unescape(policy)
    rule = next(rule for rule in policy.split(";") if rule.strip().startswith("script-src"))
    scripts = dict(re.findall(r"<script([^>]*)>(.*?)</script>", html, re.S))
    plotly = gzip.decompress(base64.b64decode(scripts[' type="application/octet-stream" id="plotly"'])).decode()
    for source in (scripts[""], plotly):
        assert f"'sha256-{base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()}'" in rule
    assert len(rule.split()) == 3 and "unsafe" not in rule and "default-src 'none'" in policy
    assert html.count("<script") == 3
    data = json.loads(scripts[' type="application/json" id="trajectory-data"'])
    assert data["product"]["pca"]["policy"]["labels"][0] == f"</script>{EVIL}&"
    assert not re.search(r'(src|href)=(?!"#)', html.replace(scripts[""], ""))


def test_charts_say_in_words_what_they_show(finished):
    labels = [attributes.get("aria-label") for tag, attributes in read(finished).elements if tag == "svg"]
    assert "Held-out reward, 95 % interval: -0.5 to 1.25 [1.15, 1.35]" in labels
    level, line = Series("by chance", [(0, 0.0)], [(-0.1, 0.2)], "chance c3"), Series("x", [(0, 1.0)], [(1, 1)])
    assert str(Chart("t", [level, line], "")) == "t. by chance: -0.1 to 0.2; x: 1 to 1"


@pytest.mark.parametrize("missing", ["config.yaml", "environment.json", "metrics.jsonl", "summary.json", "evaluations"])
def test_a_run_in_progress_lacks_files(run, missing):
    path = run / missing
    path.rename(run.parent / f"{run.name}-{missing}")
    page_of(run)


def test_an_empty_run_says_so(tmp_path):
    page = page_of(tmp_path)
    assert "No measurements yet." in page.text and "in progress" not in page.text


def test_broken_files_are_left_out(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(json.dumps(evaluation(None, 0.5)) + '\n[1]\n{"stage": "po')
    (tmp_path / "config.yaml").write_text("a: [")
    (tmp_path / "environment.json").write_text("[]")
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "sft.jsonl").write_text('{"prompt": "p", "completion": "lone \\ud800", "reward": NaN}')
    assert "lone ?" in page_of(tmp_path).text


def test_no_folder_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="no such folder"):
        write_report(tmp_path / "absent")


def test_a_resumed_stage_counts_once():
    metrics = [evaluation(0, 1.0), evaluation(None, 0.0), evaluation(0, 2.0)]
    assert [(line["iteration"], line["reward"]) for line in latest_evaluations(metrics)] == [(None, 0.0), (0, 2.0)]
    ends = [{"stage": "sft", "iteration": None, "event": "end", "seconds": s} for s in (4.0, 2.0)]
    assert [(line["seconds"], line["share"]) for line in stage_seconds(ends)] == [(2.0, 1.0)]


def test_iterations_are_laid_end_to_end():
    lines = [{"stage": "policy", "iteration": i, "step": s, "reward": 10.0 * i + s} for i in (0, 1) for s in (1, 2, 3)]
    chart = next(chart for chart in training_charts(lines, SFT) if "Reward" in chart.title)
    assert list(chart.series[0].points) == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 11.0), (5, 12.0), (6, 13.0)]
    assert [x for x, _ in chart.dividers] == [0.5, 3.5], "before an iteration's first step"
    assert draw(Figure(), chart).get_xlim() == (0.5, 6) and [series.name for series in chart.series] == ["each step"]
    many = [{"stage": "policy", "step": s, "reward": 1.0} for s in range(1, 25)]
    assert [series.name for series in training_charts(many, SFT)[0].series] == ["each step", "mean of 2 steps"]
    two = [{"stage": "policy", "iteration": i, "step": s, "reward": float(i)} for i in (0, 1) for s in range(1, 13)]
    mean = training_charts(two, SFT)[0].series[1]
    assert {y for _, y in mean.points} == {0.0, 1.0}, "not across iterations"


def test_samples_are_matched_by_prompt(tmp_path):
    write_jsonl(tmp_path / "evaluations" / "sft.jsonl", [{"prompt": p, "completion": f"s{p}"} for p in "ab"])
    write_jsonl(tmp_path / "evaluations" / "000.jsonl", [{"prompt": p, "completion": f"0{p}"} for p in "ba"])
    assert [[a.text for a in sample.answers] for sample in samples(tmp_path)] == [["sa", "0a"], ["sb", "0b"]]


@pytest.mark.parametrize("values", [[1.0], [2.0, 2.0], [0.0, 0.0, 0.0], [1.0, math.nan, math.inf, 2.0], [-1e9, 1e9]])
@pytest.mark.parametrize("log", [False, True])
def test_every_series_draws_inside_the_frame(values, log):
    chart = Chart("t", [Series("s", list(enumerate(values)), dots=True)], "x", log=log)
    svg = str(inline(chart))
    positive = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    assert svg.count("<title>s ") == len(positive)
    for x, y in re.findall(r' x="([^"]+)" y="([^"]+)"', svg):
        assert 0 <= float(x) <= 360 and 0 <= float(y) <= 200


def test_long_series_are_thinned():
    points = [(float(i), float(i % 2)) for i in range(10_000)]
    assert len(inline(Chart("t", [Series("s", points)], "x"))) < 20_000


@pytest.mark.parametrize("count", [MAX_POINTS, MAX_POINTS + 1, 1001])
def test_bands_are_thinned_with_their_lines(count):
    points = [(float(i), float(i)) for i in range(count)]
    band = [(x - 1, x + 3) for x, _ in points]
    (shown,) = Chart("t", [Series("s", points, band)], "x").shown
    assert len(shown.points) == len(shown.band) <= MAX_POINTS
    for (x, y), edges in zip(shown.points, shown.band, strict=True):
        assert x == y and edges == pytest.approx((x - 1, x + 3))
    inline(Chart("t", [Series("s", points, band)], "x"))


def test_a_chart_takes_its_colours_from_the_page(analysed):
    html = (analysed / "report.html").read_text("utf-8")
    drawn = "".join(re.findall(r"<svg .*?</svg>", html, re.S))
    assert not re.findall(r"(?:fill|stroke): (?!none|var\()", drawn), "every colour has a light and a dark form"
    names = set(re.findall(r"var\((--\w+)\)", drawn))
    assert {"--c1", "--c3", "--c4", "--muted", "--edge"} == names, "no two meanings have one colour"
    for name in names:
        assert len(re.findall(rf"{name}: #\w{{6}};", html)) == 2, "light and dark"
    marks = re.findall(r'id="(\w+)"', drawn)
    assert len(marks) == len(set(marks)) and set(marks) == set(re.findall(r'href="#(\w+)"', drawn))
    assert "<style" not in drawn
    assert write_report(analysed).read_text("utf-8") == html, "drawn again it is the same"


def test_means_over_a_window():
    assert running_mean([(0, 1.0), (1, 3.0), (2, math.nan), (3, 5.0)], 2) == [(0, 1.0), (1, 2.0), (3, 4.0)]
