"""A run goes on with the rows that it began with, wherever they lie; others are refused before the model is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

from tiny_runs import config, rows
from zopro.errors import InputError
from zopro.loop import models
from zopro.loop.opening import open_all
from zopro.loop.rows import told


def write(path: Path, data: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in data))
    return str(path)


def opened(given: Any, **options: Any) -> None:
    run, _, _ = open_all(given, **options)
    run.store.lock.release()


@pytest.fixture
def begun(folder: Path, tmp_path: Path) -> Any:
    data = {key: write(tmp_path / f"{key}.jsonl", part) for key, part in PARTS.items()}
    settings = config(folder, tmp_path / "run", **data)
    opened(settings)
    return settings


PARTS = {"train_data": rows()[8:], "eval_data": rows()[:8], "other_data": [{"prompt": "egg?"}, {"prompt": "salt?"}]}


def test_other_rows_are_refused_and_the_same_ones_elsewhere_are_not(
    begun: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(models, "load_start", lambda *given: pytest.fail("the model was loaded first"))
        for key, changed, said in (
            ("train_data", [*rows()[8:], rows()[8]], "others to train on .49 rows, 48 at first"),
            ("train_data", rows()[:7:-1], "others to train on"),
            ("train_data", [rows()[8] | {"chosen": "egg"}, *rows()[9:]], "others to train on"),
            ("eval_data", rows()[20:28], "others that are held out"),
            ("other_data", [{"prompt": "egg?"}], "others of another task .1 rows, 2 at first"),
        ):
            whole = Path(getattr(begun, key)).read_text()
            write(Path(getattr(begun, key)), changed)
            with pytest.raises(InputError, match=f"^{key}: must give the rows that the run began .* {said}") as error:
                open_all(begun, resume=True)
            lock = FileLock(str(tmp_path / "run/.lock"), timeout=0, thread_local=False, is_singleton=True)
            assert not lock.is_locked, f"whoever keeps {error} keeps no lock"
            Path(getattr(begun, key)).write_text(whole)
    Path(begun.train_data).rename(tmp_path / "moved.jsonl")
    settings = begun.to_dict() | {"train_data": str(tmp_path / "moved.jsonl")}
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(settings))
    opened(type(begun)(**settings), resume=True)
    (tmp_path / "run/data.json").unlink()  # of an earlier version
    write(tmp_path / "moved.jsonl", rows()[9:])
    opened(type(begun)(**settings), resume=True)


def test_a_copy_goes_on_where_the_first_place_may_not_be_seen(begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(*given: Any) -> bool:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "samefile", refuses)
    opened(begun, resume=True)


def test_what_reward_functions_read_is_part_of_a_row(begun: Any) -> None:
    _, _, data = open_all(begun, resume=True)
    before = told(data)
    for item in (data.eval[0], data.other[0]):
        object.__setattr__(item.example, "columns", {"target": 7})
    assert {part for part, now in told(data).items() if now != before[part]} == {"eval"}, "another task has no rewards"


def test_a_model_that_was_started_ends_where_something_does_not_fit(begun: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ended: list[Any] = []
    monkeypatch.setattr(models, "end", ended.append)
    monkeypatch.setattr(models, "frame_of", lambda *given: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        open_all(begun, resume=True)
    assert [type(base).__name__ for base in ended] == ["LlamaForCausalLM"]
