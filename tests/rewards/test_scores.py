"""Scores of a reward model: the end at which they are read, padding, long answers, the centre."""

from __future__ import annotations

import pytest
import torch

from tiny_rewards import make_model, make_pairs, sample_ids
from zopro.errors import InputError
from zopro.rewards import Pair, RewardModel, Scored


def alone(model: RewardModel, ids: list[int]) -> float:
    """Reward of one unpadded sequence from the classifier's own parts, read at its last position."""
    classifier = model.model.base_model.model
    with torch.no_grad():
        hidden = classifier.model(torch.tensor([ids])).last_hidden_state
        return float(classifier.score(hidden)[0, -1, 0])


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


def test_what_is_cut_is_not_measured() -> None:
    model = make_model(max_length=6)
    pairs = [
        Pair("a :", " tea", " cake"),
        Pair("a :", " tea is here now", " cake"),
        Pair("a :", " cake", " tea is here now"),
    ]
    assert model.accuracy(pairs) == model.accuracy(pairs[:1]) and model.accuracy(pairs[1:])["n"] == 0
    rows = [Scored("a :", " tea", 1.0), Scored("a :", " cake", 2.0), Scored("a :", " tea is here now", 3.0)]
    assert model.correlation(rows) == model.correlation(rows[:2]) and model.correlation(rows[1:])["n"] == 1


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
