"""Options that only a backward pass has a use for are said, and do no harm."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset
from trl import SFTConfig

from tiny_trainers import PROMPTS, TOKENIZER, settings, tea, with_adapter
from zopro import GuidedConfig, GuidedTrainer, ZOPrOConfig
from zopro.train.gradients import without_backward


@pytest.mark.parametrize("config", [SFTConfig, ZOPrOConfig])
def test_only_what_was_chosen_is_said_and_gets_its_default(
    config: type, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    given = settings(tmp_path)
    without_backward(config(**given))
    assert not caplog.records
    args = config(**given, optim="lomo", max_grad_norm=0.3, weight_decay=0.1, gradient_checkpointing=True)
    without_backward(args)
    assert "optim, max_grad_norm: without effect" in caplog.text
    assert (args.optim, args.max_grad_norm, args.weight_decay) == ("adamw_torch_fused", 1.0, 0.1)
    assert not args.gradient_checkpointing


def test_a_guided_trainer_goes_without_checkpointing(tmp_path: Path) -> None:
    options = {"gradient_checkpointing": True, "num_generations": 2, "max_completion_length": 4, "max_steps": 1}
    rows = Dataset.from_dict({"prompt": list(PROMPTS)})
    args = GuidedConfig(**settings(tmp_path, **options))
    trainer = GuidedTrainer(with_adapter(), tea, args, rows, processing_class=TOKENIZER)
    assert trainer.train().global_step == 1 and not trainer.args.gradient_checkpointing
