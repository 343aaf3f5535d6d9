"""A run in several attempts, or by an earlier version: its seconds, its memory and its records add up."""

from __future__ import annotations

import json
import re
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from one_run import metrics, no_figures, no_report, page
from tiny_runs import config, fingerprint
from zopro import demo
from zopro.analysis.page.report import report
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.run import Run
from zopro.store.rundir import RunDirectory
from zopro.train.callbacks import MetricsCallback


class Crashed(BaseException):
    """As a crash: no handler for errors may see it."""


def test_a_finished_run_is_left_as_it_is(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    settings, summary = finished
    run = Path(settings.output_dir)

    def files() -> dict[str, tuple[int, bytes]]:
        paths = [path for path in run.rglob("*") if path.is_file() and not path.name.startswith(".lock")]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in paths}

    before = files()
    assert pipeline.run(settings, resume=True, quiet=True) == summary
    assert files() == before
    moved = tmp_path / "moved"
    shutil.copytree(run, moved)
    again = pipeline.run(replace(settings, output_dir=str(moved)), resume=True, quiet=True)
    assert again == {**summary, "run": str(moved), "report": str(moved / "report.html")}


def test_a_run_goes_on_for_more_iterations_to_the_bits_of_a_longer_one(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, no_finish: None, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, run = Path(finished[0].output_dir), tmp_path / "run"
    longer = replace(finished[0], output_dir=str(run))
    pipeline.run(replace(longer, iterations=1), quiet=True)
    with pytest.raises(InputError, match=rf"continue it with: zopro run {run}/config.yaml --resume --iterations 2$"):
        pipeline.run(longer, quiet=True)
    capsys.readouterr()
    pipeline.run(replace(longer, iterations=1), resume=True)
    assert "nothing is left to do; more iterations: --iterations 2\n" in capsys.readouterr().err
    begun = RunDirectory(longer, resume=True)
    begun.create()
    begun.lock.release()
    assert not begun.layout.summary().exists()
    assert pipeline.run(longer, resume=True, quiet=True)["iterations"] == 2
    assert fingerprint(run) == fingerprint(whole)
    with pytest.raises(InputError, match=r"another config \(iterations is 2 there, 1 here\)"):
        pipeline.run(replace(longer, iterations=1), resume=True, quiet=True)


def test_a_run_says_first_where_it_is_and_how_to_go_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pipeline, "_loop", lambda *args: {})
    settings = config(folder, tmp_path / "a run")
    pipeline.run(settings)
    again = f"zopro run '{tmp_path}/a run/config.yaml' --resume"
    assert f"the run is in {tmp_path}/a run; if it is stopped, continue it with: {again}" in capsys.readouterr().err
    pipeline.run(settings, resume=True)
    assert "the run is in" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"method": "es", "population": 4, "learning_rate": 1.0},
            "learning_rate, eps: of no effect with es; set es_learning_rate",
        ),
        (
            {"es_learning_rate": 1.0, "sigma": 0.2},
            "es_learning_rate, sigma: of no effect with rloo and zopro; set first_order_learning_rate or learning_rate",
        ),
        (
            {"es_learning_rate": 1.0, "first_order_learning_rate": 1e-3, "learning_rate": 1e-3},
            "es_learning_rate: of no effect with rloo and zopro",
        ),
        ({"population": 4}, "population: of no effect with rloo and zopro"),
        ({}, ""),
    ],
)
def test_keys_of_other_methods_are_named(
    options: dict[str, Any], said: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pipeline, "walk", lambda *args: ())
    lines: list[str] = []
    monkeypatch.setattr(Run, "say", lambda self, line: lines.append(line))
    nothing: Any = None
    pipeline._stages(Run(config(folder, tmp_path, **options), nothing, nothing), nothing, nothing, live=False)
    assert lines == [said] * bool(said)


def test_attempts_add_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process crashes in a stage, and had more memory than the second ever needs."""
    no_figures(monkeypatch)
    settings, run = config(folder, tmp_path / "run", iterations=1, policy_steps=4, checkpoint_steps=2), tmp_path / "run"
    original = MetricsCallback.on_log

    def mortal(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if self.stage == "policy" and state.global_step == 3:
            raise Crashed

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_log", mortal)
        with pytest.raises(Crashed):
            pipeline.run(settings, quiet=True)
    (crashed,) = json.loads((run / "usage.json").read_text())
    assert (crashed["unfinished"]["stage"], crashed["unfinished"]["iteration"]) == ("policy", 0)
    ended = {line["stage"]: line["seconds"] for line in metrics(run) if line.get("event") == "end"}
    assert crashed["seconds"] > crashed["unfinished"]["seconds"] + sum(ended.values())

    crashed = {**crashed, "seconds": crashed["seconds"] + 1000, "peak_rss_mb": 99_999.0}
    crashed["unfinished"]["seconds"] += 500
    (run / "usage.json").write_text(json.dumps([crashed]))
    began = time.perf_counter()
    summary = pipeline.run(settings, resume=True, quiet=True)
    took = time.perf_counter() - began
    first, second = summary["attempts"]
    assert first == {name: crashed[name] for name in ("seconds", "peak_rss_mb", "processes")}
    assert 0 < second["seconds"] <= took + 0.01 and second["peak_rss_mb"] < 99_999
    assert summary["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.01)
    assert summary["peak_rss_mb"] == 99_999.0
    assert 500 + ended["sft"] < summary["stages"]["policy"] < 500 + crashed["unfinished"]["seconds"] + took
    assert summary["stages"]["sft"] == ended["sft"], "what the first process had finished counts once"
    lines = metrics(run)
    assert {line["peak_rss_mb"] for line in lines if line.get("event") == "end" and line["iteration"] == 0} == {99_999.0}
    text = demo.table(summary)
    assert f"seconds      {summary['seconds']:.1f} in 2 attempts" in text and "peak memory  99999 MB" in text
    assert f"Time {summary['seconds']:.1f} s peak memory 99999 MB" in page(run)


def test_earlier_versions_are_read(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, no_finish: None) -> None:
    """Both KLs were `kl`, and nothing said how long the run's processes had taken."""
    settings, summary = finished
    run = tmp_path / "run"
    shutil.copytree(settings.output_dir, run)
    text = (run / "metrics.jsonl").read_text()
    for path in (run / "metrics.jsonl", *(run / "evaluations").glob("*.json")):
        path.write_text(re.sub("kl_per_(answer|token)", "kl", path.read_text()))
    shown_now = report(Path(settings.output_dir), summary=summary)
    assert report(run, summary=summary) == shown_now.replace(Path(settings.output_dir).name, "run")
    (run / "usage.json").unlink()
    for path in (run / "summary.json", run / "evaluations/001.json"):
        path.unlink()
    again = pipeline.run(replace(settings, output_dir=str(run)), resume=True, quiet=True)
    assert again["evaluations"][0]["kl_per_answer"] == 0
    assert again["evaluations"][2]["kl_per_answer"] == summary["evaluations"][2]["kl_per_answer"]
    before = [json.loads(line) for line in text.splitlines()]
    ends = [line for line in before if line.get("event") == "end"]
    assert again["attempts"][0]["seconds"] == pytest.approx(sum(line["seconds"] for line in ends), abs=0.01)
    assert again["attempts"][0]["peak_rss_mb"] == ends[-1]["peak_rss_mb"]


def test_a_stage_whose_process_was_killed_before_it_could_say_its_end_is_counted(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, no_finish: None
) -> None:
    settings, run = finished[0], tmp_path / "run"
    shutil.copytree(settings.output_dir, run)
    (run / "summary.json").unlink()
    ends = [line["stage"] == "policy" and line.get("event") == "end" for line in metrics(run)]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = (line for line, end in zip(lines, ends, strict=True) if not end)
    (run / "metrics.jsonl").write_text("".join(kept))
    killed = [{"stage": "policy", "iteration": iteration, "seconds": 7.0} for iteration in range(2)]
    used = [{"seconds": 9.0, "peak_rss_mb": 1.0, "processes": 1, "unfinished": unfinished} for unfinished in killed]
    (run / "usage.json").write_text(json.dumps(used))
    changed = replace(settings, output_dir=str(run))
    assert pipeline.run(changed, resume=True, quiet=True)["stages"]["policy"] == 14.0
    (run / "summary.json").unlink()
    assert pipeline.run(changed, resume=True, quiet=True)["stages"]["policy"] == 14.0, "an end is said once"


def test_a_damaged_record_of_usage_is_one_line(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    settings = replace(finished[0], output_dir=str(tmp_path / "run"))
    shutil.copytree(finished[0].output_dir, tmp_path / "run")
    entry = '{"seconds": 1, "peak_rss_mb": 2, "unfinished": %s}'
    for text in ("[{", "[1]", "null", "{}", '[{"seconds": 1}]', f"[{entry % 1}]", f"[{entry % '[1]'}]", "[" * 10**5):
        (tmp_path / "run/usage.json").write_text(text)
        with pytest.raises(InputError, match=r"usage.json: must be JSON, but is damaged .* Delete it"):
            RunDirectory(settings, resume=True)


def test_a_damaged_configuration_is_one_line(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    settings = replace(finished[0], output_dir=str(tmp_path))
    for text in ("a: [", "- a\n", "", "[" * 10**4, 'seed: !!int ""'):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(InputError, match=r"config.yaml must be the run's configuration, and is damaged"):
            RunDirectory(settings, resume=True)


@pytest.fixture
def no_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    no_report(monkeypatch)
