"""A finished run on the disk without a loop: a base of a few words, and adapters large enough to change every answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zopro.config import RunConfig

WORDS = "user assistant what is a good day for the garden red green blue tall small"
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}assistant {% endif %}"
)


def save_base(folder: Path) -> None:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = ["<unk>", "<eos>", "<pad>"]
    tokenizer.train_from_iterator([WORDS], trainers.WordLevelTrainer(special_tokens=special))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>")
    fast.chat_template = TEMPLATE
    fast.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=fast.eos_token_id,
        pad_token_id=fast.pad_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def save_adapter(base: Path, folder: Path) -> None:
    """An adapter with weights large enough to change every answer."""
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, target_modules="all-linear"))
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(folder)


def write_config(run: Path, **options: Any) -> None:
    config = RunConfig(task="chat", train_data="x", max_completion_length=6, dtype="float32", device="cpu", **options)
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))


def finished_run(folder: Path) -> Path:
    """A run with two finished LoRA iterations, and a third that has only begun; its base is beside it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_base(folder / "base")
        for part in ("sft", "policy/000", "policy/001"):
            save_adapter(folder / "base", folder / "run" / part)
    (folder / "run" / "policy" / "002").mkdir()
    write_config(folder / "run", model=str(folder / "base"))
    return folder / "run"


def policy(run: Path, part: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(run.parent / "base", dtype=torch.float32)
    return PeftModel.from_pretrained(base, run / part).eval()


def greedy(run: Path, model: Any, *said: str) -> str:
    """What transformers itself answers to messages of a user and an assistant by turns."""
    tokenizer = AutoTokenizer.from_pretrained(run.parent / "base")
    messages = [{"role": ("user", "assistant")[index % 2], "content": text} for index, text in enumerate(said)]
    ids = tokenizer(
        tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False), return_tensors="pt"
    )
    out = model.generate(**ids, max_new_tokens=6, do_sample=False)
    answer: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return answer.strip()
