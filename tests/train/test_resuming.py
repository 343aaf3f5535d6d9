"""Going on from a checkpoint: what cannot be gone on from is one line, what is finished stays, what is kept is said."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tiny_trainers import es, online, plain, same, weights, with_adapter, zopro
from zopro.errors import InputError
from zopro.train.guided import GuidedConfig, GuidedTrainer

pytestmark = pytest.mark.usefixtures("random_state")

SAVED: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
SHORT: dict[str, Any] = {"max_completion_length": 4, "num_generations": 2, "per_device_train_batch_size": 4, **SAVED}


def guided(folder: Path, **options: Any) -> Any:
    return online(GuidedTrainer, GuidedConfig, folder, {"model": with_adapter(), "guard_every": 0, **options})


def along_noise(folder: Path, **options: Any) -> Any:
    return zopro(folder, **{"eps": 1e-2, "model": with_adapter(), **options})


def population(folder: Path, **options: Any) -> Any:
    return es(folder, **{"population": 2, "model": with_adapter(), **options})


def any_trainer(folder: Path, num_generations: int = 0, max_completion_length: int = 0, **options: Any) -> Any:
    return plain(folder, {"eps": 1e-2, "check_slope": False}, **{"model": with_adapter(), **options})


BUILDS = {"zopro": along_noise, "es": population, "guided": guided, "zeroth_order": any_trainer}


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Output folders of trainings of two steps, by trainer."""
    found = {name: tmp_path_factory.mktemp(name) for name in BUILDS}
    for name, folder in found.items():
        BUILDS[name](folder, max_steps=2, **SHORT).train()
    return {name: folder / "out" for name, folder in found.items()}


def refusal(trainer: Any, checkpoint: Any) -> str:
    with pytest.raises(InputError, match=r"\Aresume_from_checkpoint: must be [^\n]*\Z") as error:
        trainer.train(resume_from_checkpoint=checkpoint)
    return str(error.value)


@pytest.mark.parametrize("kind", BUILDS)
def test_a_checkpoint_that_does_not_fit_is_one_line(kind: str, saved: dict[str, Path], tmp_path: Path) -> None:
    trainer, out = BUILDS[kind](tmp_path, max_steps=3, **SHORT), saved[kind]
    assert "got True" in refusal(trainer, True)
    assert str(tmp_path / "none") in refusal(trainer, tmp_path / "none")
    assert f"Give {out / 'checkpoint-2'}." in refusal(trainer, str(out))
    other = BUILDS[kind](tmp_path, max_steps=3, **{**SHORT, "model": with_adapter(hidden_size=32)})
    assert "size mismatch" in refusal(other, out / "checkpoint-1")
    fewer = BUILDS[kind](tmp_path, max_steps=3, **{**SHORT, "model": with_adapter(targets=["v_proj"])})
    assert str(out / "checkpoint-1") in refusal(fewer, out / "checkpoint-1")
    scaled = with_adapter()
    scaled.peft_config["default"].lora_alpha = 99
    scaled = BUILDS[kind](tmp_path, max_steps=3, **{**SHORT, "model": scaled})
    assert "(lora_alpha is 8 there and 99 here)" in refusal(scaled, out / "checkpoint-1")
    another = saved["es" if kind == "zopro" else "zopro"] / "checkpoint-1"
    if kind != "zeroth_order":  # SPSA too
        assert str(another) in refusal(trainer, another)


@pytest.mark.parametrize("by", ["steps", "epochs"])
@pytest.mark.parametrize("kind", BUILDS)
def test_a_training_that_ended_within_an_epoch_stays_as_it_ended(
    kind: str, by: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    half = {"max_steps": 1} if by == "steps" else {"max_steps": -1, "num_train_epochs": 0.5}
    options = {**SHORT, **half, "per_device_train_batch_size": 2 if kind == "zeroth_order" else 4}
    ended = BUILDS[kind](tmp_path, **options)
    ended.train()
    again = BUILDS[kind](tmp_path, **options)
    result = again.train(resume_from_checkpoint=True)
    assert result.global_step == again.state.global_step == 1
    again.log_metrics("train", result.metrics)
    assert same(weights(again.model), weights(ended.model))
    assert "checkpoint-1 has all of its 1 steps" in caplog.text


def test_the_best_is_loaded_where_no_step_is_left(tmp_path: Path) -> None:
    best = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "reward"}
    options = {**SHORT, **best, "max_steps": 3, "per_device_eval_batch_size": 30, "learning_rate": 0.5}
    options["per_device_train_batch_size"] = 2
    ended = population(tmp_path, **options)
    ended.train()
    again = population(tmp_path, **options)
    again.train(resume_from_checkpoint=tmp_path / "out" / "checkpoint-3")
    assert again.state.best_model_checkpoint == ended.state.best_model_checkpoint
    assert same(weights(again.model), weights(ended.model))


@pytest.mark.parametrize(
    ("kind", "asked", "said"),
    [
        ("es", {"sigma": 0.5, "learning_rate": 0.5}, {"learning_rate: 0.1, 0.5", "sigma: 0.1, 0.5"}),
        ("es", {"sigma": "auto", "population": 4}, {"sigma: 0.1, auto"}),
        ("zopro", {"eps": "auto", "weight_decay": 0.5}, {"eps: 0.01, auto", "weight_decay: 0.0, 0.5"}),
        ("zopro", {"seed": 5, "adam_beta1": 0.5}, {"seed of the directions: 42, 5"}),
        ("guided", {"adam_beta1": 0.5, "adam_epsilon": 0.5}, {"adam_beta1: 0.9, 0.5", "adam_epsilon: 1e-08, 0.5"}),
        ("zeroth_order", {"learning_rate": 0.5}, {"learning_rate: 0.01, 0.5"}),
        *[(kind, {}, set()) for kind in BUILDS],
    ],
)
def test_what_a_checkpoint_keeps_of_the_settings_is_said(
    kind: str,
    asked: dict[str, Any],
    said: set[str],
    saved: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    trainer = BUILDS[kind](tmp_path, max_steps=2, **SHORT, **asked)
    trainer.train(resume_from_checkpoint=saved[kind] / "checkpoint-1")
    pattern = r"([\w ]+): a resumed training goes on with its checkpoint's (\S+), not with (\S+)"
    found = [re.fullmatch(pattern, record.getMessage()) for record in caplog.records]
    assert {f"{line[1]}: {line[2]}, {line[3]}" for line in found if line} == said


def test_an_eps_that_was_searched_for_is_no_other(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for steps, checkpoint in ((1, None), (2, True)):
        along_noise(tmp_path, max_steps=steps, eps="auto", **SHORT).train(resume_from_checkpoint=checkpoint)
    assert "a resumed training goes on" not in caplog.text


@pytest.mark.parametrize("kind", BUILDS)
def test_a_checkpoint_without_the_optimiser_is_said(
    kind: str, saved: dict[str, Path], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    only = tmp_path / "out" / "checkpoint-1"
    shutil.copytree(saved[kind] / "checkpoint-1", only)
    (only / "optimizer.pt").unlink()  # as save_only_model leaves it
    BUILDS[kind](tmp_path, max_steps=2, **SHORT).train(resume_from_checkpoint=True)
    assert f"{only}: has no optimizer.pt, so the optimiser and its schedule begin anew" in caplog.text
