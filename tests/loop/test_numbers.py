"""Every number that is shown in two places is one number: terminal, metrics.jsonl, summary.json and report.html."""

from __future__ import annotations

import json
import math
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from one_run import AGO, metrics, no_figures, page
from tiny_runs import config
from zopro import demo
from zopro.analysis.page.report import write_report
from zopro.analysis.reading.records import stage_seconds
from zopro.config import RunConfig
from zopro.engine.local.rollouts import Rollouts
from zopro.loop import answers, pipeline
from zopro.loop.divergence import kl_per_answer, log_ratios, policy_logprobs
from zopro.loop.evaluation import evaluate
from zopro.loop.opening import open_all
from zopro.loop.policy_stage import policy_trainer
from zopro.loop.recording import Origin
from zopro.loop.run import Run
from zopro.loop.stages import train_reward, train_sft
from zopro.loop.summary import headline
from zopro.store.rundir import RunDirectory


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
    assert f"KL to SFT {kl} nats per answer" in report
    quality = next(line for line in lines if line.get("event") == "quality")
    said = f"accuracy {quality['accuracy']:.3f} on {quality['n']} held-out rows"
    assert f"reward model {said}" in terminal and said in report


def test_the_headline_is_the_same_again(
    finished: tuple[RunConfig, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    settings, summary = finished
    directory = RunDirectory(settings, resume=True)
    line, last = headline(directory, 1, settings.sft_steps), summary["evaluations"][-1]
    directory.lock.release()
    assert f"reward {last['reward']:.3f} [{last['reward_low']:.3f}, {last['reward_high']:.3f}]" in line
    assert f"KL {last['kl_per_answer']:.2f} nats per answer, wins {last['win_rate']:.3f} against SFT" in line


def test_the_last_page_of_a_live_run_does_not_reload(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, summary = finished
    run, seen = tmp_path / "run", list[str]()
    shutil.copytree(settings.output_dir, run)
    (run / "summary.json").unlink()
    no_figures(monkeypatch)

    @contextmanager
    def watching(path: Path) -> Iterator[None]:
        write_report(path, reload=5)
        yield
        seen.append((path / "report.html").read_text("utf-8"))

    monkeypatch.setattr(pipeline, "watching", watching)
    again = pipeline.run(replace(settings, output_dir=str(run)), resume=True, quiet=True, live=True)
    assert again["evaluations"] == summary["evaluations"], "nothing was left to do but the report"
    (live,) = seen
    assert 'http-equiv="refresh"' in live and 'http-equiv="refresh"' not in (run / "report.html").read_text("utf-8")


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
    drawn = captured(monkeypatch)
    opened = open_all(replace(settings, output_dir=str(tmp_path / "run")), resume=True)
    line = evaluate(*opened, 1)
    store = opened[0].store
    folders = store.policy(1), store.sft()
    store.lock.release()
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


def captured(monkeypatch: pytest.MonkeyPatch) -> list[Rollouts]:
    """What is sampled from now on."""
    drawn: list[Rollouts] = []
    sample = answers.sample
    monkeypatch.setattr(answers, "sample", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    return drawn


def test_verdicts_that_cannot_be_used_are_counted_and_said(
    finished: tuple[RunConfig, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings, summary = finished
    shutil.copytree(settings.output_dir, tmp_path / "run")
    run, models, data = open_all(replace(settings, output_dir=str(tmp_path / "run")), resume=True)
    said: list[str] = []
    monkeypatch.setattr(Run, "say", lambda self, line: said.append(line))
    decides = evaluate(run, models, data, 1)
    assert decides["invalid"] == 0 and not any("could not be used" in line for line in said)
    assert summary["evaluations"][-1]["ties"] == decides["ties"] < 4, "else the test would see nothing"

    asked: list[str] = []

    def half(prompts: list[str], completions: list[list[str]], references: list[str | None]) -> list[Any]:
        asked.extend(prompts)
        return [1 if place % 2 else "the second" for place in range(len(asked) - len(prompts), len(asked))]

    line = evaluate(run, replace(models, judge=half), data, 1)
    run.store.lock.release()
    equal, invalid = line["n"] - len(asked), math.ceil(len(asked) / 2)
    assert json.loads((tmp_path / "run/evaluations/001.json").read_text())["invalid"] == line["invalid"] == invalid
    assert line["ties"] == equal and sum(line["reasons"].values()) == equal + invalid
    assert line["win_rate"] == pytest.approx((len(asked) - invalid + 0.5 * (equal + invalid)) / line["n"])
    reason = f"verdict is not an integer but str: {invalid}"
    assert f"evaluation 1: {invalid} of 6 verdicts could not be used ({reason}), each half a win." in " ".join(said)


def test_what_is_known_is_not_estimated(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A policy that has not moved, in bfloat16, where sampling's log-probs are not those of a pass."""
    opened = open_all(config(folder, tmp_path / "run", dtype="bfloat16"))
    for stage in (train_sft, train_reward):
        stage(*opened)
    run, models, _ = opened
    sft, policy = run.store.sft(), run.store.policy(0)
    shutil.copytree(sft, policy)
    drawn = captured(monkeypatch)
    evaluate(*opened)
    line = evaluate(*opened, 0)
    with models.policies.open(policy) as model:
        logprobs = [policy_logprobs(model, rollout, 1.0) for rollout in drawn]
    noise = [((r.logprobs - p) * r.completion_mask).abs().max() for r, p in zip(drawn, logprobs, strict=True)]
    assert max(noise) > 1e-3, "else the test would see nothing"
    assert set(log_ratios(run, models, policy, drawn, logprobs)) == {0.0}
    assert set(log_ratios(run, models, sft, drawn, [rollout.logprobs for rollout in drawn])) == {0.0}, "by definition"
    run.store.lock.release()
    assert line["kl_per_answer"] == 0 and line["win_rate"] == 0.5
    assert kl_per_answer([-0.5, 0.3]) == 0 and kl_per_answer([-0.5, 1.5]) == 0.5
    assert math.isnan(kl_per_answer([-0.5, math.nan])), "a policy that has diverged is not one that has not moved"


def test_a_stage_without_memory_is_drawn() -> None:
    ends = [{"stage": "sft", "iteration": None, "event": "end", "seconds": 4.0}]
    assert [line["stage"] for line in stage_seconds(ends, {"stages": {"other": 1.0}})] == ["sft", "other"]


@pytest.mark.parametrize(("sft_steps", "method", "said"), [(0, "zopro", 1), (0, "mezo", 0), (3, "zopro", 0)])
def test_noise_alone_is_said(
    sft_steps: int,
    method: str,
    said: int,
    finished: tuple[RunConfig, dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A comparison, and `warm_start: sft`, take the SFT update for the previous one; without SFT steps it is 0."""
    run, models, data = open_all(finished[0], resume=True)
    run = replace(run, config=replace(run.config, sft_steps=sft_steps))
    origin = Origin(run.store.path, 0, method, run.store.sft(), (run.store.sft(), run.store.initial()))
    lines: list[str] = []
    monkeypatch.setattr(Run, "say", lambda self, line: lines.append(line))
    with policy_trainer(run, models, origin, data.train[:4], 1, 0, tmp_path):
        pass
    run.store.lock.release()
    assert sum("so steps go along noise alone" in line for line in lines) == said
