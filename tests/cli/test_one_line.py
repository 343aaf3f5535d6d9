"""What libraries raise on a person's input reaches the person as one line: the errors that can come from anywhere."""

from __future__ import annotations

import pytest
import torch

from commands import run
from zopro.errors import Diverged
from zopro.loop import pipeline
from zopro.store.explained import explained

pytestmark = pytest.mark.usefixtures("quietly")

KNOWN = [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), 1, "stopped: the memory is full"),
    (MemoryError(), 1, "stopped: the memory is full"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"), 1, "stopped: the memory is full"),
    (OSError(28, "No space left on device"), 1, "stopped: the disk is full, or a quota"),
    (PermissionError(13, "Permission denied", "runs/a"), 2, "error: 'runs/a': Permission denied."),
    (Diverged("the loss of step 3 is nan"), 2, "error: learning rate: must be low enough"),
    (FloatingPointError("the logits are not finite"), 2, "error: learning rate: must be low enough"),
]


@pytest.mark.parametrize(("error", "code", "words"), KNOWN, ids=lambda value: type(value).__name__)
def test_a_known_error_is_one_line_wherever_it_comes_from(error, code, words, inputs, tmp_path, capsys, monkeypatch):
    def fails(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("zopro.loop.pipeline.run", fails)
    assert run(capsys, inputs, tmp_path)[0] == code
    with pytest.raises(type(error)):
        pipeline.run()
    assert explained(error)[1].startswith(words) and "\n" not in explained(error)[1]


def test_a_model_that_the_memory_does_not_hold(inputs, tmp_path, capsys, monkeypatch):
    def fails(*given: object, **named: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", fails)
    code, line = run(capsys, inputs, tmp_path)
    assert code == 1 and line.startswith("zopro: stopped: the memory is full") and not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [KeyError("x"), ValueError("y"), AssertionError(), RuntimeError("z"), OSError("w")])
def test_an_unknown_error_is_our_bug_and_shows_where(error, inputs, tmp_path, capsys, monkeypatch):
    def fails(*given: object, **named: object) -> None:
        raise error

    monkeypatch.setattr("zopro.loop.pipeline.run", fails)
    with pytest.raises(type(error)):
        run(capsys, inputs, tmp_path)
