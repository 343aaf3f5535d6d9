"""Both perturbations: the model reads exactly w + offset where it reads w, and w keeps its bits, whatever happens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zopro.zo import Gaussian
from zopro.zo.perturbation import IN_PLACE_LIMIT, KEPT_FROM, InPlace, Perturbation, Virtual, choose, displaced

KINDS = {"in_place": InPlace, "virtual": Virtual}


class Reader(nn.Module):
    """Reads its weight in one particular way."""

    def __init__(self, read: Callable[[nn.Parameter, Tensor], Tensor]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 6))
        self.read = read

    def forward(self, x: Tensor) -> Tensor:
        return self.read(self.weight, x)


class MatMul(torch.autograd.Function):
    """Reads the weight inside a custom autograd function, as fused losses do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        return x @ weight

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        raise NotImplementedError


READS: dict[str, Callable[[nn.Parameter, Tensor], Tensor]] = {
    "linear": lambda w, x: F.linear(x, w),
    "transpose property": lambda w, x: x @ w.T,
    "mT": lambda w, x: x @ w.mT,
    "data": lambda w, x: x @ w.data,
    "detach": lambda w, x: x @ w.detach(),
    "method": lambda w, x: w.matmul(x.T),
    "right operand of a python operator": lambda w, x: x.sum(0) * 2 + w,
    "indexing": lambda w, x: x @ w[:, 2],
    "iteration": lambda w, x: torch.stack([x @ row for row in w]),
    "view and split": lambda w, x: torch.cat([x[:, :3] @ part for part in w.view(2, 3, 6).unbind()]),
    "list argument": lambda w, x: torch.cat([w, x]),
    "keyword argument": lambda w, x: F.linear(input=x, weight=w),
    "cast": lambda w, x: x.double() @ w.double(),
    "clone": lambda w, x: x @ w.clone(),
    "einsum": lambda w, x: torch.einsum("bi,ij->bj", x, w),
    "python float": lambda w, x: x * float(w[0, 0]),
    "numpy": lambda w, x: x @ torch.tensor(w.detach().numpy().copy()),
    "functional with a python body": lambda w, x: F.multi_head_attention_forward(
        x, x, x, 6, 1, w.repeat(3, 1), None, None, None, False, 0.0, w, None, need_weights=False
    )[0],
    "custom autograd function": lambda w, x: MatMul.apply(x, w),
}


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embedding(x.abs().long() % 9))


MODULES: dict[str, Callable[[], nn.Module]] = {
    "mlp with norm": lambda: nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 2)),
    "tied embedding and head": Tied,
    "convolution": lambda: nn.Sequential(nn.Unflatten(1, (1, 6)), nn.Conv1d(1, 3, 2), nn.Flatten()),
    "lstm": lambda: nn.LSTM(6, 5),
    "attention": lambda: nn.TransformerEncoderLayer(6, 2, 8, dropout=0.0),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 3)),
}
CASES = {f"read: {k}": (lambda read=read: Reader(read)) for k, read in READS.items()} | MODULES


def offset_for(parameters: list[nn.Parameter], t: float = 0.1) -> Callable[[int], Tensor]:
    return lambda index: Gaussian().tensor(str(index), parameters[index], seed=0, step=0).mul_(t)


def output(module: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        result = module(x)
    return result[0] if isinstance(result, tuple) else result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_every_read_sees_the_displaced_weights_to_the_bit(case: str, kind: str, dtype: torch.dtype) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if dtype == torch.bfloat16 and case == "read: numpy":
            pytest.skip("numpy has no bfloat16")
        module = CASES[case]().to(dtype)
        x = torch.randn(5, 6, dtype=dtype)
    parameters = list(module.parameters())
    originals = [p.detach().clone() for p in parameters]
    offset = offset_for(parameters)
    before = output(module, x)
    with KINDS[kind](parameters).at(offset):
        during = output(module, x)
    for parameter, original in zip(parameters, originals, strict=True):
        assert torch.equal(parameter, original)
    after = output(module, x)
    for index, parameter in enumerate(parameters):
        parameter.data.copy_(displaced(originals[index], offset(index)))
    expected = output(module, x)
    assert torch.equal(during, expected)
    assert torch.equal(after, before)
    assert not torch.equal(during, before)


@pytest.mark.parametrize("kind", KINDS)
def test_theta_keeps_its_bits_when_the_body_raises(kind: str) -> None:
    parameters = [nn.Parameter(torch.tensor([1.0, torch.nan, -0.0, torch.inf, 1e-40])), nn.Parameter(torch.ones(2))]
    bits = [p.detach().clone().view(torch.int32) for p in parameters]
    with pytest.raises(KeyError), KINDS[kind](parameters).at(offset_for(parameters)):
        raise KeyError
    broken = offset_for(parameters)
    with pytest.raises(ZeroDivisionError), KINDS[kind](parameters).at(lambda i: broken(i) if i == 0 else 1 / 0):
        (parameters[0] * 2).sum()
        (parameters[1] * 2).sum()
    assert all(torch.equal(p.detach().view(torch.int32), b) for p, b in zip(parameters, bits, strict=True))


def test_displaced_is_summed_in_single_precision_and_never_less_than_the_parameter_s_own() -> None:
    w = torch.randn(1000)
    z = torch.randn(1000) * 1e-3
    assert torch.equal(displaced(w, z.clone()), w + z)
    assert torch.equal(displaced(w.bfloat16(), z.clone()), (w.bfloat16().float() + z).bfloat16())
    assert torch.equal(displaced(w.double(), z.clone()), w.double() + z.double())
    small = displaced(torch.ones(1, dtype=torch.float64), torch.full((1,), 1e-12))
    assert float(small) != 1


class Layers(nn.Module):
    def __init__(self, count: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(count))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            assert layer.weight.shape[0] == layer.weight.size(0) == len(layer.weight)  # descriptions cost nothing
            x = layer(x)
        return x


def test_virtual_holds_one_perturbed_layer_at_a_time() -> None:
    """Bytes that are alive at once, counted as the allocator sees them: two layers' worth, of twenty."""
    module = Layers(20, 64)
    layer = 64 * 64 * 4
    parameters = list(module.parameters())
    peaks = {name: peak_bytes(kind, module, parameters) for name, kind in KINDS.items()}
    assert peaks["virtual"] < 3 * layer, peaks
    assert peaks["in_place"] > 20 * layer, peaks


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that were made in the context and are alive at once; `known` is no new memory."""

    def __init__(self, known: list[nn.Parameter]) -> None:
        super().__init__()
        self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._storages: dict[int, StorageWeakRef] = {}
        self._sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in self._known:
                storage = tensor.untyped_storage()
                self._storages[storage._cdata] = StorageWeakRef(storage)
                self._sizes[storage._cdata] = storage.nbytes()
        self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        self.peak = max(self.peak, sum(self._sizes[key] for key in self._storages))
        return result


def peak_bytes(kind: type[Perturbation], module: nn.Module, parameters: list[nn.Parameter]) -> int:
    offset = offset_for(parameters)
    with torch.no_grad(), LiveBytes(parameters) as live, kind(parameters).at(offset):
        module(torch.ones(1, 64))
    return live.peak


def test_virtual_draws_noise_only_where_values_are_read() -> None:
    module = Layers(3, 8)
    parameters = list(module.parameters())
    offset, drawn = offset_for(parameters), []
    with torch.no_grad(), Virtual(parameters).at(lambda index: drawn.append(index) or offset(index)):  # type: ignore[func-returns-value]
        module(torch.ones(1, 8))
    assert drawn == [0, 1, 2]


def test_virtual_refuses_a_function_transform_rather_than_draw_other_noise_in_it() -> None:
    parameter = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(RuntimeError), Virtual([parameter]).at(offset_for([parameter])):
        torch.vmap(lambda row: parameter @ row)(torch.ones(4, 3))


def test_virtual_refuses_raw_pointers_rather_than_hand_out_the_wrong_one() -> None:
    parameter = nn.Parameter(torch.ones(3))
    with (
        pytest.raises(RuntimeError, match="perturbation='in_place'"),
        Virtual([parameter]).at(offset_for([parameter])),
    ):
        parameter.data_ptr()
    assert parameter.data_ptr()


def test_auto_keeps_originals_of_small_sets_only() -> None:
    small, large = torch.empty(10), torch.empty(IN_PLACE_LIMIT + 1, device="meta")
    assert isinstance(choose("auto", [small]), InPlace)
    assert isinstance(choose("auto", [large]), Virtual)
    assert isinstance(choose("virtual", [small]), Virtual)
    assert isinstance(choose("in_place", [large]), InPlace)


def test_a_large_parameter_read_in_a_row_is_displaced_once() -> None:
    large, other = torch.ones(KEPT_FROM), torch.ones(KEPT_FROM)
    drawn: list[int] = []

    def offset(index: int) -> Tensor:
        drawn.append(index)
        return torch.full((KEPT_FROM,), float(index + 1))

    with Virtual([large, other]).at(offset):
        sums = [float(parameter.sum()) for parameter in (large, large, other, large)]
    assert sums == [2 * KEPT_FROM, 2 * KEPT_FROM, 3 * KEPT_FROM, 2 * KEPT_FROM]
    assert drawn == [0, 1, 0]


def test_the_largest_parameter_is_displaced_once_for_reads_at_both_ends() -> None:
    embedding, layer, drawn = torch.ones(2 * KEPT_FROM), torch.ones(KEPT_FROM), []

    def offset(index: int) -> Tensor:
        drawn.append(index)
        return torch.full_like((embedding, layer)[index], float(index + 1))

    with Virtual([embedding, layer]).at(offset):
        means = [float(parameter.mean()) for parameter in (embedding, layer, layer, embedding)]
    assert means == [2, 3, 3, 2]
    assert drawn == [0, 1]
