"""A whole folder takes the place of an empty one, of what a link points to, or of nothing: never half of it is left."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from zopro.errors import InputError
from zopro.store.durable import read_json, unwritable, whole_folder, write_text


@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_one(there: bool, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real/folder")
    if there:
        (tmp_path / "real/folder").mkdir(parents=True)
    with whole_folder(tmp_path / "link") as partial:
        (partial / "file").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real/folder/file").read_text() == "x"
    assert not list(tmp_path.rglob("*.partial"))


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real/file")
    for text in ("x", "y"):
        write_text(tmp_path / "link", text)
        assert (tmp_path / "link").is_symlink() and (tmp_path / "real/file").read_text() == text
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127])
def test_a_name_of_any_length(name: str, tmp_path: Path) -> None:
    write_text(tmp_path / name, "x")
    with whole_folder(tmp_path / name[::-1][1:]) as partial:
        (partial / "file").write_text("x")
    assert len(list(tmp_path.iterdir())) == 2


def test_here_is_a_folder_with_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with whole_folder(Path()) as partial:
        (partial / "file").write_text("x")
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["here", "here/file"]


def test_what_cannot_be_put_in_its_place_is_not_left_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(source: Path, target: Path) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "replace", busy)
    with pytest.raises(OSError, match="busy"), whole_folder(tmp_path / "mounted") as partial:
        (partial / "file").write_text("x")
    assert not list(tmp_path.iterdir())


def test_where_nothing_can_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    assert unwritable(tmp_path / "a/b/c") is None and unwritable(tmp_path / "file/a") == "Not a directory"
    (tmp_path / "link").symlink_to("nowhere")
    assert unwritable(tmp_path / "link") == unwritable(tmp_path / "link/a") == "No such file or directory"
    monkeypatch.setattr("os.access", lambda path, mode: False)  # whoever runs the tests may write everywhere
    assert unwritable(tmp_path / "a") == "Permission denied"


def test_brackets_without_end_are_damage(tmp_path: Path) -> None:
    (tmp_path / "deep.json").write_text("[" * 10**5)
    with pytest.raises(InputError, match="must be there and be JSON"):
        read_json(tmp_path / "deep.json")
