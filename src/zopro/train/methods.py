"""How one policy iteration is optimised: methods, each a function from its inputs to a trainer.

Their names, and what is to be known of each before it is imported, are in `zopro.choices.METHODS`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from datasets import Dataset
from torch import Tensor
from transformers import Trainer
from trl import RLOOConfig

from zopro.choices import DIRECTIONS
from zopro.config import RunConfig
from zopro.config.evolution import EvolutionOptions
from zopro.config.step import DirectionOptions, StepOptions, preset_rate
from zopro.train.arguments import policy_arguments, scaled_gradients, without_autocast
from zopro.train.checkpoints import checkpointed
from zopro.train.directed import moves
from zopro.train.drawing import ROW
from zopro.train.es import ESConfig, ESTrainer
from zopro.train.guided import GuidedConfig, GuidedSPSAConfig, GuidedSPSATrainer, GuidedTrainer
from zopro.train.online_dpo import OnlineDPOTrainer
from zopro.train.rloo import EngineRLOOTrainer
from zopro.train.zopro import FZOOTrainer, ZOPrOConfig, ZOPrOTrainer


@dataclass(frozen=True)
class PolicyInputs:
    """What a method gets: everything about one policy iteration."""

    model: Any  # the policy, a PeftModel or (full-parameter) a PreTrainedModel
    tokenizer: Any
    reward_function: Callable[..., list[float]]
    prompts: list[str]
    steps: int
    seed: int
    folder: Path  # the trainer's: checkpoints, logs of report_to
    config: RunConfig
    previous_update: Mapping[str, Tensor] = field(default_factory=dict)  # mu
    reward_update: Mapping[str, Tensor] = field(default_factory=dict)  # v
    rows: list[int] = field(default_factory=list)  # of the data, as the journal names them: one for each prompt
    writes: bool = True  # False on the ranks of a job that only take part
    reference: Mapping[str, Tensor] | None = None  # the SFT adapter; None: the model that its config names
    eps_guess: float | None = None  # with which `eps: auto`, or `sigma: auto`, begins: the iteration's before


def _arguments(inputs: PolicyInputs, **others: Any) -> dict[str, Any]:
    """What all methods' trainers are given, but for `others`."""
    config = inputs.config
    shared = {"num_generations": config.num_generations, "beta": config.beta}
    return policy_arguments(
        output_dir=inputs.folder,
        steps=inputs.steps,
        seed=inputs.seed,
        device=inputs.model.device,
        logging_steps=1,
        report_to=config.report_to if inputs.writes else [],
        checkpoint_steps=config.checkpoint_steps if inputs.writes else 0,
        prompts=config.prompts_per_step,
        max_completion_length=config.max_completion_length,
        temperature=config.temperature,
        **{**shared, **others},
    )


def _trainer(trainer_cls: type, arguments: Any, inputs: PolicyInputs, **extra: Any) -> Trainer:
    return checkpointed(trainer_cls)(
        model=inputs.model,
        reward_funcs=inputs.reward_function,
        args=without_autocast(arguments),
        train_dataset=Dataset.from_dict(_columns(inputs)),
        processing_class=inputs.tokenizer,
        reference=inputs.reference,
        **{"advantage": inputs.config.advantage, **extra},
    )


def _columns(inputs: PolicyInputs) -> dict[str, list[Any]]:
    """prompt; `ROW`: of the data, for the journal; item: the prompt's place, by which rewards find its answer."""
    named = {ROW: inputs.rows, "item": list(range(len(inputs.prompts)))} if inputs.rows else {}
    return {"prompt": inputs.prompts, **named}


def _updates(inputs: PolicyInputs, targeted: bool, noise: str = "") -> dict[str, Mapping[str, Tensor]]:
    """What directions are made of: the updates that are followed and avoided, or the one that noise is made of."""
    if not inputs.previous_update:
        return {}
    if targeted:
        return {"previous_update": inputs.previous_update, "reward_update": inputs.reward_update}
    return {"previous_update": inputs.previous_update} if noise and DIRECTIONS[noise].of_update else {}


def first_order(
    inputs: PolicyInputs, trainer_cls: type = EngineRLOOTrainer, checkpointing: bool = False, **extra: Any
) -> Trainer:
    """Back-propagation and AdamW: RLOO, GRPO or online DPO. Checkpointing keeps one block's activations at a time."""
    arguments = {**_arguments(inputs), "gradient_checkpointing": checkpointing, **scaled_gradients(inputs.model)}
    config = inputs.config
    rates = {"learning_rate": config.first_order_learning_rate, "weight_decay": config.weight_decay}
    return _trainer(trainer_cls, RLOOConfig(**arguments, **rates), inputs, **extra)


def _zeroth_order(
    inputs: PolicyInputs, targeted: bool, preset: str | None = None, trainer_cls: type = ZOPrOTrainer
) -> Trainer:
    config = replace(inputs.config, preset=preset) if preset else inputs.config
    follows = targeted and moves(inputs.previous_update)
    arguments = ZOPrOConfig(
        **_arguments(inputs),
        learning_rate=config.learning_rate or preset_rate(config.preset, follows),
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        **{key.name: getattr(config, key.name) for key in fields(StepOptions)},
    )
    _guess_eps(arguments, inputs)
    updates = _updates(inputs, targeted)
    return _trainer(trainer_cls, arguments, inputs, **updates)


def _guess_eps(arguments: ZOPrOConfig, inputs: PolicyInputs) -> None:
    arguments.eps_guess = inputs.eps_guess if arguments.eps == "auto" else None


def fzoo(inputs: PolicyInputs) -> Trainer:
    """FZOO (Dang et al. 2025): one-sided differences along signs, 8 of them unless `queries` says more."""
    queries, sides = inputs.config.differences_of("fzoo")
    evaluation = "batched" if inputs.config.evaluation == "batched" else "sequential"
    config = replace(inputs.config, sides=sides, noise="rademacher", evaluation=evaluation, queries=queries)
    return _zeroth_order(replace(inputs, config=config), targeted=False, trainer_cls=FZOOTrainer)


def evolution(inputs: PolicyInputs, **paper: Any) -> Trainer:
    """Evolution strategies as the configuration says, but for what `paper` does."""
    config = inputs.config
    options = {key.name: getattr(config, key.name) for key in (*fields(EvolutionOptions), *fields(DirectionOptions))}
    options |= paper
    updates = _updates(inputs, options["targeted"], options["noise"])
    arguments = ESConfig(
        **_arguments(inputs, num_generations=1, beta=0.0),
        learning_rate=config.es_learning_rate,
        weight_decay=config.weight_decay,
        sigma_guess=inputs.eps_guess if options["sigma"] == "auto" else None,
        **{**options, "targeted": options["targeted"] and bool(updates)},
    )
    return _trainer(ESTrainer, arguments, inputs, kept=inputs.folder, advantage="rloo", **updates)


def evolution_paper(inputs: PolicyInputs) -> Trainer:
    """As Qiu et al. 2025: theta <- theta + alpha / P sum_m F_m s_m z_m, of z-scores, greedy answers, members one-sided.

    Of the options population, sigma and es_learning_rate (their alpha) are heeded; their sigma is 0.001.
    """
    config = inputs.config
    sigma = 1e-3 if config.sigma == "auto" else float(config.sigma)
    scaled = replace(config, es_learning_rate=config.es_learning_rate * sigma, weight_decay=0.0)
    return evolution(
        replace(inputs, config=scaled),
        sigma=sigma,
        noise="gaussian",
        greedy=True,
        shaping="z_score",
        normalize=False,
        antithetic=False,
        targeted=False,
        momentum=0.0,
        second_moment=0.0,
        anchor=0.0,
    )


def guided(inputs: PolicyInputs) -> Trainer:
    """RLOO with residual feedback for a gradient: in AdamW (`guide: adam`), or as a direction of SPSA (spsa, mixed)."""
    config = inputs.config
    avoid = inputs.reward_update if config.guide_avoid_reward else None
    shared = {
        **_arguments(inputs),
        "learning_rate": config.guided_learning_rate,
        "local": config.guide_local,
        "tail": config.guide_tail,
        "top_blocks": config.guide_blocks,
    }
    if config.guide == "adam":
        arguments = GuidedConfig(**shared, weight_decay=config.weight_decay, guard_every=config.guard_every)
        return _trainer(GuidedTrainer, arguments, inputs, avoid=avoid)
    along = GuidedSPSAConfig(
        **shared,
        lr_scheduler_type="constant",
        weight_decay=config.weight_decay,
        **{key.name: getattr(config, key.name) for key in fields(StepOptions)},
        guide=1.0 if config.guide == "spsa" else 0.5,
    )
    _guess_eps(along, inputs)
    updates = _updates(inputs, along.guide < 1)
    return _trainer(GuidedSPSATrainer, along, inputs, avoid=avoid, **updates)


targeted = partial(_zeroth_order, targeted=True)
paper = partial(_zeroth_order, targeted=True, preset="paper")
mezo = partial(_zeroth_order, targeted=False)
checkpointing = partial(first_order, checkpointing=True)
grpo = partial(first_order, advantage="grpo")
online_dpo = partial(first_order, trainer_cls=OnlineDPOTrainer)
