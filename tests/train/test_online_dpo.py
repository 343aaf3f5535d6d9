"""Online DPO as a first-order method, and RLOO with checkpointed activations: the same gradient as without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from trl import RLOOConfig

from tiny_trainers import PROMPTS, TOKENIZER, adapted, mean_reward, online, tea
from zopro import zeroth_order
from zopro.engine import Batch
from zopro.train.objectives import online_dpo_loss
from zopro.train.online_dpo import OnlineDPOTrainer
from zopro.train.rloo import EngineRLOOTrainer
from zopro.weights.adapters import tensor_name

pytestmark = pytest.mark.usefixtures("random_state")


def dpo(folder: Path, **options: Any) -> Any:
    own = {"model": adapted(), "beta": 0.1, "learning_rate": 3e-2}
    return online(OnlineDPOTrainer, RLOOConfig, folder, {**own, **options})


def test_the_reward_rises(tmp_path: Path) -> None:
    trainer = dpo(tmp_path, max_steps=10, learning_rate=5e-2)
    before = mean_reward(trainer)
    trainer.train()
    assert mean_reward(trainer) > before + 0.3


def test_a_zeroth_order_trainer_measures_its_slope(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The projected gradient is autograd's directional derivative, on the same answers."""
    options = {"model": adapted(), "beta": 0.5, "learning_rate": 0.0, "max_steps": 1}
    trainer = online(zeroth_order(OnlineDPOTrainer, eps=1e-3), RLOOConfig, tmp_path, options)
    seen: dict[str, Any] = {}
    loss_of = trainer._compute_loss
    monkeypatch.setattr(trainer, "_compute_loss", lambda model, inputs: [seen.update(inputs), loss_of(model, inputs)][1])
    trainer.train()
    loss_of(trainer.model, seen).backward()
    slope = 0.0
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            z = trainer.spsa.directions.tensor(tensor_name(name), parameter, trainer.spsa.seed, 0)
            slope += float((z * parameter.grad).sum())
    assert trainer.spsa.last.projected_gradient == pytest.approx(slope, rel=2e-2) and abs(slope) > 1e-2


def test_the_loss_is_the_objective_s_in_whatever_order_the_rows_come(tmp_path: Path) -> None:
    trainer = dpo(tmp_path)
    trainer.model.train()
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(8)])
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if ".default." in name and "lora_B" in name:
                parameter.normal_(std=0.3)
        order = torch.randperm(32)
        shuffled = {key: value[order] for key, value in inputs.items()}
        loss = float(trainer.compute_loss(trainer.model, shuffled))
        tokens = trainer._logprobs(trainer.model, Batch.of_inputs(inputs))
    rewards = torch.tensor(tea(TOKENIZER.batch_decode(inputs["completion_ids"], skip_special_tokens=True)))
    logprobs = (tokens * inputs["completion_mask"]).sum(1)
    expected = online_dpo_loss(logprobs, inputs["old_logps"], rewards, 8, 0.1)  # the start is its own reference
    assert loss == pytest.approx(float(expected), rel=1e-4) and loss > 0


def test_an_answer_to_which_no_reward_applies_has_no_score(tmp_path: Path) -> None:
    """Not one of 0, which would be the best where others are below."""

    def negative(completions: Any, **columns: Any) -> list[float | None]:
        return [None if row % 8 == 3 else -1.0 - row % 8 for row in range(len(completions))]

    trainer = dpo(tmp_path, reward_funcs=negative)
    inputs = trainer._generate_and_score_completions([{"prompt": prompt} for prompt in PROMPTS for _ in range(8)])
    assert inputs["scores"][:8].isnan().tolist() == [row == 3 for row in range(8)]
    assert trainer.compute_loss(trainer.model, inputs).isfinite()


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"beta: must be greater than 0 for online DPO's reference policy, got 0"):
        dpo(tmp_path, beta=0.0)
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps: must be 1"):
        dpo(tmp_path, per_device_train_batch_size=8, gradient_accumulation_steps=4)


def test_checkpointed_rloo_takes_the_same_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer activations are kept for the backward pass: those of one block, and every block's input."""
    kept: dict[bool, int] = {}
    after = []
    for checkpointing in (False, True):
        options = {"model": adapted(), "gradient_checkpointing": checkpointing, "max_steps": 2}
        trainer = online(EngineRLOOTrainer, RLOOConfig, tmp_path, options)
        elements = []
        loss_of = trainer.compute_loss

        def counted(*arguments: Any, loss_of: Any = loss_of, elements: list[int] = elements, **more: Any) -> Any:
            seen: dict[int, int] = {}

            def pack(tensor: torch.Tensor) -> torch.Tensor:
                seen[tensor.untyped_storage().data_ptr()] = tensor.numel()
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                loss = loss_of(*arguments, **more)
            elements.append(sum(seen.values()))
            return loss

        monkeypatch.setattr(trainer, "compute_loss", counted)
        trainer.train()
        kept[checkpointing] = max(elements)
        after.append(torch.cat([p.detach().flatten() for p in trainer.model.parameters() if p.requires_grad]))
    assert kept[True] < kept[False] / 2
    assert torch.allclose(*after, atol=1e-4)
