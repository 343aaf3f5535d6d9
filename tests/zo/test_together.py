"""Both sides of a central difference in one pass: the numbers of two, half the passes, refusals where it cannot be."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tiny_trainers import plain, same, weights, with_adapter, zopro
from trained import COMPLETION, COPIES, batch, shared
from zopro.config import RunConfig
from zopro.engine.local.logprobs import completion_logprobs
from zopro.errors import InputError
from zopro.train.objectives import clipped_surrogate, log_ratio_surrogate
from zopro.weights.adapters import tensor_name
from zopro.zo import SPSA

pytestmark = pytest.mark.usefixtures("random_state")


def optimizer(model: Any, evaluation: str, **options: Any) -> SPSA:
    named = [(tensor_name(name), p) for name, p in model.named_parameters() if p.requires_grad]
    return SPSA(named, lr=1e-2, eps=5e-3, evaluation=evaluation, queries=2, **options)


def closure(model: Any, spsa: SPSA, surrogate: Callable[..., Tensor], copies: int) -> Callable[[], Tensor]:
    ids, mask, advantages = batch()
    with torch.no_grad():
        old = completion_logprobs(model, ids, mask, COMPLETION).sum(1)

    def logprobs(times: int) -> Tensor:
        twice = torch.cat([ids] * times), torch.cat([mask] * times)
        return completion_logprobs(model, *twice, COMPLETION, num_generations=copies)

    def loss() -> Tensor:
        found = spsa.together.rows(lambda: logprobs(2)) if spsa.together.active else logprobs(1)
        return surrogate(found.sum(1), old, advantages)

    return loss


@pytest.mark.parametrize(
    ("kind", "surrogate", "copies"),
    [
        *(("llama", clipped_surrogate, 1), ("llama", log_ratio_surrogate, COPIES)),
        *(("gemma3", clipped_surrogate, COPIES), ("gemma3", log_ratio_surrogate, 1)),
        *(("gpt2", clipped_surrogate, COPIES), ("gpt2", log_ratio_surrogate, 1)),
    ],
)
def test_the_losses_are_those_of_one_after_another(kind: str, surrogate: Any, copies: int) -> None:
    model = shared(kind)
    passes: list[int] = []
    embedding = model.get_base_model().get_input_embeddings()
    hook = embedding.register_forward_hook(lambda module, args, output: passes.append(args[0].numel()))
    found, counted, before = {}, {}, weights(model)
    for evaluation in ("sequential", "together"):
        spsa = optimizer(model, evaluation)
        loss = closure(model, spsa, surrogate, copies)
        passes.clear()
        found[evaluation] = spsa.measure(loss).losses
        counted[evaluation] = len(passes), sum(passes)
        assert same(weights(model), before) and not spsa.together.active
    hook.remove()
    for one, other in zip(found["together"], found["sequential"], strict=True):
        assert one == pytest.approx(other, abs=2e-5)
        assert abs(other[0] - other[1]) > 2e-3, "differences far above the tolerance"
    assert counted["together"] == (counted["sequential"][0] / 2, counted["sequential"][1]), (
        "the same tokens in half the passes"
    )


@pytest.mark.parametrize("surrogate", ["clipped", "log_ratio"])
def test_a_trainer_takes_the_same_steps(surrogate: str, tmp_path: Path) -> None:
    gradients, after = [], []
    for evaluation in ("sequential", "together"):
        options = {"surrogate": surrogate, "eps": 1e-2, "beta": 0.1, "max_steps": 3, "queries": 2}
        trainer = zopro(tmp_path, model=with_adapter(), evaluation=evaluation, **options)
        trainer.train()
        gradients.append(
            [line["projected_gradient"] for line in trainer.state.log_history if "projected_gradient" in line]
        )
        after.append(torch.cat([p.flatten() for p in weights(trainer.model).values()]))
    assert gradients[0] == pytest.approx(gradients[1], rel=1e-2) and max(map(abs, gradients[0])) > 1e-3
    assert torch.allclose(*after, atol=1e-3)


def test_eps_auto_is_measured_one_after_another(tmp_path: Path) -> None:
    eps = []
    for evaluation in ("sequential", "together"):
        trainer = zopro(tmp_path, model=with_adapter(), evaluation=evaluation, max_steps=1)
        trainer.train()
        eps.append(trainer.spsa.last.eps)
    assert eps[0] == eps[1]


def test_after_an_error_it_begins_at_the_first_side() -> None:
    model = shared("llama")
    spsa = optimizer(model, "together")
    loss = closure(model, spsa, log_ratio_surrogate, COPIES)
    expected = spsa.measure(loss).losses
    for failing in (1, 2):
        calls = iter(range(1, 9))

        def fails(calls: Iterator[int] = calls, failing: int = failing) -> Tensor:
            value = loss()
            if next(calls) == failing:
                raise KeyError("a closure's own error")
            return value

        with pytest.raises(KeyError):
            spsa.measure(fails)
        assert not spsa.together.active
        assert spsa.measure(loss).losses == expected


def test_a_side_that_an_interruption_left_alone_is_forgotten() -> None:
    """Ctrl-C between the two sides: the next batch's first loss is not the last one's second."""
    model = shared("llama")
    spsa = optimizer(model, "together")
    loss = closure(model, spsa, log_ratio_surrogate, COPIES)
    expected = spsa.measure(loss).losses
    with spsa.evaluator().together.at(lambda index: torch.zeros(())):  # type: ignore[union-attr]
        spsa.together.rows(lambda: torch.ones(2, 3))
    assert spsa.measure(loss).losses == expected


def test_what_it_cannot_do_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"evaluation: together needs trained matrices .* one is read by linear\. Use"):
        zopro(tmp_path, evaluation="together", max_steps=1).train()  # an output matrix
    with pytest.raises(InputError, match=r"one is read by embedding"):
        spsa = SPSA([("w", weight := torch.zeros(4, 2))], evaluation="together")
        spsa.measure(lambda: spsa.together.rows(lambda: torch.nn.functional.embedding(torch.tensor([1]), weight)).sum())
    with pytest.raises(InputError, match=r"evaluation: together needs a loss of log-probs from zopro's engine alone"):
        plain(tmp_path, {"evaluation": "together", "eps": 1e-3}, max_steps=1).train()
    with pytest.raises(ValueError, match=r"evaluation: must be sequential, or together .* got .together., sides=1"):
        optimizer(shared("llama"), "together", sides=1)
    with pytest.raises(ValueError, match=r"evaluation: must be one of sequential, together, batched, got .both."):
        zopro(tmp_path, evaluation="both")
    given = {"model": "m", "task": "chat", "train_data": "x", "evaluation": "together"}
    assert RunConfig(**given).evaluation == "together"
    for key, value, rule in (("sides", 1, "sequential or batched"), ("lora_r", 0, "sequential")):
        with pytest.raises(InputError, match=rf"evaluation: must be {rule} with {key}: {value}, got 'together'"):
            RunConfig(**given, **{key: value})
    with pytest.raises(InputError, match=r"evaluation: must be one of sequential, together, batched, got 'both'"):
        RunConfig(**{**given, "evaluation": "both"})
