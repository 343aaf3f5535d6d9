"""A GGUF model as PEFT and TRL see it: modules of the right names and shapes, without weights.

Adapters are put on it, saved and loaded by PEFT as ever; the forward passes are llama.cpp's, and one that is asked of the
skeleton is refused.

base = skeleton(Model("model.gguf"))
served(get_peft_model(base, LoraConfig(...))).sample(...)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

import torch
from torch import nn
from transformers import GenerationMixin, PreTrainedConfig, PreTrainedModel

from zopro.config.model import ModelOptions
from zopro.engine.servers.adapters import hollow, lora_tensors
from zopro.engine.servers.llamacpp.adapter import module_names
from zopro.engine.servers.llamacpp.engine import LlamaCppEngine
from zopro.engine.servers.llamacpp.model import Model
from zopro.errors import InputError
from zopro.zo import Gaussian, Weights


class SkeletonConfig(PreTrainedConfig):
    """What the rest of the package asks a configuration."""

    model_type = "gguf"


class Skeleton(PreTrainedModel, GenerationMixin):
    """Names and shapes.

    Attributes:
        served_by: the loaded file.
        serve: makes the engine of this model with adapters on it (`zopro.engine.opening.served`).
        context_note: why its context is shorter than the one that it was trained for; empty where it is not.
    """

    config_class = SkeletonConfig
    main_input_name = "input_ids"
    _supports_sdpa = True

    def __init__(self, config: SkeletonConfig, served_by: Model) -> None:
        super().__init__(config)
        self.served_by, self.serve = served_by, served
        short = served_by.context_length < served_by.trained_context
        self.context_note = (
            " (its original one, beyond which llama.cpp changes what short rows give too: LongRoPE)" if short else ""
        )
        vocabulary, width = served_by.tensors["token_embd.weight"]
        with torch.device("meta"):
            self.model = nn.Module()
            self.model.embed_tokens = nn.Embedding(vocabulary, width)
            for name, weight in module_names(served_by.tensors, served_by.architecture).items():
                out, wide = served_by.tensors[weight]
                parent: nn.Module = self
                *path, last = name.split(".")
                for part in path:
                    if not hasattr(parent, part):
                        parent.add_module(part, nn.Module())
                    parent = getattr(parent, part)
                parent.add_module(last, nn.Linear(wide, out, bias=False))
            self.lm_head = nn.Linear(width, vocabulary, bias=False)
        hollow(self)

    def get_input_embeddings(self) -> Any:
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        return self.lm_head

    def check_tokens(self, tokenizer: Any, texts: Sequence[str]) -> list[str]:
        """Nothing to remark. Raises InputError: llama.cpp encodes a text differently from `tokenizer`, which every prompt
        comes from."""
        for text in texts:
            theirs, ours = self.served_by.tokens(text), tokenizer(text, add_special_tokens=False)["input_ids"]
            if theirs != ours:
                raise InputError(
                    f"model: must have the tokenizer of {self.served_by.path.name}, got one that encodes a prompt "
                    f"differently from llama.cpp: {text[:60]!r}. Name the one that the file was made of."
                )
        return []

    def forward(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise InputError(
            "engine: llamacpp has no network in PyTorch, which this needs. Use engine: transformers with a model that "
            "PyTorch can load."
        )


def open_file(options: ModelOptions) -> Skeleton:
    """What `engine: llamacpp:FILE.gguf` stands for. Raises InputError: as `Model`, and as `skeleton`."""
    return skeleton(Model(options.served))


def skeleton(model: Model) -> Skeleton:
    """Of a loaded file. Raises InputError: no module of it is known that takes an adapter."""
    if not module_names(model.tensors, model.architecture):
        raise InputError(f"engine: no module of {model.path.name} ({model.architecture}) is known that takes an adapter.")
    vocabulary, width = model.tensors["token_embd.weight"]
    config = SkeletonConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        max_position_embeddings=model.context_length,
        eos_token_id=model.stops,
        tie_word_embeddings=False,
    )
    return Skeleton(config, model).requires_grad_(False).eval()


def served(model: Any) -> LlamaCppEngine:
    """The engine at a skeleton's active adapter, whose tensors it reads."""
    tensors, alpha = lora_tensors(model)
    return LlamaCppEngine(model.served_by, Weights.of(tensors.items(), Gaussian()), alpha)
