"""Configuration keys of method guided; a group of `zopro.config.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from zopro.config.fields import check_choices, not_negative, option, positive

GUIDED_LEARNING_RATE = 2e-4
GUIDES = ("adam", "spsa", "mixed")
GUIDE_LOCAL = ("none", "mlp", "chain", "block")


@dataclass
class GuidedOptions:
    """The policy stage of method guided: residual feedback in place of the gradient."""

    guided_learning_rate: float = option(GUIDED_LEARNING_RATE, "Learning rate of method guided.")
    guide: str = option(
        "adam",
        "What is made of the guess: adam (AdamW's gradient), spsa (a direction whose slope is measured) or mixed "
        "(as spsa, half of it ZOPrO's direction).",
        GUIDES,
    )
    guide_local: str = option(
        "block",
        "Local products: none, mlp (inside each block's MLP), chain (from MLP to MLP) or block (from block to block; "
        "best and most expensive).",
        GUIDE_LOCAL,
    )
    guide_tail: int = option(
        4,
        "With guide_local block: how many tokens at the prompts' ends are swept; 0: all of the prompts, which makes the "
        "guess the gradient. For prompts much longer than the answers.",
    )
    guide_blocks: int = option(0, "How many of the last blocks to guide; 0: all.")
    guide_avoid_reward: bool = option(
        False, "Take the component along the reward model's last update off the guess, tensor by tensor."
    )
    guard_every: int = option(
        10,
        "With adam: every this many steps, measure the slope (two more passes) and follow only what goes downhill; "
        "0: never.",
    )

    def __post_init__(self) -> None:
        positive(self, "guided_learning_rate")
        not_negative(self, "guide_tail", "guide_blocks", "guard_every")
        check_choices(self, GuidedOptions)
