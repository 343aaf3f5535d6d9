"""Loading, the shared-weights classifier, adapters' targets and files."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CohereConfig, CohereForCausalLM

from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.config.model import ModelOptions
from zopro.engine.local import models
from zopro.errors import InputError
from zopro.weights.adapters import adapter_state

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama", tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def adapted(model, task_type, **options):
    with torch.random.fork_rng(devices=[]):
        return get_peft_model(model, models.lora_config(ModelOptions(model="x", lora_r=2, **options), task_type))


def test_device_and_precision(monkeypatch):
    assert models.resolve_device("cpu") == CPU
    assert models.resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for device in ("tpu-9", "cuda:99"):
        with pytest.raises(InputError, match=f"device: must .* got '{device}'"):
            models.resolve_device(device)
    assert models.resolve_dtype("float32", CPU) == torch.float32
    assert models.resolve_dtype("bfloat16", CPU) == torch.bfloat16
    for amx, avx in ((False, False), (True, False), (False, True)):
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda amx=amx: amx)
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda avx=avx: avx)
        assert models.resolve_dtype("auto", CPU) == (torch.bfloat16 if amx or avx else torch.float32)


def test_load_base(folder, tokenizer):
    model = models.load_base(str(folder), torch.bfloat16, CPU)
    assert model.dtype == torch.bfloat16
    assert not model.training
    expected = tiny_model("llama", tokenizer).state_dict()
    assert torch.equal(model.state_dict()["lm_head.weight"], expected["lm_head.weight"].bfloat16())


@pytest.mark.parametrize("damage", ["absent", "empty", "truncated", "no weights", "lacks a tensor"])
def test_a_model_that_cannot_be_loaded_is_one_line(damage, folder, tokenizer, tmp_path):
    path = tmp_path / "model"
    if damage != "absent":
        path.mkdir()
    if damage not in ("absent", "empty"):
        tiny_model("llama", tokenizer).save_pretrained(path)
        weights = path / "model.safetensors"
        if damage == "truncated":
            weights.write_bytes(weights.read_bytes()[:-100])
        elif damage == "no weights":
            weights.unlink()
        else:
            tensors = load_file(weights)
            del tensors["model.layers.1.mlp.up_proj.weight"]
            save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(InputError) as error:
        models.load_base(str(path), torch.float32, CPU)
    assert str(path) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kind", KINDS)
def test_classifier_shares_the_weights_and_keeps_to_itself(kind, tokenizer):
    base = tiny_model(kind, tokenizer)
    flags = [parameter.requires_grad for parameter in base.parameters()]
    before = copy.deepcopy(base.state_dict())
    state = torch.get_rng_state()
    classifier = models.sequence_classifier(base, tokenizer, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in base.parameters()] == flags
    own = dict(base.base_model.named_parameters())
    for name, parameter in classifier.base_model.named_parameters():
        assert parameter.data_ptr() == own[name].data_ptr(), name
    ids = torch.tensor([[1, 40, 41, 50], [1, 60, 0, 0]])
    hidden = base.base_model(input_ids=ids, attention_mask=(ids != 0).long()).last_hidden_state
    with torch.no_grad():
        scores = classifier(input_ids=ids, attention_mask=(ids != 0).long()).logits
        expected = classifier.score(hidden[torch.arange(2), torch.tensor([3, 1])])
    assert scores.shape == (2, 1)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(models.sequence_classifier(base, tokenizer, seed=3).score.weight, classifier.score.weight)
    assert not torch.equal(models.sequence_classifier(base, tokenizer, seed=4).score.weight, classifier.score.weight)
    model = adapted(classifier, "SEQ_CLS")
    assert not any("lora" in name for name, _ in base.named_modules())
    model(input_ids=ids, attention_mask=(ids != 0).long()).logits.sum().backward()
    assert all(parameter.grad is None for parameter in base.parameters())
    model.unload()
    assert all(torch.equal(tensor, before[name]) for name, tensor in base.state_dict().items())


def test_an_architecture_without_classifier_is_named(tokenizer):
    small = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    base = CohereForCausalLM(CohereConfig(vocab_size=300, pad_token_id=0, bos_token_id=1, eos_token_id=2, **small))
    with pytest.raises(InputError, match="CohereForCausalLM has no sequence classification head"):
        models.sequence_classifier(base, tokenizer, seed=0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_all_linear_leaves_the_heads_alone(kind, task_type, tokenizer):
    base = tiny_model(kind, tokenizer)
    model = base if task_type == "CAUSAL_LM" else models.sequence_classifier(base, tokenizer, seed=0)
    names = [name for name, parameter in adapted(model, task_type).named_parameters() if parameter.requires_grad]
    lora = [name for name in names if "lora_" in name]
    assert len(lora) >= 2 * 2 * 4  # A and B of at least four projections in each of two layers
    assert not [name for name in lora if any(head in name for head in ("lm_head", "embed_out", "score"))]
    assert [name for name in names if name not in lora] == (
        [] if task_type == "CAUSAL_LM" else ["base_model.model.score.modules_to_save.default.weight"]
    )


def test_named_targets(tokenizer):
    model = adapted(tiny_model("llama", tokenizer), "CAUSAL_LM", lora_target_modules="o_proj, down_proj")
    targets = {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name}
    assert targets == {"o_proj", "down_proj"}


@pytest.mark.parametrize("task_type", ["CAUSAL_LM", "SEQ_CLS"])
def test_adapter_state_names_tensors_as_the_model_does(task_type, tokenizer, tmp_path):
    base = tiny_model("llama", tokenizer)
    model = base if task_type == "CAUSAL_LM" else models.sequence_classifier(base, tokenizer, seed=0)
    model = adapted(model, task_type)
    model.save_pretrained(tmp_path)
    state = adapter_state(tmp_path)
    assert "model.layers.1.mlp.down_proj.lora_B.weight" in state
    assert ("score.weight" in state) == (task_type == "SEQ_CLS")
    live = dict(model.named_parameters())
    name = "model.layers.0.self_attn.q_proj.lora_A"
    assert torch.equal(state[f"{name}.weight"], live[f"base_model.model.{name}.default.weight"])


@pytest.mark.parametrize("damage", ["absent", "truncated", "not finite"])
def test_a_damaged_adapter_names_its_file(damage, tokenizer, tmp_path):
    adapted(tiny_model("llama", tokenizer), "CAUSAL_LM").save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    if damage == "absent":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(path.read_bytes()[:-10])
    else:
        tensors = load_file(path)
        next(iter(tensors.values()))[0, 0] = torch.nan
        save_file(tensors, path)
    with pytest.raises(InputError) as error:
        adapter_state(tmp_path)
    assert "adapter_model.safetensors" in str(error.value)
    assert str(tmp_path) in str(error.value)
