"""With several GPUs in sight and no launcher a process trains on one: no copies of the model, no larger batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from trl import RLOOConfig, SFTConfig

from tiny_trainers import PROMPTS, TOKENIZER, llama, settings, tea, with_adapter
from zopro import zeroth_order
from zopro.engine.local.models import resolve_device
from zopro.errors import InputError
from zopro.train.arguments import quiet_arguments
from zopro.train.rloo import EngineRLOOTrainer


@pytest.fixture(autouse=True)
def four_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def seen(self: TrainingArguments) -> int:
        return (self.device, self._n_gpu)[1] or 4  # 0 is what a machine without one has found

    monkeypatch.setattr(TrainingArguments, "n_gpu", property(seen))


def test_stages_that_learn_from_rows(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    shared = {"output_dir": tmp_path, "steps": 1, "batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    found = quiet_arguments(SFTConfig, **shared, device=torch.device("cpu"))
    assert (found.n_gpu, found.train_batch_size) == (1, 2) and "of 4 GPUs one is used" in caplog.text


def test_trainers(tmp_path: Path) -> None:
    made = zeroth_order(Trainer)(llama(), TrainingArguments(**settings(tmp_path)))
    rows = Dataset.from_dict({"prompt": list(PROMPTS)})
    args = RLOOConfig(**settings(tmp_path, num_generations=2))
    online = EngineRLOOTrainer(with_adapter(), tea, args, rows, processing_class=TOKENIZER)
    assert [(trainer.args.n_gpu, trainer.args.train_batch_size) for trainer in (made, online)] == [(1, 4)] * 2


def test_another_gpu_than_the_first_is_refused_with_its_remedy() -> None:
    with pytest.raises(InputError, match=r"got 'cuda:1'. Set the environment variable CUDA_VISIBLE_DEVICES=1"):
        resolve_device("cuda:1")
