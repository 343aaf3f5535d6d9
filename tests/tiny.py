"""Tiny models and a tokenizer built on the spot, for all tests; nothing is downloaded, the random state is kept."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

KINDS = ("llama", "qwen3", "gemma3", "gpt2", "gpt_neox")
TEXTS = ("a cup of tea, please", "no cake is left", "thank you, the tea was good", "two cups and a cake for me")


def tiny_tokenizer(texts: Iterable[str] | None = None, size: int = 300, phrases: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE of `size` tokens trained on `texts`, with <pad>, <bos> and <eos> as 0, 1 and 2; adds none itself.
    `phrases`: a token may be longer than a word, up to a whole text, for answers of a few tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not phrases)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<pad>", "<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS if texts is None else texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def tiny_model(kind: str, tokenizer: PreTrainedTokenizerFast, seed: int = 0, **options: Any) -> PreTrainedModel:
    """A randomly initialised two-layer fp32 causal model in eval mode; Gemma has a sliding and a full layer, window 8.

    Weights are drawn five times wider than usual, so that logits differ clearly and depend on the whole context.
    """
    attention = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        **ids,
    }
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "initializer_range": 0.1}
        off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        config, cls = GPT2Config(**{"vocab_size": len(tokenizer), **sizes, **off, **ids, **options}), GPT2LMHeadModel
    elif kind == "gpt_neox":
        config, cls = GPTNeoXConfig(**{**common, "num_attention_heads": 4, **options}), GPTNeoXForCausalLM
    elif kind == "gemma3":
        layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 8}
        config = Gemma3TextConfig(**{**common, **attention, **layers, "query_pre_attn_scalar": 8, **options})
        cls = Gemma3ForCausalLM
    else:
        configs = {
            "llama": (LlamaConfig, LlamaForCausalLM),
            "qwen3": (Qwen3Config, Qwen3ForCausalLM),
            "mistral": (MistralConfig, MistralForCausalLM),
        }
        config_cls, cls = configs[kind]
        config = config_cls(**{**common, **attention, **options})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return cls(config).eval()
