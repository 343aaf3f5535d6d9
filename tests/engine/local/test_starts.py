"""An adapter given as the model: what it is merged into, what it refuses, and one exported adapter after two runs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from one_run import no_report
from tiny import tiny_model
from tiny_runs import config, write_inputs
from zopro import cli
from zopro.engine.local.starts import load_start, start_adapter, start_note, tokenizer_home
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.export import export
from zopro.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 70, 8, 9]])
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora, patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 4}, "alpha_pattern": {r"layers.1.*up_proj": 32}},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
}
MORE: dict[str, dict[str, Any]] = {
    "dora": {"use_dora": True},
    "whole modules": {"modules_to_save": ["lm_head"]},
    "bias": {"bias": "all"},
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_inputs(tmp_path_factory.mktemp("inputs"), layers=2)


def adapted(inputs: Path, folder: Path, seed: int = 0, with_base: bool = False, **options: Any) -> Path:
    """A saved adapter whose weights change every answer, without a tokenizer. with_base: as PEFT saves it by default."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        base = AutoModelForCausalLM.from_pretrained(inputs / "model")
        settings = {"r": 2, "target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM", **options}
        model = get_peft_model(base, LoraConfig(**settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.2 * torch.randn(parameter.shape)
    model.save_pretrained(folder, save_embedding_layers=with_base)
    return folder


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def policy_over(start: str, policy: Path) -> torch.Tensor:
    """What the run's policy says, put together by PEFT: its adapter over the merged start."""
    return logits(PeftModel.from_pretrained(load_start(start, torch.float32, CPU), policy))


@pytest.mark.parametrize("kind", [*KINDS, *MORE])
def test_an_adapter_is_merged_into_its_base(kind, inputs, tmp_path):
    folder = adapted(inputs, tmp_path / "adapter", **(KINDS | MORE)[kind])
    state = torch.get_rng_state()
    merged = load_start(str(folder), torch.float32, CPU)
    assert torch.equal(torch.get_rng_state(), state)
    assert not any("lora" in name for name, _ in merged.named_modules())
    expected = logits(PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(inputs / "model"), folder))
    torch.testing.assert_close(logits(merged), expected, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(logits(AutoModelForCausalLM.from_pretrained(inputs / "model")), expected, atol=1e-2)


@pytest.mark.parametrize("end", ["lm_head", "embed_tokens"])
def test_an_adapter_of_one_end_of_the_model(end, inputs, tmp_path):
    """PEFT saves the weights below it too, which must be the model's; and ends that share theirs cannot have one."""
    folder = adapted(inputs, tmp_path / "adapter", with_base=True, target_modules=["q_proj", end])
    plain = AutoModelForCausalLM.from_pretrained(inputs / "model")
    expected = logits(PeftModel.from_pretrained(plain, folder))
    torch.testing.assert_close(logits(load_start(str(folder), torch.float32, CPU)), expected, atol=1e-4, rtol=1e-4)
    file = folder / "adapter_model.safetensors"
    (name,) = (name for name in load_file(file) if "base_layer" in name)
    save_file({key: tensor + (key == name) for key, tensor in load_file(file).items()}, file)
    with pytest.raises(InputError, match=rf"but .*{end}.base_layer.weight is another weight than the model's"):
        load_start(str(folder), torch.float32, CPU)
    tied = tiny_model("llama", load_tokenizer(str(inputs / "model")), tie_word_embeddings=True)
    tied.save_pretrained(tmp_path / "tied")
    with pytest.raises(InputError, match=rf"must not adapt (model.)?{end}: embeddings and output head share"):
        load_start(changed(folder, base_model_name_or_path=str(tmp_path / "tied")), torch.float32, CPU)


def test_its_tokenizer_is_its_own_or_its_base_s(inputs, tmp_path):
    folder = adapted(inputs, tmp_path / "adapter")
    assert tokenizer_home(str(folder)) == str(inputs / "model")
    load_tokenizer(str(inputs / "model")).save_pretrained(folder)
    assert tokenizer_home(str(folder)) == str(folder)
    assert start_note(str(folder)) == f"model {folder} is an adapter: merged into its base {inputs / 'model'} in memory"
    assert start_adapter(str(inputs / "model")) is start_note(str(inputs / "model")) is None


def second_run(inputs: Path, run: Path, start: str, **options: Any) -> Path:
    """The policy that a run over `start` would have left in `run`."""
    (run / "policy").mkdir(parents=True)
    policy = run / "policy" / "000"
    shutil.copytree(adapted(inputs, run.parent / "second", seed=2, **options), policy)
    (run / "config.yaml").write_text(json.dumps(config(inputs, run, model=start, dtype="float32").to_dict()))
    return policy


@pytest.mark.parametrize("kind", KINDS)
def test_the_second_run_s_adapter_belongs_to_the_first_base(kind, inputs, tmp_path, monkeypatch):
    """run -> export -> run -> export: PEFT alone, on the base that everybody has, says what the second policy says."""
    start = str(adapted(inputs, tmp_path / "first", seed=1, **KINDS[kind]))
    policy = tmp_path / "run" / "policy" / "000"
    if kind == "plain":
        no_report(monkeypatch)
        options = {"lora_target_modules": "o_proj, up_proj", "dtype": "float32", "sft_learning_rate": 0.02}
        pipeline.run(config(inputs, tmp_path / "run", model=start, iterations=1, policy_steps=1, **options), quiet=True)
        named = json.loads((policy / "adapter_config.json").read_text())["base_model_name_or_path"]
        assert named == f"{inputs / 'model'} + {start}", "the run's own adapter is not the base's"
        with pytest.raises(OSError, match=r"is not a local folder|Repo id|repo name"):
            AutoPeftModelForCausalLM.from_pretrained(policy)
    else:
        second_run(inputs, tmp_path / "run", start, target_modules=["o_proj", "up_proj"])
    expected = policy_over(start, policy)
    assert not torch.allclose(logits(load_start(start, torch.float32, CPU)), expected, atol=1e-3), "it moved"

    written = export(tmp_path / "run", tmp_path / "adapter")
    assert written["base"] == str(inputs / "model")
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter", dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, atol=1e-4, rtol=1e-4)
    export(tmp_path / "run", tmp_path / "model", merged=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), expected, atol=1e-4, rtol=1e-4)
    third = load_start(str(tmp_path / "adapter"), torch.float32, CPU)
    torch.testing.assert_close(logits(third), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kind", MORE)
def test_what_cannot_be_joined_is_exported_as_a_model(kind, inputs, tmp_path):
    start = str(adapted(inputs, tmp_path / "first", seed=1, **MORE[kind]))
    run = tmp_path / "run"
    policy = second_run(inputs, run, start)
    with pytest.raises(InputError, match="Use --merged"):
        export(run, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export(run, tmp_path / "out", merged=True)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    torch.testing.assert_close(logits(whole), policy_over(start, policy), atol=1e-4, rtol=1e-4)


def changed(folder: Path, **values: Any) -> str:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return str(folder)


def test_adapters_that_are_no_start(inputs, tmp_path):
    folder = adapted(inputs, tmp_path / "adapter")
    for values, words in (
        ({"task_type": "SEQ_CLS"}, "must be a language model's adapter"),
        ({"peft_type": "LOHA"}, r"must be a model or a LORA adapter, .*Merge it with PEFT"),
        ({"base_model_name_or_path": None}, "must name its base"),
        (
            {"base_model_name_or_path": str(tmp_path / "gone")},
            "needs its base, which adapter_config.json names",
        ),
        ({"base_model_name_or_path": str(folder)}, "must be a model, got the adapter"),
    ):
        one = shutil.copytree(folder, tmp_path / "one", dirs_exist_ok=True)
        with pytest.raises(InputError, match=words):
            load_start(changed(Path(one), **values), torch.float32, CPU)
    tiny_model("llama", load_tokenizer(str(inputs / "model")), hidden_size=16).save_pretrained(tmp_path / "narrow")
    with pytest.raises(InputError, match="must be an adapter of this model"):
        load_start(changed(folder, base_model_name_or_path=str(tmp_path / "narrow")), torch.float32, CPU)


def test_answers_compare_and_bench_take_it_too(inputs, tmp_path, monkeypatch, capsys):
    """`generate` of a run over an adapter: its base answers as the adapter does. `bench` loads it as the run does."""
    from zopro.bench.work import Work, build

    start = adapted(inputs, tmp_path / "first", seed=1)
    run = tmp_path / "run"
    second_run(inputs, run, str(start))
    assert cli.main(["generate", str(run), "--prompt", "tea or cake?", "--max-new-tokens", "6", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["answers"]
    tokenizer = load_tokenizer(str(inputs / "model"))
    chat = [{"role": "user", "content": "tea or cake?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    merged = load_start(str(start), torch.float32, CPU)
    out = merged.generate(**ids, max_new_tokens=6, do_sample=False)[0, ids["input_ids"].shape[1] :]
    assert row["base"] == tokenizer.decode(out, skip_special_tokens=True).strip()
    setting = build(Work(model=str(start), prompts=1, num_generations=2, dtype="float32", device="cpu"))
    ours = {name: p for name, p in setting.base.named_parameters() if "lora" not in name}
    plain = {name.replace(".base_layer", ""): p for name, p in ours.items()}
    assert all(torch.equal(plain[name], p) for name, p in merged.named_parameters())
