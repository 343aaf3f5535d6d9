"""The local engine against transformers' own full forward pass of a model that was displaced by hand."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tiny_trainers import llama, online, same, weights, with_adapter, zopro
from zopro.engine import Abilities, Batch, Rollouts, Sampling
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.logprobs import completion_logprobs
from zopro.engine.local.rollouts import generate
from zopro.train.guided import GuidedSPSAConfig, GuidedSPSATrainer
from zopro.weights.adapters import tensor_name
from zopro.zo import Displacement, Gaussian, StepRecord, Weights
from zopro.zo.evaluation import Evaluator
from zopro.zo.together import Together

PROMPTS = [[2, 3], [4, 5, 6]]
PLUS = Displacement(seed=3, query=0, step=1, t=1.0, eps=(0.3,))
AT = [None, PLUS, PLUS.mirrored, Displacement(seed=3, query=1, step=1, t=0.5, eps=(0.3,))]
OPTIONS = {"max_new_tokens": 5, "eos_token_ids": [1], "pad_token_id": 0}


pytestmark = pytest.mark.usefixtures("random_state")


@pytest.fixture(scope="module")
def model() -> Any:
    """Adapters whose both factors are off 0."""
    policy = with_adapter()
    draw = torch.Generator().manual_seed(0)
    for _, parameter in named(policy):
        parameter.data.copy_(torch.randn(parameter.shape, generator=draw) * 0.3)
    return policy.eval()


def named(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(tensor_name(name), p) for name, p in model.named_parameters() if p.requires_grad]


def engine_over(model: Any) -> LocalEngine:
    return LocalEngine(model, Weights.of(named(model), Gaussian()))


def displaced(model: Any, at: Displacement | None) -> Any:
    """A copy whose tensors were written, by the formula."""
    other = copy.deepcopy(model)
    for name, parameter in named(other) if at is not None else ():
        z = Gaussian().tensor(name, parameter, at.direction_seed, at.step)
        parameter.data.add_(z, alpha=at.t * at.eps[0])
    return other


def true_logprobs(model: Any, batch: Batch, temperature: float = 1.0) -> Tensor:
    positions = (batch.attention_mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(batch.input_ids, attention_mask=batch.attention_mask, position_ids=positions).logits / temperature
    picked = logits.log_softmax(-1)[:, :-1].gather(-1, batch.input_ids[:, 1:, None])[..., 0]
    return picked[:, -batch.completion_length :] * batch.completion_mask


def drawn(model: Any, **options: Any) -> Rollouts:
    generators = [torch.Generator().manual_seed(row) for row in range(4)]
    return generate(model, PROMPTS, num_generations=2, generator=generators, **OPTIONS, **options)


@pytest.mark.parametrize("together", [False, True])
def test_logprobs_are_those_of_a_displaced_model(together: bool, model: Any) -> None:
    engine, batch = engine_over(model), Batch.of(drawn(model))
    before = weights(model)
    evaluator = Evaluator(engine.weights, Together([]) if together else None)
    passes: list[int] = []
    hook = model.get_input_embeddings().register_forward_hook(lambda module, args, output: passes.append(len(args[0])))
    with torch.no_grad(), engine.during(evaluator):
        engine.logprobs(batch)
        passes.clear()
        found = engine.logprobs(batch, AT, 0.7)
        assert engine.abilities.at_once == 1 + together
    hook.remove()
    assert same(weights(model), before)
    for at, tokens in zip(AT, found, strict=True):
        assert torch.allclose(tokens, true_logprobs(displaced(model, at), batch, 0.7), atol=1e-5)
    assert (found[1] - found[2]).abs().max() > 0.1, "displacements show"
    each = len(passes) // (3 if together else 4)
    assert len(passes) == each * (3 if together else 4) and each in (1, 2), "both sides in one pass"


def test_prompts_may_differ_by_what_is_padding_alone(model: Any) -> None:
    """Where the pad token is a token of prompts too, as GPT-2's: the same ids are two prompts."""
    ids = torch.tensor([[0, 5, 6, 7, 8], [0, 5, 6, 7, 8], [0, 5, 6, 9, 9], [0, 5, 6, 9, 8]])
    mask = torch.ones_like(ids)
    mask[[1, 3], 0] = 0
    for rows in ([0, 1], [0, 1, 2, 3]):
        batch = Batch(ids[rows], mask[rows], 2)
        with torch.no_grad():
            found, expected = engine_over(model).logprobs(batch)[0], completion_logprobs(model, *batch)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
        assert not torch.allclose(expected[0], expected[1])


def test_samples_are_those_of_a_displaced_model_by_the_same_random_numbers(model: Any) -> None:
    engine = engine_over(model)
    options = Sampling(**OPTIONS, generator=[torch.Generator().manual_seed(row) for row in range(4)])
    found = engine.sample(PROMPTS, 2, options, AT)
    for at, rollouts in zip(AT, found, strict=True):
        expected = drawn(displaced(model, at))
        assert torch.equal(rollouts.completion_ids, expected.completion_ids)
        assert torch.allclose(rollouts.logprobs, expected.logprobs, atol=1e-5)
    assert not torch.equal(found[0].completion_ids, found[1].completion_ids)


def test_dropout_is_the_same_at_every_displacement() -> None:
    policy = llama(attention_dropout=0.5).train()
    engine = LocalEngine(policy, Weights.of(named(policy), Gaussian()))
    batch, tiny = Batch.of(drawn(policy)), Displacement(0, 0, 0, 1.0, (1e-6,))
    with torch.no_grad():
        one, other, again = engine.logprobs(batch, [None, tiny, None])
        assert torch.equal(one, again) and torch.allclose(one, other, atol=1e-3)
        assert not torch.allclose(one, engine.logprobs(batch, [None])[0], atol=1e-2), "the next call draws another"


def test_a_record_moves_the_model(model: Any) -> None:
    policy = copy.deepcopy(model)
    record = StepRecord(4, 7, [2.0], [2.0], [0.1], [0.3], [0.0], 0.0, 1.0, False)
    engine_over(policy).apply(record)
    for (name, parameter), (_, start) in zip(named(policy), named(model), strict=True):
        assert torch.allclose(parameter, start - 0.1 * 2.0 * Gaussian().tensor(name, start, 7, 4), atol=1e-6)
    for call in (lambda: LocalEngine(model).apply(record), lambda: LocalEngine(model).logprobs(None, [PLUS])):
        with pytest.raises(ValueError, match=r"weights: must be given to an engine that is to be displaced or moved"):
            call()


class Server:
    """As an engine elsewhere: a model of its own, to which each displaced adapter is published as tensors."""

    def __init__(self, model: Any) -> None:
        self.model = copy.deepcopy(model)
        self.weights: Weights = Weights.of([(n, p.detach().clone()) for n, p in named(model)], Gaussian())
        self.calls: list[int] = []

        self.abilities = Abilities()

    def _published(self, at: Displacement | None) -> Any:
        tensors = {name: tensor for name, tensor, _ in self.weights.entries} if at is None else self.weights.at(at)
        for name, parameter in named(self.model):
            parameter.data.copy_(tensors[name])
        return self.model

    def sample(self, prompts: Any, k: int, options: Sampling, at: Any = (None,)) -> list[Rollouts]:
        return [LocalEngine(self._published(one)).sample(prompts, k, options)[0] for one in at]

    def logprobs(self, batch: Batch, at: Any = (None,), temperature: float = 1.0) -> list[Tensor]:
        self.calls.append(len(at))
        return [LocalEngine(self._published(one)).logprobs(batch, (None,), temperature)[0] for one in at]

    def apply(self, record: StepRecord) -> None:
        self.weights.apply(record)


@pytest.mark.parametrize("options", [{"queries": 2, "noise": "gaussian"}, {"sides": 1, "preset": "paper", "eps": 1e-2}])
def test_a_trainer_takes_the_same_steps_by_an_engine_elsewhere(options: dict[str, Any], tmp_path: Any) -> None:
    """It gets all displacements of a step in one call, and nothing but numbers; both end with the same policy."""
    trainers, policy = [], with_adapter()
    server = Server(policy)
    for engine in (None, server):
        trainer = zopro(tmp_path, model=copy.deepcopy(policy), engine=engine, max_steps=3, **{"eps": 1e-3, **options})
        trainer.train()
        trainers.append(trainer)
    local, remote = trainers
    assert remote.spsa.last.projected_gradient == local.spsa.last.projected_gradient != 0
    assert same(weights(local.model), weights(remote.model))
    assert same({n: t for n, t, _ in server.weights.entries}, {n: p.detach() for n, p in named(local.model)})
    asked = [count for count in server.calls if count > 1]
    assert asked == ([4, 4, 4] if options.get("queries") == 2 else [2]), server.calls


def test_engines_that_cannot_are_refused(tmp_path: Any) -> None:
    server = Server(with_adapter())
    with pytest.raises(ValueError, match=r"engine: must be the local one for guided trainers, .* got Server"):
        online(GuidedSPSATrainer, GuidedSPSAConfig, tmp_path, {"model": with_adapter(), "engine": server})
    server.abilities = Abilities(logprobs=False)
    with pytest.raises(ValueError, match=r"engine: must give log-probs of given answers, got Server, which cannot"):
        zopro(tmp_path, model=with_adapter(), engine=server)
