"""Models with weights of a few bits: adapters in float32 over them, a reward model that shares them, or one line."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from one_run import no_report
from tiny import tiny_model, tiny_tokenizer
from tiny_runs import config, write_inputs
from tiny_trainers import es, llama, same, weights, zopro
from zopro import cli
from zopro.bench.options import Work
from zopro.config import RunConfig
from zopro.config import model as model_options
from zopro.config.model import ModelOptions
from zopro.engine import Batch, Sampling
from zopro.engine.local import models
from zopro.engine.local.abilities import Abilities, abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.quantised import check_trainable, hide, quantised, shown
from zopro.engine.local.targets import new_adapter
from zopro.engine.opening import open_base
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.beforehand import check_beforehand
from zopro.loop.export import export
from zopro.zo import Displacement, Gaussian, Weights

TOKENIZER = tiny_tokenizer()
IDS = torch.tensor([[1, 40, 41, 50], [1, 60, 61, 62]])


class Eighths(nn.Linear):
    """A linear layer of 8-bit weights and one scale, as the libraries make them: no float weight to take away."""

    def __init__(self, source: nn.Linear) -> None:
        super().__init__(source.in_features, source.out_features, source.bias is not None, device="meta")
        self.scale = float(source.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((source.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    one_way = False

    def forward(self, x: Tensor) -> Tensor:
        assert not (Eighths.one_way and torch.is_grad_enabled()), "function values need no way back"
        return x @ (self.weight.to(x.dtype) * self.scale).T


def stored_in_8_bits(model: PreTrainedModel, trainable: bool = True) -> Any:
    for name, module in list(model.base_model.named_modules()):
        if isinstance(module, nn.Linear):
            model.base_model.set_submodule(name, Eighths(module))
    model.hf_quantizer = SimpleNamespace(
        is_trainable=trainable, quantization_config=SimpleNamespace(quant_method="eighths")
    )
    model.is_loaded_in_8bit = True
    hide(model)
    return model.requires_grad_(False)


def base(**options: Any) -> Any:
    return stored_in_8_bits(tiny_model("llama", TOKENIZER), **options)


def test_the_reward_model_shares_what_is_stored():
    model = base()
    classifier = models.sequence_classifier(model, TOKENIZER, seed=0)
    theirs = dict(model.base_model.named_parameters())
    for name, parameter in classifier.base_model.named_parameters():
        assert parameter.data_ptr() == theirs[name].data_ptr() and parameter.dtype == theirs[name].dtype, name
    with torch.no_grad():
        hidden = model.base_model(input_ids=IDS).last_hidden_state[:, -1]
        torch.testing.assert_close(classifier(input_ids=IDS).logits, classifier.score(hidden))
        before = model(input_ids=IDS).logits
    options = ModelOptions(model="x", lora_r=2)
    reward = new_adapter(classifier, options, "SEQ_CLS")
    reward(input_ids=IDS).logits.sum().backward()
    assert not any("lora" in name for name, _ in model.named_modules())
    with torch.no_grad():
        assert torch.equal(model(input_ids=IDS).logits, before)
    reward.unload()
    assert all(type(module) is not nn.Linear for module in classifier.base_model.modules())


def test_only_peft_sees_how_weights_are_stored():
    model = base()
    assert quantised(model) and not model.is_loaded_in_8bit
    with shown(model):
        assert model.is_loaded_in_8bit
    policy = new_adapter(model, ModelOptions(model="x", lora_r=2), "CAUSAL_LM")
    assert not policy.is_loaded_in_8bit
    with shown(policy):
        assert policy.is_loaded_in_8bit
    assert not quantised(tiny_model("llama", TOKENIZER))


def test_what_nothing_can_be_trained_over_is_refused_when_loaded():
    check_trainable(tiny_model("llama", TOKENIZER), lora_r=0)
    check_trainable(base(), lora_r=8)
    with pytest.raises(InputError, match="lora_r: must be greater than 0 over weights quantised by eighths"):
        check_trainable(base(), lora_r=0)
    with pytest.raises(InputError, match="model: its weights are quantised by eighths, over which transformers trains"):
        check_trainable(base(trainable=False), lora_r=8)


@pytest.mark.parametrize("method", ["zopro", "es"])
def test_function_values_take_no_way_back(method, tmp_path, monkeypatch):
    """Not even when a model is first seen; where autograd is on, its way back is tried too."""
    monkeypatch.setattr(Eighths, "one_way", True)
    policy = new_adapter(stored_in_8_bits(llama()), ModelOptions(model="x", lora_r=2), "CAUSAL_LM")
    trainer = {"zopro": zopro, "es": es}[method](tmp_path, model=policy, max_steps=2)
    before = weights(trainer.model)
    trainer.train()
    assert not same(weights(trainer.model), before)
    monkeypatch.setattr(Eighths, "one_way", False)
    assert abilities(causal_parts(policy)) == Abilities()


def test_quantised_as_it_is_loaded_is_refused_in_one_line(tmp_path, monkeypatch):
    tiny_model("llama", TOKENIZER).save_pretrained(tmp_path)
    options = ModelOptions(model=str(tmp_path), load_in_4bit=True)
    monkeypatch.setattr(model_options, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"^load_in_4bit: needs bitsandbytes, which is not installed. Run: pip install"):
        open_base(options, torch.device("cpu"))
    for given in (4, 8):
        run = RunConfig(model=str(tmp_path), task="chat", train_data="x", **{f"load_in_{given}bit": True})
        with pytest.raises(InputError, match=f"^load_in_{given}bit: needs bitsandbytes"):
            check_beforehand(run)
        with pytest.raises(InputError, match=f"^load_in_{given}bit: needs bitsandbytes"):
            Work(size="tiny", **{f"load_in_{given}bit": True})
    monkeypatch.undo()
    monkeypatch.setattr(model_options, "find_spec", lambda name: object())
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match=r"load_in_4bit: must not be given, the weights of .* are quantised already"):
        open_base(options, torch.device("cpu"))
    (tmp_path / "config.json").unlink()
    named = {"peft_type": "LORA", "base_model_name_or_path": "base"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(named))
    with pytest.raises(InputError, match="model: must be a model where it is quantised when loaded, got the adapter"):
        open_base(options, torch.device("cpu"))
    for given, line in (
        ({"load_in_8bit": True}, "load_in_8bit: must be false with load_in_4bit: true, got True"),
        ({"lora_r": 0}, "lora_r: must be greater than 0 with load_in_4bit or load_in_8bit, got 0"),
        ({"engine": "llamacpp:m.gguf"}, "engine: must be transformers with load_in_4bit or load_in_8bit"),
    ):
        with pytest.raises(InputError, match=line):
            ModelOptions(model="x", load_in_4bit=True, **given)


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes_as_it_is_loaded(bits, tmp_path):
    """Where it is installed: the key alone, float32 adapters, log-probs and steps by function values."""
    bitsandbytes = pytest.importorskip("bitsandbytes")
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    tiny_model("llama", TOKENIZER, **sizes).save_pretrained(tmp_path)
    options = ModelOptions(model=str(tmp_path), lora_r=2, dtype="float32", **{f"load_in_{bits}bit": True})
    base = open_base(options, torch.device("cpu"))
    kind = bitsandbytes.nn.Linear4bit if bits == 4 else bitsandbytes.nn.Linear8bitLt
    linear = [module for module in base.base_model.modules() if isinstance(module, torch.nn.Linear)]
    assert quantised(base) and linear and all(isinstance(module, kind) for module in linear)
    policy = new_adapter(base.requires_grad_(False), options, "CAUSAL_LM")
    trained = [(name, parameter) for name, parameter in policy.named_parameters() if parameter.requires_grad]
    assert {parameter.dtype for _, parameter in trained} == {torch.float32}
    engine = LocalEngine(policy, Weights.of(trained, Gaussian()))
    plus = Displacement(0, 0, 0, 1.0, (0.1,))
    rollouts = engine.sample([[1, 40, 41], [1, 50]], 2, Sampling(6, [2], 0), [None])[0]
    with torch.no_grad():
        found = engine.logprobs(Batch.of(rollouts), [None, plus, plus.mirrored])
        engine.logprob_tokens = 10**6
        together = engine.logprobs(Batch.of(rollouts), [None, plus, plus.mirrored])
    assert (found[1] - found[2]).abs().max() > 1e-3, "displacements show"
    for one, other in zip(together, found, strict=True):
        # of 8 bits bitsandbytes rounds what a layer reads as well
        torch.testing.assert_close(one, other, atol=0.1 if bits == 8 else 1e-4, rtol=0)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def test_the_loop_runs_and_its_adapters_stay_in_float32(inputs, tmp_path, monkeypatch):
    """TRL turns what is trained over 4 and 8 bits to bfloat16, where it sees them."""
    loaded = models.load_base

    def load(*given: Any) -> Any:
        return stored_in_8_bits(loaded(*given))

    for module in ("zopro.engine.opening", "zopro.loop.models"):
        monkeypatch.setattr(f"{module}.load_start", load)
    no_report(monkeypatch)
    run = tmp_path / "run"
    summary = pipeline.run(config(inputs, run, dtype="float32", policy_steps=1), quiet=True)
    assert summary["iterations"] == 2
    for folder in ("sft", "policy/000", "policy/001", "reward/000", "reward/002"):
        assert {t.dtype for t in load_file(run / folder / "adapter_model.safetensors").values()} == {torch.float32}
    export(run, tmp_path / "adapter")
    with pytest.raises(InputError, match="--merged: must not be given, the run's model is quantised"):
        export(run, tmp_path / "model", merged=True)
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize("bits", [4, 8])
def test_bitsandbytes(bits, inputs, tmp_path, capsys, monkeypatch):
    """Where it is installed: a saved folder, given to the command."""
    pytest.importorskip("bitsandbytes")
    from transformers import BitsAndBytesConfig

    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    no_report(monkeypatch)
    wide, folder = tmp_path / "wide", tmp_path / "model"
    tokenizer = AutoTokenizer.from_pretrained(inputs / "model")
    tiny_model("llama", tokenizer, hidden_size=64, intermediate_size=128, head_dim=16).save_pretrained(wide)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8)
    AutoModelForCausalLM.from_pretrained(wide, quantization_config=settings).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run = tmp_path / "run"
    options = config(inputs, run, model=str(folder), dtype="float32", policy_steps=1)
    pipeline.run(options, quiet=True)
    saved = load_file(run / "policy" / "001" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in saved.values()} == {torch.float32}
    assert gradients_agree(models.load_base(str(folder), torch.float32, torch.device("cpu")), wide)


def gradients_agree(model: Any, wide: Path) -> bool:
    """Sampling first, as the loop does: the adapters' gradient is that over the same weights in float32."""
    import bitsandbytes

    plain = AutoModelForCausalLM.from_pretrained(wide, dtype=torch.float32)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            values = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = values.float()
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            plain.get_submodule(name).weight.data = module.weight.CB.float() * module.weight.SCB[:, None] / 127
    gradients = []
    for base in (model, plain):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            policy = new_adapter(base.requires_grad_(False), ModelOptions(model="x", lora_r=2), "CAUSAL_LM").eval()
            trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
            for parameter in trained:
                parameter.data += 0.1 * torch.randn(parameter.shape)
        with torch.no_grad():
            policy(input_ids=IDS)
        policy(input_ids=IDS).logits.log_softmax(-1)[:, -1, 3].sum().backward()
        gradients.append(torch.cat([parameter.grad.flatten() for parameter in trained]))
    return float(torch.cosine_similarity(*gradients, dim=0)) > 0.995
