"""Rows from every kind of source, and one clear line for every kind of broken one."""

from __future__ import annotations

import csv
import gzip
import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from zopro.errors import InputError
from zopro.tasks import load_rows
from zopro.tasks.rows import check_source

ROWS = [{"chosen": "grün, gut", "n": 1}, {"chosen": 'a "b"\nc', "n": 2}]


def write_jsonl(path):
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS) + "\n\n", encoding="utf-8")


def write_jsonl_gz(path):
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in ROWS)


def write_json(path):
    path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")


def write_csv(path):
    with open(path, "w", newline="", encoding="utf-8-sig") as file:
        writer = csv.DictWriter(file, ["chosen", "n"])
        writer.writeheader()
        writer.writerows(ROWS)


def write_parquet(path):
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), path)


WRITERS = {
    "x.jsonl": write_jsonl,
    "x.jsonl.gz": write_jsonl_gz,
    "x.json": write_json,
    "lines.json": write_jsonl,
    "x.csv": write_csv,
    "x.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_file_kind_gives_the_same_rows(tmp_path, name):
    WRITERS[name](tmp_path / name)
    rows = load_rows(str(tmp_path / name))
    assert [row["chosen"] for row in rows] == [row["chosen"] for row in ROWS]
    assert [int(row["n"]) for row in rows] == [1, 2]
    assert rows[1].number == 2
    assert rows[1].file.endswith(name)


BROKEN = {
    "json": ("x.jsonl", b'{"a": 1}\n{"a": \n', "column 7): write each row in one line, as one object in double quotes"),
    "a list as lines": (
        "x.jsonl",
        b'[{"a": 1}]',
        "row 1 must be an object with columns, got list: give a file that is one",
    ),
    "semicolons": (
        "x.csv",
        b"a;b\n1,5;2\n",
        "does not have the header's 1 field: part fields by commas, and quote one that",
    ),
    "truncated json": ("x.json", b'[{"a": 1},\n {"a"', "is not JSON (Expecting ':' delimiter, line 2 column"),
    "json array of numbers": ("x.json", b"[1, 2]", "row 1 must be an object"),
    "utf-8": ("x.jsonl", b'{"a": 1}\n\n{"a": "\xff"}\n', "row 3 is not UTF-8 (byte 8): save the file as UTF-8"),
    "csv utf-8": ("x.csv", b"a,b\n1,2\n\xff,3\n", "line 3 is not UTF-8"),
    "csv width": ("x.csv", b"a,b\n1,2\n1,2,3\n", "row 2 (line 3) does not have the header's 2 fields"),
    "csv too narrow": ("x.csv", b"a,b\n1\n", "row 1 (line 2) does not have"),
    "csv blank header": ("x.csv", b"\na,b\n1,2\n", "begins with a blank line, where the header is due"),
    "csv quotes": ("x.csv", b'a,b\n1,"2" x\n', "row 1 is not CSV"),
    "not an object": ("x.jsonl", b"[1]\n", "row 1 must be an object"),
    "huge integer": ("x.jsonl", b'{"a": ' + b"1" * 5000 + b"}", "row 1 is not JSON"),
    "not gzip": ("x.jsonl.gz", b'{"a": 1}\n', "cannot be read"),
    "cut gzip": ("x.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "cannot be read"),
    "not parquet": ("x.parquet", b"PAR2", "is not Parquet"),
    "empty": ("x.jsonl", b"", "has no rows"),
    "blank": ("x.json", b" \n", "has no rows"),
    "empty list": ("x.json", b"[]", "has no rows"),
    "csv header only": ("x.csv", b"a,b\n", "has no rows"),
    "unknown kind": ("x.xml", b"<a/>", "must be one of .jsonl"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_files_are_named_with_their_row_in_one_line(tmp_path, case):
    name, content, message = BROKEN[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError) as error:
        load_rows(str(tmp_path / name))
    text = str(error.value)
    assert text.startswith("train_data: ")
    assert name in text and message in text and "\n" not in text


def test_byte_order_mark_is_no_part_of_the_first_row(tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\n')
    assert load_rows(str(tmp_path / "x.jsonl")) == [{"a": 1}]


def test_keys_that_arrow_adds_to_objects_are_no_part_of_them(tmp_path):
    calls = [{"name": "f", "arguments": {"x": 1}}, {"name": None, "arguments": {"y": [{"z": 2}, {"w": 3}]}}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"calls": calls, "a": None}]), tmp_path / "x.parquet")
    assert load_rows(str(tmp_path / "x.parquet")) == [{"calls": calls, "a": None}]
    (tmp_path / "x.jsonl").write_text('{"calls": [{"arguments": {"x": null}}]}')
    assert load_rows(str(tmp_path / "x.jsonl")) == [{"calls": [{"arguments": {"x": None}}]}]


def test_nulls_stay_apart_from_missing_columns(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"a": null}\n{"b": 1}\n')
    assert load_rows(str(tmp_path / "x.jsonl")) == [{"a": None}, {"b": 1}]


def test_a_folder_gives_the_files_of_the_split(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / ".cache").mkdir()
    for name, value in {
        "train-00000.jsonl": 1,
        "train-00001.jsonl": 2,
        "data/test.jsonl": 3,
        "validation.jsonl": 4,
        ".cache/train.jsonl": 5,
        "train.txt": 6,
    }.items():
        (tmp_path / name).write_text(json.dumps({"a": value}))
    assert load_rows(str(tmp_path)) == [{"a": 1}, {"a": 2}]
    assert load_rows(str(tmp_path), "eval") == [{"a": 3}]
    (tmp_path / "data/test.jsonl").unlink()
    assert load_rows(str(tmp_path), "eval") == [{"a": 4}]


SEVERAL = [f"{split}-00000-of-00001.jsonl" for split in ("test_gen", "test_prefs", "train_prefs", "train_sft")]


def test_a_folder_of_several_splits_is_refused_but_for_one_of_just_that_name(tmp_path):
    for name in SEVERAL:
        (tmp_path / name).write_text(json.dumps({"a": name}))
    for split, word, found in (("train", "train", SEVERAL[2:]), ("eval", "test", SEVERAL[:2])):
        with pytest.raises(InputError) as refused:
            load_rows(str(tmp_path), split)
        assert str(refused.value).startswith(f"{split}_data: '{tmp_path}' must hold one split that begins with {word}")
        assert f"got the files {', '.join(found)}. Name the file itself" in str(refused.value)
    said = []
    for name in ("train-00000-of-00002-0a1b.jsonl", "train_00001_of_00002.jsonl.gz"):
        data = json.dumps({"a": name}).encode()
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    assert [row["a"][:11] for row in load_rows(str(tmp_path), "train", said.append)] == ["train-00000", "train_00001"]
    assert said == ["train_data: of the splits train, train_prefs, train_sft one is read: train"]


def test_of_a_hub_data_set_the_split_of_that_name_is_read_else_the_first(monkeypatch):
    asked, said = [], []
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, split: asked.append(split) or datasets.Dataset.from_list(ROWS)
    )
    for splits in (["train_small", "train"], ["train_prefs", "train_sft", "test"], ["train"]):
        monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_, splits=splits: splits)
        load_rows("who/what", "train", said.append)
    assert asked == ["train", "train_prefs", "train"]
    assert said == [
        "train_data: of the splits train_small, train one is read: train",
        "train_data: of the splits train_prefs, train_sft one is read: train_prefs",
    ]


def test_a_folder_without_the_split_says_what_it_has(tmp_path):
    (tmp_path / "a").mkdir()
    for name in ("test.jsonl", "a/test.jsonl"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(InputError, match=r"train_data: no file in .* begins with train; found a/test.jsonl, test.jsonl"):
        load_rows(str(tmp_path))


@pytest.mark.parametrize(
    ("names", "found"),
    [
        (["train.jsonl", "train.jsonl.gz"], "train.jsonl, train.jsonl.gz"),
        (
            ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl", "train.csv"],
            "train.csv, train-00000-of-00002.jsonl",
        ),
        (["a/train.jsonl", "b/train.jsonl.gz"], ""),
        (["train.JSONL", "train-1.jsonl"], ""),
    ],
)
def test_a_split_in_two_forms_is_refused_whose_rows_may_count_twice(names, found, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"a": 1}')
    if not found:
        return check_source(str(tmp_path))
    with pytest.raises(InputError, match=f"must hold the split train in one form, got the files {found}. Name the file"):
        check_source(str(tmp_path))


def test_a_data_set_as_save_to_disk_writes_it_is_named(tmp_path):
    (tmp_path / "data-00000-of-00001.arrow").touch()
    (tmp_path / "state.json").touch()
    with pytest.raises(
        InputError, match=r"must hold train.parquet or .* as save_to_disk writes it. Write it with to_parquet"
    ):
        check_source(str(tmp_path))


@pytest.mark.parametrize("source", ["missing.jsonl", "rowz.txt", "no such thing", "", "tests*/x"])
def test_missing_files_are_refused_without_asking_the_hub(monkeypatch, tmp_path, source):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(InputError):
        load_rows(source, "eval")


def test_a_missing_file_below_an_existing_folder_is_no_hub_id(monkeypatch, tmp_path):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: pytest.fail("asked the Hub"))
    with pytest.raises(InputError, match="no such file"):
        load_rows("data/hh_rlhf")


def test_hub_data_sets_come_with_their_configuration_and_split(monkeypatch):
    asked = []
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda name, config: ["train", "validation"])
    monkeypatch.setattr(
        datasets, "load_dataset", lambda *a, **k: asked.append((a, k)) or datasets.Dataset.from_list(ROWS)
    )
    rows = load_rows("openai/summarize_from_feedback:comparisons", "eval")
    assert rows == ROWS and rows[0].number == 1
    assert asked == [(("openai/summarize_from_feedback", "comparisons"), {"split": "validation"})]


def test_hub_failures_are_one_line(monkeypatch):
    def fail(*_):
        raise ConnectionError("offline\nmore lines")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    with pytest.raises(InputError, match=r"'who/what' is neither .*\(ConnectionError: offline\)\.$"):
        load_rows("who/what")
    monkeypatch.setattr(datasets, "get_dataset_split_names", lambda *_: ["default"])
    with pytest.raises(InputError, match="has no train split, only default"):
        load_rows("who/what")


def test_a_hub_data_set_of_several_configurations_says_how_to_name_one(monkeypatch):
    def fail(*_):
        raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["main", "socratic"])
    with pytest.raises(InputError, match=r"configurations, main, socratic, got 'a/gsm8k'\. Write it .* a/gsm8k:main\.$"):
        load_rows("a/gsm8k")
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: [f"c{n}" for n in range(60)])
    with pytest.raises(InputError, match=r", c10, c11 and 48 more, got"):
        load_rows("a/mmlu")
    monkeypatch.setattr(datasets, "get_dataset_config_names", fail)
    with pytest.raises(InputError, match="nor a Hub data set that loads"):
        load_rows("a/gsm8k")
