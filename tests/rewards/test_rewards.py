"""Reward models as files and as arguments: interpolation, saving, what is refused."""

from __future__ import annotations

import pytest
import torch

from tiny_rewards import make_classifier, make_model, make_pairs, make_scored, make_tokenizer, sample_ids
from zopro.errors import InputError
from zopro.rewards import RewardModel, interpolate


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


def test_prompts_and_completions_must_align() -> None:
    with pytest.raises(InputError, match=r"completions: must be as many as prompts \(2\), got 1"):
        make_model().score([[1], [1]], [[8]])
    with pytest.raises(InputError, match=r"answers: must be as many as prompts \(1\), got 2"):
        make_model().score_texts(["a :"], [" tea", " cake"])
