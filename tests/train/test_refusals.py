"""What a trainer cannot be made of gets one line that names the argument: adapters, rewards, options."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification
from trl import SFTTrainer

from tiny_trainers import es, head_only, llama, online, tea, zopro
from zopro import ESConfig, ESTrainer, ZOPrOConfig, ZOPrOTrainer, zeroth_order
from zopro.errors import InputError
from zopro.train.arguments import check_text
from zopro.train.checkpoints import checkpointed
from zopro.train.construction import check_rewards
from zopro.train.guided import GuidedConfig, GuidedSPSAConfig, GuidedTrainer


def lora() -> LoraConfig:
    return LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")


def adapters(*names: str, active: str | list[str]) -> Any:
    model = get_peft_model(llama(), lora(), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lora())
    model.base_model.set_adapter(active)
    return model


BUILDS: dict[str, Callable[..., Any]] = {
    "zopro": lambda folder, model: zopro(folder, model=model),
    "es": lambda folder, model: es(folder, model=model),
    "guided": lambda folder, model: online(GuidedTrainer, GuidedConfig, folder, {"model": model}),
}


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(
    ("names", "active", "said"),
    [
        (
            ("policy",),
            "policy",
            r"^model: must have its adapter under the name 'default', got 'policy'\. .*adapter_name='def",
        ),
        (
            ("default", "other"),
            "other",
            r"^model: must have the adapter 'default' active, .*, got 'other'\. Call .*set_adap",
        ),
        (("default", "other"), ["default", "other"], r"^model: .* active, and no other, got 'default', 'other'\. Call "),
        (("default", "ref"), "default", r"^model: must have no adapter 'ref', .*delete_adapter\('ref'\)\.$"),
    ],
)
def test_the_adapter_that_trl_trains_must_be_there_and_active(
    kind: str, names: tuple[str, ...], active: Any, said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=said):
        BUILDS[kind](tmp_path, adapters(*names, active=active))


def test_another_adapter_beside_it_stays_as_it_is(tmp_path: Path) -> None:
    BUILDS["zopro"](tmp_path, adapters("default", "other", active="default"))


def test_a_peft_config_is_one(tmp_path: Path) -> None:
    args = ZOPrOConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(InputError, match=r"^peft_config: must be a peft\.PeftConfig, got dict\. Use peft\.LoraConfig"):
        ZOPrOTrainer(head_only(), tea, args, peft_config={"r": 2})  # type: ignore[typeddict-item]


# Rewards.


def test_rewards_may_stand_in_a_tuple(tmp_path: Path) -> None:
    trainer = es(tmp_path, max_steps=1, population=2, reward_funcs=(tea, tea))
    trainer.train()
    assert len(trainer.reward_funcs) == 2 and trainer.state.global_step == 1


def classifier() -> Any:
    return llama(cls=LlamaForSequenceClassification, num_labels=1)


@pytest.mark.parametrize(
    ("functions", "said"),
    [
        ([3], r"^reward_funcs: must be functions or names of classifiers, got 3 \(int\)\.$"),
        (None, r"^reward_funcs: must be functions or names of classifiers, got None"),
        ([], r"^reward_funcs: must have at least one function, got none\.$"),
        (torch.nn.Linear(1, 1), r"^reward_funcs: must have networks of transformers, got Linear\. Call it in a function"),
        (
            [tea, classifier()],
            r"^reward_processing_classes: must have the tokenizer of LlamaForSeq.*, got None\. Pass it",
        ),
        (
            get_peft_model(classifier(), LoraConfig(task_type="SEQ_CLS")),
            r"^reward_processing_classes: .* PeftModelForSeq",
        ),
    ],
)
def test_rewards_that_are_none(functions: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        zopro(tmp_path, reward_funcs=functions)


def test_networks_that_trl_can_call() -> None:
    loaded, model = classifier(), classifier()
    loaded.config._name_or_path = "somewhere"
    assert check_rewards((loaded, "name", tea)) == [loaded, "name", tea]
    assert check_rewards([model, tea], [object(), None]) == [model, tea] and check_rewards(model, object()) == [model]


# Rows.


def test_prompts_with_images_are_refused(tmp_path: Path) -> None:
    trainer = es(tmp_path, max_steps=1, population=2)
    trainer.train_dataset = Dataset.from_list([{"prompt": "tea", "images": ["cup.png"]}] * 4)
    with pytest.raises(InputError, match=r"^train_dataset: must have prompts of text alone for ESTrainer, got images\. "):
        trainer.train()
    for rows, images, fields in (
        ([{"image": object()}], None, {}),
        ([{}], [["cup"]], {}),
        ([{"image": None}], None, {"input_features": []}),
    ):
        with pytest.raises(
            InputError, match=r"^train_dataset: .*, got (image|images in messages|input_features)\. Remove"
        ):
            check_text(rows, images, fields)
    check_text([{"image": None, "images": []}, {}], None, {"token_type_ids": [[0]]})


# Options.


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"epsilon": 1e-3}, r"^spsa_options: must be of eps, directions, .*, got 'epsilon'\."),
        ({"query": 2}, r", got 'query'\. Did you mean 'queries'\?$"),
        ({"lr": 1e-3}, r", got 'lr'\. Set learning_rate in the trainer's args\.$"),
    ],
)
def test_options_that_spsa_has_not(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        zeroth_order(SFTTrainer, **options)


@pytest.mark.parametrize(
    "trainer", [zeroth_order(SFTTrainer), ZOPrOTrainer, ESTrainer, checkpointed(ESTrainer), GuidedTrainer]
)
def test_trainers_without_a_backward_pass_already(trainer: type) -> None:
    with pytest.raises(
        TypeError, match=rf"^trainer_cls: must have a backward pass, got {trainer.__name__}, which has none"
    ):
        zeroth_order(trainer)


@pytest.mark.parametrize(
    ("config", "name", "values", "said"),
    [
        (ESConfig, "num_generations", (None, 0, 1.5), "must be a whole number of at least 1"),
        (ESConfig, "population", ("8", 8.0, None), "must be a whole number of at least 1"),
        (ZOPrOConfig, "queries", ("2", 1.5, True), "must be a whole number of at least 1"),
        (ZOPrOConfig, "second_moment_beta", (2.0, 1.0, -0.1), r"must lie in \[0, 1\)"),
        (ZOPrOConfig, "eps_guess", (0, -1.0, "auto", math.inf), "must be finite and above 0"),
        (partial(ZOPrOConfig, eps=1e-3), "eps_guess", (1e-3,), "must be left out unless eps is auto"),
        (partial(ESConfig, sigma="auto"), "sigma_guess", (0, math.nan, "auto"), "must be finite and above 0"),
        (ESConfig, "sigma_guess", (1e-3,), "must be left out unless sigma is auto"),
        (GuidedConfig, "local", ("all",), "must be one of none, mlp, chain, block"),
        (GuidedConfig, "tail", (-1, 1.5), "must be a whole number of at least 0"),
        (GuidedConfig, "top_blocks", (-1,), "must be a whole number of at least 0"),
        (GuidedSPSAConfig, "local", ("all",), "must be one of none, mlp, chain, block"),
        (GuidedSPSAConfig, "tail", (-1,), "must be a whole number of at least 0"),
    ],
)
def test_values_that_are_none_are_refused_before_any_model(
    config: Any, name: str, values: tuple[Any, ...], said: str
) -> None:
    for value in values:
        with pytest.raises(InputError, match=rf"^{name}: {said}, got {value!r}"):
            config(use_cpu=True, **{name: value})


def test_a_compiled_policy_is_refused(tmp_path: Path) -> None:
    args = ZOPrOConfig(str(tmp_path), report_to="none")
    args.torch_compile = True  # given, it would compile whatever this process makes
    with pytest.raises(InputError, match=r"^torch_compile: must be off"):
        ZOPrOTrainer(llama(), tea, args)
