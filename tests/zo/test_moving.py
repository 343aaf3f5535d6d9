"""What must not move: frozen tensors, and tensors that the loss never reads, in every mode, in replay and with ranks."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from zopro.zo import SPSA, Gaussian, LowRank, Ranks, ResidualFeedback, Targeted

MODES: dict[str, dict[str, Any]] = {
    "in place": {"perturbation": "in_place"},
    "virtual": {"perturbation": "virtual"},
    "one-sided": {"sides": 1, "queries": 2},
    "auto": {"eps": "auto", "second_moment_beta": 0.9},
}


@pytest.fixture(autouse=True)
def fixed_global_state() -> Iterator[None]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


class Two(nn.Module):
    """A model on text with a branch for images, an unused head and a gate that is 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.text, self.image = nn.Linear(4, 6), nn.Sequential(nn.Linear(3, 6), nn.Tanh())
        self.head, self.value = nn.Linear(6, 3), nn.Linear(6, 1)
        self.gate, self.gated = nn.Parameter(torch.zeros(())), nn.Linear(6, 6)
        self.frozen = nn.Linear(6, 6).requires_grad_(False)

    def forward(self, x: Tensor, images: Tensor | None = None) -> tuple[Tensor, Tensor]:
        hidden = self.text(x)
        if images is not None:
            hidden = hidden + self.image(images)
        hidden = self.frozen(hidden).tanh() + self.gate * self.gated(hidden)
        return self.head(hidden), self.value(hidden)


X, Y, IMAGES = torch.arange(20.0).view(5, 4).sin(), torch.tensor([0, 1, 2, 1, 0]), torch.arange(15.0).view(5, 3).cos()


def loss_of(model: nn.Module, images: Tensor | None = None) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        logits, value = model(X, images)
        unused = 0.0 * sum(p.sum() for p in model.parameters())  # as DDP's users write it
        return nn.functional.cross_entropy(logits, Y) + unused + 0 * value.sum()

    return loss


def without_gradient(model: nn.Module, loss: Callable[[], Tensor]) -> set[str]:
    """By autograd: names whose gradient is zero, with every parameter a little off theta, where gates are not 0."""
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.add_(0.01)
    named = [(n, p) for n, p in other.named_parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss_of(other)(), [p for _, p in named], allow_unused=True)
    return {name for (name, _), g in zip(named, gradients, strict=True) if g is None or not g.any()}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


IMAGE = {"image.0.weight", "image.0.bias"}
UNREAD = {*IMAGE, "value.weight", "value.bias"}
FROZEN = {"frozen.weight", "frozen.bias"}


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


def test_one_more_look_costs_two_evaluations_once_and_none_where_all_is_read() -> None:
    model, calls = Two(), []
    opt = SPSA(model.named_parameters(), lr=1e-2)
    counts = []
    for _ in range(3):
        calls.clear()
        opt.step(lambda: calls.append(0) or loss_of(model)())
        counts.append(len(calls))
    assert counts == [4, 2, 2]
    few = [(n, p) for n, p in model.named_parameters() if n not in UNREAD]
    calls.clear()
    SPSA(few).step(lambda: calls.append(0) or loss_of(model)())
    assert len(calls) == 2


@pytest.mark.parametrize("mode", MODES)
def test_what_is_read_later_moves_from_then_on(mode: str) -> None:
    """Rows with images come in the third step, the value head has a part in the loss from the fifth one on."""
    model = Two()
    opt = SPSA(model.named_parameters(), lr=1e-2, **MODES[mode])
    for step in range(7):
        images = IMAGES if step >= 2 else None

        def loss(images: Any = images, step: int = step) -> Tensor:
            value = model(X, images)[1]
            return loss_of(model, images)() + (value.square().sum() if step >= 4 else 0 * value.sum())

        before = weights(model)
        opt.step(loss)
        changed = moved(before, model)
        assert (changed >= IMAGE) == (step >= 3) and bool(IMAGE & changed) == (step >= 3), step
        assert ("value.weight" in changed) == (step >= 5), step
    assert opt.last.left_out == sorted(FROZEN, reverse=True)[::-1] or set(opt.last.left_out) == FROZEN


def test_a_micro_batch_that_reads_more_does_not_move_what_another_left_out() -> None:
    model = Two()
    opt = SPSA(model.named_parameters(), lr=1e-2)
    before = weights(model)
    opt.estimate(loss_of(model))
    opt.estimate(loss_of(model, IMAGES))
    opt.apply()
    assert not moved(before, model) & UNREAD
    opt.step(loss_of(model, IMAGES))
    assert moved(before, model) >= IMAGE


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


# In doubt a tensor counts as read.


class Kernel(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return torch.from_numpy(x.numpy() @ weight.detach().numpy().T)


def hidden_reads() -> dict[str, Callable[[nn.Linear, Tensor], Tensor]]:
    traced: dict[int, Any] = {}

    def script(layer: nn.Linear, x: Tensor) -> Tensor:
        return traced.setdefault(id(layer), torch.jit.trace(layer, x))(x)

    def cached(layer: nn.Linear, x: Tensor) -> Tensor:
        alias = traced.setdefault(id(layer), layer.weight.data.view(-1))
        return x @ alias.view(layer.weight.shape).T

    def written(layer: nn.Linear, x: Tensor) -> Tensor:
        out = torch.empty(len(x), layer.out_features)
        out[:, :] = nn.functional.linear(x, layer.weight, layer.bias)
        return out

    def preallocated(layer: nn.Linear, x: Tensor) -> Tensor:
        return torch.mm(x, layer.weight.T, out=torch.empty(len(x), layer.out_features))

    def number(layer: nn.Linear, x: Tensor) -> Tensor:
        return x * float(layer.weight.sum())

    def functional(layer: nn.Linear, x: Tensor) -> Tensor:
        return torch.func.functional_call(layer, dict(layer.named_parameters()), x)

    return {
        "TorchScript": script,
        "alias": cached,
        "written in place": written,
        "out": preallocated,
        "number": number,
        "functional_call": functional,
        "numpy": lambda layer, x: Kernel.apply(x, layer.weight),
        "checkpoint": lambda layer, x: checkpointing.checkpoint(layer, x, use_reentrant=False),
        "compile": lambda layer, x: torch.compile(layer, backend="eager")(x),
        "vmap": lambda layer, x: torch.vmap(layer)(x),
    }


@pytest.mark.parametrize("kind", hidden_reads())
def test_reads_that_are_hard_to_see_count(kind: str) -> None:
    read = hidden_reads()[kind]
    first, last, other = nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(4, 2)
    model, x = nn.ModuleList([first, last, other]), torch.randn(3, 4)
    before = weights(model)
    opt = SPSA(model.named_parameters(), lr=1e-2, perturbation="in_place")
    opt.step(lambda: last(read(first, x).tanh()).square().sum())
    assert {"0.weight", "1.weight", "1.bias"} <= moved(before, model)
    if kind != "TorchScript":  # which hides everything that leads to it, but not what nothing was given
        assert "2.weight" not in moved(before, model)


def test_a_constant_or_broken_loss_says_nothing() -> None:
    model = Two()
    before = weights(model)
    opt = SPSA(model.named_parameters(), lr=1e-2)
    opt.step(lambda: 0 * loss_of(model)())
    opt.step(lambda: loss_of(model)() * torch.nan)
    assert not opt.unread.read and not opt.unread.left_out
    opt.step(loss_of(model))
    assert moved(before, model) & UNREAD == set() and set(opt.unread.left_out) == UNREAD


def test_batch_norm_and_dropout_do_not_hide_what_is_unread() -> None:
    """Both change with every evaluation: a mask by the random state, statistics by what went before."""
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.BatchNorm1d(6), nn.Linear(6, 3))
    unread = nn.Linear(2, 2)
    named = [*model.named_parameters(), *((f"unread.{n}", p) for n, p in unread.named_parameters())]
    before = weights(unread)
    SPSA(named, lr=1e-2).step(lambda: nn.functional.cross_entropy(model(X), Y))
    assert not moved(before, unread)


def test_ranks_agree_on_what_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of two ranks has the rows with images, in one of two steps. Ranks are threads here."""
    models, barrier = [Two(), Two()], threading.Barrier(2, timeout=60)
    models[1].load_state_dict(models[0].state_dict())
    sent: list[Any] = [None, None]

    class Thread(Ranks):
        def __init__(self, rank: int) -> None:
            self.parallel, self.rank, self.size = "data", rank, 2

        def _gather(self, values: Tensor) -> Tensor:
            sent[self.rank] = values
            barrier.wait()
            rows = torch.stack(list(sent))
            barrier.wait()
            return rows

    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    left_out: list[list[Any]] = [[], []]

    def work(rank: int) -> None:
        opt = SPSA(models[rank].named_parameters(), lr=1e-2, ranks=Thread(rank))
        for step in range(3):
            opt.step(loss_of(models[rank], IMAGES if rank == step == 1 else None))
            left_out[rank].append(set(opt.last.left_out) - FROZEN)

    before = weights(models[0])
    other = threading.Thread(target=work, args=(1,))
    other.start()
    work(0)
    other.join()
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True))
    assert left_out[0] == left_out[1] == [UNREAD, UNREAD, UNREAD - IMAGE]
    assert moved(before, models[0]) >= IMAGE


# Copies.


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "save"])
@pytest.mark.parametrize("mode", [*MODES, "together"])
def test_a_copy_goes_on_as_the_original(how: str, mode: str, tmp_path: Any) -> None:
    options = MODES.get(mode, {"evaluation": "together"})
    weight, x = nn.Parameter(torch.ones(2, 3)), torch.arange(12.0).view(2, 2, 3).cos()

    def loss(opt: SPSA, w: Tensor) -> Callable[[], Tensor]:
        rows = lambda n: nn.functional.linear(torch.cat([x] * n), w)  # noqa: E731
        return lambda: (opt.together.rows(lambda: rows(2)) if opt.together.active else rows(1)).square().sum()

    told: list[Any] = []
    opt = SPSA([("w", weight)], lr=1e-3, before_apply=told.append, measure_noise=True, **options)
    scheduler = torch.optim.lr_scheduler.ConstantLR(opt)  # which puts a step of its own on the optimiser
    for _ in range(2):
        opt.step(loss(opt, weight))
        scheduler.step()
    if how == "deepcopy":
        other = copy.deepcopy(opt)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(opt))
    else:
        torch.save(opt, tmp_path / "opt.pt")
        other = torch.load(tmp_path / "opt.pt", weights_only=False)
    copied = other.param_groups[0]["params"][0]
    assert copied is not weight and torch.equal(copied, weight)
    for _ in range(2):
        opt.step(loss(opt, weight))
        other.step(loss(other, copied))
    assert torch.equal(copied, weight) and repr(other.last) == repr(opt.last)
    assert other.before_apply is None


# What is said.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_steps_below_the_resolution_of_a_tensor_are_said_once(
    dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    name = str(dtype).removeprefix("torch.")
    weight = nn.Parameter(torch.full((400,), 1.0, dtype=dtype))
    opt = SPSA([weight], lr=1e-5, second_moment_beta=0.9)
    before = weight.detach().clone()
    with caplog.at_level(logging.WARNING, logger="zopro"):
        for _ in range(9):
            opt.step(lambda: weight.float().square().sum())
    said = [record.message for record in caplog.records if "resolution" in record.message]
    assert len(said) == 1 and name in said[0] and "float32" in said[0] and "raise the learning rate" in said[0]
    assert torch.equal(weight, before), "no entry has moved"
    caplog.clear()
    for lr, kind in ((0.1, dtype), (1e-5, torch.float32)):
        other = nn.Parameter(torch.ones(400, dtype=kind))
        with caplog.at_level(logging.WARNING, logger="zopro"):
            SPSA([other], lr=lr, second_moment_beta=0.9).step(lambda other=other: other.float().square().sum())
    assert not caplog.records


def test_where_eps_is_chosen_the_remedy_is_another_one(caplog: pytest.LogCaptureFixture) -> None:
    weight = nn.Parameter(torch.ones(50))

    def rough() -> float:
        return 1 + 1e-3 * float((1e5 * weight.double().sum()).sin())

    opt = SPSA([weight], lr=0, eps="auto")
    with caplog.at_level(logging.WARNING, logger="zopro"):
        for _ in range(4):
            opt.step(rough)
    said = [record.message for record in caplog.records if "signal-to-noise" in record.message]
    assert said and all("eps='auto'" not in line and "raise eps" not in line for line in said)
    assert all("more prompts" in line and "float32" in line and "learning rate" in line for line in said)


@pytest.mark.parametrize("lr", [1e20, 1e12])
def test_a_step_that_no_network_survives_is_refused_before_anything_moves(lr: float) -> None:
    model = Two()
    before, written = weights(model), []
    opt = SPSA(model.named_parameters(), lr=lr, before_apply=written.append)
    with pytest.raises(ValueError, match=r"lr: must leave weights that a network can work with, got .*Lower") as error:
        opt.step(loss_of(model))
    assert "\n" not in str(error.value) and not moved(before, model) and not written
    half = nn.Parameter(torch.ones(3, dtype=torch.float16))
    with pytest.raises(ValueError, match=r"lr: must leave weights"):
        SPSA([half], lr=1e4).step(lambda: half.float().square().sum())
    with pytest.raises(ValueError, match=r"lr: must leave weights"):
        SPSA(model.named_parameters(), lr=lr, weight_decay=0.1).step(lambda: torch.tensor(1.0))
    with pytest.raises(ValueError, match=r"lr: must be finite"):
        SPSA(model.named_parameters(), lr=float("inf"))


@pytest.mark.parametrize("perturbation", ["in_place", "virtual"])
def test_the_adapters_of_a_vision_tower_stay_in_a_run_on_text(perturbation: str) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaConfig(vocab_size=40, num_key_value_heads=2, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=8, **sizes)
    config = LlavaConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), image_token_index=39)
    model = get_peft_model(LlavaForConditionalGeneration(config), LoraConfig(r=2, target_modules="all-linear"))
    ids, before = torch.arange(2, 23).view(3, 7), weights(model)
    opt = SPSA(model.named_parameters(), lr=1e-2, perturbation=perturbation)
    for _ in range(2):
        opt.step(lambda: model(input_ids=ids, labels=ids).loss)
    tower = {name for name in before if "vision_tower" in name or "projector" in name}
    assert moved(before, model) == {name for name in before if "lora_" in name} - tower
