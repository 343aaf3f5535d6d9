"""What a gradient takes as constant is kept at theta; a backward pass of its own kind is met and refused."""

from __future__ import annotations

import itertools
import logging
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback
from trl import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RLOOTrainer,
    SFTTrainer,
)

from many_ranks import results
from tiny_slopes import NEEDED, build, policy, slopes, token_logprobs
from tiny_trainers import SIZES, lines, same, weights
from zopro.train import slope, slope_check

pytestmark = pytest.mark.usefixtures("random_state")


# Losses of one's own.


class Straight(torch.autograd.Function):
    """Rounds, with the gradient of not rounding."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        return (4 * values).round() / 4

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad


class Entropies(torch.autograd.Function):
    """The second result has no gradient, and none of what it is made of is a torch function of the loss."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> tuple[Tensor, Tensor]:
        weights = torch.from_numpy(values.detach().exp().numpy() ** 2)
        ctx.mark_non_differentiable(weights)
        return values.clone(), weights

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> Tensor:  # type: ignore[override]
        return grad


def no_grad(logprobs: Tensor) -> Tensor:
    with torch.no_grad():
        weights = 1 - logprobs.exp()
        weights *= weights
    return -(weights * logprobs).mean()


def in_place(logprobs: Tensor) -> Tensor:
    weights = torch.zeros_like(logprobs)
    weights[:, 1:] = logprobs.detach()[:, 1:].exp()
    loss = -logprobs
    loss *= weights
    return loss.mean()


def reweighted(logprobs: Tensor) -> Tensor:
    values, weights = Entropies.apply(logprobs)  # type: ignore[no-untyped-call]
    return -(weights * values).mean()


def hardest(logprobs: Tensor) -> Tensor:
    total: Any = 0.0
    for row, token in (logprobs < logprobs.median()).nonzero():
        total = total + logprobs[row, token] ** 2
    return total


def straight(logprobs: Tensor) -> Tensor:
    return Straight.apply(logprobs).square().mean()  # type: ignore[no-untyped-call]


def hooked(logprobs: Tensor) -> Tensor:
    if logprobs.requires_grad:
        logprobs.register_hook(lambda grad: 0.5 * grad)
    return -logprobs.mean()


HANDLED: dict[str, Callable[[Tensor], Tensor]] = {
    "detach": lambda logprobs: -(logprobs.detach().exp() * logprobs).mean(),
    "data": lambda logprobs: -(logprobs.data.exp() * logprobs).mean(),
    "no_grad": no_grad,
    "in place": in_place,
    "item": lambda logprobs: -logprobs.mean() * float(torch.exp(logprobs.mean())),
    "numpy": lambda logprobs: -(torch.from_numpy(logprobs.detach().numpy() ** 2) * logprobs).mean(),
    "tolist": lambda logprobs: (
        -sum(weight * row.mean() for weight, row in zip(logprobs.sum(1).tolist(), logprobs, strict=True))
    ),
    "count": lambda logprobs: -logprobs.sum() / (logprobs > logprobs.mean()).sum().item(),
    "quantile": lambda logprobs: -logprobs[logprobs > logprobs.quantile(0.5)].sum(),
    "top": lambda logprobs: logprobs.flatten()[logprobs.flatten().topk(3).indices].square().sum(),
    "a loop over a mask": hardest,
    "a result without gradient": reweighted,
}
PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda logprobs: -logprobs.mean(),
    "focal": lambda logprobs: -((1 - logprobs.exp()) ** 2 * logprobs).mean(),
    "an unused detach": lambda logprobs: (logprobs.detach().exp().mean().item(), -logprobs.mean())[1],
    "padding": lambda logprobs: -(logprobs * torch.zeros_like(logprobs).add_(1)).mean(),
}
REFUSED: dict[str, Callable[[Tensor], Tensor]] = {
    "straight-through": straight,
    "hook": hooked,
    "hard samples": lambda logprobs: functional.gumbel_softmax(logprobs, hard=True).mul(torch.arange(3.0)).sum(),
}


def distance(loss_at: Any, scale: Any) -> tuple[float, float]:
    """In place of a search for one, which takes longer than all the rest."""
    return 1e-3, 1e-7


def with_loss(loss: Callable[[Tensor], Tensor]) -> type:
    class Own(Trainer):
        def compute_loss(
            self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
        ) -> Any:
            return loss(token_logprobs(model, inputs))

    return Own


@pytest.mark.parametrize(
    ("name", "perturbation"),
    [
        *itertools.product([*HANDLED, *PLAIN], ["in_place"]),
        *itertools.product(["in place", "a loop over a mask"], ["virtual"]),
    ],
)
def test_losses_of_one_s_own(name: str, perturbation: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(slope_check, "auto_eps", distance)
    trainer = build(with_loss({**HANDLED, **PLAIN}[name]), tmp_path, {"perturbation": perturbation})
    measured, slope = slopes(trainer)
    assert measured == pytest.approx(slope, rel=1e-2) and abs(slope) > 1e-3
    assert set(trainer._slope._freezes.values()) == {name in HANDLED}


def test_experts_are_those_that_theta_chooses(tmp_path: Path) -> None:
    """The choice is a comparison: another expert for a token is a jump in the loss, which no gradient sees."""
    sizes = {**SIZES, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "initializer_range": 0.5}
    trainer = build(Trainer, tmp_path, model=MixtralForCausalLM(MixtralConfig(**sizes)))
    measured, slope = slopes(trainer)
    assert measured == pytest.approx(slope, rel=1e-2) and abs(slope) > 1e-2
    assert set(trainer._slope._freezes.values()) == {True}


@pytest.mark.parametrize("name", REFUSED)
def test_a_backward_pass_that_is_no_derivative_stops_at_the_first_step(name: str, tmp_path: Path) -> None:
    trainer_cls = with_loss(REFUSED[name])
    trainer = build(trainer_cls, tmp_path, model=policy("all-linear"), label_smoothing_factor=0.1)
    before = weights(trainer.model)
    expected = r"zeroth_order\(Own\): .*got [-\d.e]+ by differences and [-\d.e]+ by autograd .*label_smoothing_factor=0.1"
    with pytest.raises(ValueError, match=expected):
        trainer.train()
    assert same(before, weights(trainer.model)) and all(p.grad is None for p in trainer.model.parameters())
    trusting = build(trainer_cls, tmp_path, {"check_slope": False})
    trusting.train()
    assert len(lines(trusting)) == 1


def test_a_loss_that_changes_in_training_is_searched_again(tmp_path: Path) -> None:
    found: dict[int, set[bool]] = {}

    def warmed(logprobs: Tensor) -> Tensor:
        step = trainer.state.global_step
        found[step] = set(trainer._slope._freezes.values())  # as the evaluations of a step see it, the last one counts
        return -(logprobs.detach().exp() * logprobs if step >= 2 else logprobs).mean()

    trainer = build(with_loss(warmed), tmp_path, max_steps=5)
    trainer.train()
    assert found == {0: {False}, 1: {False}, 2: {False}, 3: {True}, 4: {True}}


# What the search and the comparison leave alone.


def numbers(trainer: Any) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if "time" not in key} for line in lines(trainer)]


@pytest.mark.parametrize("trainer_cls", [SFTTrainer, DPOTrainer, RLOOTrainer])
def test_losses_that_were_right_keep_their_bits_and_their_logs(trainer_cls: type, tmp_path: Path) -> None:
    found = []
    for known in (False, True):
        torch.manual_seed(0)
        model = policy(attention_dropout=0.2)
        zo = {"eps": "auto", "second_moment_beta": 0.9}
        trainer = build(trainer_cls, tmp_path, zo, model, max_steps=2, learning_rate=1e-2)
        trainer.known_loss = known
        trainer.train()
        found.append((numbers(trainer), weights(trainer.model), float(torch.rand(1))))
        assert trainer._slope.tries == (slope.TRIES if known else 0), "it compared at the first step"
    assert found[0][0] == found[1][0] and found[0][2] == found[1][2]
    assert same(found[0][1], found[1][1])


def test_a_loss_that_adapts_is_one_function_for_a_step(tmp_path: Path) -> None:
    """TRL steps its entropy coefficient in the loss: once for a step, not once for an evaluation."""
    options = NEEDED["use_adaptive_entropy", True]
    trainer = build(GRPOTrainer, tmp_path, {"queries": 3}, use_adaptive_entropy=True, max_steps=2, **options)
    trainer.train()
    assert trainer.entropy_coef == pytest.approx(0.1 + 2 * 0.05)


def test_without_memory_for_a_backward_pass_the_comparison_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(slope_check.psutil, "virtual_memory", lambda: SimpleNamespace(available=1000))
    trainer = build(with_loss(straight), tmp_path)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert caplog.text.count("the slope of its loss was not checked (a backward pass over a row or two takes") == 1


def test_rows_without_a_slope_are_tried_again(tmp_path: Path) -> None:
    trainer = build(with_loss(lambda logprobs: hooked(logprobs) * factor[0]), tmp_path, max_steps=3)
    factor = [0.0]

    class Turn(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            factor[0] = 1.0

    trainer.add_callback(Turn())
    with pytest.raises(ValueError, match="by autograd"):
        trainer.train()
    assert trainer.state.global_step == 1


# Refusals.


def test_a_path_that_depends_on_the_parameters_is_refused(tmp_path: Path) -> None:
    calls = itertools.count()

    def wandering(logprobs: Tensor) -> Tensor:
        loss = -(logprobs.detach() * logprobs).mean()
        return loss.sin().mean() if next(calls) % 2 else (loss.detach() * loss.cos()).mean()

    trainer = build(with_loss(wandering), tmp_path, {"check_slope": False})
    with pytest.raises(ValueError, match=r"zeroth_order\(Own\): the loss must take the same path through its code"):
        trainer.train()


def kto_on_a_rank() -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(slope_check, "auto_eps", distance)
        torch.manual_seed(0)
        trainer = build(KTOTrainer, Path(folder), per_device_train_batch_size=2)
        measured, slope = slopes(trainer)
        assert set(trainer._slope._freezes.values()) == {True}
        return measured, slope


def test_a_factor_that_ranks_gather_is_kept_as_well() -> None:
    """KTO's divergence is the ranks' mean: what comes back from a gathering comes from the parameters too."""
    found = results(kto_on_a_rank, 2)
    assert found[0][0] == found[1][0] == pytest.approx(sum(slope for _, slope in found) / 2, rel=1e-2)
