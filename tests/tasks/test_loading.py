"""Training and evaluation rows: disjoint prompts, seeded order, counts that add up."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from zopro.choices import TASKS
from zopro.errors import InputError
from zopro.tasks import load, load_prompts, prompt_key


def options(train, held_out="", task="preference", most=0):
    return SimpleNamespace(
        task=task,
        train_data=str(train),
        eval_data=str(held_out or ""),
        max_train_rows=most,
        source_language="English",
        target_language="German",
    )


def write(path, prompts):
    rows = [{"prompt": prompt, "chosen": f"good {i}", "rejected": "bad"} for i, prompt in enumerate(prompts)]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


PROMPTS = st.lists(st.sampled_from(["a", "b", "c d", "c  d", " a", "e", "f", "g"]), min_size=1, max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(train=PROMPTS, held_out=PROMPTS | st.none(), count=st.integers(1, 4), seed=st.integers(0, 3))
def test_evaluation_prompts_never_occur_in_training(tmp_path, train, held_out, count, seed):
    source = write(tmp_path / "train.jsonl", train)
    other = write(tmp_path / "test.jsonl", held_out) if held_out else ""
    try:
        data = load(options(source, other), count, seed)
    except InputError as error:
        assert "must leave training prompts" in str(error)
        return
    train_keys = {prompt_key(example) for example in data.train}
    eval_keys = [prompt_key(example) for example in data.eval]
    assert train_keys.isdisjoint(eval_keys)
    assert len(eval_keys) == len(set(eval_keys)) <= count
    if held_out:
        assert train_keys.isdisjoint(" ".join(f"user: {prompt}".split()) for prompt in held_out)
        assert len(data.train) + sum(data.dropped.values()) == len(train)
    else:
        assert len(eval_keys) == count
        assert len(data.train) + len(data.eval) + sum(data.dropped.values()) == len(train)


def test_order_follows_the_seed_alone_and_is_cut_after_shuffling(tmp_path):
    source = write(tmp_path / "x.jsonl", [f"p{i}" for i in range(30)])
    runs = [load(options(source), 5, seed) for seed in (1, 1, 2)]
    assert runs[0] == runs[1]
    assert [example.row for example in runs[0].train] != [example.row for example in runs[2].train]
    assert [example.row for example in runs[0].train] != sorted(example.row for example in runs[0].train)
    short = load(options(source, most=10), 5, 1)
    assert short.train == runs[0].train[:10] and short.eval == runs[0].eval


def test_dropped_rows_are_counted_by_reason_and_side(tmp_path):
    train = tmp_path / "train.jsonl"
    train.write_text(
        "\n".join(
            json.dumps({"prompt": p, "chosen": c, "rejected": "b"})
            for p, c in [("a", "x"), ("b", "b"), ("c", None), ("d", "x"), ("too long", "x")]
        )
    )
    held_out = write(tmp_path / "test.jsonl", ["d", " "])
    data = load(options(train, held_out), 5, 0, refuse=lambda e: "long" if "long" in e.prompt[-1]["content"] else None)
    assert [example.row for example in data.train] == [1]
    assert [example.row for example in data.eval] == [1]
    assert data.dropped == {
        "chosen and rejected are equal": 1,
        "chosen is null": 1,
        "long": 1,
        "prompt is held out for evaluation": 1,
        "eval_data: empty prompt": 1,
    }


def test_refused_rows_do_not_count_towards_the_evaluation(tmp_path):
    source = write(tmp_path / "x.jsonl", [f"p{i}" for i in range(20)])
    data = load(options(source), 8, 0, refuse=lambda e: "odd" if e.row % 2 else None)
    assert len(data.eval) == 8 and len(data.train) == 2


def test_which_of_several_splits_is_read_is_said(tmp_path):
    for name in ("train.jsonl", "train_small.jsonl", "test.jsonl"):
        write(tmp_path / name, ["a", "b"] if "train" in name else ["c"])
    said = "of the splits train, train_small one is read: train"
    assert load(options(tmp_path, tmp_path / "test.jsonl"), 1, 0).remarks() == [f"train_data: {said}"]
    (tmp_path / "test.jsonl").rename(tmp_path / "validation.jsonl")
    assert len(load_prompts(str(tmp_path), 5, 0)[0]) == 1 and load_prompts(str(tmp_path), 5, 0)[2] == []


def test_a_column_without_a_name_is_named_as_such(tmp_path):
    (tmp_path / "x.csv").write_text(",prompt,chosen,rejected\n0,a,good,bad\n1,b,good,bad\n")
    assert load(options(tmp_path / "x.csv"), 1, 0).remarks() == ["columns not read: one without a name"]


def test_nothing_usable_says_why(tmp_path):
    source = write(tmp_path / "x.jsonl", [" ", ""])
    with pytest.raises(InputError, match=r"train_data: .* has no usable row \(empty prompt: 2\)"):
        load(options(source), 1, 0)


def test_too_many_evaluation_prompts_are_refused(tmp_path):
    source = write(tmp_path / "x.jsonl", ["a", "b", "a"])
    with pytest.raises(InputError, match=r"eval_prompts: .* all 2 distinct prompts"):
        load(options(source), 2, 0)
    with pytest.raises(InputError, match="eval_data: must leave training prompts"):
        load(options(source, source), 1, 0)


def test_errors_of_evaluation_rows_name_the_evaluation_data(tmp_path):
    source = write(tmp_path / "x.jsonl", ["a", "b"])
    (tmp_path / "test.jsonl").write_text('{"text": "x"}')
    with pytest.raises(
        InputError, match=r"^eval_data: '.*test.jsonl' row 1 has the columns text \(TRL.s language.*; task preference"
    ):
        load(options(source, tmp_path / "test.jsonl"), 1, 0)


def test_unknown_task_names_the_nearest():
    with pytest.raises(InputError, match=r"task: .* got 'summarisation'. Did you mean 'summarization'\?"):
        load(options("x", task="summarisation"), 1, 0)


def test_every_task_names_a_metric_and_judge_that_exist():
    from zopro.judges import make_judge

    for name, build in ((task.name, task.load()) for task in TASKS.values()):
        task = build(options("x"))
        assert task.name == name and task.reward in ("pairwise", "regression")
        if task.default_judge != "model":
            assert callable(make_judge("auto", task))
