"""Reward models on a tiny Llama: learning, the end at which a score is read, state, and the caller's random state."""

from __future__ import annotations

import copy
import json
import math
import random
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

from zopro.errors import InputError
from zopro.rewards import Pair, RewardModel, Scored, interpolate
from zopro.system.random_state import preserve_random_state
from zopro.train.callbacks import MetricsCallback

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


def alone(model: RewardModel, ids: list[int]) -> float:
    """Reward of one unpadded sequence from the classifier's own parts, read at its last position."""
    classifier = model.model.base_model.model
    with torch.no_grad():
        hidden = classifier.model(torch.tensor([ids])).last_hidden_state
        return float(classifier.score(hidden)[0, -1, 0])


def test_pairwise_training_raises_held_out_accuracy_and_reports() -> None:
    model, held_out, lines = make_model(), make_pairs(60, seed=1), []
    before = model.accuracy(held_out)
    callback = MetricsCallback(lines.append, "reward", quiet=True)
    report = model.train_pairs(
        make_pairs(120, seed=0), steps=40, batch_size=16, learning_rate=1e-2, seed=0, callbacks=[callback]
    )
    after = model.accuracy(held_out)
    assert before["accuracy"] < 0.8 and after["accuracy"] >= 0.95 and after["n"] == 60
    assert report["pairs"] == 120 and report["dropped"] == 0 and report["cut"] == 0
    assert 0 < report["loss"] < math.log(2)
    assert [line["step"] for line in lines] == list(range(1, 41))
    first = lines[0]
    assert first["stage"] == "reward" and first["iteration"] is None and first["time"] > 0
    assert {"loss", "learning_rate", "accuracy"} <= first.keys() and "total_flos" not in first
    assert lines[-1]["loss"] < lines[0]["loss"]


def test_regression_raises_held_out_correlation_in_standard_units() -> None:
    model, rows, held_out = make_model(), make_scored(150, seed=0), make_scored(60, seed=1)
    before = model.correlation(held_out)
    model.train_scores(rows, steps=60, batch_size=16, learning_rate=1e-2, seed=0)
    after = model.correlation(held_out)
    assert before["pearson"] < 0.6 and after["pearson"] > 0.9 and after["spearman"] > 0.85 and after["n"] == 60
    scores = torch.tensor([row.score for row in rows], dtype=torch.float64)
    assert model.score_mean == pytest.approx(float(scores.mean()))
    assert model.score_std == pytest.approx(float(scores.std(correction=0)))
    rewards = model.score_texts([row.prompt for row in rows], [row.answer for row in rows])
    errors = torch.tensor(rewards).double() * model.score_std + model.score_mean - scores
    assert float(errors.abs().mean()) < 5  # in the data's unit, where the scores' own deviation is 14


def test_correlation_ranks_ties_by_their_mean(monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model()
    monkeypatch.setattr(model, "score_texts", lambda *_: [1.0, 2.0, 2.0, 100.0])
    result = model.correlation([Scored("a :", " tea", score) for score in (1.0, 2.0, 3.0, 4.0)])
    assert result["spearman"] == pytest.approx(0.9486832980505138)  # scipy.stats.spearmanr
    assert result["pearson"] == pytest.approx(0.7798123297668083)  # scipy.stats.pearsonr


@pytest.mark.parametrize("pad", ["<pad>", "<eos>", None])
def test_scores_equal_unpadded_ones_in_the_order_given(pad: str | None) -> None:
    model = make_model(pad=pad)
    prompts, completions = sample_ids(13, seed=0)
    expected = [alone(model, [*p, *c, 2]) for p, c in zip(prompts, completions, strict=True)]
    assert model.score(prompts, completions, batch_size=4) == pytest.approx(expected, abs=1e-5)
    assert len({round(value, 6) for value in expected}) == 13
    assert model.score([], []) == []


def test_a_sequence_ends_with_one_eos_and_what_follows_it_is_left_out() -> None:
    model, prompt, completion = make_model(), [1, 4, 7], [8, 9]
    variants = [completion, [*completion, 2], [*completion, 2, 0, 0], [*completion, 2, 11, 2]]
    rewards = model.score([prompt] * 4, variants, batch_size=1)
    assert rewards == pytest.approx([alone(model, [*prompt, *completion, 2])] * 4, abs=1e-6)
    assert model.score([prompt], [[]]) == pytest.approx([alone(model, [*prompt, 2])], abs=1e-6)
    text = model.score_texts(["a :"] * 2, [" tea is", " tea is <eos>"])
    assert text[0] == pytest.approx(text[1]) == pytest.approx(alone(model, [4, 7, 15, 16, 2]), abs=1e-6)


def test_an_eos_inside_the_prompt_stays_and_training_reads_the_end_where_eos_is_padding() -> None:
    model = make_model(pad="<eos>")
    assert model.score([[1, 4, 2, 7]], [[8]]) == pytest.approx([alone(model, [1, 4, 2, 7, 8, 2])], abs=1e-6)
    before = model.score_texts(["a :", "a :"], [" tea", " tea"])
    model.train_pairs(make_pairs(8, seed=0), steps=1, batch_size=4, learning_rate=1e-2, seed=0)
    assert model.model.config.pad_token_id != model.tokenizer.eos_token_id
    assert model.tokenizer.pad_token == "<eos>"
    after = model.score_texts(["a :", "a :"], [" tea", " tea"])
    assert after != before and after[0] == pytest.approx(alone(model, [4, 7, 15, 2]), abs=1e-6)


def test_a_long_answer_loses_its_tail_and_a_long_prompt_is_refused() -> None:
    model = make_model(max_length=6)
    cut = model.score([[1, 4, 7]], [[8, 9, 10, 11, 12]])
    assert cut == pytest.approx([alone(model, [1, 4, 7, 8, 9, 2])], abs=1e-6)
    with pytest.raises(InputError, match="max_length=6, got 5 tokens in row 1"):
        model.score([[1], [1, 4, 5, 6, 7]], [[8], [9]])
    same = Pair("a :", " tea is here now for", " tea is here and")  # the first three words fit
    other = Pair("a :", " cake is here now for", " tea is here now for")
    report = model.train_pairs([same, other], steps=0, batch_size=2, learning_rate=1e-3, seed=0)
    assert report == {"pairs": 1, "dropped": 1, "cut": 4}
    with pytest.raises(InputError, match="at least one pair with two different answers"):
        model.train_pairs([same], steps=1, batch_size=2, learning_rate=1e-3, seed=0)


def test_scoring_restores_the_mode_and_leaves_no_gradient() -> None:
    model = make_model()
    for mode in (True, False):
        model.model.train(mode)
        model.score([[1, 4]], [[8]])
        assert model.model.training is mode
    assert all(parameter.grad is None for parameter in model.model.parameters())


def test_reward_function_scores_the_token_ids_not_the_text() -> None:
    model = make_model()
    function = model.as_reward_function(batch_size=2)
    assert function.__name__ == "reward_model"
    prompts, ids = ["a b :", "a b :", "c :"], [[8, 9], [10], [11, 2]]
    rewards = function(prompts=prompts, completions=["wrong"] * 3, completion_ids=ids, trainer_state=None)
    assert rewards == pytest.approx(model.score([[4, 5, 7], [4, 5, 7], [6, 7]], ids), abs=1e-6)


def test_interpolation_ends_and_middle_are_what_is_used_and_saved(tmp_path) -> None:
    model = make_model()
    previous = model.state()
    model.save(tmp_path / "000")
    model.train_pairs(make_pairs(16, seed=0), steps=3, batch_size=8, learning_rate=1e-2, seed=0)
    refined = model.state()
    assert any("lora_B" in name for name in refined) and any("score" in name for name in refined)
    assert all(not torch.equal(previous[n], refined[n]) for n in refined if "lora_B" in n or "score" in n)
    for weight, expected in ((0.0, previous), (1.0, refined)):
        mixed = interpolate(previous, refined, weight)
        assert all(torch.equal(mixed[name], expected[name]) for name in expected)
    quarter = interpolate(tmp_path / "000", refined, 0.25)
    for name, tensor in quarter.items():
        torch.testing.assert_close(tensor, 0.25 * refined[name] + 0.75 * previous[name])
    model.interpolate_with(tmp_path / "000", 0.25)
    assert all(torch.equal(tensor, quarter[name]) for name, tensor in model.state().items())
    scores = model.score([[1, 4]], [[8]])
    model.save(tmp_path / "001")
    assert RewardModel.load(make_classifier(), tmp_path / "001", make_tokenizer()).score([[1, 4]], [[8]]) == scores


def test_interpolation_names_the_tensor_that_does_not_match() -> None:
    left = {"a.lora_A.weight": torch.zeros(2, 2), "score.weight": torch.zeros(1, 2)}
    with pytest.raises(InputError, match=r"'score.weight' is missing"):
        interpolate({"a.lora_A.weight": torch.zeros(2, 2)}, left, 0.5)
    with pytest.raises(InputError, match=r"\(3, 2\) and \(2, 2\) for 'a.lora_A.weight'"):
        interpolate(left | {"a.lora_A.weight": torch.zeros(3, 2)}, left, 0.5)
    with pytest.raises(InputError, match="weight: must lie in"):
        interpolate(left, left, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapter", ["default", "reward"])
def test_save_and_load_give_equal_scores(tmp_path, adapter: str, dtype: torch.dtype) -> None:
    model = make_model(adapter=adapter, dtype=dtype)
    model.train_scores(make_scored(16, seed=0), steps=2, batch_size=8, learning_rate=1e-2, seed=0)
    prompts, completions = sample_ids(9, seed=0)
    model.center(prompts, completions)
    rewards = model.score(prompts, completions)
    model.save(tmp_path / "reward" / "000")
    model.save(tmp_path / "reward" / "000")  # replaces it
    folder = tmp_path / "reward" / "000"
    assert {"adapter_model.safetensors", "adapter_config.json", "reward.json"} <= {p.name for p in folder.iterdir()}
    assert [p.name for p in folder.parent.iterdir()] == ["000"]
    state = torch.random.get_rng_state()
    loaded = RewardModel.load(make_classifier(dtype), folder, make_tokenizer())
    assert torch.equal(state, torch.random.get_rng_state())
    assert loaded.score(prompts, completions) == rewards
    assert (loaded.offset, loaded.score_mean, loaded.score_std) == (model.offset, model.score_mean, model.score_std)
    assert loaded.sequences.max_length == 32
    report = loaded.train_pairs(make_pairs(8, seed=0), steps=1, batch_size=4, learning_rate=1e-2, seed=0)
    assert report["pairs"] == 8 and loaded.score(prompts, completions) != rewards


def test_load_refuses_a_folder_without_a_reward_model(tmp_path) -> None:
    with pytest.raises(InputError, match=r"has no reward\.json"):
        RewardModel.load(make_classifier(), tmp_path / "nothing", make_tokenizer())


def test_centre_makes_the_mean_zero_and_belongs_to_its_weights() -> None:
    model = make_model()
    prompts, completions = sample_ids(9, seed=0)
    raw = model.score(prompts, completions)
    assert model.offset == 0.0
    model.center(prompts, completions)
    centred = model.score(prompts, completions)
    assert sum(centred) == pytest.approx(0, abs=1e-5)
    assert [a - b for a, b in zip(raw, centred, strict=True)] == pytest.approx([model.offset] * 9, abs=1e-6)
    assert model.center(prompts, completions) == pytest.approx(sum(raw) / 9, abs=1e-6)  # again: no change
    model.interpolate_with(model.state(), 1.0)
    assert model.offset == 0.0 and model.score(prompts, completions) == raw


def test_training_leaves_random_states_alone_and_depends_on_its_seed_only() -> None:
    def train(seed: int, global_seed: int) -> dict[str, torch.Tensor]:
        model = make_model()
        random.seed(global_seed), np.random.seed(global_seed), torch.manual_seed(global_seed)
        before = random.getstate(), np.random.get_state()[1].copy(), torch.random.get_rng_state()
        model.train_pairs(make_pairs(32, seed=0), steps=2, batch_size=4, learning_rate=1e-2, seed=seed)
        assert random.getstate() == before[0]
        assert np.array_equal(np.random.get_state()[1], before[1])
        assert torch.equal(torch.random.get_rng_state(), before[2])
        return model.state()

    first, again, other = train(0, 5), train(0, 6), train(1, 5)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_random_state_is_restored_after_an_exception() -> None:
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with pytest.raises(RuntimeError), preserve_random_state():
        torch.manual_seed(0)
        raise RuntimeError
    assert torch.equal(state, torch.random.get_rng_state())


def test_training_writes_and_prints_nothing(tmp_path, capfd, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model, lines = make_model(), []
    quiet = MetricsCallback(lines.append, "refine", iteration=2, quiet=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.train_pairs(make_pairs(4, seed=0), steps=1, batch_size=2, learning_rate=1e-2, seed=0, callbacks=[quiet])
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    shown = MetricsCallback(lines.append, "refine", iteration=2)
    model.train_scores(make_scored(4, seed=0), steps=1, batch_size=2, learning_rate=1e-2, seed=0, callbacks=[shown])
    out, err = capfd.readouterr()
    assert out == "" and "refine 2" in err and "1/1" in err
    assert [(line["stage"], line["iteration"]) for line in lines] == [("refine", 2)] * 2


def test_lines_are_strict_json_numbers() -> None:
    lines: list[dict] = []
    state = SimpleNamespace(global_step=3, is_world_process_zero=True)
    logs = {"loss": math.nan, "kl": 0.5, "note": "text", "flag": True, "total_flos": 1e9}
    MetricsCallback(lines.append, "policy", 1).on_log(None, state, None, logs=copy.copy(logs))
    assert lines[0] | {"time": 0} == {
        "time": 0, "stage": "policy", "iteration": 1, "step": 3, "loss": None, "kl_per_token": 0.5
    }  # fmt: skip
    json.dumps(lines[0], allow_nan=False)
    MetricsCallback(lines.append, "policy", 1).on_log(None, state, None, logs={"train_runtime": 1.0})
    assert len(lines) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([Scored("a :", " tea", 1.0)] * 2, "at least two different scores"),
        ([Scored("a :", " tea", 1.0), Scored("a :", " cake", math.nan)], "got nan in row 1"),
    ],
)
def test_scores_that_cannot_be_learnt_from_are_refused(rows: list[Scored], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make_model().train_scores(rows, steps=1, batch_size=2, learning_rate=1e-3, seed=0)


def test_prompts_and_completions_must_align() -> None:
    with pytest.raises(InputError, match=r"completions: must be as many as prompts \(2\), got 1"):
        make_model().score([[1], [1]], [[8]])
    with pytest.raises(InputError, match=r"answers: must be as many as prompts \(1\), got 2"):
        make_model().score_texts(["a :"], [" tea", " cake"])
