"""What the loss reads is found out as it runs; in doubt a tensor counts as read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.utils import checkpoint as checkpointing
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from tiny import tiny_model, tiny_tokenizer
from tiny_branches import FROZEN, IMAGE, IMAGES, MODES, UNREAD, Two, X, Y, loss_of, moved
from tiny_problems import weights
from zopro.zo import SPSA, Ranks
from zopro.zo.reads import Reads


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


def test_nothing_is_watched_once_all_tensors_are_used() -> None:
    first, second = torch.ones(2), torch.ones(2)
    reads, modes = Reads([first, second]), list[int]()

    def loss(*of: Tensor) -> Tensor:
        modes.append(len(torch.overrides._get_current_function_mode_stack()))
        return sum((tensor.sum() for tensor in of), torch.zeros(()))

    for of in ((first,), (first, second), (first, second)):
        assert reads.watch(lambda of=of: loss(*of)) == 2 * len(of)
    assert modes == [1, 1, 0] and reads.used == 0b11


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


def test_a_coarse_loss_leaves_nothing_out_that_is_not_seen() -> None:
    """An error rate may well be the same far away; that it changes near theta says that something is read."""
    model = nn.Linear(4, 2)
    values = iter([0.5, 0.25, *[0.5] * 5])  # both sides of the step; what a further look would find
    opt = SPSA(model.named_parameters())
    opt.step(lambda: next(values))
    assert not opt.unread.left_out and opt.unread.read == {"weight", "bias"}


def test_virtual_displacements_that_reach_nothing_are_said_once(caplog: pytest.LogCaptureFixture) -> None:
    layer, x = nn.Linear(4, 4), torch.randn(3, 4)
    scripted = torch.jit.trace(layer, x)
    opt = SPSA(layer.named_parameters(), perturbation="virtual")
    for _ in range(2):
        opt.step(lambda: scripted(x).square().sum())
    assert [m for m in caplog.messages if "perturbation: 'virtual' displaces nothing" in m] == caplog.messages[:1]
    caplog.clear()
    seen = SPSA(layer.named_parameters(), perturbation="virtual")
    seen.step(lambda: 0 * layer(x).sum())
    assert not caplog.messages


def test_what_was_compiled_reads_displaced_weights() -> None:
    found, ids = [], torch.arange(6).view(1, 6)
    for kind in ("in_place", "virtual"):
        model = tiny_model("llama", tiny_tokenizer(["a b c d e f"])).eval()
        compiled = torch.compile(model, backend="eager")
        opt = SPSA(model.named_parameters(), lr=1e-3, eps=1e-2, perturbation=kind)
        for _ in range(3):  # the first ones are watched
            opt.step(lambda compiled=compiled: compiled(input_ids=ids, labels=ids).loss)
        found.append(opt.last.projected_gradient)
    assert found[1] == pytest.approx(found[0], rel=1e-3)


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
