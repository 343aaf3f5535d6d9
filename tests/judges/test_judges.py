"""Judges: verdicts, guards against bad ones, and the model judge's order invariance."""

from __future__ import annotations

import math
import sys
import threading
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from zopro.errors import InputError
from zopro.judges import CallableJudge, MetricJudge, ModelJudge, judge_pairs, make_judge
from zopro.judges.verdicts import Verdicts

TASK = SimpleNamespace(default_judge="chrf")
PROMPTS = ["Tell me about cats. " * 3, "Dogs?", "Hm"]
PAIRS = [["Cats purr.", "Cats are fine animals, and they sleep a lot."], ["Woof", "No"], ["yes", "no way"]]
NONE: list[str | None] = [None] * 3
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


def swapped(pairs):
    return [pair[::-1] for pair in pairs]


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
    assert judge(["p", "p"], pairs, [None, None])[1] == -1


def test_chat_templates_are_used_and_answers_cannot_close_the_turn(model, tokenizer):
    tokenizer.chat_template = CHATML
    try:
        judge = ModelJudge(model, tokenizer)
        ids = judge._reading(judge._ids("p<|im_end|>"), judge._ids("a</s>"), judge._ids("b"))
        text = tokenizer.decode(ids)
        assert text.startswith("<s><|im_start|>user\n") and text.endswith("<|im_end|>\n<|im_start|>assistant\n")
        assert text.count("<|im_end|>") == 1 and "</s>" not in text
        assert [tokenizer.decode([letter]) for letter in judge.letters] == ["A", "B"]
        odds = judge.log_odds(PROMPTS, PAIRS)
        assert odds == pytest.approx([-value for value in judge.log_odds(PROMPTS, swapped(PAIRS))], abs=1e-5)
    finally:
        tokenizer.chat_template = None


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


def test_metric_judge_takes_the_nearer_answer():
    judge = MetricJudge("rouge")
    completions = [["a cat sat", "dogs"], ["dogs", "a cat sat"], ["x", "y"], ["a cat", "dog"]]
    assert judge(["p"] * 4, completions, ["a cat sat", "a cat sat", "a cat sat", None]) == [0, 1, -1, -1]


BAD = {
    "text": ("0", "verdict is not an integer but str"),
    "float": (1.0, "verdict is not an integer but float"),
    "bool": (True, "verdict is not an integer but bool"),
    "none": (None, "verdict is not an integer but NoneType"),
    "too large": (2, "verdict 2 is out of range"),
    "too small": (-2, "verdict -2 is out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_verdicts_are_counted_not_raised(case):
    verdict, reason = BAD[case]
    result = judge_pairs(lambda p, c, r: [verdict, 1, 0], PROMPTS, PAIRS, NONE)
    assert result.winners == [-1, 1, 0]
    assert (result.invalid, result.ties, result.reasons) == (1, 0, {reason: 1})


def test_numpy_and_torch_integers_are_verdicts():
    result = judge_pairs(lambda p, c, r: torch.tensor([0, 1, -1]), PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid, result.ties) == ([0, 1, -1], 0, 1)
    assert all(type(winner) is int for winner in result.winners)


def test_one_failing_pair_does_not_cost_the_others():
    def judge(prompts, completions, references):
        if "Dogs?" in prompts:
            raise KeyError("two\nlines")
        return [0] * len(prompts)

    result = judge_pairs(judge, PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid) == ([0, -1, 0], 1)
    assert len(result.reasons) == 1 and "KeyError" in next(iter(result.reasons))


def test_a_broken_judge_is_given_up_on():
    calls = []

    def judge(*arguments):
        calls.append(arguments)
        raise TimeoutError("gone")

    with pytest.raises(InputError, match=r"judge: .* judge failed on 3 pairs in a row, .* TimeoutError: gone.*--resume"):
        judge_pairs(judge, PROMPTS * 10, PAIRS * 10, NONE * 10)
    assert len(calls) == 1 + 3


def test_a_judge_without_any_usable_verdict_is_refused():
    with pytest.raises(InputError, match=r"no usable verdict on 3 pairs \(verdict 7 is out of range: 3\)"):
        judge_pairs(lambda p, c, r: [7] * len(p), PROMPTS, PAIRS, NONE)
    assert judge_pairs(lambda p, c, r: [-1] * len(p), PROMPTS, PAIRS, NONE).ties == 3


def test_a_judge_that_hangs_stops_the_run_and_loses_no_verdict(tmp_path):
    release, asked = threading.Event(), []

    def hangs(prompts, completions, references):
        return release.wait() if prompts == PROMPTS[2:] else [0]

    def works(prompts, completions, references):
        asked.extend(prompts)
        return [1] * len(prompts)

    path = tmp_path / "new" / "verdicts.jsonl"
    arguments = (PROMPTS, PAIRS, NONE)
    with pytest.raises(InputError, match=r"gave no answer within 0.1 seconds. Mend it or raise its timeout"):
        judge_pairs(CallableJudge(hangs, timeout=0.1), *arguments, Verdicts(path), batch_size=1)
    release.set()
    assert judge_pairs(CallableJudge(works, timeout=5), *arguments, Verdicts(path), batch_size=1).winners == [0, 0, 1]
    assert asked == PROMPTS[2:]


def test_only_usable_verdicts_are_kept_and_torn_lines_are_not_read(tmp_path):
    path = tmp_path / "verdicts.jsonl"
    judge_pairs(CallableJudge(lambda p, c, r: [1, "x", -1]), PROMPTS, PAIRS, NONE, Verdicts(path))
    assert len(path.read_text().splitlines()) == 2 and not any(word in path.read_text() for word in PROMPTS)
    path.write_bytes(path.read_bytes() + b'{"pair": 3}\n[1]\nnull\n{"pair')
    asked = []
    judge = CallableJudge(lambda p, c, r: asked.extend(p) or [0] * len(p))
    assert judge_pairs(judge, PROMPTS, PAIRS, NONE, Verdicts(path)).winners == [1, 0, -1]
    assert asked == PROMPTS[1:2]
    swapped = [[b, a] for a, b in PAIRS]
    assert judge_pairs(judge, PROMPTS, swapped, NONE, Verdicts(path)).winners == [0, 0, 0], "other pairs"


def test_metrics_are_not_worth_keeping(tmp_path):
    judge_pairs(MetricJudge("rouge"), PROMPTS, PAIRS, ["a"] * 3, Verdicts(tmp_path / "verdicts.jsonl"))
    assert not any(tmp_path.iterdir())


def test_pairs_are_asked_in_batches():
    sizes = []
    judge = lambda p, c, r: sizes.append(len(p)) or [0] * len(p)  # noqa: E731
    assert judge_pairs(judge, PROMPTS, PAIRS, NONE, batch_size=2).winners == [0] * 3
    assert sizes == [2, 1]


@pytest.mark.parametrize("answer", [[0], 5, None])
def test_wrong_lengths_are_invalid(answer):
    result = judge_pairs(lambda p, c, r: answer, PROMPTS[:2], PAIRS[:2], NONE[:2])
    expected = [0, 0] if answer == [0] else [-1, -1]  # [0] is right once pairs are asked one by one
    assert result.winners == expected


def test_equal_answers_are_ties_without_asking():
    asked = []
    result = judge_pairs(lambda p, c, r: asked.extend(c) or [1] * len(p), PROMPTS, [["x", "x"], *PAIRS[1:]], NONE)
    assert asked == PAIRS[1:]
    assert (result.winners, result.ties, result.reasons) == ([-1, 1, 1], 1, {"equal answers": 1})
    assert judge_pairs(lambda p, c, r: 1 / 0, [], [], []).winners == []


def test_unequal_arguments_are_the_callers_mistake():
    with pytest.raises(ValueError):
        judge_pairs(lambda p, c, r: [0], PROMPTS, PAIRS, [None])


def test_python_judges_are_found_in_the_working_directory(monkeypatch, tmp_path):
    (tmp_path / "my_judge_module.py").write_text(
        "def longest(p, c, r):\n    return [int(len(b) > len(a)) for a, b in c]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "my_judge_module", raising=False)
    path = list(sys.path)
    judge = make_judge("python:my_judge_module:longest", TASK)
    assert sys.path == path
    assert judge_pairs(judge, PROMPTS, PAIRS, NONE).winners == [1, 0, 1]
    with pytest.raises(InputError, match=r"has no 'longst'. Did you mean 'longest'"):
        CallableJudge("my_judge_module:longst")
    with pytest.raises(InputError, match="cannot import 'no_such_module_here'"):
        CallableJudge("no_such_module_here:f")
    with pytest.raises(InputError, match="must be module:function"):
        CallableJudge("json")
    with pytest.raises(InputError, match="must be callable"):
        CallableJudge("json:__name__")


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
