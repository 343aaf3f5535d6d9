"""Easy questions and prompts of another task: what is recorded and said, and that nothing else of a run changes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.nn.functional import kl_div
from transformers import AutoModelForCausalLM, AutoTokenizer

from one_run import no_report
from tiny_runs import config, fingerprint
from zopro import demo
from zopro.config import ALL_QUESTIONS, RunConfig
from zopro.config.reading import load_config
from zopro.errors import InputError
from zopro.loop import answers as answering
from zopro.loop import opening, pipeline, remembered
from zopro.loop.divergence import log_ratios
from zopro.loop.opening import open_all
from zopro.rewards.functions.answer import has
from zopro.store import shown

OTHER = ["salt and tea?", "a plum, please", "milk or cake or egg?", "salt and tea?"]
DRAWN: list[Any] = []
HARD = "What is 2 + 2?"  # which the tiny model does not know


def by_transformers(folder: Path, adapter: Path | None = None) -> dict[str, str]:
    """The likeliest answers to the questions, by transformers' own loop, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(folder / "model")
    model = model if adapter is None else PeftModel.from_pretrained(model, adapter)
    found = {}
    for question in [*remembered.QUESTIONS][:5]:
        chat = [{"role": "user", "content": question}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        with torch.no_grad():
            out = model.generate(**ids, max_new_tokens=remembered.LONGEST, do_sample=False, pad_token_id=0)
        found[question] = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    return found


def noted(run: Any, models: Any, policy: Path, rollouts: Any, logprobs: Any) -> list[float]:
    """As `log_ratios`; the answers of the last call are kept."""
    DRAWN[:] = [
        (ids[mask.bool()].tolist(), answer)
        for drawn in rollouts
        for ids, mask, answer in zip(drawn.prompt_ids, drawn.prompt_mask, drawn.answers(), strict=True)
    ]
    return log_ratios(run, models, policy, rollouts, logprobs)


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, Any]]]:
    """Of a model that knows no question ("none"), and of one that knows all but one of them ("most"): run and summary."""
    found, base = {}, by_transformers(folder)
    for name in ("none", "most"):
        options = {"dtype": "float32", "iterations": 1, "sft_learning_rate": 0.05}
        if name == "most":
            options["other_data"] = str(folder / "other.jsonl")
            (folder / "other.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in OTHER))
        settings = config(folder, tmp_path_factory.mktemp(name) / "run", lora_target_modules="all-linear", **options)
        with pytest.MonkeyPatch.context() as patch:
            no_report(patch)
            patch.setattr(answering, "log_ratios", noted)
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


def opened(folder: Path, adapter: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / "model"), adapter)


def next_tokens(model: Any, ids: list[list[int]]) -> torch.Tensor:
    """Log-probs [row, place, token] of what follows each place."""
    with torch.no_grad():
        return model(torch.tensor(ids)).logits.log_softmax(-1)


def test_divergence_on_another_task_is_of_the_answers_drawn_there(folder, runs) -> None:
    (run, summary), record = runs["most"], evaluation(runs["most"][0], "000")
    assert record["other_n"] == len(DRAWN) == len(set(OTHER)) and "other_n" not in evaluation(run, "sft")
    ratios = [0.0] * len(DRAWN)
    for sign, adapter in ((1, "policy/000"), (-1, "sft")):
        model = opened(folder, run / adapter)
        for row, (prompt, answer) in enumerate(DRAWN):
            found = next_tokens(model, [prompt + answer])[0]
            ratios[row] += sign * sum(found[len(prompt) + i - 1, token].item() for i, token in enumerate(answer))
    half = 4.302653 * stdev(ratios) / len(ratios) ** 0.5  # Student's t, 2 degrees of freedom
    for name, value in (("", 0.0), ("_low", -half), ("_high", half)):
        assert record[f"other_kl_per_answer{name}"] == pytest.approx(max(0.0, fmean(ratios) + value), abs=1e-5)
    said = shown.elsewhere(record)
    assert said.startswith("on 3 prompts of another task: KL ") and f"elsewhere    {said}" in demo.table(summary)


def test_divergence_on_another_task_is_the_true_one_within_its_noise(folder, runs, tmp_path, monkeypatch) -> None:
    """Of answers of up to two tokens, all of which can be listed; by a policy that is far from the SFT policy."""
    for check in ("check_answers_early", "check_answers"):  # nothing is trained on answers as short as these
        monkeypatch.setattr(opening, check, lambda *given: None)
    settings = dataclasses.replace(load_config(runs["most"][0] / "config.yaml"), max_completion_length=2)
    settings = dataclasses.replace(settings, eval_batch_size=500, output_dir=str(tmp_path / "new"))
    run, models, data = open_all(settings, writes=False)
    shutil.copytree(runs["most"][0] / "sft", run.store.sft())
    with models.policies.open(None) as fresh:
        models.policies.save(fresh, tmp_path / "fresh")
    drawn = answering.divergences(run, models, [data.other[0]] * 500, tmp_path / "fresh", 0)
    policy, sft = opened(folder, tmp_path / "fresh"), opened(folder, run.store.sft())
    prompt = data.other[0].ids
    first = [next_tokens(model, [prompt])[0, -1] for model in (policy, sft)]
    true = kl_div(first[1], first[0], reduction="sum", log_target=True).item()
    going = [token for token in range(len(first[0])) if token not in models.eos_token_ids]
    second = [next_tokens(model, [[*prompt, token] for token in going])[:, -1] for model in (policy, sft)]
    each = kl_div(second[1], second[0], reduction="none", log_target=True).sum(1)
    true += (first[0][going].exp() * each).sum().item()
    noise = stdev(drawn) / len(drawn) ** 0.5
    assert true > 8 * noise and abs(fmean(drawn) - true) < 3 * noise


def test_nothing_else_of_a_run_changes(runs) -> None:
    (run, summary), (plain, without) = runs["most"], runs["none"]
    assert fingerprint(run) == fingerprint(plain)
    for line, before in zip(summary["evaluations"], without["evaluations"], strict=True):
        measured = {key: value for key, value in line.items() if not key.startswith("other_")}
        assert {**measured, "remembered": None} == {**before, "remembered": None}


def test_a_model_that_knows_nothing_is_not_said_to_have_forgotten(runs) -> None:
    run, summary = runs["none"]
    assert "remembered" not in evaluation(run, "sft")
    assert "forgotten" not in demo.table(summary)


def test_the_questions_are_short_and_give_no_answer_away() -> None:
    assert len(remembered.QUESTIONS) == ALL_QUESTIONS, "none stands there twice"
    assert [*remembered.QUESTIONS][:2] == ["What is the capital of France?", HARD]
    for question, right in remembered.QUESTIONS.items():
        assert right and len(question) < 70 and question.endswith("?"), question
        assert not any(has(question, answer) for answer in right), question


def test_how_many_are_asked() -> None:
    def asked(value: Any) -> tuple[Any, int]:
        made = RunConfig(model="m", task="chat", train_data="x", easy_questions=value)
        return made.easy_questions, made.questions_asked

    for value, meant in ((True, (True, 5)), (5, (True, 5)), (1, (1, 1)), (0, (False, 0)), (200, (200, 200))):
        assert asked(value) == meant and type(asked(value)[0]) is type(meant[0])
    for value in (201, -1):
        with pytest.raises(InputError, match=rf"^easy_questions: must be true, false .* up to 200, got {value}"):
            asked(value)


def test_the_share_kept_is_of_what_was_known_and_means_are_over_trainings() -> None:
    before = [True] * 8 + [False] * 2
    one = remembered.counts([[True] * 6 + [False] * 3 + [True]], before)
    assert (one["known_before"], one["known"], one["forgotten"], one["of"]) == (8, 7, 2, 10)
    wilson = (0.40927, 0.92852)  # of 6 in 8
    assert (one["kept"], one["kept_low"], one["kept_high"]) == pytest.approx((0.75, *wilson), abs=1e-5)
    two = remembered.counts([[True] * 10, [True] * 5 + [False] * 5], before)
    assert (two["known"], two["forgotten"], two["kept"]) == (7.5, 1.5, 13 / 16)
    assert "kept" not in remembered.counts([[True]], [False])
    many = {**one, "answers": [{"question": f"{i}?", "right_before": True, "right": False} for i in range(7)]}
    assert shown.remembered({**many, "forgotten": 7}).endswith("(0? 1? 2? 3? 4? and 2 more), kept 0.750 [0.409, 0.929]")
