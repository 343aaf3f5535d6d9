"""Model cards name the method that a trainer is of, and its paper."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import Trainer
from trl import DPOTrainer, RLOOTrainer

from tiny_trainers import es, zopro
from zopro import ESTrainer, GuidedTrainer, ZOPrOTrainer, zeroth_order
from zopro.train.checkpoints import checkpointed
from zopro.train.guided import GuidedSPSATrainer
from zopro.train.online_dpo import OnlineDPOTrainer
from zopro.train.zopro import FZOOTrainer


@pytest.mark.parametrize(
    "trainer", [ESTrainer, GuidedTrainer, GuidedSPSATrainer, OnlineDPOTrainer, checkpointed(FZOOTrainer), ZOPrOTrainer]
)
def test_no_other_method_is_called_rloo(trainer: type[RLOOTrainer]) -> None:
    assert trainer._name != RLOOTrainer._name and trainer._paper != RLOOTrainer._paper
    assert trainer._tag_names[:2] == ["trl", "zopro"]


def test_cards_say_it(tmp_path: Path) -> None:
    for build, name, paper, tag in (
        (zopro, "ZOPrO", "2503.03460", "zeroth-order"),
        (es, "evolution strategies", "2509.24372", "evolution-strategies"),
    ):
        trainer = build(tmp_path)
        trainer.create_model_card(model_name="mine")
        card = (tmp_path / "out" / "README.md").read_text("utf-8")
        assert f"trained with {name}, a method introduced in [" in card and f"papers/{paper})" in card
        assert f"- {tag}\n" in card and "rloo" not in card.lower() and tag in trainer.model.model_tags
        assert ("galatolo2025" in card) == (build is zopro)


def test_a_loss_without_its_backward_pass_is_named_so() -> None:
    trainer = zeroth_order(DPOTrainer)
    assert trainer._name == "zeroth-order DPO" and trainer._tag_names == ["trl", "dpo", "zopro", "zeroth-order"]
    assert trainer._paper["id"] == "2305.17333" and trainer._paper["citation"] == DPOTrainer._paper["citation"]
    assert not hasattr(zeroth_order(Trainer), "_paper")
