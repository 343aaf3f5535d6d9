"""Methods that are a setting of another one: what they fix, and what they leave to the configuration."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tiny_trainers import PROMPTS, TOKENIZER, online, with_adapter
from zopro import ZOPrOConfig
from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.system.random_state import preserve_random_state
from zopro.train.methods import PolicyInputs, evolution, evolution_paper, fzoo
from zopro.train.zopro import FZOOTrainer
from zopro.zo import Gaussian, Rademacher


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    """A reward that no two answers share easily."""
    return [float(len(text)) for text in completions]


def trainer_of(method: Any, folder: Path, **options: Any) -> Any:
    config = RunConfig(model="m", task="chat", train_data="x", prompts_per_step=2, max_completion_length=4, **options)
    with preserve_random_state():
        inputs = PolicyInputs(with_adapter(), TOKENIZER, letters, list(PROMPTS), 1, 0, folder, config)
        trainer = method(inputs)
        trainer.train()
    return trainer


def test_fzoo_s_step_is_over_the_deviation_of_its_losses(tmp_path: Path) -> None:
    trainer = trainer_of(fzoo, tmp_path, eps=1e-3, learning_rate=1e-3, num_generations=4, beta=0.0)
    spsa, last = trainer.spsa, trainer.spsa.last
    assert (spsa.queries, spsa.sides, type(spsa.directions)) == (8, 1, Rademacher)
    slopes = torch.tensor(last.projected_gradients, dtype=torch.float64)
    assert last.coefficients == pytest.approx((slopes / 8 / slopes.std()).tolist()) and slopes.std() > 0
    assert trainer_of(fzoo, tmp_path, eps=1e-3, num_generations=2, queries=3).spsa.queries == 3


@pytest.mark.parametrize(
    ("name", "key", "guess"),
    [("zopro", "eps", "eps_guess"), ("fzoo", "eps", "eps_guess"), ("es", "sigma", "sigma_guess")],
)
@pytest.mark.parametrize(("given", "begins"), [("auto", 0.02), (1e-3, None)])
def test_the_eps_of_an_iteration_before_is_where_auto_begins(
    name: str, key: str, guess: str, given: Any, begins: float | None, tmp_path: Path
) -> None:
    made = {key: str(given) if key == "eps" else given}
    config = RunConfig(model="m", task="chat", train_data="x", prompts_per_step=2, **made)
    with preserve_random_state():
        inputs = PolicyInputs(with_adapter(), TOKENIZER, letters, list(PROMPTS), 1, 0, tmp_path, config, eps_guess=0.02)
        trainer = METHODS[name].load()(inputs)
        trainer.create_optimizer()
    assert getattr(trainer.args, guess) == trainer.spsa_arguments()[guess] == begins


@pytest.mark.parametrize(("name", "update"), [("mezo", ""), ("fzoo", ""), ("zopro", "of 0"), ("zopro-paper", "of 0")])
def test_a_rate_relative_to_an_update_needs_one(name: str, update: str, tmp_path: Path) -> None:
    """The paper's preset has 1, which times noise of size 1 would leave no model."""
    mu = {name: torch.zeros_like(p) for name, p in with_adapter().named_parameters() if p.requires_grad}
    config = RunConfig(model="m", task="chat", train_data="x", prompts_per_step=2, preset="paper")
    mu = mu if update == "of 0" else {}
    with preserve_random_state():

        def made(**changes: Any) -> Any:
            at = with_adapter(), TOKENIZER, letters, [*PROMPTS], 1, 0, tmp_path, config
            return METHODS[name].load()(replace(PolicyInputs(*at, previous_update=mu), **changes))

        assert made().args.learning_rate == 1e-4
        some = {name: p.detach() + 1e-3 for name, p in with_adapter().named_parameters()}
        assert made(previous_update=some).args.learning_rate == (1 if METHODS[name].follows_update else 1e-4)
        with pytest.raises(InputError, match=r"learning_rate: must be given with the paper preset .* MeZO's .* is 1e-4"):
            made(config=replace(config, learning_rate=1.0)).train()


@pytest.mark.parametrize(
    ("options", "said"), [({}, "sides: must be 1 for FZOO.*got 2"), ({"sides": 1}, "queries: must be at least 2.*got 1")]
)
def test_fzoo_s_own_trainer_names_what_it_needs(options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        online(FZOOTrainer, ZOPrOConfig, tmp_path, options).train()


def test_the_paper_s_evolution_strategy(tmp_path: Path) -> None:
    options = {
        "sigma": 0.5,
        "es_learning_rate": 0.02,
        "population": 5,
        "antithetic": False,
        "anchor": 0.5,
        "momentum": 0.9,
    }
    before = dict(with_adapter().named_parameters())
    trainer = trainer_of(evolution_paper, tmp_path, **options, shaping="centred_rank", noise="rademacher")
    es, last = trainer.spsa, trainer.spsa.last
    assert trainer.args.greedy and type(es.directions) is Gaussian and len(last.coefficients) == 5
    fitness = [-coefficient * 5 * 0.5 for coefficient in last.coefficients]
    assert sum(fitness) == pytest.approx(0, abs=1e-6) and sum(f * f for f in fitness) == pytest.approx(5), "z-scores"
    for name, tensor, _ in es.weights.movable:
        (full,) = (full for full in before if full.replace(".default", "").endswith(name))
        seeds = [member.direction_seed for member in es.strategy.ask(0)]
        moved = sum(f * es.directions.tensor(name, tensor, seed, 0) for f, seed in zip(fitness, seeds, strict=True))
        expected = before[full].detach() + 0.02 / 5 * moved  # theta + alpha / P sum F z
        assert torch.allclose(tensor, expected, atol=1e-6), name


@pytest.mark.parametrize("name", [name for name in METHODS if not METHODS[name].population])
def test_every_method_takes_the_options_that_mean_something_to_it(name: str, tmp_path: Path) -> None:
    """Decay of weights, and where differences are taken those of a step."""
    mine: dict[str, Any] = {"weight_decay": 0.1, "eps": 1e-3, "queries": 4, "surrogate": "clipped"}
    config = RunConfig(model="m", task="chat", train_data="x", prompts_per_step=2, guide="mixed", **mine)
    inputs = PolicyInputs(with_adapter(), TOKENIZER, letters, [*PROMPTS], 1, 0, tmp_path, config)
    with preserve_random_state():
        args: Any = METHODS[name].load()(inputs).args
    heeded = mine if METHODS[name].zeroth_order or name == "guided" else {"weight_decay": 0.1}
    assert {key: getattr(args, key) for key in heeded} == heeded
    if METHODS[name].zeroth_order:
        assert (args.queries, args.sides) == config.differences_of(name)


def test_evolution_strategies_answer_each_prompt_once(tmp_path: Path) -> None:
    trainer = trainer_of(evolution, tmp_path, population=2, num_generations=4, greedy=True)
    assert trainer.args.per_device_train_batch_size == 2 and trainer.args.num_generations == 1
    assert trainer.state.log_history[0]["answers"] == 4 and trainer.args.beta == 0
