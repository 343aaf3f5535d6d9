"""The work that is measured: one model with its adapters and a batch of prompts, made from a `Work`."""

from __future__ import annotations

import dataclasses
import math
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from zopro.bench.options import SIZES, Work
from zopro.config.model import ModelOptions
from zopro.engine.local import models
from zopro.engine.local.starts import tokenizer_home
from zopro.engine.local.targets import new_adapter
from zopro.engine.opening import open_base
from zopro.system.random_state import preserve_random_state
from zopro.text.frame import check_embedded
from zopro.text.tokenizer import load_tokenizer
from zopro.weights.saving import save_weights

__all__ = ["Setting", "Work", "build"]

WORDS = ("a", "the", "river", "model", "under", "seven", "birds", "wrote", "slowly", "green", "and", "over", "paper")


@dataclass
class Setting:
    """A `Work` with its objects: base model, policy (a PeftModel, or the base itself), tokenizer and prompts."""

    work: Work
    base: PreTrainedModel
    policy: Any
    tokenizer: PreTrainedTokenizerBase
    prompts: list[str]
    prompt_ids: list[list[int]]
    classifier: PreTrainedModel | None

    @property
    def parameters(self) -> int:
        """Parameters of the base model, in 4 bits two of them in a byte."""
        return sum(
            math.prod(getattr(getattr(parameter, "quant_state", None), "shape", parameter.shape))
            for name, parameter in self.base.named_parameters()
            if "lora_" not in name
        )


def build(work: Work, classifier: bool = True) -> Setting:
    """Load or make the model and the prompts; the reward model's classifier shares its weights."""
    if work.threads:
        torch.set_num_threads(work.threads)
    device = models.resolve_device(work.device)
    options = work.model_options()
    with preserve_random_state():
        torch.manual_seed(work.seed)
        if work.model:
            tokenizer = load_tokenizer(tokenizer_home(work.model))
            base = open_base(options, device)
            check_embedded(tokenizer, base, "the pad token", [tokenizer.pad_token_id])
        else:
            tokenizer, base = _random_model(work, models.resolve_dtype(work.dtype, device), device)
            if options.bits:
                base = _quantised(base, options, device)
        judge = models.sequence_classifier(base, tokenizer, work.seed) if classifier else None
        policy: Any = base.requires_grad_(not work.lora_r)
        if work.lora_r:
            policy = new_adapter(base, options, "CAUSAL_LM")
    prompts = [_prompt(tokenizer, work, number) for number in range(work.prompts)]
    return Setting(work, base, policy, tokenizer, prompts, tokenizer(prompts)["input_ids"], judge)


def _random_model(
    work: Work, dtype: torch.dtype, device: torch.device
) -> tuple[PreTrainedTokenizerBase, PreTrainedModel]:
    hidden, intermediate, layers, heads, key_value_heads = SIZES[work.size]
    vocabulary = {word: number for number, word in enumerate(["<pad>", "<eos>", *WORDS])}
    vocabulary |= {f"w{number}": number for number in range(len(vocabulary), work.vocab_size)}
    text = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="<pad>"))
    text.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=text, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    config = LlamaConfig(
        vocab_size=work.vocab_size,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        max_position_embeddings=8192,
        tie_word_embeddings=hidden < 4096,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=None,
    )
    with device:
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config)
        finally:
            torch.set_default_dtype(before)
    return tokenizer, model.eval()


def _quantised(model: PreTrainedModel, options: ModelOptions, device: torch.device) -> Any:
    """The same model as it is loaded in 4 or 8 bits."""
    with tempfile.TemporaryDirectory() as folder:
        save_weights(model, Path(folder))
        return open_base(dataclasses.replace(options, model=folder), device)


def _prompt(tokenizer: PreTrainedTokenizerBase, work: Work, number: int) -> str:
    """Words until there are `prompt_length` tokens."""
    draw = random.Random(f"{work.seed}/{number}")
    words: list[str] = []
    while len(tokenizer(" ".join(words))["input_ids"]) < work.prompt_length:
        words.append(draw.choice(WORDS))
    return " ".join(words)
