"""Configuration keys of the policy stage, whatever its method; a group of `zopro.config.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from zopro.config.fields import LARGEST_SCALE, at_most, check, check_choices, not_negative, option, positive

ADVANTAGES = ("rloo", "grpo")


@dataclass
class PolicyOptions:
    """The policy stage: RLOO's objective, optimised by `method`."""

    policy_steps: int = option(
        0, "Steps of each policy iteration; 0: iteration_share of the training rows, prompts_per_step in a step."
    )
    prompts_per_step: int = option(8, "Prompts in a step.")
    num_generations: int = option(2, "Completions per prompt, K (the paper: 2). Verifiable: 8. es: one of each member.")
    temperature: float = option(1.0, "Sampling temperature of the rollouts.")
    beta: float = option(
        0.05,
        "Weight of KL(policy || SFT) in the sequence reward; es has no such term, but anchor. online-dpo: DPO's beta.",
    )
    max_kl: float = option(
        0.0,
        "End a policy iteration at the first step whose answers are, on average, more than this many nats from the SFT "
        "policy (without SFT, from the start); 0: never. 10 suits answers of up to 50 tokens: KL grows with their "
        "length, so there is no bound for all. es, and beta: 0, measure none in a step: there evaluations say it.",
    )
    first_order_learning_rate: float = option(
        2e-4, "AdamW learning rate of back-propagation (rloo, grpo, online-dpo, warm start)."
    )
    es_learning_rate: float = option(
        1e-2, "Evolution strategies: change of a weight in a step (es-paper: their alpha, of the mean of F z)."
    )
    advantage: str = option(
        "rloo",
        "rloo (a reward less the mean of the prompt's others) or grpo (normalised over the prompt's group), for every "
        "method but online-dpo, es and es-paper.",
        ADVANTAGES,
    )
    learning_rate: float = option(
        0.0,
        "Zeroth-order learning rate; 0 takes the preset's, and the default's 1e-4 where there is no previous update. "
        "default: change of a weight in a typical step.",
    )
    weight_decay: float = option(
        0.0, "Decoupled weight decay, not on biases and norms (zeroth-order: on what has two or more dimensions)."
    )

    def __post_init__(self) -> None:
        not_negative(self, "policy_steps", "beta", "max_kl", "learning_rate", "weight_decay")
        positive(self, "prompts_per_step", "first_order_learning_rate", "es_learning_rate")
        at_most(self, 1_000_000, "prompts_per_step", "num_generations")
        at_most(self, LARGEST_SCALE, "weight_decay")
        check(1e-6 <= self.temperature <= 1e6, "temperature", "must lie in [1e-6, 1e6]", self.temperature)
        check(
            self.num_generations >= 2,
            "num_generations",
            "must be at least 2 (the leave-one-out baseline needs another completion)",
            self.num_generations,
        )
        check_choices(self, PolicyOptions)
