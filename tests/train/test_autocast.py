"""bf16=True: answers are drawn under autocast, as TRL's are, and a whole float32 model trains."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_trainers import adapted, es, llama, online, zopro
from zopro import ZOPrOConfig
from zopro.engine import Sampling
from zopro.engine.local.causal import causal_parts, without_wrapping
from zopro.engine.local.engine import LocalEngine
from zopro.errors import InputError
from zopro.train.arguments import without_autocast
from zopro.train.guided import GuidedConfig, GuidedTrainer

pytestmark = pytest.mark.usefixtures("random_state")

SMALL = {"max_steps": 1, "max_completion_length": 3, "num_generations": 2, "per_device_train_batch_size": 4}


def guided(folder: Path, **options: Any) -> Any:
    return online(GuidedTrainer, GuidedConfig, folder, options)


BUILDS: dict[str, Any] = {
    "zopro": lambda folder, **o: zopro(folder, eps=1e-3, **SMALL, **o),
    "es": lambda folder, **o: es(folder, population=2, max_steps=1, max_completion_length=3, **o),
    "guided": lambda folder, **o: guided(folder, **SMALL, **o),
}


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("kind", BUILDS)
def test_answers_are_drawn_in_the_precision_that_was_asked_for(kind: str, bf16: bool, tmp_path: Path) -> None:
    trainer = BUILDS[kind](tmp_path, bf16=bf16, model=adapted())
    trainer.train()  # the engine's first look at a model is in its own precision
    seen: Counter[tuple[bool, torch.dtype]] = Counter()
    sample, layer = trainer.engine.sample, trainer.model.get_base_model().model.layers[0].mlp

    def noted(*args: Any) -> Any:
        hook = layer.register_forward_hook(
            lambda module, given, output: seen.update([(torch.is_autocast_enabled("cpu"), output.dtype)])
        )
        try:
            return sample(*args)
        finally:
            hook.remove()

    trainer.engine.sample = noted
    trainer.train()
    assert set(seen) == {(bf16, torch.bfloat16 if bf16 else torch.float32)} and trainer.state.global_step == 1


def test_a_launcher_s_precision_is_no_choice_of_the_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """But of a trainer of one's own, whose denominators then are no rollout's."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    theirs = zopro(tmp_path, eps=1e-3, surrogate="clipped", **SMALL, model=adapted())
    assert theirs.accelerator.mixed_precision == "bf16" and not theirs._takes_rollout_logprobs(theirs.model)
    arguments = without_autocast(ZOPrOConfig(str(tmp_path), bf16=False, use_cpu=True, report_to=[]))
    assert arguments.mixed_precision == "no"
    assert without_autocast(ZOPrOConfig(str(tmp_path), bf16=True, use_cpu=True, report_to=[])).mixed_precision == "bf16"


def test_a_model_in_16_bits_answers_as_it_is(tmp_path: Path) -> None:
    """Autocast would round its float32 adapters, and keep a GPU from captured graphs."""
    entered: list[str] = []

    @contextmanager
    def autocast() -> Iterator[None]:
        entered.append("")
        yield

    for dtype, times in ((torch.bfloat16, 0), (torch.float32, 1)):
        entered.clear()
        engine = LocalEngine(llama().to(dtype), autocast=autocast)
        engine.sample([[5, 6]], 1, Sampling(2, [2], 0))
        assert len(entered) == times


@pytest.mark.parametrize("before", ["", "evaluate"])
@pytest.mark.parametrize("kind", ["zopro", "es"])
def test_a_whole_model_trains(kind: str, before: str, tmp_path: Path) -> None:
    trainer = BUILDS[kind](tmp_path, bf16=True, model=llama())
    if before:
        trainer.evaluate()
    trainer.train()
    assert trainer.state.global_step == 1


def wrapped(model: Any, folder: Path) -> Any:
    """As accelerate leaves it, with an autocast of its own around the forward pass."""
    return zopro(folder, bf16=True).accelerator.prepare_model(model, evaluation_mode=True)


def test_a_wrapped_model_is_looked_at_as_sharply_as_another(tmp_path: Path) -> None:
    for wraps in (False, True):
        good, bad = llama(), llama(seed=1)
        plain = type(bad).forward

        def shifted(self: Any, *args: Any, plain: Any = plain, **kwargs: Any) -> Any:
            output = plain(self, *args, **kwargs)
            output.logits = output.logits * 1.005  # which bfloat16's rounding would hide
            return output

        bad.forward = shifted.__get__(bad)
        if wraps:
            good, bad = (wrapped(model, tmp_path) for model in (good, bad))
        before = vars(good).get("forward")
        causal_parts(good)
        assert vars(good).get("forward") is before
        with pytest.raises(InputError, match="changes its logits in a way the engine does not know"):
            causal_parts(bad)


def test_a_model_s_wrapping_comes_back(tmp_path: Path) -> None:
    model = wrapped(llama(), tmp_path)
    around = model.forward
    with pytest.raises(RuntimeError), without_wrapping(model):
        assert model.forward == model._original_forward != around
        raise RuntimeError
    assert model.forward == around
