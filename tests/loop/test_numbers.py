"""Every number that is shown in two places is one number: terminal, metrics.jsonl, summary.json and report.html."""

from __future__ import annotations

import json
import math
import re
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from html import unescape
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from tiny_runs import config, write_inputs
from zopro import demo
from zopro.analysis.page.report import render, stage_seconds
from zopro.compare import run as comparison
from zopro.compare.plan import Plan
from zopro.config import RunConfig
from zopro.engine.local.rollouts import Rollouts
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.divergence import kl_per_answer, log_ratios, policy_logprobs
from zopro.loop.evaluation import evaluate
from zopro.loop.session import Session
from zopro.loop.stages import train_reward, train_sft
from zopro.loop.summary import headline
from zopro.store import shown
from zopro.store.rundir import RunDirectory
from zopro.train import callbacks
from zopro.train.callbacks import MetricsCallback

AGO, BEFORE = 100.0, {"pretraining": 60.0}


class Died(BaseException):
    """No handler but those for death itself may see it."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def finished(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, dict[str, Any]]:
    """A run whose caller had begun 100 seconds earlier, as the demo has; its figures are left out."""
    settings = config(folder, tmp_path_factory.mktemp("run") / "run", dtype="float32")
    with pytest.MonkeyPatch.context() as patch:
        no_figures(patch)
        return settings, pipeline.run(settings, quiet=True, began=time.perf_counter() - AGO, before=BEFORE)


def no_figures(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(pipeline.write, "refresh", lambda run: None)
    patch.setattr(pipeline.write, "finish", lambda run: None)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def page(run: Path) -> str:
    """The words of the report, with one blank between them."""
    html = (run / "report.html").read_text("utf-8")
    html = re.sub(r"<(style|script)[^>]*>.*?</\1>", "", html, flags=re.DOTALL)
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", " ", html)))


def found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, pattern
    return match[1]


def test_terminal_metrics_and_report_say_the_same(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    settings, summary = finished
    run = Path(settings.output_dir)
    assert json.loads((run / "summary.json").read_text()) == summary
    terminal, report, lines = demo.table(summary), page(run), metrics(run)

    assert summary["seconds"] > AGO, "from the caller's beginning"
    assert found(r"seconds +(\S+)", terminal) == found(r" Time (\S+) s", report) == f"{summary['seconds']:.1f}"
    ends = [line for line in lines if line.get("event") == "end"]
    stages = [*((x["stage"], x["seconds"]) for x in ends), ("other", summary["stages"]["other"])]
    assert stages[0] == ("pretraining", 60.0)
    assert sum(seconds for _, seconds in stages) == pytest.approx(summary["seconds"], abs=0.02), "all parts, each once"
    assert re.findall(r"([a-z]+) ([\d.]+)", found(r"seconds +\S+ \((.*)\)", terminal)) == [
        (name, f"{seconds:.1f}") for name, seconds in summary["stages"].items()
    ]
    table = found(r"Peak MB so far (.*?) Samples ", report)
    assert [(name, s) for name, s in re.findall(r"([a-z]+)(?: \d)? (\d+\.\d) \d+ ", table + " ")] == [
        (name, f"{seconds:.1f}") for name, seconds in stages
    ]

    peak = f"{summary['peak_rss_mb']:.0f}"
    assert found(r"peak memory +(\d+) MB", terminal) == found(r"peak memory (\d+) MB", report) == peak
    peaks = [line["peak_rss_mb"] for line in ends]
    assert peaks == sorted(peaks) and summary["peak_rss_mb"] >= peaks[-1]

    last = [line for line in lines if line["stage"] == "evaluation" and "reward" in line][-1]
    assert last.items() <= {**summary["evaluations"][-1], "time": last["time"]}.items()
    (row,) = (line for line in terminal.splitlines() if line.startswith("iteration 1"))
    numbers = [
        last[name] for name in ("reward", "reward_low", "reward_high", "win_rate", "win_rate_low", "win_rate_high")
    ]
    expected = "{:.3f} [{:.3f}, {:.3f}] {:.3f} [{:.3f}, {:.3f}]".format(*numbers)
    kl = f"{last['kl_per_answer']:.2f}"
    assert " ".join(row.split()) == f"iteration 1 {expected} {kl}"
    reward, reward_interval, wins, wins_interval = (
        found(r"(.*)", expected).replace(" [", "|[").replace("] ", "]|").split("|")
    )
    assert f"iteration 1 {reward} {reward_interval} {kl} {wins} {wins_interval} " in report
    assert (
        f"→ {reward} 95 % {reward_interval}" in report and f"Win rate against SFT {wins} 95 % {wins_interval}" in report
    )
    assert f"KL to the SFT policy {kl} nats per answer" in report
    quality = next(line for line in lines if line.get("event") == "quality")
    said = f"accuracy {quality['accuracy']:.3f}, n {quality['n']}"
    assert f"reward model {said} on held-out rows" in terminal and said in report


def test_the_headline_is_the_same_again(
    finished: tuple[RunConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, summary = finished
    directory = RunDirectory(settings, resume=True)
    line, last = headline(directory, 1), summary["evaluations"][-1]
    directory.lock.release()
    assert f"reward {last['reward']:.3f} [{last['reward_low']:.3f}, {last['reward_high']:.3f}]" in line
    assert f"KL {last['kl_per_answer']:.2f} nats per answer, wins {last['win_rate']:.3f} against SFT" in line


def test_both_kls_have_names_and_values_of_their_own(finished: tuple[RunConfig, dict[str, Any]]) -> None:
    settings, summary = finished
    run = Path(settings.output_dir)
    lines = metrics(run)
    assert not any("kl" in line for line in [*lines, *summary["evaluations"]])
    assert any("kl_per_token" in line for line in lines if line["stage"] == "policy")
    assert summary["evaluations"][0]["kl_per_answer"] == 0
    assert next(line for line in lines if line["stage"] == "evaluation")["kl_per_answer"] == 0


def test_kl_is_that_of_plain_forward_passes(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, summary = finished
    shutil.copytree(settings.output_dir, tmp_path / "run")
    session = Session(replace(settings, output_dir=str(tmp_path / "run")), resume=True, quiet=True)
    drawn = captured(session, monkeypatch)
    line = evaluate(session, 1)
    folders = session.directory.policy(1), session.directory.sft()
    session.directory.lock.release()
    models = [
        PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(settings.model), folder).eval()
        for folder in folders
    ]
    ratios = []
    for rollout in drawn:
        prompts = zip(rollout.prompt_ids, rollout.prompt_mask.bool(), strict=True)
        answers = zip(rollout.completion_ids, rollout.completion_mask.bool(), strict=True)
        for (prompt, real), (answer, said) in zip(prompts, answers, strict=True):
            prompt, answer = prompt[real], answer[said]
            ids = torch.cat([prompt, answer])[None]
            with torch.no_grad():
                logs = [model(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1) for model in models]
            ours, theirs = (log.gather(1, answer[:, None]).sum() for log in logs)
            ratios.append(float(ours - theirs))
    assert len(ratios) == 6 and sum(ratios) > 0.01
    assert line["kl_per_answer"] == pytest.approx(sum(ratios) / 6, rel=1e-3)
    assert line["kl_per_answer"] == summary["evaluations"][-1]["kl_per_answer"]


def captured(session: Session, monkeypatch: pytest.MonkeyPatch) -> list[Rollouts]:
    """What the session samples from now on."""
    drawn: list[Rollouts] = []
    sample = session.sample
    monkeypatch.setattr(session, "sample", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    return drawn


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


def test_attempts_add_up(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process dies in a stage, and had more memory than the second ever needs."""
    no_figures(monkeypatch)
    settings, run = config(folder, tmp_path / "run", iterations=1, policy_steps=4, checkpoint_steps=2), tmp_path / "run"
    original = MetricsCallback.on_log

    def mortal(self: Any, args: Any, state: Any, *rest: Any, **kwargs: Any) -> None:
        original(self, args, state, *rest, **kwargs)
        if self.stage == "policy" and state.global_step == 3:
            raise Died

    with monkeypatch.context() as patch:
        patch.setattr(MetricsCallback, "on_log", mortal)
        with pytest.raises(Died):
            pipeline.run(settings, quiet=True)
    (died,) = json.loads((run / "usage.json").read_text())
    assert (died["unfinished"]["stage"], died["unfinished"]["iteration"]) == ("policy", 0)
    ended = {line["stage"]: line["seconds"] for line in metrics(run) if line.get("event") == "end"}
    assert died["seconds"] > died["unfinished"]["seconds"] + sum(ended.values())

    died = {**died, "seconds": died["seconds"] + 1000, "peak_rss_mb": 99_999.0}
    died["unfinished"]["seconds"] += 500
    (run / "usage.json").write_text(json.dumps([died]))
    began = time.perf_counter()
    summary = pipeline.run(settings, resume=True, quiet=True)
    took = time.perf_counter() - began
    first, second = summary["attempts"]
    assert first == {name: died[name] for name in ("seconds", "peak_rss_mb", "processes")}
    assert 0 < second["seconds"] <= took + 0.01 and second["peak_rss_mb"] < 99_999
    assert summary["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.01)
    assert summary["peak_rss_mb"] == 99_999.0
    assert 500 + ended["sft"] < summary["stages"]["policy"] < 500 + died["unfinished"]["seconds"] + took
    assert summary["stages"]["sft"] == ended["sft"], "what the first process had finished counts once"
    lines = metrics(run)
    assert {line["peak_rss_mb"] for line in lines if line.get("event") == "end" and line["iteration"] == 0} == {99_999.0}
    text = demo.table(summary)
    assert f"seconds      {summary['seconds']:.1f} in 2 attempts" in text and "peak memory  99999 MB" in text
    assert f"Time {summary['seconds']:.1f} s peak memory 99999 MB" in page(run)


def test_what_is_known_is_not_estimated(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that has not moved, in bfloat16, where sampling's log-probs are not those of a pass."""
    session = Session(config(folder, tmp_path / "run", dtype="bfloat16"), quiet=True)
    for stage in (train_sft, train_reward):
        stage(session)
    sft, policy = session.directory.sft(), session.directory.policy(0)
    shutil.copytree(sft, policy)
    drawn = captured(session, monkeypatch)
    evaluate(session)
    line = evaluate(session, 0)
    with session.policies.open(policy) as model:
        logprobs = [policy_logprobs(model, rollout, 1.0) for rollout in drawn]
    noise = [((r.logprobs - p) * r.completion_mask).abs().max() for r, p in zip(drawn, logprobs, strict=True)]
    assert max(noise) > 1e-3, "else the test would see nothing"
    assert set(log_ratios(session, policy, drawn, logprobs)) == {0.0}
    assert set(log_ratios(session, sft, drawn, [rollout.logprobs for rollout in drawn])) == {0.0}, "by definition"
    session.directory.lock.release()
    assert line["kl_per_answer"] == 0 and line["win_rate"] == 0.5
    assert kl_per_answer([-0.5, 0.3]) == 0 and kl_per_answer([-0.5, 1.5]) == 0.5
    assert math.isnan(kl_per_answer([-0.5, math.nan])), "a policy that has diverged is not one that has not moved"


def test_earlier_versions_are_read(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, no_finish: None) -> None:
    """Both KLs were `kl`, and nothing said how long the run's processes had taken."""
    settings, summary = finished
    run = tmp_path / "run"
    shutil.copytree(settings.output_dir, run)
    text = (run / "metrics.jsonl").read_text()
    for path in (run / "metrics.jsonl", *(run / "evaluations").glob("*.json")):
        path.write_text(re.sub("kl_per_(answer|token)", "kl", path.read_text()))
    shown_now = render(Path(settings.output_dir), summary=summary)
    assert render(run, summary=summary) == shown_now.replace(Path(settings.output_dir).name, "run")
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


def test_a_damaged_record_of_usage_is_one_line(finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path) -> None:
    settings = replace(finished[0], output_dir=str(tmp_path / "run"))
    shutil.copytree(finished[0].output_dir, tmp_path / "run")
    (tmp_path / "run/usage.json").write_text("[{")
    with pytest.raises(InputError, match=r"usage.json: must be JSON, but is damaged .* Delete it"):
        pipeline.run(settings, resume=True, quiet=True)


@pytest.fixture
def no_finish(monkeypatch: pytest.MonkeyPatch) -> None:
    no_figures(monkeypatch)


def test_an_earlier_comparison_is_read(tmp_path: Path) -> None:
    plan = Plan(("mezo",), steps=4)
    start = {"step": 0, "seconds": 0.0, "reward": 1.0, "reward_low": 0.5, "reward_high": 1.5, "kl_per_answer": 0.0}
    old = {
        "curve": [{"step": 0, "reward": 1.0, "kl": -0.08}, {"step": 4, "reward": 2.0, "kl": 0.5}],
        "search": [{"kl": 0.2}],
    }
    saved = {"plan": {**asdict(plan), "methods": ["guided"]}, "methods": {"guided": old, "mezo": old}}
    (tmp_path / "compare.json").write_text(json.dumps(saved))
    assert comparison._finished(tmp_path / "compare.json", plan, start) == {
        "guided": {
            "curve": [start, {"step": 4, "reward": 2.0, "kl_per_answer": 0.5}],
            "search": [{"kl_per_answer": 0.2}],
        }
    }


def test_the_bar_names_what_it_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    beside: list[dict[str, float]] = []
    bar = SimpleNamespace(step=lambda done, numbers: beside.append(numbers))
    monkeypatch.setattr(callbacks, "Progress", lambda *named: bar)
    callback = MetricsCallback(lambda line: None, "policy", 0)
    state: Any = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=True)
    callback.on_train_begin(None, state, None)
    callback.on_log(None, state, None, logs={"reward": 1.5, "kl": 0.25, "loss": 0.5, "other": 1.0})
    assert beside == [{"loss": 0.5, "train_reward": 1.5, "kl_per_token": 0.25}]


@pytest.mark.parametrize(
    ("show", "value", "text"),
    [
        (shown.kl, -0.001, "0.00"),
        (shown.reward, 12345.6789, "12345.679"),
        (shown.seconds, 12345.67, "12345.7"),
        (shown.megabytes, 2458.51, "2459"),
        (shown.share, None, "-"),
        (shown.share, float("nan"), "-"),
    ],
)
def test_numbers_are_rounded_alike(show: Callable[[Any], str], value: Any, text: str) -> None:
    assert show(value) == text


def test_a_stage_without_memory_is_drawn() -> None:
    ends = [{"stage": "sft", "iteration": None, "event": "end", "seconds": 4.0}]
    assert [line["stage"] for line in stage_seconds(ends, {"stages": {"other": 1.0}})] == ["sft", "other"]
