"""Many ranks: the same steps as one, bits equal between ranks, scalars exchanged only. Gloo, on CPU processes."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from datasets import Dataset
from torch import Tensor, nn
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer

from many_ranks import Job, bits, in_turn, train
from tiny_problems import mlp, same, trainable, weights
from tiny_trainers import TOKENIZER, llama, quiet, settings, with_adapter, zopro
from zopro import zeroth_order
from zopro.system.launch import Processes, alone, counted
from zopro.weights.adapters import tensor_name
from zopro.zo import SPSA, Ranks
from zopro.zo.ranks import checksum

Found = list[dict[str, Any]]


def update() -> dict[str, torch.Tensor]:
    """mu, so that directions are targeted ones."""
    draw = torch.Generator().manual_seed(5)
    named = with_adapter().named_parameters()
    return {tensor_name(n): torch.randn(p.shape, generator=draw) for n, p in named if p.requires_grad}


def zopro_steps(**options: Any) -> dict[str, Any]:
    fixed = {"max_steps": 3, "num_generations": 4, "eps": 1e-3, "beta": 0.05, "seed": 3}
    return train(zopro, 16, {"model": with_adapter(), **fixed, **options})


def on_shares(width: int = 16) -> dict[str, Any]:
    return zopro_steps(model=with_adapter(hidden_size=width))


def test_the_same_global_batch_gives_the_same_projected_gradients(alike: dict[int, Found]) -> None:
    one = alike[1][0]
    assert len(one["gradients"]) == 3 and all(abs(g) > 1e-4 for g in one["gradients"])
    for size in (2, 4):
        assert all(rank["group"] == size for rank in alike[size])
        for key in ("gradients", "losses"):
            assert alike[size][0][key] == pytest.approx(one[key], rel=1e-3, abs=1e-7)
        for key in ("reward", "kl", "completions/mean_length"):
            assert [x[key] for x in alike[size][0]["log"]] == pytest.approx(
                [x[key] for x in one["log"]], rel=1e-3, abs=1e-6
            ), key


def test_ranks_end_with_the_same_bits_and_no_gradient_synchronisation(alike: dict[int, Found]) -> None:
    for size in (2, 4):
        first = alike[size][0]
        assert all(rank["bits"] == first["bits"] and rank["gradients"] == first["gradients"] for rank in alike[size])
        assert all(rank["wrapped"] == "PeftModelForCausalLM" for rank in alike[size])
    assert bits(with_adapter()) == bits(with_adapter()) != bits(with_adapter(seed=1)), "the bits say something"


def test_what_ranks_exchange_does_not_grow_with_the_model(done: Done, alike: dict[int, Found]) -> None:
    narrow, wide = alike[2][0], done[2]["wide"][0]
    assert wide["parameters"] > 10 * narrow["parameters"]
    assert 0 < wide["bytes"] == narrow["bytes"] < narrow["parameters"]
    assert narrow["log"][-1]["exchanged_bytes"] == narrow["bytes"]
    assert alike[1][0]["bytes"] == 0 and "exchanged_bytes" not in alike[1][0]["log"][-1]


def one_sided() -> dict[str, Any]:
    return zopro_steps(sides=1, queries=2, surrogate="clipped", eps=3e-3, previous_update=update())


def test_one_sided_estimates_take_the_known_loss_of_all_ranks(done: Done) -> None:
    one, two = done[1]["one-sided"][0], done[2]["one-sided"]
    assert two[0]["gradients"] == two[1]["gradients"] == pytest.approx(one["gradients"], rel=1e-2)


def on_queries(queries: int) -> dict[str, Any]:
    Processes.join("cpu", 1)
    with alone():
        return zopro_steps(queries=queries, parallel="queries")


@pytest.mark.parametrize(("size", "queries"), [(2, 3), (4, 1)])
def test_shared_queries_give_what_one_rank_finds_to_the_bit(size: int, queries: int, done: Done) -> None:
    one, many = done[1][f"{queries} queries"][0], done[size][f"{queries} queries"]
    for rank in many:
        assert (rank["gradients"], rank["bits"]) == (one["gradients"], one["bits"])
        assert rank["group"] == size and 0 < rank["bytes"] <= 8 * queries * 2


def queries_without_the_data() -> str:
    with pytest.raises(ValueError) as error:
        zopro_steps(parallel="queries")
    return str(error.value)


def test_shared_queries_without_all_the_data_are_refused(done: Done) -> None:
    said = done[2]["without the data"]
    assert len(said) == 2 and all(
        line.startswith("parallel: with 'queries' args and trainer must be made inside") for line in said
    )


def uneven_sft(folder: Path, **options: Any) -> Any:
    """Supervised rows of 2 to 9 tokens, whose mean loss counts tokens, not rows."""
    rows = Dataset.from_list([{"prompt": "tea", "completion": " yes" * n + " please"} for n in (1, 8, 2, 6, 1, 3, 7, 1)])
    arguments = SFTConfig(**settings(folder, **options))
    trainer_cls = zeroth_order(SFTTrainer, eps=1e-3)
    return quiet(trainer_cls(llama(), arguments, train_dataset=rows, processing_class=TOKENIZER))


def supervised() -> dict[str, Any]:
    return train(uneven_sft, 4, {"max_steps": 3})


def test_supervised_losses_weigh_every_token_alike(done: Done) -> None:
    one, two = done[1]["supervised"][0], done[2]["supervised"]
    assert two[0]["bits"] == two[1]["bits"]
    assert two[0]["gradients"] == pytest.approx(one["gradients"], rel=1e-3, abs=1e-5)
    assert two[0]["losses"] == pytest.approx(one["losses"], rel=1e-4)


def own_weights() -> dict[str, Any]:
    return zopro_steps(model=with_adapter(seed=int(os.environ["RANK"])))


def test_ranks_that_begin_with_other_weights_are_given_the_first_one_s(done: Done, alike: dict[int, Found]) -> None:
    assert {rank["bits"] for rank in done[2]["own weights"]} == {alike[2][0]["bits"]}


class Drift(TrainerCallback):
    """One rank's parameters change behind the optimiser's back."""

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if dist.get_rank() == 1:
            next(p for p in model.parameters() if p.requires_grad).data.view(-1)[0] += 1e-3


def drifting() -> str:
    def build(folder: Path, **options: Any) -> Any:
        trainer = zopro(folder, **options)
        trainer.add_callback(Drift())
        return trainer

    with pytest.raises(RuntimeError) as error:
        train(build, 16, {"model": with_adapter(), "max_steps": 1, "num_generations": 4, "eps": 1e-3})
    return str(error.value)


def test_ranks_that_drift_apart_are_found_out(done: Done) -> None:
    found = done[2]["drifting"]
    assert len(found) == 2 and all("ranks: must end with the same parameters, 1 differ" in said for said in found)


def collectives() -> list[int]:
    dist.init_process_group("gloo")
    sizes: list[int] = []
    with counted(sizes.append):
        dist.all_gather([torch.empty(3) for _ in range(2)], tensor=torch.ones(3))
        dist.all_reduce(torch.ones(2, dtype=torch.float64))
        dist.all_gather_object([None, None], "x" * 100)
    dist.all_reduce(torch.ones(9))
    assert Ranks().mean([float(dist.get_rank()), 1.0]) == [0.5, 1.0]
    return sizes


def test_every_collective_is_counted_inside_and_none_outside(done: Done) -> None:
    assert len(done[2]["collectives"]) == 2
    for sizes in done[2]["collectives"]:
        assert sizes[:2] == [12, 16] and 100 < sizes[2] < 200 and len(sizes) == 3


JOBS: dict[int, dict[str, Job]] = {
    1: {
        "alike": (on_shares, ()),
        "one-sided": (one_sided, ()),
        "3 queries": (on_queries, (3,)),
        "1 queries": (on_queries, (1,)),
        "supervised": (supervised, ()),
    },
    2: {
        "alike": (on_shares, ()),
        "wide": (on_shares, (96,)),
        "one-sided": (one_sided, ()),
        "3 queries": (on_queries, (3,)),
        "without the data": (queries_without_the_data, ()),
        "supervised": (supervised, ()),
        "own weights": (own_weights, ()),
        "drifting": (drifting, ()),
        "collectives": (collectives, ()),
    },
    4: {"alike": (on_shares, ()), "1 queries": (on_queries, (1,))},
}
Done = dict[int, dict[str, list[Any]]]


@pytest.fixture(scope="module")
def done() -> Done:
    """What all of these jobs return, on 1, 2 and 4 ranks."""
    return {size: in_turn(size, jobs) for size, jobs in JOBS.items()}


@pytest.fixture(scope="module")
def alike(done: Done) -> dict[int, Found]:
    """The same global batch of 16 rows on 1, 2 and 4 ranks."""
    return {size: jobs["alike"] for size, jobs in done.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
def test_checksums_see_one_changed_entry(dtype: torch.dtype) -> None:
    tensor = torch.arange(35).reshape(5, 7).to(dtype)[:, 1:]
    changed = tensor.clone()
    changed[4, 5] += 1
    assert checksum(tensor) == checksum(tensor.clone()) != checksum(changed)
    assert checksum(torch.zeros((), dtype=dtype)) == 0


def test_ranks_that_average_their_losses_stay_equal() -> None:
    """Two ranks with other data: each averages the scalars it exchanged, and ends at the same bits."""
    module, _ = mlp()
    ranks = [copy.deepcopy(module) for _ in range(2)]
    data = [(torch.randn(6, 6), torch.randint(3, (6,))) for _ in range(2)]

    def losses(m: nn.Module) -> list[Callable[[], Tensor]]:
        return [lambda x=x, y=y: nn.functional.cross_entropy(m(x), y) for x, y in data]

    exchanged: list[list[float]] = []
    for rank, m in enumerate(ranks):
        local, other = losses(m)[rank], losses(m)[1 - rank]
        other_values: list[float] = []

        def evaluate(local: Any = local, other: Any = other, seen: list[float] = other_values) -> Tensor:
            seen.append(float(other()))
            return local()

        class Pair(Ranks):
            def __init__(self, rank: int = rank) -> None:
                self.parallel, self.rank, self.size = "data", rank, 2

            def gather(self, values: Any, seen: list[float] = other_values) -> list[list[float]]:
                rows = [list(values), seen[-len(values) :]]
                exchanged.append(rows if self.rank == 0 else rows[::-1])
                return exchanged[-1]

        opt = SPSA(trainable(m), lr=0.05, ranks=Pair(), sides=1, queries=2)
        for _ in range(3):
            opt.step(evaluate)
    assert same(weights(ranks[0]), weights(ranks[1]))
    assert len(exchanged) == 6 and exchanged[:3] == exchanged[3:], "one exchange a step"
