"""Examples in docstrings and notebooks are run, and every public name and all public maths have one.

Those that need a model find a tiny one under the Hub's name, the demo's, in the folder that they run in.
"""

from __future__ import annotations

import doctest
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
from transformers import PrinterCallback, ProgressCallback

import zopro
import zopro.zo
from one_run import no_figures
from zopro.demo import model
from zopro.rewards import interpolate
from zopro.train import objectives
from zopro.weights.updates import difference

HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"
SOURCE = Path(zopro.__file__).parents[1]
FILES = [path for path in sorted(SOURCE.rglob("*.py")) if ">>> " in path.read_text("utf-8")]
WITH_EXAMPLES = [".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__") for path in FILES]
NO_MATHS = {"Directions", "Ranks", "StepRecord", "Strategy", "Weights"}
MATHS = {
    **{name: getattr(zopro.zo, name) for name in zopro.zo.__all__ if name not in NO_MATHS},
    **{name: getattr(objectives, name) for name in objectives.__all__},
    **{f.__name__: f for f in (interpolate, difference)},
}
PUBLIC = sorted({*zopro.__all__} - {"__version__"})


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a model, rows, and the run that the example of `zopro.run` makes."""
    folder = tmp_path_factory.mktemp("examples")
    questions = ("What is tea?", "What is rust?", "What do bees make?", "Why do we yawn?")
    model.write(folder / HUB_ID, 0, [(question, "Leaves in hot water.") for question in questions] * 16, steps=2)
    settings = folder / HUB_ID / "config.json"
    settings.write_text(settings.read_text().replace('"max_position_embeddings": 128', '"max_position_embeddings": 1024'))
    ends = folder / HUB_ID / "generation_config.json"
    values = json.loads(ends.read_text())
    values["eos_token_id"] = sorted({values["eos_token_id"], *range(2, 2000, 8)})  # answers end after a few tokens
    ends.write_text(json.dumps(values))
    (folder / "rows.jsonl").write_text("".join(json.dumps({"prompt": question}) + "\n" for question in questions))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        no_figures(patch)
        begins = doctest.DocTestParser().get_examples(zopro.run.__doc__ or "")
        exec("".join(example.source for example in begins), {"zopro": zopro})
    return folder


@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_hold(
    module: str, place: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(place)
    no_figures(monkeypatch)
    for shown in (PrinterCallback, ProgressCallback):  # what trainers print is not what examples are about
        monkeypatch.setattr(shown, "on_log", lambda *args, **kwargs: None)
    result = doctest.testmod(import_module(module), extraglobs={"zopro": zopro}, optionflags=doctest.ELLIPSIS)
    assert result.attempted and not result.failed, capsys.readouterr().out


NOTEBOOKS = sorted((SOURCE.parent / "examples").glob("*.ipynb"))


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(notebook: Path, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their cells in order, with fewer steps; none has outputs, which would be another machine's."""
    monkeypatch.chdir(place)
    monkeypatch.syspath_prepend(place)
    no_figures(monkeypatch)
    cells = [cell for cell in json.loads(notebook.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"]
    text = "\n".join("".join(cell["source"]) for cell in cells)
    names: dict[str, object] = {}
    exec(re.sub(r"(?m)^STEPS, POPULATION, PROMPTS = .*$", "STEPS, POPULATION, PROMPTS = 1, 2, 2", text), names)
    after = names["after"]
    assert isinstance(after, list) and len(after) == 2 and (place / "runs/brief/summary.json").is_file()
    assert not any(cell["outputs"] or cell["execution_count"] for cell in cells)


@pytest.mark.parametrize("name", MATHS)
def test_public_maths_has_an_example(name: str) -> None:
    assert ">>> " in (MATHS[name].__doc__ or "")


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name: str) -> None:
    assert ">>> " in (getattr(zopro, name).__doc__ or "")
