"""Examples in docstrings are run, and public maths has one each. Those that need a model are no doctests."""

from __future__ import annotations

import doctest
from importlib import import_module
from pathlib import Path

import pytest

import zopro.zo
from zopro.rewards import interpolate
from zopro.train import objectives
from zopro.weights.updates import difference

SOURCE = Path(zopro.__file__).parents[1]
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text("utf-8")]
WITH_EXAMPLES = [".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
NO_MATHS = {"Directions", "Ranks", "StepRecord", "Strategy", "Weights"}
MATHS = {
    **{name: getattr(zopro.zo, name) for name in zopro.zo.__all__ if name not in NO_MATHS},
    **{name: getattr(objectives, name) for name in objectives.__all__},
    **{f.__name__: f for f in (interpolate, difference)},
}


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_hold(module: str, capsys: pytest.CaptureFixture[str]) -> None:
    result = doctest.testmod(import_module(module), optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed, capsys.readouterr().out


@pytest.mark.parametrize("name", MATHS)
def test_public_maths_has_an_example(name: str) -> None:
    assert ">>> " in (MATHS[name].__doc__ or "")
