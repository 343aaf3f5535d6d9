"""What cannot be trained gets one line when its trainer is made; training that diverges ends with one."""

from __future__ import annotations

import itertools
import logging
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoraConfig,
    PeftModel,
    PolyConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    get_peft_model,
)
from transformers import Trainer, TrainerCallback
from trl import GRPOConfig, RLOOConfig, SFTTrainer

from tiny_trainers import PROMPTS, TOKENIZER, llama, online, plain, tea, weights, with_adapter
from zopro import zeroth_order
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.loop.beforehand import check_beforehand
from zopro.train.checkpoints import checkpointed, fit
from zopro.train.guided import GuidedConfig, GuidedSPSAConfig, GuidedSPSATrainer, GuidedTrainer
from zopro.train.online_dpo import OnlineDPOTrainer
from zopro.train.rloo import EngineRLOOTrainer
from zopro.train.zopro import ZOPrOConfig, ZOPrOTrainer

TRAINERS: dict[str, tuple[type, type]] = {
    "zopro": (ZOPrOTrainer, ZOPrOConfig),
    "guided": (GuidedTrainer, GuidedConfig),
    "guided spsa": (GuidedSPSATrainer, GuidedSPSAConfig),
    "rloo": (EngineRLOOTrainer, RLOOConfig),
    "online dpo": (OnlineDPOTrainer, RLOOConfig),
}


pytestmark = pytest.mark.usefixtures("random_state")


def build(kind: str, folder: Path, model: Any = None, **options: Any) -> Any:
    trainer, config = TRAINERS[kind]
    fixed = {"beta": 0.1, "max_steps": 3, "max_completion_length": 3, "gradient_checkpointing": False}
    if issubclass(config, ZOPrOConfig):
        fixed["eps"] = 1e-2
    return online(trainer, config, folder, {"model": model or with_adapter(), **fixed, **options})


def one_line(error: Any) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    with_adapter().save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", TRAINERS)
def test_an_adapter_that_was_loaded_frozen_is_refused(kind: str, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"requires_grad=True.*is_trainable=True") as error:
        build(kind, tmp_path, PeftModel.from_pretrained(llama(), saved))
    one_line(error)
    build(kind, tmp_path, PeftModel.from_pretrained(llama(), saved, is_trainable=True))
    with pytest.raises(InputError, match=r"model: must be .* got an adapter's, .*AutoPeftModelForCausalLM") as error:
        build(kind, tmp_path, str(saved))
    one_line(error)


@pytest.mark.parametrize(
    ("kind", "rate"), [*itertools.product(TRAINERS, [1e20, math.nan]), ("zopro", 1e12), ("rloo", math.inf)]
)
def test_a_learning_rate_that_is_far_too_high_is_one_line(kind: str, rate: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^(lr|learning_rate): must ") as error:
        build(kind, tmp_path, learning_rate=rate).train()
    assert f"{rate:g}" in one_line(error)


def test_weights_that_diverge_in_the_last_step_are_not_handed_over(tmp_path: Path) -> None:
    trainer = build("rloo", tmp_path, max_steps=1, learning_rate=1e20)
    with pytest.raises(InputError, match=r"^learning_rate: must be .*, got 1e\+20: weights are .* after step 1$"):
        trainer.train()


def test_a_loss_that_is_never_finite_again_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are skipped then, and the weights stay as the last step has left them."""
    original = Trainer.compute_loss
    trainer = plain(tmp_path, {"eps": 1e-3}, max_steps=4, learning_rate=1e5)
    start = weights(trainer.model)

    def overflows(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        near = all((p - start[name]).abs().max() < 1 for name, p in model.named_parameters())
        return original(self, model, *args, **kwargs) * (1 if near else math.nan)

    monkeypatch.setattr(Trainer, "compute_loss", overflows)
    with pytest.raises(InputError, match=r"learning_rate: must leave a loss that is finite, .* in 3 of 4 steps") as error:
        trainer.train()
    assert "got 100000" in one_line(error)


@pytest.mark.parametrize("kind", ["zopro", "guided", "guided spsa"])
def test_args_of_another_trainer_are_refused(kind: str, tmp_path: Path) -> None:
    trainer, config = TRAINERS[kind]
    for other in {RLOOConfig, GRPOConfig, ZOPrOConfig, GuidedConfig} - set(config.__mro__):
        with pytest.raises(ValueError, match=rf"args: must be {config.__name__}\(.* got {other.__name__}\.$") as error:
            online(trainer, other, tmp_path, {"model": with_adapter()})
        one_line(error)
    with pytest.raises(ValueError, match=r"args: must be RLOOConfig\(...\), .* got GRPOConfig"):
        online(EngineRLOOTrainer, GRPOConfig, tmp_path, {"model": with_adapter()})


@pytest.mark.skipif(torch.cuda.is_available(), reason="of machines without a GPU")
def test_without_args_the_defaults_suit_the_machine_or_are_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = Dataset.from_list([{"prompt": prompt, "completion": " yes"} for prompt in PROMPTS])
    for trainer, config in TRAINERS.values():
        made = trainer(with_adapter(), tea, train_dataset=rows.select_columns(["prompt"]), processing_class=TOKENIZER)
        assert type(made.args) is config and not made.args.bf16
    zeroth_order(Trainer)(llama())
    with pytest.raises(ValueError, match=r"args: must be given on a machine without a GPU, .* bf16=False") as error:
        zeroth_order(SFTTrainer)(llama(), train_dataset=rows, processing_class=TOKENIZER)
    one_line(error)


def test_one_direction_is_not_measured_again_and_again() -> None:
    with pytest.raises(ValueError, match="queries: must be 1 with guide=1, which has one direction a step, got 4"):
        GuidedSPSAConfig(use_cpu=True, queries=4)
    assert GuidedSPSAConfig(use_cpu=True, queries=4, guide=0.5).queries == 4
    run = RunConfig(model="m", task="chat", train_data="x", method="guided", guide="spsa", queries=4)
    with pytest.raises(InputError, match="queries: must be 1 with guide: spsa, which has one direction a step, got 4"):
        check_beforehand(run)


def test_a_guided_configuration_has_the_learning_rate_of_the_command() -> None:
    command = RunConfig(model="m", task="chat", train_data="x").guided_learning_rate
    assert GuidedConfig(use_cpu=True).learning_rate == GuidedSPSAConfig(use_cpu=True).learning_rate == command == 2e-4


@pytest.mark.parametrize("kind", ["zopro", "guided", "rloo"])
def test_a_model_in_memory_has_no_reference_policy_and_no_tokenizer(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"beta: must be 0 for a model that was loaded from no folder.*got 0\.1"
    ) as error:
        build(kind, tmp_path, llama())
    one_line(error)
    build(kind, tmp_path, llama(), beta=0.0)
    trainer, config = TRAINERS[kind]
    with pytest.raises(ValueError, match=r"processing_class: must be given for a model that was loaded from no folder"):
        trainer(with_adapter(), tea, config(str(tmp_path), use_cpu=True, bf16=False))


CONFIGS = {
    "AdaLoRA": AdaLoraConfig(r=2, total_step=10, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "Poly": PolyConfig(r=2, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM"),
    "activated LoRA": LoraConfig(r=2, alora_invocation_tokens=[2], target_modules="all-linear", task_type="CAUSAL_LM"),
    "bias='all'": LoraConfig(r=2, bias="all", target_modules="all-linear", task_type="CAUSAL_LM"),
    "init_lora_weights='olora'": LoraConfig(r=2, init_lora_weights="olora", task_type="CAUSAL_LM"),
    "P_TUNING": PromptEncoderConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"),
    "PREFIX_TUNING": PrefixTuningConfig(
        num_virtual_tokens=2, prefix_projection=True, encoder_hidden_size=8, task_type="CAUSAL_LM"
    ),
}


@pytest.mark.parametrize("word", CONFIGS)
@pytest.mark.parametrize("kind", ["zopro", "guided", "rloo"])
def test_adapters_that_cannot_be_driven_are_refused(kind: str, word: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model: must have adapters.* Use ") as error:
        build(kind, tmp_path, get_peft_model(llama(), CONFIGS[word]))
    assert word in one_line(error)


OTHERS = {
    "Dora": LoraConfig(r=2, use_dora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    "IA3": IA3Config(target_modules=["v_proj", "down_proj"], feedforward_modules=["down_proj"], task_type="CAUSAL_LM"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_adapters_are_guided_block_by_block_as_by_back_propagation(kind: str, tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=rf"local: must be 'block' for adapters of the kind {kind}, got 'chain'"
    ) as error:
        build("guided", tmp_path, get_peft_model(llama(), OTHERS[kind]), local="chain")
    one_line(error)
    changes = []
    for trainer, own in (("rloo", {}), ("guided", {"tail": 0, "guard_every": 0})):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = get_peft_model(llama(initializer_range=0.3), OTHERS[kind])
        given = {"max_steps": 1, "optim": "sgd", "learning_rate": 0.1, "max_grad_norm": 0.0, "beta": 0.0}
        made = build(trainer, tmp_path, model, **given, **own)
        before = weights(made.model)
        made.train()
        after = weights(made.model)
        changes.append(torch.cat([(after[name] - before[name]).flatten() for name in before]))
    assert float(changes[0].abs().max()) > 1e-4
    assert float(torch.cosine_similarity(*changes, dim=0)) > 0.999


def test_what_the_guide_does_not_reach_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    trainer = build("guided", tmp_path, get_peft_model(llama(), config), max_steps=2)
    with caplog.at_level(logging.WARNING, logger="zopro"):
        trainer.train()
    said = [record.message for record in caplog.records if "does not reach" in record.message]
    assert said == ["the guide (local=block) does not reach 1 of the 3 trained tensors"]


@pytest.mark.parametrize("kind", ["guided", "guided spsa"])
def test_guided_trainers_leave_alone_what_is_frozen_between_steps(kind: str, tmp_path: Path) -> None:
    trainer = build(kind, tmp_path, max_steps=4, learning_rate=1e-2)
    weight = next(p for n, p in trainer.model.named_parameters() if n.endswith("o_proj.lora_B.default.weight"))
    seen: list[torch.Tensor] = []

    class Freeze(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            weight.requires_grad_(state.global_step not in (1, 2))
            seen.append(weight.detach().clone())

    trainer.add_callback(Freeze)
    trainer.train()
    seen.append(weight.detach().clone())
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(seen)]
    assert moved == [True, False, False, True]


@pytest.mark.parametrize("kind", ["rloo", "guided", "zopro"])
def test_steps_lost_in_16_bits_are_said_once(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for dtype, rate, count in ((torch.bfloat16, 1e-5, 1), (torch.bfloat16, 1e-2, 0), (torch.float32, 1e-5, 0)):
        caplog.clear()
        trainer = build(kind, tmp_path, llama().to(dtype), beta=0.0, learning_rate=rate, max_steps=2)
        with caplog.at_level(logging.WARNING, logger="zopro"):
            trainer.train()
        said = [record.message for record in caplog.records if "resolution" in record.message]
        assert len(said) == count and all("bfloat16" in line and "float32" in line for line in said)


@pytest.mark.parametrize("kind", ["zopro", "guided", "rloo"])
def test_adapters_over_quantised_weights_stay_in_float32(kind: str, tmp_path: Path) -> None:
    trainer, config = TRAINERS[kind]
    shared = {"output_dir": str(tmp_path), "use_cpu": True, "bf16": False, "beta": 0.0, "gradient_checkpointing": False}
    rows = Dataset.from_list([{"prompt": prompt} for prompt in PROMPTS])
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    for model, own in ((llama(), {"peft_config": lora}), (with_adapter(), {})):
        base = model if own else model.get_base_model()
        base.is_loaded_in_8bit, base.hf_quantizer = True, SimpleNamespace(is_trainable=True)
        before = weights(model)
        made = trainer(model, tea, config(**shared), rows, processing_class=TOKENIZER, **own)
        trained = {name: p.detach() for name, p in made.model.named_parameters() if p.requires_grad}
        assert trained and all(tensor.dtype == torch.float32 for tensor in trained.values())
        assert own or all(torch.equal(tensor, before[name]) for name, tensor in trained.items())


def test_a_damaged_checkpoint_is_named(tmp_path: Path) -> None:
    options = {"model": with_adapter(), "max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    trainer = online(checkpointed(GuidedTrainer), GuidedConfig, tmp_path, options)
    trainer.train()
    saved = tmp_path / "out" / "checkpoint-1"
    files = list(saved.iterdir())
    assert len(files) == 6 and saved / "parameters.safetensors" in files
    for file in files:
        whole = file.read_bytes()
        for noise in (b"", b"\x00\xff{"):
            file.write_bytes(noise)
            with pytest.raises(InputError, match=rf"^[^\n]*{re.escape(str(saved))}[^\n]*\Z"):
                fit(trainer)
        file.write_bytes(whole)
    fit(trainer)
    assert trainer.state.global_step == 2
