"""What a trainer cannot be made of gets one line that names the argument: adapters, rewards, options."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import LlamaForSequenceClassification
from trl import RLOOConfig, SFTTrainer

from tiny_trainers import es, head_only, llama, online, tea, zopro
from zopro import ESConfig, ESTrainer, ZOPrOConfig, ZOPrOTrainer, zeroth_order
from zopro.errors import InputError
from zopro.train.arguments import kinds
from zopro.train.checkpoints import checkpointed
from zopro.train.construction import check_rewards
from zopro.train.guided import GuidedConfig, GuidedSPSAConfig, GuidedTrainer
from zopro.train.rloo import EngineRLOOTrainer
from zopro.train.rows import check_text
from zopro.weights.live import by_saved_names


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


@pytest.mark.parametrize("build", [zopro, es])
def test_messages_need_a_template(build: Any, tmp_path: Path) -> None:
    trainer = build(tmp_path, max_steps=1)
    trainer.train_dataset = Dataset.from_list([{"prompt": [{"role": "user", "content": "tea"}]}] * 4)
    with pytest.raises(InputError, match=r"processing_class: must have a chat template .*, got none\. Set"):
        trainer.train()


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
        (ZOPrOConfig, "num_generations", (None, 1, 2.0), "must be a whole number of at least 2"),
        (ZOPrOConfig, "eps_guess", (0, -1.0), "must be above 0"),
        (ZOPrOConfig, "eps_guess", ("auto", math.inf), "must be a finite number"),
        (partial(ZOPrOConfig, eps=1e-3), "eps_guess", (1e-3,), "must be left out unless eps is auto"),
        (partial(ESConfig, sigma="auto"), "sigma_guess", (0,), "must be above 0"),
        (ESConfig, "sigma_guess", (1e-3,), "must be left out unless sigma is auto"),
        (GuidedConfig, "local", ("all",), "must be one of none, mlp, chain, block"),
        (GuidedConfig, "tail", (-1, 1.5), "must be a whole number of at least 0"),
        (GuidedConfig, "top_blocks", (-1,), "must be a whole number of at least 0"),
        (GuidedConfig, "guard_every", (-1, "5"), "must be a whole number of at least 0"),
        (GuidedConfig, "guard_eps", (0,), "must be greater than 0"),
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


WRONG = {
    "bool": ("false", [True]),
    "int": ("2", 1.5, True),
    "float": ("0.1", math.nan, [0.1]),
    "list[float]": (["1"], [math.nan, 1.0], [math.inf], 1.0),
    "dict": ([1], "x"),
    "float | str": ("nonsense", [3], math.nan),
    "str": (3, [3]),
}


@pytest.mark.parametrize("config", [ZOPrOConfig, ESConfig, GuidedConfig, GuidedSPSAConfig])
def test_no_option_takes_a_value_of_another_kind(config: Any) -> None:
    """Of ours and of TRL's for RLOO."""
    found = kinds(config)
    assert not [name for name in {*found} - {*RLOOConfig.__dataclass_fields__} if not found[name]], "ours are known"
    assert len(found) > 40
    for name, value in [(name, value) for name, kind in found.items() if kind for value in WRONG[kind]]:
        with pytest.raises(ValueError, match=rf"^{name}: must [^\n]*, got {re.escape(repr(value))}"):
            config(use_cpu=True, **{name: value})


@pytest.mark.parametrize("config", [ZOPrOConfig, ESConfig, GuidedConfig, GuidedSPSAConfig])
def test_no_word_is_taken_that_is_not_known(config: Any) -> None:
    for name in [n for n, kind in kinds(config).items() if kind == "str" and n not in RLOOConfig.__dataclass_fields__]:
        with pytest.raises(InputError, match=rf"^{name}: must [^\n]*, got 'nonsense'"):
            config(use_cpu=True, **{name: "nonsense"})


def test_values_of_their_kind_are_taken() -> None:
    numpy = torch.tensor([0.5]).numpy()
    taken = {"beta": numpy[0], "queries": torch.tensor([2]).numpy()[0], "normalize": numpy[0] > 1, "epsilon": math.inf}
    more = {"reward_weights": numpy, "generation_kwargs": '{"top_k": 3}', "top_k": None, "normalize_advantages": 1}
    assert ZOPrOConfig(use_cpu=True, **taken, **more).generation_kwargs == {"top_k": 3}


def test_values_are_looked_at_again_with_the_trainer(tmp_path: Path) -> None:
    for name, value in (("beta", math.nan), ("reward_weights", [math.nan])):
        args = RLOOConfig(str(tmp_path), use_cpu=True, bf16=False, **{name: value})
        with pytest.raises(InputError, match=f"^{name}: must be .*finite number"):
            EngineRLOOTrainer(llama(), tea, args)


@pytest.mark.parametrize("value", ["60", -1, math.nan, math.inf, True, 2e9])
def test_a_time_limit_is_a_number_of_seconds(value: Any, tmp_path: Path) -> None:
    said = r"^reward_timeout: must be a number of seconds from 0 to 1e\+09, got .*\. 0: no limit\.$"
    with pytest.raises(InputError, match=said):
        zopro(tmp_path, reward_timeout=value)
    assert check_rewards(tea, timeout=None) == [tea]


@pytest.mark.parametrize("model", [None, Path("model"), llama(cls=LlamaForSequenceClassification)])
def test_a_model_that_does_not_answer(model: Any, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"^model: must be a causal .*, got \w+\. Load it with AutoModelForCausalLM, .*\.$"
    ):
        ZOPrOTrainer(model, tea, ZOPrOConfig(str(tmp_path), use_cpu=True))


@pytest.mark.parametrize("value", ["RUN/policy/000", [1], {"a": 1}, {"a": None}, {1: torch.ones(1)}, 5, [], math.nan])
@pytest.mark.parametrize("name", ["previous_update", "reward_update", "reference", "avoid"])
def test_tensors_come_by_name(name: str, value: Any) -> None:
    with pytest.raises(InputError, match=rf"^{name}: must hold tensors by name, got .*\. Use peft\.load_peft_weights"):
        by_saved_names(value, head_only(), name)


def test_an_engine_is_one(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^engine: must follow zopro\.engine\.Engine, got str\.$"):
        es(tmp_path, engine="vllm")


def test_a_folder_may_be_a_text(tmp_path: Path) -> None:
    assert es(tmp_path, kept="kept")._folder == Path("kept")


def test_a_compiled_policy_is_refused(tmp_path: Path) -> None:
    args = ZOPrOConfig(str(tmp_path), report_to="none")
    args.torch_compile = True  # given, it would compile whatever this process makes
    with pytest.raises(InputError, match=r"^torch_compile: must be off"):
        ZOPrOTrainer(llama(), tea, args)
