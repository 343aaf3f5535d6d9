"""The trainer that a method makes of a policy iteration's inputs; one of the user's is tried before the first stage.

trainer = trainer_of("mezo", inputs)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from transformers import PreTrainedTokenizerBase, Trainer

from zopro.choices import METHODS, made_by
from zopro.config import RunConfig
from zopro.loop.data import Item
from zopro.loop.policies import Policies
from zopro.system.launch import alone
from zopro.system.random_state import derived_seed, preserve_random_state
from zopro.train.methods import PolicyInputs
from zopro.weights.adapters import tensor_name


def trainer_of(method: str, inputs: PolicyInputs) -> Trainer:
    """The trainer of a method. Raises `InputError`: one of the user's raises, or makes no trainer."""

    def make() -> Trainer:
        trainer: Trainer = METHODS[method].load()(inputs)
        return trainer

    rule = "method: must return a trainer of transformers"
    return made_by(method, make, Trainer, rule) if method.startswith("python:") else make()


def try_method(config: RunConfig, policies: Policies, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> None:
    """Make the trainer of a method of the user's for a fresh policy, and forget both: nothing is trained or kept.

    Its weights stand in for the updates that the method may ask for. Raises as `trainer_of`.
    """
    if not config.method.startswith("python:"):
        return
    asked = items[: config.prompts_per_step]
    first = METHODS[config.method].self_starting
    with (
        alone(),
        preserve_random_state(),
        TemporaryDirectory() as folder,
        policies.open(None, trainable=True) as model,
    ):
        weights = {tensor_name(name): weight.detach() for name, weight in model.named_parameters()}
        adapter = {name: weight for name, weight in weights.items() if policies.full or ".lora_" in name}
        inputs = PolicyInputs(
            model=model,
            tokenizer=tokenizer,
            reward_function=_no_reward,
            prompts=[item.prompt for item in asked],
            rows=[item.example.row for item in asked],
            config=config,
            previous_update={} if first else adapter,
            reward_update=adapter if config.trains_reward and not first else {},  # as a first iteration has none
            reference=None if policies.full else adapter,
            steps=1,
            seed=derived_seed(config.seed, "policy", 0),
            folder=Path(folder),
        )
        trainer_of(config.method, inputs)


def _no_reward(completions: Sequence[str], **columns: object) -> list[float]:
    return [0.0] * len(completions)
