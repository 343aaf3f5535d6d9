"""What must not move: frozen tensors, and tensors that the loss never reads, in every mode, in replay and with ranks."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tiny_branches import FROZEN, IMAGES, MODES, UNREAD, Two, Y, loss_of, moved
from tiny_problems import weights
from zopro.zo import SPSA, Gaussian, LowRank, ResidualFeedback, Targeted


def without_gradient(model: nn.Module, loss: Callable[[], Tensor]) -> set[str]:
    """By autograd: names whose gradient is zero, with every parameter a little off theta, where gates are not 0."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(0.01)
    named = [(n, p) for n, p in other.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss_of(other)(), [p for _, p in named], allow_unused=True)
    return {name for (name, _), g in zip(named, gradients, strict=True) if g is None or not g.any()}


@pytest.mark.parametrize("mode", MODES)
def test_only_what_has_a_gradient_moves(mode: str, caplog: pytest.LogCaptureFixture) -> None:
    model = Two()
    names, before = {name for name, _ in model.named_parameters()}, weights(model)
    assert without_gradient(model, loss_of(model)) == UNREAD
    opt = SPSA(model.named_parameters(), lr=1e-2, weight_decay=0.1, **MODES[mode])
    with caplog.at_level(logging.WARNING, logger="zopro"):
        for _ in range(3):
            opt.step(loss_of(model))
    assert moved(before, model) == names - UNREAD - FROZEN
    assert set(opt.last.left_out) == UNREAD | FROZEN
    said = [record.message for record in caplog.records if "does not read" in record.message]
    assert len(said) == 1 and "4 of the 11 tensors" in said[0] and "\n" not in said[0]


@pytest.mark.parametrize("mode", MODES)
def test_the_rest_moves_as_if_what_stays_had_not_been_given(mode: str) -> None:
    given, alone = Two(), Two()
    alone.load_state_dict(given.state_dict())
    few = [(n, p) for n, p in alone.named_parameters() if n not in UNREAD | FROZEN]
    both = SPSA(given.named_parameters(), lr=1e-2, **MODES[mode]), SPSA(few, lr=1e-2, **MODES[mode])
    for _ in range(4):
        for opt, model in zip(both, (given, alone), strict=True):
            opt.step(loss_of(model))
        if mode != "auto":  # whose eps takes in the scale of all tensors' directions, which is 1 but for chance
            assert both[0].last.projected_gradients == both[1].last.projected_gradients
    if mode != "auto":
        assert all(torch.equal(a, b) for a, b in zip(given.parameters(), alone.parameters(), strict=True))


@pytest.mark.parametrize("perturbation", ["in_place", "virtual"])
@pytest.mark.parametrize("kind", ["gaussian", "low rank", "targeted", "guided"])
def test_requires_grad_is_obeyed_whenever_it_is_set(kind: str, perturbation: str) -> None:
    model = Two()
    named = [(n, p) for n, p in model.named_parameters() if n not in UNREAD]
    update = {n: torch.randn_like(p) for n, p in named}
    directions = {
        "gaussian": Gaussian(),
        "low rank": LowRank(),
        "targeted": Targeted(update, update, 9),
        "guided": ResidualFeedback(0.5, 0.5),
    }[kind]
    head, text = model.head.weight, model.text.weight
    head.requires_grad_(False)
    opt = SPSA(named, lr=1e-2, directions=directions, perturbation=perturbation, weight_decay=0.1)
    seen: list[bool] = []
    for frozen in ({"head.weight"}, {"head.weight", "text.weight"}, {"text.weight"}, set()):
        for name, parameter in (("head.weight", head), ("text.weight", text)):
            parameter.requires_grad_(name not in frozen)
        if isinstance(directions, ResidualFeedback):
            directions.update(update, opt.step_count)
        before = weights(model)

        def loss(before: Any = before, frozen: Any = frozen) -> Tensor:
            seen.extend(torch.equal(model.get_parameter(n).clone(), before[n]) for n in frozen)
            return loss_of(model)()

        opt.step(loss)
        assert moved(before, model) == {n for n, _ in named} - FROZEN - frozen
    assert seen and all(seen), "what is frozen is not displaced either"


def test_a_plain_tensor_is_trained_until_it_is_frozen() -> None:
    plain, asked, parameter = torch.ones(3), torch.ones(3, requires_grad=True), nn.Parameter(torch.ones(3))
    opt = SPSA([plain, asked, parameter], lr=0.1)
    tensors = (plain, asked, parameter)

    def step() -> list[bool]:
        before = [t.detach().clone() for t in tensors]
        opt.step(lambda: sum(t.square().sum() for t in tensors))
        return [not torch.equal(a, b) for a, b in zip(before, tensors, strict=True)]

    assert step() == [True, True, True]
    copied = copy.deepcopy(opt)
    copied.step(lambda: sum(t.square().sum() for t in copied.param_groups[0]["params"]))
    assert not any(torch.equal(a, b) for a, b in zip(tensors, copied.param_groups[0]["params"], strict=True))
    asked.requires_grad_(False)
    parameter.requires_grad_(False)
    assert step() == [True, False, False]
    asked.requires_grad_(True)
    assert step() == [True, True, False]


def test_nothing_to_train_is_one_line() -> None:
    model = Two()
    with pytest.raises(ValueError, match=r"params: none has requires_grad=True, so there is nothing to train\. Leave"):
        SPSA(copy.deepcopy(model).requires_grad_(False).named_parameters())
    opt = SPSA(model.named_parameters())
    model.requires_grad_(False)  # as in scripts that need no autograd
    with pytest.raises(ValueError, match=r"params: none has requires_grad=True"):
        opt.step(loss_of(model))
    int8 = nn.Parameter(torch.ones(2, dtype=torch.int8), requires_grad=False)  # the base weights under QLoRA
    SPSA([("base", int8), ("w", nn.Parameter(torch.ones(2)))])


def test_a_peft_model_s_base_stays() -> None:
    base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3))
    model = get_peft_model(base, LoraConfig(r=2, target_modules=["0", "2"]))
    x, before = torch.randn(5, 6), weights(model)
    opt = SPSA(model.named_parameters(), lr=1e-2)
    opt.step(lambda: nn.functional.cross_entropy(model(x), Y))
    assert moved(before, model) == {name for name in before if "lora_" in name}, "lora_A too, though B is 0"


@pytest.mark.parametrize("mode", MODES)
def test_replay_and_resume_move_the_same_tensors(mode: str) -> None:
    model = Two()
    start, opt = copy.deepcopy(model), SPSA(model.named_parameters(), lr=1e-2, **MODES[mode])
    records, halfway = [], None
    for step in range(6):
        if step == 3:
            halfway = copy.deepcopy((model, opt.state_dict()))
        for m in (model,):
            m.head.weight.requires_grad_(step % 2 == 0)
        opt.step(loss_of(model, IMAGES if step >= 4 else None))
        records.append(opt.last)
    player = SPSA([(n, p.detach()) for n, p in start.named_parameters()], lr=9.0)  # plain tensors, none of them frozen
    for record in records:
        player.replay(record)
    assert all(torch.equal(a, b) for a, b in zip(start.parameters(), model.parameters(), strict=True))
    resumed, state = halfway
    again = SPSA(resumed.named_parameters(), **MODES[mode])
    again.load_state_dict(state)
    for step in range(3, 6):
        resumed.head.weight.requires_grad_(step % 2 == 0)
        again.step(loss_of(resumed, IMAGES if step >= 4 else None))
    assert all(torch.equal(a, b) for a, b in zip(resumed.parameters(), model.parameters(), strict=True))
    assert repr(again.last) == repr(opt.last)
    frozen = copy.deepcopy(start).requires_grad_(False)
    frozen.head.requires_grad_(True)
    before = weights(frozen)
    player = SPSA(frozen.named_parameters())
    player.replay(records[0])
    assert moved(before, frozen) == {"head.weight", "head.bias"}, "replay leaves alone what is frozen here"
