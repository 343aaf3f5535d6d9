"""Chat templates by shape, each with what stands around an answer by its own words, for all tests of text.

The shapes are those of widely used model families, written anew and cut down to what differs between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from tiny import TEXTS, tiny_tokenizer

TOKENS = (
    "<|im_start|>", "<|im_end|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>",
    "<end_of_turn>", "<think>", "</think>", "<|start|>", "<|channel|>", "<|message|>", "<|return|>", "<|end|>",
    "<|user|>", "<|assistant|>", "<end_of_utterance>", "<|END_RESPONSE|>", "<|END_OF_TURN|>",
)  # fmt: skip


@dataclass(frozen=True)
class Shape:
    """opening, ending: what is around an answer; declared: tokens that the model says end an answer."""

    template: str
    ending: str
    opening: str = ""
    declared: tuple[str, ...] = ()
    parts: bool = False
    options: dict[str, Any] = field(default_factory=dict)
    system: bool = True


_CHATML = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
_ASKS = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
_QWEN3 = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}"
)
_SWITCH = "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% if not enable_thinking | default(true) %}"
_HEADER = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"

SHAPES = {
    "chatml": Shape(_CHATML + _ASKS, "<|im_end|>"),
    "chatml with a system prompt of its own": Shape(
        "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + _CHATML + _ASKS,
        "<|im_end|>",
    ),
    "llama 2": Shape(
        "{% for m in messages %}{% if m.role == 'user' %}<bos>[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content | trim }} <eos>{% endif %}{% endfor %}",
        " <eos>",
        " ",
        system=False,
    ),
    "mistral": Shape(
        "<bos>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
        "{% elif m.role == 'assistant' %} {{ m.content }}<eos>"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}",
        "<eos>",
        " ",
        system=False,
    ),
    "llama 3": Shape(
        "<bos>{% for m in messages %}" + _HEADER + "{{ m.content | trim }}<|eot_id|>{% endfor %}"
        "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}",
        "<|eot_id|>",
    ),
    "gemma": Shape(
        "<bos>{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
        "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
        "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<end_of_turn>",
        system=False,
    ),
    "phi": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% else %}<eos>{% endif %}",
        "<|end|>",
        declared=("<eos>", "<|end|>"),
    ),
    "reasoning, empty where there is none": Shape(_QWEN3 + _ASKS, "<|im_end|>", "<think>\n\n</think>\n\n"),
    "reasoning left open, with a switch": Shape(
        _QWEN3.replace("\n\n</think>\n\n", "</think>")
        + _SWITCH.replace("<think>\n", "<think>")
        + "</think>{% else %}\n{% endif %}{% endif %}",
        "<|im_end|>",
        options={"enable_thinking": False},
    ),
    "reasoning left open and closed by the answer, with a switch": Shape(
        _QWEN3 + _SWITCH + "{{ '\n</think>\n\n' }}{% endif %}{% endif %}",
        "<|im_end|>",
        options={"enable_thinking": False},
    ),
    "channels": Shape(
        "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}<|channel|>final{% endif %}"
        "<|message|>{{ m.content }}"
        "{% if m.role == 'assistant' and loop.last %}<|return|>{% else %}<|end|>{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}",
        "<|return|>",
        "<|channel|>final<|message|>",
    ),
    "an end of two tokens": Shape(
        _CHATML.replace("<|im_end|>\n", "<|END_RESPONSE|><|END_OF_TURN|>") + _ASKS,
        "<|END_RESPONSE|><|END_OF_TURN|>",
        declared=("<|END_OF_TURN|>",),
    ),
    "a last turn left open": Shape(
        "<bos>"
        + _CHATML.replace("<|im_end|>\n", "{% if not (loop.last and m.role == 'assistant') %}<|im_end|>\n{% endif %}")
        + _ASKS,
        "<|im_end|>",
    ),
    "ended by the next speaker": Shape(
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
        "<|user|>",
        declared=("<eos>", "<|user|>"),
    ),
    "parts, text as nothing": Shape(
        "<bos>{% for m in messages %}{{ m.role | capitalize }}:"
        "{% for part in m.content %}{% if part.type == 'image' %}<image>{% elif part.type == 'text' %} {{ part.text }}"
        "{% endif %}{% endfor %}<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}Assistant:{% endif %}",
        "<end_of_utterance>",
        " ",
        parts=True,
    ),
    "parts, text refused": Shape(
        "<bos>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content[0].text.strip() }} [/INST]"
        "{% else %} {{ m.content[0].text.strip() }}<eos>{% endif %}{% endfor %}",
        "<eos>",
        " ",
        parts=True,
    ),
    "no end at all": Shape(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}",
        "<eos>",
        " ",
    ),
}


KINDS = ("byte-level", "spaces as tokens", "a space before every piece", "a space before the first piece")


def with_template(template: str | None, kind: str = "byte-level") -> PreTrainedTokenizerFast:
    """A tiny tokenizer of a kind with `TOKENS` and a template; two kinds add BOS."""
    tokenizer = tiny_tokenizer() if kind == "byte-level" else _sentence_pieces(kind)
    tokenizer.add_tokens(list(TOKENS), special_tokens=True)
    tokenizer.chat_template = template
    return tokenizer


def _sentence_pieces(kind: str) -> PreTrainedTokenizerFast:
    """Sentence pieces as Llama and Mistral have them, old (a normaliser's space) and new (Metaspace)."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    if kind == "a space before every piece":
        spaces = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        tokenizer.normalizer = normalizers.Sequence(spaces)
    else:
        scheme = "first" if kind == "a space before the first piece" else "never"
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    parts = [decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(parts)
    trainer = trainers.BpeTrainer(
        vocab_size=250,
        special_tokens=["<pad>", "<bos>", "<eos>", "<unk>"],
        initial_alphabet=["\n", *map(chr, range(33, 127))],
        show_progress=False,
    )
    tokenizer.train_from_iterator([text.replace(" ", "\u2581") for text in TEXTS], trainer)
    if kind != "spaces as tokens":
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", pair="<bos> $A $B", special_tokens=[("<bos>", 1)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def in_parts(messages: list[dict[str, str]]) -> list[dict[str, Any]]:
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]
