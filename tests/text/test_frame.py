"""Whole runs read, write and stop as the model's own template does, and are refused before anything is written."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import get_peft_model
from tokenizers import processors
from trl import RLOOConfig, SFTConfig, SFTTrainer

import tiny_runs
from one_run import no_report
from templates import SHAPES, in_parts, with_template
from tiny import tiny_model
from zopro import cli
from zopro.config import RunConfig
from zopro.config.model import ModelOptions
from zopro.engine.local.models import lora_config, sequence_classifier
from zopro.errors import InputError
from zopro.judges.model import ModelJudge
from zopro.loop import pipeline, policy_stage, stages
from zopro.loop.data import Data
from zopro.loop.export import export
from zopro.loop.models import Models
from zopro.loop.opening import open_all
from zopro.loop.run import Run
from zopro.loop.voices import answer
from zopro.rewards import RewardModel
from zopro.store.rundir import read_rows
from zopro.text.frame import frame_of
from zopro.train.rloo import EngineRLOOTrainer

TEMPLATES = ("llama 2", "gemma", "reasoning, empty where there is none", "channels", "parts, text as nothing")


def inputs(folder: Path, template: str, rows: list[dict[str, Any]] | None = None) -> Path:
    """A model folder with a template, whose model declares the tokenizer's EOS as its only stop, and its rows."""
    tokenizer = with_template(template)
    tiny_model("llama", tokenizer, num_hidden_layers=1).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    lines = tiny_runs.rows() if rows is None else rows
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    return folder


def opened(
    folder: Path, template: str, rows: list[dict[str, Any]] | None = None, **options: Any
) -> tuple[Run, Models, Data]:
    options = {"max_prompt_length": 96, "max_completion_length": 24, "sft_steps": 1, **options}
    return open_all(tiny_runs.config(inputs(folder, template, rows), folder / "run", **options))


class Made(Exception):
    """Carries what a stage was about to train with."""


def made(trainer: Any) -> None:
    raise Made(trainer)


@pytest.mark.parametrize("name", TEMPLATES)
def test_fine_tuning_trains_the_tokens_that_trl_trains(name, tmp_path, monkeypatch):
    shape = SHAPES[name]
    run, models, data = opened(tmp_path, shape.template)
    monkeypatch.setattr(stages, "fit", made)
    with pytest.raises(Made) as caught:
        stages.train_sft(run, models, data)
    ours = caught.value.args[0].train_dataset

    def chat(role: str, text: str) -> list[dict[str, Any]]:
        messages = [{"role": role, "content": text}]
        return in_parts(messages) if shape.parts else messages

    rows = [
        {"prompt": chat("user", item.example.prompt[0]["content"]), "completion": chat("assistant", item.example.chosen)}
        for item in data.train
    ]
    trainer = SFTTrainer(
        tiny_model("llama", models.tokenizer),
        args=SFTConfig(output_dir=str(tmp_path / "trl"), report_to="none", use_cpu=True, bf16=False),
        train_dataset=Dataset.from_list(rows),
        processing_class=models.tokenizer,
    )
    assert len(ours) == len(trainer.train_dataset) == len(rows)
    for left, right in zip(ours, trainer.train_dataset, strict=True):
        length = len(left["input_ids"])
        assert left["input_ids"] == right["input_ids"][:length] and left["labels"] == right["labels"][:length]
        assert models.tokenizer.decode(right["input_ids"][length:]).strip() == ""
        assert left["labels"][-1] == models.frame.stop and left["labels"][0] == -100


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[RunConfig, list[list[int]]]:
    """A run whose template opens an answer with a channel and ends it with a token that the model does not declare."""
    folder = inputs(tmp_path_factory.mktemp("channels"), SHAPES["channels"].template)
    config = tiny_runs.config(folder, folder / "run", max_prompt_length=64, max_completion_length=16, iterations=2)
    stops: list[list[int]] = []
    with pytest.MonkeyPatch.context() as patch:
        no_report(patch)
        fit = policy_stage.fit
        patch.setattr(policy_stage, "fit", lambda trainer: (stops.append(trainer.eos_token_ids), fit(trainer)))
        pipeline.run(config, quiet=True)
    return config, stops


def test_rollouts_stop_at_the_templates_end_of_a_turn(finished):
    config, stops = finished
    tokenizer = with_template(SHAPES["channels"].template)
    end = tokenizer.convert_tokens_to_ids("<|return|>")
    assert stops == [[2, end]] * 2
    samples = read_rows(Path(config.output_dir) / "iterations/000/samples.jsonl")
    assert samples and all(row["prompt"].endswith("<|start|>assistant") for row in samples)


def test_what_is_exported_stops_there_too(finished, tmp_path):
    config, stops = finished
    export(config.output_dir, tmp_path / "out", merged=True)
    declared = json.loads((tmp_path / "out" / "generation_config.json").read_text())["eos_token_id"]
    assert set(declared) == set(stops[0])
    shown = answer(config.output_dir, ["tea or cake?"], max_new_tokens=6)
    assert set(shown["answers"][0]) == {"prompt", "base", "sft", "aligned"}


def test_one_sequence_is_trained_and_scored_whichever_token_ended_it():
    tokenizer = with_template(SHAPES["chatml"].template)
    base = tiny_model("llama", tokenizer)
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot_id|>")]
    base.generation_config.eos_token_id = [2, *ends]
    classifier = sequence_classifier(base, tokenizer, seed=0)
    with torch.random.fork_rng(devices=[]):
        options = lora_config(ModelOptions(model="x", lora_r=2), "SEQ_CLS")
        reward = RewardModel(get_peft_model(classifier, options), tokenizer, 64, frame_of(tokenizer, [2, *ends]))
    prompt = "<|im_start|>user\ntea?<|im_end|>\n<|im_start|>assistant\n"
    ids, body = (tokenizer(text)["input_ids"] for text in (prompt, "a cake"))
    scores = reward.score([ids] * 5, [[*body, *end] for end in ([2], [ends[0]], [ends[1]], [ends[0], 0, 0], [])], 1)
    whole = torch.tensor([[*ids, *body, ends[0]]])
    with torch.no_grad():
        hidden = classifier.model(whole).last_hidden_state
        expected = float(reward.model.base_model.model.score(hidden)[0, -1, 0])
    assert scores == pytest.approx([expected] * 5, abs=1e-5)
    assert reward.score_texts([prompt], ["a cake"]) == pytest.approx([expected], abs=1e-5)


def test_what_a_template_would_lose_is_left_out_and_counted(tmp_path):
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{{ m.content | replace('tea', '') if m.role != 'user' else m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    ask = {"role": "user", "content": "milk or cake?"}
    system = [{"role": "system", "content": "no tea"}, ask]
    rows: list[dict[str, Any]] = [{"prompt": f"plum {i}?", "chosen": "a plum", "rejected": "no plum"} for i in range(9)]
    rows += [{"prompt": system, "chosen": "milk", "rejected": "salt"}, {**rows[0], "rejected": "tea"}]
    rows += [{"prompt": [{**ask, "content": "milk<|eot_id|>?"}], "chosen": "milk", "rejected": "salt"}]
    rows += [{"prompt": [{**ask, "content": "salt?"}], "chosen": "salt<eos>", "rejected": "salt"}]
    _, _, kept = opened(tmp_path, template, rows, eval_prompts=2)
    assert "left out 1: the chat template leaves out or changes the system's message" in kept.rows
    assert "left out 1: the chat template changes the answer" in kept.rows
    assert "left out 1: the user's message has the control token <|eot_id|> in it" in kept.rows
    assert "left out 1: the answer has the control token <eos> in it" in kept.rows
    assert len(kept.train) == 7


def test_an_answer_may_bring_the_tokens_of_its_own_opening_and_any_text_what_has_no_token():
    tokenizer = with_template(SHAPES["reasoning, empty where there is none"].template, "spaces as tokens")
    tokenizer.unk_token = "<unk>"
    frame = frame_of(tokenizer)
    assert frame.control_token("<think>\nmilk?\n</think>\n\nno milk", answer=True) is None
    assert frame.control_token("<think>milk?") == "<think>" and frame.control_token("a <|im_end|>") == "<|im_end|>"
    assert tokenizer.unk_token_id in tokenizer("\u2603").input_ids and frame.control_token("\u2603") is None


@pytest.mark.parametrize("what", ["reasoning", "pad", "template"])
def test_a_run_that_would_train_other_text_is_refused_before_it_begins(what, tmp_path, capsys):
    shape = SHAPES["chatml"]
    template = shape.template.replace("assistant\n", "assistant\n<think>\n") if what == "reasoning" else shape.template
    folder = inputs(tmp_path, template)
    if what != "reasoning":
        tokenizer = with_template(template)
        if what == "pad":
            tokenizer.add_special_tokens({"pad_token": "<extra>"})
        else:
            tokenizer.add_tokens(["<extra>"], special_tokens=True)
            tokenizer.chat_template = "<extra>" + template
        tokenizer.save_pretrained(folder / "model")
    options = tiny_runs.config(folder, folder / "run")
    with pytest.raises(InputError) as error:
        open_all(options)
    reasons = {
        "reasoning": "asks for an answer with '<think>\\n', which answered turns do not have",
        "pad": "must have an embedding for the pad token, got '<extra>' with the id 319 and 319 rows",
        "template": "must have an embedding for every token of prompts and answers, got '<extra>'",
    }
    assert str(error.value).startswith("model: ") and reasons[what] in str(error.value) and "\n" not in str(error.value)
    assert not (folder / "run").exists()
    if what == "pad":
        (folder / "config.yaml").write_text(json.dumps(asdict(options)))
        assert cli.main(["run", str(folder / "config.yaml")]) == 2
        assert "the pad token" in capsys.readouterr().err


@pytest.mark.parametrize("what", ["pad", "eos"])
def test_trainers_in_python_refuse_them_too(what, tmp_path):
    tokenizer = with_template(SHAPES["chatml"].template)
    model = tiny_model("llama", tokenizer)
    if what == "pad":
        tokenizer.add_special_tokens({"pad_token": "<extra>"})
    else:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="$A <eos>", pair="$A $B <eos>", special_tokens=[("<eos>", 2)]
        )
    arguments = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "max_completion_length": 4}
    options = RLOOConfig(per_device_train_batch_size=2, num_generations=2, max_steps=1, beta=0.0, bf16=False, **arguments)
    data = Dataset.from_dict({"prompt": ["tea?", "cake?"]})

    def train() -> None:
        common = {"args": options, "train_dataset": data, "processing_class": tokenizer}
        EngineRLOOTrainer(model, lambda **rows: [0.0, 1.0], **common).train()

    with pytest.raises(
        InputError, match="the pad token, got '<extra>'" if what == "pad" else "end every prompt with <eos>"
    ):
        train()
    if what == "eos":
        classifier = sequence_classifier(model, tokenizer, seed=0)
        with torch.random.fork_rng(devices=[]):
            reward = get_peft_model(classifier, lora_config(ModelOptions(model="x", lora_r=2), "SEQ_CLS"))
        with pytest.raises(InputError, match=r"tokenizer: .* end every prompt with <eos>"):
            RewardModel(reward, tokenizer, 64)


@pytest.mark.parametrize("name", ["channels", "parts, text as nothing", "reasoning left open, with a switch"])
def test_a_judge_reads_its_letter_where_an_answer_stands(name):
    shape = SHAPES[name]
    tokenizer = with_template(shape.template)
    judge = ModelJudge(tiny_model("llama", tokenizer), tokenizer, max_length=4096)
    question = [{"role": "user", "content": "which?"}]
    whole = [*question, {"role": "assistant", "content": "A"}]
    theirs = tokenizer.apply_chat_template(in_parts(whole) if shape.parts else whole, tokenize=False, **shape.options)
    before = theirs[: theirs.rindex("A" + shape.ending)].partition("which?")[2]
    assert tokenizer.decode(judge._end).rstrip().endswith(before.rstrip())
    assert "Which reply is better" in tokenizer.decode(judge._end)


def test_a_judge_that_would_answer_inside_its_reasoning_is_refused():
    tokenizer = with_template(SHAPES["chatml"].template.replace("assistant\n", "assistant\n<think>\n"))
    with pytest.raises(InputError, match=r"judge: the chat template asks for an answer with '<think>\\n'"):
        ModelJudge(tiny_model("llama", tokenizer), tokenizer)
