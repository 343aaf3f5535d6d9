"""`model:PATH` against TRL's own use of a reward model, and what is no such classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)
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


@pytest.mark.parametrize(
    ("of_tokenizer", "of_config"), [("<pad>", 0), (None, None), ("<eos>", None), ("<eos>", 0), ("<eos>", 2), (None, -1)]
)
def test_the_score_is_that_of_the_conversation_alone(of_tokenizer: str | None, of_config: int | None, tmp_path: Path):
    """Whatever pads: transformers reads a decoder's score at the last token that is not config.pad_token_id."""
    path = saved(tmp_path, pad_token_id=of_config, initializer_range=0.2)
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.pad_token = of_tokenizer
    tokenizer.save_pretrained(path)
    reward = Classifier(path, torch.float32, torch.device("cpu"))
    model = AutoModelForSequenceClassification.from_pretrained(path).eval()
    assert tokenizer.eos_token_id == 2 and tokenizer.convert_ids_to_tokens(0) == "<pad>"
    for template in (TEMPLATE, TEMPLATE.replace("{{ eos_token }}", "")):
        tokenizer.chat_template = reward.tokenizer.chat_template = template
        answers = ["two cups", "no", "tea or cake, please<pad>"]
        for answer, score in zip(answers, reward(["tea?"] * 3, answers), strict=True):
            turns = [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(turns, tokenize=False)
            inputs = tokenizer(text, add_special_tokens=False, return_tensors="pt")
            with torch.inference_mode():
                assert score == pytest.approx(float(model(**inputs).logits[0, 0]), abs=1e-5)


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
    answer = pair.tokenizer("no cake " * 20, add_special_tokens=False)["input_ids"]
    ids = pair._read("tea " * 60, "no cake " * 20)["input_ids"]
    assert len(ids) == 64 > len(answer) > 32 and ids[-len(answer) :] == answer


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


def test_what_is_too_long_loses_its_beginning_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    reward = Classifier(saved(tmp_path), torch.float32, torch.device("cpu"))
    found = reward(["tea?", "cake?"], ["tea " * 80, "no " * 90])
    assert [record.getMessage() for record in caplog.records] == [
        f"reward: {str(tmp_path)!r} reads 64 tokens: longer conversations lose their beginning"
    ]
    text = reward.tokenizer.apply_chat_template(
        [{"role": "user", "content": "tea?"}, {"role": "assistant", "content": "tea " * 80}], tokenize=False
    )
    ids = torch.tensor([reward.tokenizer(text, add_special_tokens=False)["input_ids"][-64:]])
    with torch.inference_mode():
        assert found[0] == pytest.approx(float(reward.model(input_ids=ids).logits[0, 0]), abs=1e-5)


def test_roberta_has_fewer_positions_than_it_says(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    config = RobertaConfig(vocab_size=len(tokenizer), max_position_embeddings=66, pad_token_id=0, num_labels=1, **SHAPE)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    reward = Classifier(str(tmp_path), torch.float32, torch.device("cpu"))
    assert reward.longest == 65 and len(reward(["tea?"], ["tea " * 80])) == 1


def test_a_conversation_that_its_template_refuses_is_one_line(tmp_path: Path) -> None:
    refuses = (
        "{% for m in messages if m.role == 'system' %}{{ raise_exception('no system role') }}{% endfor %}" + TEMPLATE
    )
    reward = Classifier(saved(tmp_path, refuses), torch.float32, torch.device("cpu"))
    with pytest.raises(
        InputError, match=r"^reward: .* must read every row's conversation, but the chat template refuses"
    ):
        reward([TURNS], ["yes"])


def test_its_template_gets_the_row_s_tools(tmp_path: Path) -> None:
    shows = "{% if tools %}{{ tools[0].name }}{% endif %}" + TEMPLATE
    reward = Classifier(saved(tmp_path, shows), torch.float32, torch.device("cpu"))
    bare, shown, spelled = reward(["tea?"] * 3, ["yes"] * 3, tools=[None, [{"name": "kettle"}], '[{"name": "kettle"}]'])
    assert bare != shown == spelled
