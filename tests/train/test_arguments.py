"""Trainers of the loop and of the bench get their arguments from one place."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainingArguments
from trl import RewardConfig, RLOOConfig, SFTConfig, TrlParser

from tiny_trainers import sft
from zopro.config import RunConfig
from zopro.config.step import StepOptions
from zopro.train.arguments import policy_arguments, quiet_arguments
from zopro.train.es import ESConfig
from zopro.train.guided import GuidedConfig, GuidedSPSAConfig
from zopro.train.zopro import ZOPrOConfig

CPU = torch.device("cpu")
SOURCE = Path(__file__).parents[2] / "src"
POLICY: dict[str, Any] = {
    **{"prompts": 3, "num_generations": 4, "max_completion_length": 8, "temperature": 0.7, "beta": 0.1},
    **{"steps": 5, "seed": 3, "logging_steps": 1},
}


def without_examples(path: Path) -> str:
    return "\n".join(
        line for line in path.read_text("utf-8").splitlines() if not line.lstrip().startswith((">>>", "..."))
    )


def test_nobody_else_spells_them() -> None:
    found = {path.name for path in SOURCE.rglob("*.py") if "per_device_train_batch_size" in without_examples(path)}
    assert found == {"arguments.py"}


@pytest.mark.parametrize("checkpoint_steps", [0, 2])
def test_all_stages_agree(tmp_path: Path, checkpoint_steps: int) -> None:
    given: dict[str, Any] = {"output_dir": tmp_path, "device": CPU, "checkpoint_steps": checkpoint_steps}
    quiet = {"steps": 5, "batch_size": 12, "learning_rate": 1e-3, "seed": 3}
    made = [quiet_arguments(kind, **quiet, **given) for kind in (TrainingArguments, SFTConfig, RewardConfig)]
    made.append(RLOOConfig(**policy_arguments(**POLICY, **given), learning_rate=1e-3))
    for arguments in made:
        assert (arguments.max_steps, arguments.per_device_train_batch_size, arguments.seed) == (5, 12, 3)
        assert (arguments.report_to, arguments.disable_tqdm, arguments.bf16, arguments.use_cpu) == ([], True, False, True)
        assert not getattr(arguments, "gradient_checkpointing", False)
        assert not getattr(arguments, "activation_checkpointing", False)
        assert arguments.save_strategy == ("steps" if checkpoint_steps else "no")
        assert not checkpoint_steps or arguments.save_steps == checkpoint_steps


@pytest.mark.parametrize(
    ("config", "option", "values"),
    [
        (ZOPrOConfig, "eps", {"auto": "auto", "1e-3": 1e-3}),
        (ZOPrOConfig, "noise", {"python:mine:Noise": "python:mine:Noise"}),
        (ESConfig, "sigma", {"auto": "auto", "0.5": 0.5}),
        (GuidedConfig, "local", {"chain": "chain"}),
        (GuidedSPSAConfig, "sides", {"1": 1}),
    ],
)
def test_command_lines_of_trl_take_them(config: Any, option: str, values: dict[str, Any]) -> None:
    for word, value in values.items():
        parser = TrlParser(config)
        typed = ["--use_cpu", "true", "--bf16", "false", f"--{option}", word]
        assert getattr(parser.parse_args_and_config(typed)[0], option) == value
    assert all(isinstance(key.type, str) for key in fields(RunConfig)), "a parser leaves other classes as they are"
    assert StepOptions.__dataclass_fields__["sides"].metadata["choices"] == (1, 2)


def test_what_goes_where(tmp_path: Path) -> None:
    """Only a GPU wants pinned memory; logs are reported where asked; processes share the rows of a step."""
    gpu = policy_arguments(**POLICY, output_dir=tmp_path, device=torch.device("cuda"), report_to=["tensorboard"])
    assert gpu["dataloader_pin_memory"] and not gpu["use_cpu"] and gpu["report_to"] == ["tensorboard"]
    assert not policy_arguments(**POLICY, output_dir=tmp_path, device=CPU)["dataloader_pin_memory"]
    rare = quiet_arguments(
        TrainingArguments, output_dir=tmp_path, steps=1000, batch_size=1, learning_rate=1.0, seed=0, device=CPU
    )
    assert rare.logging_steps == 10


def test_steps_over_the_spread_of_slopes_are_normalised_by_that_alone(tmp_path: Path) -> None:
    trainer = sft(tmp_path, {"over_std": True, "sides": 1, "queries": 2}, max_steps=1)
    trainer.train()
    assert trainer.spsa.strategy.over_std and trainer.spsa.second_moment.beta is None
