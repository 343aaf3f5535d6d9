"""Rows of any content: read, left out for a stated reason, or refused with file and row; never anything else."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiny import tiny_tokenizer
from zopro.choices import TASKS
from zopro.errors import InputError
from zopro.tasks import DropRow, Row, convert, load, load_rows, prompt_key
from zopro.tasks.pairs import PROMPTS, SYSTEMS
from zopro.text.chat import render_prompt

few = settings(max_examples=80)
OPTIONS = SimpleNamespace(source_language="English", target_language="German")
KINDS = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".csv.gz")


def read(name: str, content: bytes) -> list[Row] | str:
    """The rows of a file with this content, or the one line that refuses it."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"x{name}"
        path.write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
        limit = csv.field_size_limit()
        try:
            return load_rows(str(path))
        except InputError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return str(error)
        finally:
            assert csv.field_size_limit() == limit


@few
@given(st.sampled_from(KINDS), st.binary(max_size=60) | st.text('{}[]":,a1\n\r\t\\ "\0é', max_size=60).map(str.encode))
def test_any_bytes_are_rows_or_refused(name: str, content: bytes) -> None:
    read(name, content)


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from([10**400, "\ud800", "\0"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    sink = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue()


WHOLE = {
    ".jsonl": b'{"prompt": "p", "chosen": "a", "rejected": "b"}\n' * 3,
    ".json": json.dumps([{"prompt": "p", "chosen": "a"}] * 3, indent=1).encode(),
    ".csv": b'prompt,chosen\n"p, q",a\n"r\ns",b\n',
    ".parquet": parquet([{"prompt": "pä", "chosen": "a", "n": 1}] * 3),
}


@few
@given(st.sampled_from(list(WHOLE)), st.data())
def test_damaged_files_are_rows_or_refused(name: str, data: st.DataObject) -> None:
    content = bytearray(WHOLE[name])
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    read(name, bytes(content[: data.draw(st.integers(0, len(content)))] if data.draw(st.booleans()) else content))


COLUMNS = sorted(
    {name for task in TASKS.values() for form in task.load()(OPTIONS).formats for g in form.columns for name in g}
)
texts = st.text(max_size=8) | st.just("\n\nHuman: a\n\nAssistant: b")
roles = st.sampled_from(["user", "assistant", "tool", "human", "system", "developer", "critic"])
said = texts | st.none() | st.lists(st.fixed_dictionaries({"type": st.sampled_from(["text", "image"]), "text": texts}))
turns = st.fixed_dictionaries({"role": roles, "content": said}) | st.fixed_dictionaries(
    {"from": roles, "value": texts, "tool_calls": values, "name": values}
)
messages = st.lists(turns, max_size=4).flatmap(lambda turns: st.sampled_from([turns, str(turns), json.dumps(turns)]))
cells = st.one_of(
    values, texts, messages, st.dictionaries(st.sampled_from(["post", "text", "en", "de", "title"]), values)
)


@settings(max_examples=300)
@given(st.data())
def test_any_row_of_any_format_is_an_example_or_named(data: st.DataObject) -> None:
    make = data.draw(st.sampled_from(TASKS.values())).load()
    task = make(OPTIONS)
    form = data.draw(st.sampled_from(task.formats))
    row = {data.draw(st.sampled_from(group)): data.draw(cells) for group in form.columns}
    row |= data.draw(
        st.dictionaries(
            st.sampled_from([*COLUMNS, *PROMPTS, *SYSTEMS, "title", "rouge_scores", "source", "tools", "images"]),
            cells,
            max_size=2,
        )
    )
    try:
        example = convert(task, Row(row, "f.jsonl", 7))
    except DropRow as drop:
        assert str(drop)
    except InputError as error:
        assert str(error).startswith("train_data: 'f.jsonl' row 7")
    else:
        assert example.prompt[-1]["role"] in ("user", "tool")
        if example.chosen is None:
            assert task.name == "verifiable" and example.rejected is None
        else:
            assert example.chosen.strip() and example.chosen != example.rejected
        render_prompt(TOKENIZER, example.prompt)
        assert prompt_key(example)
        assert TOKENIZER(example.chosen or "?")["input_ids"]


TOKENIZER = tiny_tokenizer()
TOKENIZER.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
GOOD = {"prompt": "p", "chosen": "a", "rejected": "b"}


def loaded(tmp_path: Path, *rows: Any, task: str = "preference", count: int = 1, refuse: Any = None) -> Any:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), "utf-8")
    options = SimpleNamespace(task=task, train_data=str(path), eval_data="", max_train_rows=0, **vars(OPTIONS))
    return load(options, count, 0, refuse)


OTHER = {**GOOD, "prompt": "q"}
REFUSED = {
    "number for text": ({**GOOD, "chosen": 1}, "row 2: chosen: must be text, got int"),
    "half a character": (
        {**GOOD, "chosen": "a\ud800"},
        "row 2: chosen: must be text, got a lone surrogate at character 2",
    ),
    "object for text": ({**GOOD, "prompt": {"a": 1}}, "row 2: prompt: must be text, got dict"),
    "another shape": ({"prompt": "p", "answer": "a"}, "row 2 has the columns prompt, answer; task preference expects"),
    "role is a number": ({**GOOD, "prompt": [{"role": 1, "content": "x"}]}, "row 2: prompt.role: must be text, got int"),
    "no object": ("[1]", "row 2 must be an object"),
    "broken line": ('{"prompt": ', "row 2 is not JSON"),
    "one name twice": (
        '{"prompt": "p", "prompt": "q"}',
        "row 2 is not JSON that can be read (two values under one name)",
    ),
    "endless brackets": ("[" * 100_000, "row 2 is not JSON that can be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_must_be_fixed_names_file_and_row(tmp_path, case):
    row, message = REFUSED[case]
    with pytest.raises(InputError) as error:
        loaded(tmp_path, GOOD, row, OTHER)
    text = str(error.value)
    assert text.startswith("train_data: ") and f"{tmp_path / 'rows.jsonl'}' {message}" in text and "\n" not in text


LEFT_OUT = {
    "null": ({**GOOD, "rejected": None}, "rejected is null"),
    "empty answer": ({**GOOD, "chosen": ""}, "empty answer"),
    "empty prompt": ({**GOOD, "prompt": " \n"}, "empty prompt"),
    "equal": ({**GOOD, "chosen": "b "}, "chosen and rejected are equal"),
    "unknown role": ({**GOOD, "prompt": [{"role": "critic", "content": "x"}]}, "unknown role 'critic'"),
}


@pytest.mark.parametrize("case", LEFT_OUT)
def test_what_teaches_nothing_is_left_out_and_counted(tmp_path, case):
    row, reason = LEFT_OUT[case]
    data = loaded(tmp_path, GOOD, row, OTHER, {**GOOD, "prompt": "r"})
    assert data.dropped == {reason: 1} and len(data.train) == 2 and len(data.eval) == 1


def test_nul_characters_are_text_like_any_other(tmp_path):
    data = loaded(tmp_path, {**GOOD, "chosen": "a\0c"}, OTHER, {**GOOD, "prompt": "r\0"})
    chosen = {example.chosen for example in [*data.train, *data.eval]}
    assert chosen == {"a\0c", "a"} and TOKENIZER.decode(TOKENIZER("a\0c")["input_ids"]) == "a\0c"


def test_duplicated_rows_are_kept_and_never_on_both_sides(tmp_path):
    data = loaded(tmp_path, *[GOOD] * 4, *[OTHER] * 4)
    assert len(data.eval) == 1 and len(data.train) == 4
    assert {e.prompt[0]["content"] for e in data.train}.isdisjoint(e.prompt[0]["content"] for e in data.eval)
    assert data.dropped == {"prompt is held out for evaluation": 3}


@pytest.mark.parametrize("name", [".jsonl", ".csv", ".parquet"])
def test_a_megabyte_in_one_cell_is_a_row_that_is_too_long(tmp_path, name):
    rows = [{**GOOD, "prompt": "word " * 200_000}, GOOD, OTHER]
    path = tmp_path / f"rows{name}"
    if name == ".parquet":
        path.write_bytes(parquet(rows))
    elif name == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(GOOD))
            writer.writeheader()
            writer.writerows(rows)
    options = SimpleNamespace(task="preference", train_data=str(path), eval_data="", max_train_rows=0, **vars(OPTIONS))

    def too_long(example: Any) -> str | None:
        return "too long" if len(TOKENIZER(example.prompt[0]["content"])["input_ids"]) > 64 else None

    data = load(options, 1, 0, too_long)
    assert data.dropped == {"too long": 1} and len(data.train) == len(data.eval) == 1


def test_a_prompt_that_the_chat_template_refuses_is_named_with_its_row(tmp_path):
    def refuse(example: Any) -> None:
        raise InputError("prompt: the chat template refuses messages with roles ['system', 'user']: no system.")

    with pytest.raises(InputError, match=r"train_data: '.*rows.jsonl' row 1: prompt: the chat template refuses"):
        loaded(tmp_path, GOOD, OTHER, refuse=refuse)


def test_broken_utf8_in_parquet_names_the_row(tmp_path):
    text = pyarrow.array([b"fine", b"caf\xe9", b"fine"], pyarrow.binary()).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"chosen": text}), tmp_path / "x.parquet")
    with pytest.raises(InputError, match=r"x.parquet' row 2 is not UTF-8 \(byte 4 of a text\)"):
        load_rows(str(tmp_path / "x.parquet"))


def test_broken_utf8_in_a_list_names_the_line(tmp_path):
    (tmp_path / "x.json").write_bytes(b'[{"a": "b"},\n {"a": "\xff"}]')
    with pytest.raises(InputError, match=r"x.json' line 2 is not UTF-8 \(byte 22\)"):
        load_rows(str(tmp_path / "x.json"))


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_two_columns_of_one_name_are_refused(tmp_path, name):
    if name == "x.csv":
        (tmp_path / name).write_text("a,b,a\n1,2,3\n")
    else:
        column = pyarrow.array([1])
        pyarrow.parquet.write_table(pyarrow.Table.from_arrays([column, column], ["a", "a"]), tmp_path / name)
    with pytest.raises(InputError, match=rf"{name}' (has two columns of one name|is not Parquet \(Multiple matches)"):
        load_rows(str(tmp_path / name))
