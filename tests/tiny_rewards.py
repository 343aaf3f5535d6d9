"""A tiny reward model that can learn which words are kind, and rows for it."""

from __future__ import annotations

import random

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from zopro.rewards import Pair, RewardModel, Scored
from zopro.system.random_state import preserve_random_state

KIND, RUDE = ("please", "thanks", "gladly"), ("never", "nonsense", "wrong")
NEUTRAL = ("the", "tea", "is", "here", "and", "cake", "now", "for", "you")
PROMPTS = ("a b c :", "a b :", "c :")


def make_tokenizer(pad: str | None = "<pad>") -> PreTrainedTokenizerFast:
    words = ["<pad>", "<bos>", "<eos>", "<unk>", "a", "b", "c", ":", *KIND, *RUDE, *NEUTRAL]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=pad, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )


def make_classifier(dtype: torch.dtype = torch.float32) -> LlamaForSequenceClassification:
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_labels=1,
        pad_token_id=0,
    )
    with preserve_random_state():
        torch.manual_seed(0)
        return LlamaForSequenceClassification(config).to(dtype)


def make_model(
    max_length: int = 32, adapter: str = "default", dtype: torch.dtype = torch.float32, pad: str | None = "<pad>"
) -> RewardModel:
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="SEQ_CLS")
    with preserve_random_state():
        torch.manual_seed(1)
        model = get_peft_model(make_classifier(dtype), lora, adapter_name=adapter)
    return RewardModel(model, make_tokenizer(pad), max_length)


def answer(rng: random.Random, words: tuple[str, ...], count: int = 1) -> str:
    """Neutral words with `count` of `words` among them; a blank first, as the prompt's last word ends before it."""
    filled = rng.choices(NEUTRAL, k=rng.randint(2, 8)) + rng.choices(words, k=count)
    rng.shuffle(filled)
    return " " + " ".join(filled)


def make_pairs(count: int, seed: int) -> list[Pair]:
    rng = random.Random(seed)
    return [Pair(rng.choice(PROMPTS), answer(rng, KIND), answer(rng, RUDE)) for _ in range(count)]


def make_scored(count: int, seed: int) -> list[Scored]:
    """Scores around 60, 10 more for each kind word: far from standardised."""
    rng = random.Random(seed)
    kind = [rng.randint(0, 4) for _ in range(count)]
    return [Scored(rng.choice(PROMPTS), answer(rng, KIND, n), 60.0 + 10 * n) for n in kind]


def sample_ids(count: int, seed: int) -> tuple[list[list[int]], list[list[int]]]:
    """Prompts and completions of many lengths, none holding padding or EOS."""
    rng = random.Random(seed)
    prompts = [[1, *rng.choices(range(4, 23), k=rng.randint(1, 6))] for _ in range(count)]
    return prompts, [rng.choices(range(4, 23), k=rng.randint(1, 9)) for _ in range(count)]
