"""Imports without garbage collection: paused inside, as before afterwards, what was imported out of later collections."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

import pytest

from zopro.system.imports import importing


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "zopro_new_module.py").write_text("import gc\nenabled = gc.isenabled()\nkept = [[]]\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "zopro_new_module", raising=False)
    return "zopro_new_module"


@pytest.mark.parametrize("enabled", [True, False])
def test_collection_is_paused_while_modules_are_imported(module: str, enabled: bool) -> None:
    frozen, was = gc.get_freeze_count(), gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        with importing():
            found = __import__(module)
        assert not found.enabled and gc.isenabled() == enabled
        assert gc.get_freeze_count() > frozen
        assert not any(found.kept is held for held in gc.get_objects()), "no collection looks at it again"
        frozen = gc.get_freeze_count()
        with importing():
            __import__(module)
        assert gc.get_freeze_count() <= frozen, "nothing was imported: what is there may be garbage"
    finally:
        (gc.enable if was else gc.disable)()
        sys.modules.pop(module)


def test_collection_comes_back_after_a_failure() -> None:
    assert gc.isenabled()
    with pytest.raises(ModuleNotFoundError), importing():
        __import__("zopro_no_such_module")
    assert gc.isenabled()
