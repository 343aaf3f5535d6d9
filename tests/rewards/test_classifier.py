"""`model:PATH` against TRL's own use of a reward model, and what is no such classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForSequenceClassification
from trl.data_utils import apply_chat_template

from tiny import tiny_model, tiny_tokenizer
from zopro.errors import InputError
from zopro.rewards.classifier import Classifier

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
TURNS = [{"role": "system", "content": "no cake"}, {"role": "user", "content": "tea?"}]
SHAPE = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}


def saved(folder: Path, template: str | None = TEMPLATE, outputs: int = 1, **options: Any) -> str:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=outputs, **SHAPE, **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        LlamaForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


def test_it_scores_as_trl_does(tmp_path: Path) -> None:
    reward = Classifier(saved(tmp_path), torch.float32, torch.device("cpu"), batch_size=2)
    prompts = [TURNS, TURNS[1:], "tea?"]
    completions: list[Any] = [[{"role": "assistant", "content": text}] for text in ("thank you", "a cup of tea, please")]
    completions.append("two cups")
    found = reward(prompts=prompts, completions=completions, completion_ids=None, answer=["x"] * 3)
    listed = [prompts[0], prompts[1], TURNS[1:]]
    said = [*completions[:2], [{"role": "assistant", "content": "two cups"}]]
    for prompt, completion, score in zip(listed, said, found, strict=True):
        text = apply_chat_template({"messages": prompt + completion}, reward.tokenizer)["text"]
        inputs = reward.tokenizer(text=[text], return_tensors="pt", padding_side="right", add_special_tokens=False)
        with torch.inference_mode():
            assert score == pytest.approx(float(reward.model(**inputs).logits[0, 0]), abs=1e-5)
    assert len(set(found)) == 3


def test_without_a_template_it_reads_a_pair_or_a_line_below_the_other(tmp_path: Path) -> None:
    reward = Classifier(saved(tmp_path / "plain", template=None), torch.float32, torch.device("cpu"))
    ids = reward._read("tea?", "yes")["input_ids"]
    assert reward.tokenizer.decode(ids) == "tea?\nyes"
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"sep_token": "<sep>", "cls_token": "<cls>"})
    tokenizer.save_pretrained(tmp_path / "bert")
    BertForSequenceClassification(
        BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, num_labels=1, **SHAPE)
    ).save_pretrained(tmp_path / "bert")
    pair = Classifier(str(tmp_path / "bert"), torch.float32, torch.device("cpu"))
    both = pair(["tea?", "cake?"], ["yes", "thank you"])
    for prompt, answer, score in zip(["tea?", "cake?"], ["yes", "thank you"], both, strict=True):
        inputs = pair.tokenizer(prompt, answer, return_tensors="pt")
        with torch.inference_mode():
            assert score == pytest.approx(float(pair.model(**inputs).logits[0, 0]), abs=1e-5)


def test_what_is_no_such_classifier_is_refused(tmp_path: Path) -> None:
    def line(path: str) -> str:
        with pytest.raises(InputError) as error:
            Classifier(path, torch.float32, torch.device("cpu"))
        return str(error.value)

    assert "must have one output, got" in line(saved(tmp_path / "two", outputs=2))
    tokenizer = tiny_tokenizer()
    tiny_model("llama", tokenizer).save_pretrained(tmp_path / "causal")
    tokenizer.save_pretrained(tmp_path / "causal")
    assert "num_labels=2" in line(str(tmp_path / "causal")) or "it is no trained classifier" in line(
        str(tmp_path / "causal")
    )
    assert line("no/such/thing").startswith("reward: no folder and no Hub id of that name can be read, got 'no/s")
    with pytest.raises(InputError, match=r"reads 64 tokens, and an answer with its prompt has \d+"):
        Classifier(saved(tmp_path / "one"), torch.float32, torch.device("cpu"))(["tea?"], ["tea " * 80])
