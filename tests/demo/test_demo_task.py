"""The demo's task and model: the rule that is its truth, its data, and the tiny base model's folder."""

import json
import random
import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from zopro import demo
from zopro.demo import model, task
from zopro.errors import InputError
from zopro.judges import make_judge
from zopro.store.rundir import read_rows

PROMPT = "I would like two red cups, please."


@pytest.mark.parametrize(
    ("answer", "ninths"),
    [
        ("Certainly, here are two red cups. Thank you.", 9),
        ("Certainly, here are two red cups.", 7),
        ("Well, here are two red cups. Thank you.", 7),
        ("Certainly, here are three red cups. Thank you.", 8),
        ("Certainly, here are three blue bags. Thank you.", 6),
        ("Certainly, here are two red cups, two red cups. Thank you.", 6),  # naming several is no answer
        ("Certainly, here you are. Thank you.", 6),
        ("Well, certainly, here are two red cups.", 5),  # courtesy is how it begins
        ("Of course, here are two red cups" + " and so on" * 4 + ". Thank you.", 7),
        ("Of course, here are two red cups", 5),  # does not end
        ("", 0),
    ],
)
def test_the_rule_is_graded(answer, ninths):
    assert task.truth(PROMPT, answer) == pytest.approx(ninths / 9)


def test_brevity_falls_linearly():
    words = [task.truth(PROMPT, " ".join(["word"] * n) + ".") * 9 / 2 for n in range(task.SHORT, task.LONG + 2)]
    steps = task.LONG - task.SHORT
    assert words == pytest.approx([1 - n / steps for n in range(steps + 1)] + [0])


@given(st.text(), st.text())
def test_truth_takes_any_text(prompt, answer):
    assert 0 <= task.truth(prompt, answer) <= 1


def test_rendered_prompts_have_the_same_truth():
    rendered = f"<bos><customer>{PROMPT}<assistant>"
    for row in task.generate(50, 3):
        assert task.truth(rendered, row["chosen"]) == task.truth(PROMPT, row["chosen"])


def test_judge_follows_the_truth_and_says_ties():
    good, bad = "Gladly, you get two red cups. Thank you.", "Be quick, take it."
    pairs = [[good, bad], [bad, good], [good, good.replace("Gladly", "Certainly")]]
    assert task.judge([PROMPT] * 3, pairs, [None] * 3) == [0, 1, -1]


def test_rows_are_mediocre_varied_and_labelled_by_the_rule():
    rows = task.generate(500, 0)
    assert rows == task.generate(500, 0) != task.generate(500, 1)
    truths = {key: [task.truth(row["prompt"], row[key]) for row in rows] for key in ("chosen", "rejected")}
    assert all(a > b for a, b in zip(truths["chosen"], truths["rejected"], strict=True))
    assert 0.4 < sum(truths["chosen"]) / 500 < 0.75 and 0.1 < sum(truths["rejected"]) / 500 < 0.45
    assert len({row["chosen"] for row in rows}) > 450 and len(set(truths["chosen"])) > 15


def test_data_files_share_no_request_and_do_not_touch_the_global_random_state(tmp_path):
    before = random.getstate()
    train, test = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in task.write(tmp_path / "data", 0, train_rows=1500, test_rows=200)
    )
    assert random.getstate() == before
    asked = [{task._ORDER.findall(row["prompt"])[0] for row in rows} for rows in (train, test)]
    assert len(train) == 1500 and len({row["prompt"] for row in test}) == len(asked[1]) == 200
    assert not asked[0] & asked[1]
    # Every word of the held-out requests was seen in training: what is new is how they are combined.
    assert all({order[i] for order in asked[1]} <= {order[i] for order in asked[0]} for i in range(3))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    conversations = [(row["prompt"], row["chosen"]) for row in task.generate(300, 0)]
    folder = model.write(tmp_path_factory.mktemp("demo") / "model", 0, conversations, steps=2)
    assert torch.equal(torch.get_rng_state(), state)  # the library never reseeds
    return folder, conversations


def test_base_model_is_an_ordinary_folder(base):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, conversations = base
    tokenizer = AutoTokenizer.from_pretrained(folder)
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    assert (folder / "model.safetensors").exists() and loaded.num_parameters() < 200_000
    for text in ("Certainly, here are two red cups. Thank you.", "Grüße, 漢字 & 3 %!"):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    prompt, answer = conversations[0]
    messages = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    told = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], tokenize=False)
    assert asked == f"<bos><customer>{prompt}<assistant>" and told == f"{asked}{answer}<eos>"
    assert tokenizer(told)["input_ids"][-1] == tokenizer.eos_token_id == loaded.generation_config.eos_token_id


def test_pretraining_learns_and_repeats(base):
    _, conversations = base
    tokenizer = model.build_tokenizer([text for pair in conversations for text in pair])
    losses, weights = [], []
    for _ in range(2):
        made = model.build_model(tokenizer, 0)
        texts = [f"<bos><customer>{prompt}<assistant>{answer}<eos>" for prompt, answer in conversations]
        first = model.pretrain(made, tokenizer, texts, torch.Generator().manual_seed(0), steps=1)
        losses.append((first, model.pretrain(made, tokenizer, texts, torch.Generator().manual_seed(0), steps=15)))
        weights.append(made.get_input_embeddings().weight)
    assert losses[0] == losses[1] and torch.equal(*weights)
    assert losses[0][1] < losses[0][0] - 2  # nats a token


@pytest.mark.parametrize(("options", "word"), [({"seed": -1}, "seed"), ({"iterations": 0}, "iterations")])
def test_bad_arguments_write_nothing(tmp_path, options, word):
    with pytest.raises(InputError, match=f"^{word}: "):
        demo.run(str(tmp_path / "run"), **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(InputError, match="output_dir"):
        demo.run(str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_only_what_a_stopped_demo_has_left_is_written_over(tmp_path, monkeypatch):
    def stopped(*given):
        raise KeyboardInterrupt

    monkeypatch.setattr(model, "write", stopped)
    rows, run = tmp_path / "demo/train.jsonl", str(tmp_path)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            demo.run(run, quiet=True)
    for name, seed in (("train.jsonl", 1), ("train.jsonl", 0), ("test.jsonl", 0)):
        if not seed:
            rows.unlink()
            rows = tmp_path / "demo" / name
            rows.write_text("my own rows")
        with pytest.raises(InputError, match=f"^output_dir: must be empty, or what a stopped zopro demo of seed {seed}"):
            demo.run(run, seed=seed, quiet=True)
    assert rows.read_text() == "my own rows"
    assert task.is_own(tmp_path / "new", 0) and not task.is_own(rows, 0)


def test_a_second_demo_in_one_folder_is_refused_before_it_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(demo.RunLock, "acquire", lambda lock: (_ for _ in ()).throw(InputError("in use")))
    with pytest.raises(InputError, match="in use"):
        demo.run(str(tmp_path / "run"), quiet=True)
    assert not list((tmp_path / "run").iterdir())


def test_run_adds_its_share_to_the_summary(tmp_path, monkeypatch):
    """The pipeline is replaced; that the whole demo works and wins is measured by `make demo`."""
    perfect = "Certainly, here are two red cups. Thank you."

    def run(config, *, quiet, began, before):
        measure = make_judge(config.judge, None).in_summary
        assert time.perf_counter() - began > before["pretraining"] > 0
        assert (tmp_path / "run" / "demo" / "model" / "config.json").exists()
        folder = tmp_path / "run" / "evaluations"
        folder.mkdir(parents=True)
        for name, answer in (("sft", "Well, take it."), ("000", perfect)):
            (folder / f"{name}.jsonl").write_text(json.dumps({"prompt": PROMPT, "completion": answer}) + "\n")
        line = {"reward": 1.0, "reward_low": 0.5, "reward_high": 1.5, "n": 1, "kl_per_answer": 0.0}
        wins = {"win_rate": 0.75, "win_rate_low": 0.6, "win_rate_high": 0.9}
        return {
            "run": config.output_dir,
            "report": f"{config.output_dir}/report.html",
            "peak_rss_mb": 600.0,
            "seconds": 3.5,
            "stages": {**before, "sft": 2.0},
            "reward_quality": {"accuracy": 0.9, "n": 1},
            "evaluations": [
                {"iteration": None, **line, **measure(read_rows(folder / "sft.jsonl"))},
                {"iteration": 0, **line, **wins, **measure(read_rows(folder / "000.jsonl"))},
            ],
            "samples": [{"prompt": f"<bos><customer>{PROMPT}<assistant>", "sft": "Well, take it.", "aligned": perfect}],
        }

    monkeypatch.setattr("zopro.loop.pipeline.run", run)
    write = model.write
    monkeypatch.setattr(model, "write", lambda *args, **options: write(*args, **options, steps=1))
    summary = demo.run(str(tmp_path / "run"), quiet=True)
    assert [line["truth"] for line in summary["evaluations"]] == pytest.approx([2 / 9, 1])
    text = demo.table(summary)
    for part in (
        "0.750 [0.600, 0.900]",
        "600 MB",
        "seconds      3.5 (pretraining",
        "accuracy 0.900 on 1 held-out row\n",
        f"  {'SFT: Well, take it.':<52}aligned: Certainly, here are two red cups. Thank\n",
        "report.html",
        "0.222",
    ):
        assert part in text
    assert PROMPT in text and "<customer>" not in text
    loop = {**summary["samples"][0], "aligned": "Thank you. " * 5}
    text = demo.table({**summary, "sft_steps": 0, "samples": [loop]})
    assert "wins against the start [95 %]" in text and f"  {'start: Well, take it.':<52}broken: Thank you." in text
    assert "SFT" not in text and ", start 2.0)" in text
