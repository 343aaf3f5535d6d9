"""`zopro pairs`: of a model's own answers the best and the worst, as rows that a run and TRL read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import refused, typed
from tiny_runs import NAMES, config, write_inputs
from zopro import cli, tasks
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.own_pairs import own_pairs
from zopro.system.progress import reporting


def letters(completions: list[Any], **columns: Any) -> list[float | None]:
    """More letters are better; an answer with the word tea has no reward."""
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [None if "tea" in text else float(len(text)) for text in texts]


def breaks(completions: list[Any], **columns: Any) -> list[float]:
    raise ValueError("no such file")


def silent(completions: list[Any], **columns: Any) -> list[None]:
    return [None] * len(completions)


def constant(completions: list[Any], **columns: Any) -> list[float]:
    return [1.0] * len(completions)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    rows = [{"prompt": f"{a} or {b}?", "answer": a} for a in NAMES for b in NAMES if a != b]
    (folder / "asked.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    turns = [{"prompt": [{"role": "user", "content": row["prompt"]}], "answer": row["answer"]} for row in rows]
    (folder / "turns.jsonl").write_text("".join(json.dumps(row) + "\n" for row in turns))
    return folder


def settings(folder: Path, **options: Any) -> RunConfig:
    mine = {
        "task": "verifiable", "train_data": str(folder / "asked.jsonl"), "reward": [f"python:{__name__}:letters"],
        "num_generations": 4, "dtype": "float32", "judge": "auto", "method": "mezo", "warm_start": "spsa",
    }  # fmt: skip
    return config(folder, folder / "none", **{**mine, **options})


def read(path: Path, task: str) -> list[tasks.Example]:
    options = RunConfig(model="x", task=task, train_data=str(path))
    found = tasks.load(options, 1, 0)
    assert not found.dropped
    return [*found.train, *found.eval]


def test_the_best_and_the_worst_of_each_prompt(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(folder.rglob("*"))
    rows, found = own_pairs(settings(folder), 10)
    assert found["prompts"] == 10 >= found["pairs"] == len(rows) > 5
    for row in rows:
        better, worse = letters([row["chosen"], row["rejected"]])
        assert (better, worse) == (row["chosen_reward"], row["rejected_reward"]) and better > worse
        assert row["prompt"].startswith(row["reference"]), "the row's own answer goes along"
    more, _ = own_pairs(settings(folder, num_generations=8), 10)
    spread = [sum(row["chosen_reward"] - row["rejected_reward"] for row in some) / len(some) for some in (rows, more)]
    assert spread[1] > spread[0], "of more answers the best is better and the worst worse"
    assert own_pairs(settings(folder), 10)[0] == rows
    few, _ = own_pairs(settings(folder, eval_batch_size=3), 2)
    assert all(letters([row["chosen"]]) == [row["chosen_reward"]] for row in few) and few
    with reporting():
        others, _ = own_pairs(settings(folder), 7, held_out=True)
    assert "pairs: 7 prompts were asked for, and there are 6: eval_prompts is 6" in capsys.readouterr().err
    assert len(others) <= 6 and not {row["prompt"] for row in others} & {row["prompt"] for row in rows}
    assert sorted(folder.rglob("*")) == before, "nothing is written"


@pytest.mark.parametrize("name", ["asked", "turns"])
def test_a_run_reads_them(name: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes = {"train_data": str(folder / f"{name}.jsonl"), "output_dir": str(folder)}
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder, **changes).to_dict()))
    out = tmp_path / "pairs.jsonl"
    code, line = typed(capsys, "pairs", path, "--out", out, "--rows", "8", "--json")
    assert code == 0
    found = json.loads(line)
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert found["pairs"] == len(rows) and found["out"] == str(out)
    assert found["cut_off"] == len(rows), "random tokens do not end"
    assert all(isinstance(row["chosen"], list) == (name == "turns") for row in rows)
    examples = sorted(read(out, "preference"), key=lambda example: example.row)
    texts = [row["chosen"] if name == "asked" else row["chosen"][0]["content"] for row in rows]
    assert [example.chosen.strip() for example in examples] == [text.strip() for text in texts]


def test_what_cannot_be_ranked_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^reward: must be there before a run, and so not be model, got \['model'\]"):
        own_pairs(config(folder, tmp_path))
    with pytest.raises(
        InputError, match=r"^reward: must differ between the answers to a prompt, and did so for none of 4"
    ):
        own_pairs(settings(folder, reward=[f"python:{__name__}:constant"]), 4)
    with pytest.raises(InputError, match=r"^reward: must give a number to some answers, and gave None to all"):
        own_pairs(settings(folder, reward=[f"python:{__name__}:silent"]), 4)
    with pytest.raises(InputError, match=r"no such file\. Fix it\.$"):  # and no word of --resume
        own_pairs(settings(folder, reward=[f"python:{__name__}:breaks"]), 4)
    with pytest.raises(InputError, match=r"^rows: must not be negative, got -1"):
        own_pairs(settings(folder), -1)


def test_no_prompt_is_no_number_of_prompts(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings(folder).to_dict()))
    found = refused(capsys, "pairs", path, "--out", tmp_path / "pairs.jsonl", "--rows", "0")
    assert found == "--rows: must be at least 1, got 0."


def test_summaries_keep_the_reference_of_the_row(tmp_path: Path) -> None:
    row = {"prompt": "Summarise it.", "chosen": "Good.", "rejected": "Bad.", "reference": "By a person."}
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({**row, "prompt": f"Summarise {i}."}) + "\n" for i in range(3))
    )
    assert {example.reference for example in read(tmp_path / "rows.jsonl", "summarization")} == {"By a person."}
    (tmp_path / "none.jsonl").write_text(
        "".join(json.dumps({**row, "reference": None, "prompt": str(i)}) + "\n" for i in range(3))
    )
    assert {example.reference for example in read(tmp_path / "none.jsonl", "summarization")} == {"Good."}


def test_the_command_says_what_it_needs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["pairs", "x.yaml"]) == 2
    assert "the following arguments are required: --out" in capsys.readouterr().err
