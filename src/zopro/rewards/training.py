"""The two ways a reward model learns, on library trainers: pairs (TRL) and scores (transformers)."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from trl import RewardConfig, RewardTrainer
from trl.trainer.reward_trainer import DataCollatorForPreference

from zopro.system.random_state import preserve_random_state
from zopro.train.arguments import quiet_arguments, scaled_gradients
from zopro.train.callbacks import be_quiet
from zopro.train.checkpoints import checkpointed, fit


def pad_right(sequences: Sequence[Sequence[int]], pad_id: int) -> dict[str, Tensor]:
    """`input_ids` and `attention_mask`, both [sequence, longest length] int64."""
    rows = [torch.tensor(ids, dtype=torch.long) for ids in sequences]
    pad = torch.nn.utils.rnn.pad_sequence
    return {
        "input_ids": pad(rows, batch_first=True, padding_value=pad_id),
        "attention_mask": pad([torch.ones_like(row) for row in rows], batch_first=True),
    }


def fit_pairs(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    chosen: list[list[int]],
    rejected: list[list[int]],
    *,
    pad_id: int,
    callbacks: Sequence[TrainerCallback] = (),
    output_dir: str | Path | None = None,
    **options: Any,
) -> float:
    """-log sigmoid(reward of chosen - reward of rejected) on token ids that end with EOS; returns the mean loss."""
    with _stage_folder(output_dir) as folder, preserve_random_state(), _same_pad_token(tokenizer):
        trainer = checkpointed(RewardTrainer)(
            model,
            args=quiet_arguments(RewardConfig, output_dir=folder, max_length=None, **scaled_gradients(model), **options),
            data_collator=DataCollatorForPreference(pad_token_id=pad_id),
            train_dataset=Dataset.from_dict({"chosen_ids": chosen, "rejected_ids": rejected}),
            processing_class=tokenizer,
            callbacks=list(callbacks),
        )
        return _fit(trainer, pad_id)


def fit_scores(
    model: Any,
    sequences: list[list[int]],
    scores: list[float],
    *,
    pad_id: int,
    callbacks: Sequence[TrainerCallback] = (),
    output_dir: str | Path | None = None,
    **options: Any,
) -> float:
    """Mean squared error of the reward against `scores`; returns the mean loss."""

    def collate(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
        return pad_right([row["ids"] for row in rows], pad_id) | {"labels": torch.tensor([row["score"] for row in rows])}

    def squared_error(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return torch.nn.functional.mse_loss(outputs.logits[:, 0].float(), labels.float())

    with _stage_folder(output_dir) as folder, preserve_random_state():
        trainer = checkpointed(Trainer)(
            model,
            args=quiet_arguments(TrainingArguments, output_dir=folder, **scaled_gradients(model), **options),
            data_collator=collate,
            train_dataset=Dataset.from_dict({"ids": sequences, "score": scores}),
            compute_loss_func=squared_error,
            callbacks=list(callbacks),
        )
        return _fit(trainer, pad_id)


def _fit(trainer: Trainer, pad_id: int) -> float:
    be_quiet(trainer)
    # Both libraries copy the tokenizer's padding token into the classifier's config, which finds the end of a sequence
    # as its last token that is not padding. `pad_id` is the one that makes this the EOS.
    trainer.processing_class = None
    trainer.model.config.get_text_config().pad_token_id = pad_id
    was_training = trainer.model.training
    try:
        return float(fit(trainer).training_loss)
    finally:
        trainer.model.train(was_training)
        trainer.model.zero_grad(set_to_none=True)


@contextlib.contextmanager
def _same_pad_token(tokenizer: PreTrainedTokenizerBase) -> Any:
    """TRL gives the tokenizer it receives a padding token; the caller's tokenizer keeps what it had."""
    before = tokenizer.pad_token
    try:
        yield
    finally:
        tokenizer.pad_token = before


def _stage_folder(folder: str | Path | None) -> contextlib.AbstractContextManager[str | Path]:
    """transformers creates a folder even where it writes nothing: a temporary one unless one is given."""
    return tempfile.TemporaryDirectory() if folder is None else contextlib.nullcontext(folder)
