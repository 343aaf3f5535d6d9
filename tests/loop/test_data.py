"""A run says what it made of its rows before it begins: columns not read, rows left out, turns joined."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from tiny_runs import config, rows, write_inputs
from zopro.errors import InputError
from zopro.loop.opening import open_all
from zopro.system import progress

TEMPLATE = (
    "{{ bos_token }}{% for tool in tools or [] %}[{{ tool.name }}]{% endfor %}"
    "{% for m in messages %}{% if not loop.first and m.role == messages[loop.index0 - 1].role %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{{ m.content }} {% endfor %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "model")
    return folder


def write(folder: Path, data: list[dict[str, Any]]) -> str:
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(folder / "data.jsonl")


def test_a_run_begins_with_what_it_did_not_read(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data: list[dict[str, Any]] = [{**row, "id": 7, "system": "be kind"} for row in rows()[:40]]
    data[0]["images"] = ["a.png"]
    data[1]["margin"] = 0.5
    data[2]["tools"] = [{"name": "egg"}]
    data[3]["prompt"] = [{"role": "user", "content": text} for text in ("tea", "cake")]
    with progress.reporting():
        _, _, read = open_all(config(folder, tmp_path / "run", train_data=write(folder, data)))
    *_, counts, unread, notes = capsys.readouterr().err.splitlines()
    assert "left out 1: images: a text model cannot see or hear it" in counts
    assert [unread, notes] == [
        "columns not read: id, margin (in 1 of 39 rows)",
        "turns of one speaker joined, for the chat template takes them in turn only: 1 of 39 rows",
    ]
    prompts = {item.example.row: item.prompt for item in [*read.train, *read.eval]}
    assert prompts[3] == f"<bos>[egg]be kind {data[2]['prompt']} " and prompts[4] == "<bos>be kind tea\n\ncake "


def test_no_usable_row_says_why_in_one_line_and_writes_nothing(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At once: not after the minutes that loading a large model takes."""
    monkeypatch.setattr("zopro.loop.models.load_start", lambda *given: pytest.fail("the model was loaded first"))
    data = [{"ask": row["prompt"], "chosen": row["chosen"], "rejected": row["rejected"]} for row in rows()]
    with pytest.raises(InputError, match=r"no usable row \(no prompt: the columns are ask, chosen, rejected; known"):
        open_all(config(folder, tmp_path / "run", train_data=write(folder, data)))
    assert not (tmp_path / "run").exists()


def test_a_judge_that_compares_with_references_needs_one(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored = [{"source": row["prompt"], "translation": row["chosen"], "score": i % 7} for i, row in enumerate(rows())]
    given = {"task": "translation", "train_data": write(folder, scored), "judge": "auto", "max_prompt_length": 110}
    with progress.reporting():
        open_all(config(folder, tmp_path / "auto", **given))
    assert "judge: no row has a reference, so chrf has no verdict: every win rate will be 0.5" in capsys.readouterr().err
    with progress.reporting():
        open_all(config(folder, tmp_path / "no judge", **given, reward="length:1-9"))
    said = capsys.readouterr().err
    assert "no verdict" not in said
    unused = "reward_steps, reward_batch_size, refine_steps, pair_prompts: of no effect, as no reward model is trained"
    assert f"{unused} (reward: length:1-9)" in said
