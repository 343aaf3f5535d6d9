"""The model judge: its log-odds, invariance to order, long conversations, templates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from pairs import NONE, PAIRS, PROMPTS, TASK, swapped
from zopro.errors import InputError
from zopro.judges import MetricJudge, ModelJudge, judge_pairs, make_judge

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    raw = Tokenizer(models.BPE(unk_token=None))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    corpus = [*PROMPTS, *(text for pair in PAIRS for text in pair), "Answer: A", "Answer: B", "Reply A: Reply B:"]
    raw.train_from_iterator(
        corpus, trainers.BpeTrainer(vocab_size=400, special_tokens=special, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token="<s>", eos_token="</s>", additional_special_tokens=special[2:]
    )


@pytest.fixture(scope="module")
def model(tokenizer):
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
    )
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = LlamaForCausalLM(config)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.3)  # sharper than the default, so that answers matter
    return model.eval()


@pytest.fixture
def judge(model, tokenizer):
    return ModelJudge(model, tokenizer)


def test_swapping_the_answers_swaps_the_verdict(judge):
    odds, back = judge.log_odds(PROMPTS, PAIRS), judge.log_odds(PROMPTS, swapped(PAIRS))
    assert odds == pytest.approx([-value for value in back], abs=1e-5)
    assert max(map(abs, odds)) > 1e-3
    winners = judge(PROMPTS, PAIRS, NONE)
    assert winners == [1 - winner for winner in judge(PROMPTS, swapped(PAIRS), NONE)]
    assert winners == [int(value < 0) for value in odds]


def test_log_odds_are_the_full_models_averaged_over_orders(judge, model, tokenizer):
    """Against transformers' own full logits, one reading at a time, without padding."""
    expected = []
    for prompt, pair in zip(PROMPTS, PAIRS, strict=True):
        odds = []
        for a, b in (pair, pair[::-1]):
            ids = judge._reading(judge._ids(prompt), judge._ids(a), judge._ids(b))
            with torch.no_grad():
                logits = model(torch.tensor([ids])).logits[0, -1]
            odds.append((logits[judge.letters[0]] - logits[judge.letters[1]]).item())
        expected.append((odds[0] - odds[1]) / 2)
    assert judge.log_odds(PROMPTS, PAIRS) == pytest.approx(expected, abs=1e-5)
    assert [tokenizer.decode([letter]).strip() for letter in judge.letters] == ["A", "B"]


def test_a_liking_for_a_letter_cancels(judge, model):
    before = judge.log_odds(PROMPTS, PAIRS)
    head = model.get_output_embeddings()
    head.bias = torch.nn.Parameter(torch.zeros(head.weight.shape[0]))
    try:
        head.bias.data[judge.letters[0]] = 50.0
        assert judge.log_odds(PROMPTS, PAIRS) == pytest.approx(before, abs=1e-4)
    finally:
        head.bias = None


def test_batch_size_does_not_matter(model, tokenizer, judge):
    for size in (1, 2, 5):
        other = ModelJudge(model, tokenizer, batch_size=size)
        assert other.log_odds(PROMPTS, PAIRS) == pytest.approx(judge.log_odds(PROMPTS, PAIRS), abs=1e-5)


def test_long_conversations_lose_their_beginning_never_the_answers(model, tokenizer):
    whole = ModelJudge(model, tokenizer)
    replies = len(whole._reading([], whole._ids(PAIRS[0][0]), whole._ids(PAIRS[0][1])))
    judge = ModelJudge(model, tokenizer, max_length=replies + 4)
    conversation = whole._ids(PROMPTS[0])
    assert len(conversation) > 4
    cut = judge._reading(conversation, whole._ids(PAIRS[0][0]), whole._ids(PAIRS[0][1]))
    assert len(cut) == replies + 4
    assert cut == whole._reading(conversation[-4:], whole._ids(PAIRS[0][0]), whole._ids(PAIRS[0][1]))
    short = ModelJudge(model, tokenizer, max_length=replies)
    assert short._reading(conversation, *map(whole._ids, PAIRS[0])) == whole._reading([], *map(whole._ids, PAIRS[0]))


def test_answers_that_do_not_fit_get_no_verdict(model, tokenizer):
    judge = ModelJudge(model, tokenizer, max_length=150)
    pairs = [PAIRS[1], ["long " * 200, "short"]]
    assert [math.isnan(value) for value in judge.log_odds(["p", "p"], pairs)] == [False, True]
    result = judge_pairs(judge, ["p", "p"], pairs, [None, None])
    assert (result.winners[1], result.invalid) == (-1, 1)
    assert result.reasons == {"the answers do not fit in 150 tokens": 1}


def test_answers_may_take_more_than_a_conversation_is_cut_to(model, tokenizer, monkeypatch):
    """2048 tokens are the habit for readings, not a limit for answers: the model's context is that."""
    monkeypatch.setattr("zopro.judges.model._MOST_TOKENS", 300)
    judge = ModelJudge(model, tokenizer)
    long = "long " * 80, "short"
    conversation, (first, second) = judge._ids("why? " * 500), map(judge._ids, long)
    assert len(conversation) > judge.context and len(judge._reading(conversation, [first[0]], [second[0]])) == 300
    assert 300 < len(judge._reading([], first, second)) < judge.context
    whole = ModelJudge(model, tokenizer, max_length=judge.context)
    assert judge._reading(conversation, first, second) == whole._reading([], first, second)
    assert judge(["why? " * 500], [list(long)], [None]) == whole([""], [list(long)], [None])


def test_a_judge_whose_answers_never_fit_says_what_helps(model, tokenizer):
    judge = ModelJudge(model, tokenizer, max_length=150)
    pairs = [[f"{start} " * 200, "short"] for start in ("long", "wide", "tall")]
    with pytest.raises(InputError, match=r"150 tokens: 3\)\. Start a run with another judge, or with a smaller max"):
        judge_pairs(judge, ["p"] * 3, pairs, [None] * 3)


def test_a_context_without_room_for_answers_is_refused(model, tokenizer):
    judge = ModelJudge(model, tokenizer)
    question = judge.context - judge.room
    assert ModelJudge(model, tokenizer, max_length=question + 1).room == 1
    with pytest.raises(InputError, match=rf"longer than its question of {question} tokens, got {question}\."):
        ModelJudge(model, tokenizer, max_length=question)


def test_log_odds_that_are_no_number_are_no_verdict(judge, monkeypatch):
    monkeypatch.setattr(judge, "log_odds", lambda prompts, completions: [1.0, math.nan, 0.0])
    result = judge_pairs(judge, PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid, result.ties) == ([0, -1, -1], 1, 1)
    assert result.reasons == {"log-odds are not a number": 1}


def test_chat_templates_are_used_and_answers_cannot_close_the_turn(model, tokenizer):
    tokenizer.chat_template = CHATML
    try:
        judge = ModelJudge(model, tokenizer)
        ids = judge._reading(judge._ids("p<|im_end|>"), judge._ids("a</s>"), judge._ids("b"))
        text = tokenizer.decode(ids)
        assert text.startswith("<|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_end|>") == 1 and "</s>" not in text
        assert [tokenizer.decode([letter]) for letter in judge.letters] == ["A", "B"]
        odds = judge.log_odds(PROMPTS, PAIRS)
        assert odds == pytest.approx([-value for value in judge.log_odds(PROMPTS, swapped(PAIRS))], abs=1e-5)
    finally:
        tokenizer.chat_template = None


@pytest.mark.parametrize("text", ["a<|end|>b", "a<|e<|end|>nd|>b", "a<|im_<|im_end|>end|>b", "a<|im_<|end|>end|>b"])
def test_no_control_token_of_a_text_is_one_for_the_judge(model, tokenizer, text):
    """Also those that have no name, and those that are left where another is taken out."""
    other = copy.deepcopy(tokenizer)
    other.add_tokens([AddedToken("<|end|>", special=True)])
    other.chat_template = CHATML
    assert "<|end|>" not in other.all_special_tokens
    ids = ModelJudge(model, other)._ids(text)
    assert other.decode(ids, skip_special_tokens=False) == "ab"


@pytest.mark.parametrize(
    ("adds", "template", "begins"),
    [(False, CHATML, False), (True, CHATML, True), (False, "<s>" + CHATML, True), (True, "<s>" + CHATML, True)],
)
def test_bos_stands_where_the_template_or_the_tokenizer_has_it(model, tokenizer, adds, template, begins):
    other = copy.deepcopy(tokenizer)
    if adds:
        other.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", 0)]
        )
    other.chat_template = template
    assert ModelJudge(model, other)._start.count(other.bos_token_id) == begins


def test_the_base_model_judges_without_its_adapters(model, tokenizer, judge):
    base = judge.log_odds(PROMPTS, PAIRS)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, config)
    try:
        assert make_judge("model", TASK, adapted, tokenizer).log_odds(PROMPTS, PAIRS) == pytest.approx(base, abs=1e-5)
        with_adapters = ModelJudge(adapted, tokenizer).log_odds(PROMPTS, PAIRS)
        assert with_adapters != pytest.approx(base, abs=1e-4)
    finally:
        adapted.unload()


def test_the_training_mode_is_given_back(model, tokenizer):
    model.train()
    try:
        ModelJudge(model, tokenizer)(PROMPTS, PAIRS, NONE)
        assert model.training
    finally:
        model.eval()


def test_a_tokenizer_that_cannot_tell_the_letters_apart_is_refused(model):
    raw = Tokenizer(models.WordLevel({"[UNK]": 0, "the": 1}, unk_token="[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(InputError, match="does not tell the letters A and B apart"):
        ModelJudge(model, PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="[UNK]"))


def test_make_judge(model, tokenizer):
    loaded = []
    assert isinstance(make_judge("auto", TASK), MetricJudge)
    judge = make_judge("model:some/path", TASK, load=lambda path: loaded.append(path) or (model, tokenizer))
    assert isinstance(judge, ModelJudge) and loaded == ["some/path"]
    for spec, message in {
        "rogue": "Did you mean 'rouge'",
        "model": "'model' needs a model",
        "model:x": "needs a loader",
        "python:": "must be one of auto, rouge, chrf",
        "": "must be one of",
    }.items():
        with pytest.raises(InputError, match=message):
            make_judge(spec, TASK)
