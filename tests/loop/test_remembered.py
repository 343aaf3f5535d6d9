"""Easy questions before and after alignment: what is recorded and said, and that nothing else of a run changes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from one_run import no_report
from tiny_runs import config, fingerprint
from zopro import demo
from zopro.loop import pipeline, remembered

HARD = "What is 2 + 2?"  # which the tiny model does not know


def by_transformers(folder: Path, adapter: Path | None = None) -> dict[str, str]:
    """The likeliest answers to the questions, by transformers' own loop, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    found = {}
    for question in remembered.QUESTIONS:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=remembered.LONGEST, do_sample=False, pad_token_id=0)
        found[question] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return found


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of a model that knows no question ("none"), and of one that knows all but one of them ("most"): run and summary."""
    found, base = {}, by_transformers(folder)
    for name in ("none", "most"):
        options = {"dtype": "float32", "iterations": 1, "sft_learning_rate": 0.05}
        settings = config(folder, tmp_path_factory.mktemp(name) / "run", **options)
        with pytest.MonkeyPatch.context() as patch:
            no_report(patch)
            for question, answer in base.items() if name == "most" else ():
                patch.setitem(remembered.QUESTIONS, question, ("never",) if question == HARD else (answer,))
            found[name] = Path(settings.output_dir), pipeline.run(settings, quiet=True)
    return found


def evaluation(run: Path, name: str) -> dict[str, Any]:
    return json.loads((run / "evaluations" / f"{name}.json").read_text())


def test_each_evaluation_says_what_is_left_of_what_the_base_model_knew(folder, runs) -> None:
    (run, summary), base = runs["most"], by_transformers(folder)
    for name, adapter in (("sft", "sft"), ("000", "policy/000")):
        record, answers = evaluation(run, name)["remembered"], by_transformers(folder, run / adapter)
        assert {row["question"]: row["answer"] for row in record["answers"]} == answers
        for row in record["answers"]:
            question = row["question"]
            assert row["right_before"] == (question != HARD)
            assert row["right"] == (question != HARD and base[question] in row["answer"])
        right = [row["right"] for row in record["answers"]]
        assert (record["known_before"], record["known"], record["of"]) == (4, sum(right), 5)
        assert record["forgotten"] == 4 - sum(right)
    lost = evaluation(run, "000")["remembered"]["forgotten"]
    assert lost, "this test is of a model that has forgotten something"
    assert f"forgotten    {lost} of the 4 easy questions it knew (" in demo.table(summary)
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert sum("remembered" in line for line in logged) == 2


def test_nothing_else_of_a_run_changes(runs) -> None:
    (run, summary), (plain, without) = runs["most"], runs["none"]
    assert fingerprint(run) == fingerprint(plain)
    for line, before in zip(summary["evaluations"], without["evaluations"], strict=True):
        assert {**line, "remembered": None} == {**before, "remembered": None}


def test_a_model_that_knows_nothing_is_not_said_to_have_forgotten(runs) -> None:
    run, summary = runs["none"]
    assert "remembered" not in evaluation(run, "sft")
    assert "forgotten" not in demo.table(summary)
