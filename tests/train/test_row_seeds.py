"""Which random numbers each row draws: others than any other row's of its step or evaluation, however that is cut."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset

from tiny_trainers import es, same, weights, zopro
from zopro import ESTrainer, ZOPrOTrainer
from zopro.errors import InputError
from zopro.train.drawing import RowSeeds
from zopro.zo.directions import tensor_generator

pytestmark = pytest.mark.usefixtures("random_state")

PROMPT = [3, 4]


def seeds(found: list[torch.Generator]) -> list[int]:
    return [generator.initial_seed() for generator in found]


def test_rows_are_numbered_through_a_step_s_batches() -> None:
    whole = seeds(RowSeeds().generators([PROMPT] * 8, "train", 7, 0))
    assert len(set(whole)) == 8
    first = [tensor_generator(f"rollout/train/{row}/{PROMPT}", 7, 0, torch.device("cpu")) for row in range(8)]
    assert whole == seeds(first), "as 0.1.0's"
    for ranks in (1, 2):
        parts = [RowSeeds() for _ in range(ranks)]
        batches = [
            seeds(part.generators([PROMPT] * (4 // ranks), "train", 7, 0, rank, ranks))
            for _ in range(2)
            for rank, part in enumerate(parts)
        ]
        assert [seed for batch in batches for seed in batch] == whole
    parts = [RowSeeds() for _ in range(2)]
    batches = [
        seeds(part.generators([PROMPT] * 2, "train", 7, 0, rank, ranks=2, parts=2))
        for rank, part in enumerate(parts)
        for _ in range(2)
    ]
    assert [seed for batch in batches for seed in batch] == whole, "each rank cuts what it has in two"
    last = RowSeeds()
    for size in (2, 2, 1):
        batch = seeds(last.generators([PROMPT] * size, "eval", 7, 0, 1, 2))
    row = tensor_generator(f"rollout/eval/9/{PROMPT}", 7, 0, torch.device("cpu"))
    assert batch == [row.initial_seed()], "of an evaluation's last batch, which is smaller"


def test_a_step_an_evaluation_and_a_training_begin_anew() -> None:
    rows = RowSeeds()
    first, second = (seeds(rows.generators([PROMPT], "train", 7, 0)) for _ in range(2))
    assert first != second
    assert seeds(rows.generators([PROMPT], "train", 7, 1)) == seeds(RowSeeds().generators([PROMPT], "train", 7, 1))
    rows.begin("train")
    assert seeds(rows.generators([PROMPT], "train", 7, 0)) == first
    fresh = seeds(rows.generators([PROMPT], "eval", 7, 0))
    rows.begin("eval")
    assert seeds(rows.generators([PROMPT], "eval", 7, 0)) == fresh != first


def noting(seen: list[list[tuple[str, str]]]) -> Any:
    def words(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.append(list(zip(prompts, completions, strict=True)))
        return [float(len(text.split())) for text in completions]

    return words


def test_answers_of_a_step_do_not_depend_on_how_it_is_cut(tmp_path: Path) -> None:
    found = []
    for rows, parts in ((8, 1), (4, 2), (1, 8)):
        seen: list[Any] = []
        cut = {"per_device_train_batch_size": rows, "gradient_accumulation_steps": parts}
        trainer = es(
            tmp_path, reward_funcs=noting(seen), max_steps=2, population=2, num_generations=4, sigma="auto", **cut
        )
        trainer.train()
        steps = [seen[: 2 * parts], seen[2 * parts :]]  # of each micro-batch both members
        found.append(([[pair for batch in step[::2] for pair in batch] for step in steps], weights(trainer.model)))
    whole, moved = found[0]
    for answers, trained in found[1:]:
        assert answers == whole and same(trained, moved)
    for step in whole:
        for prompt in {prompt for prompt, _ in step}:
            assert len({text for other, text in step if other == prompt}) == 4, "four answers to each prompt"


def test_generations_of_one_step_draw_other_numbers(tmp_path: Path) -> None:
    seen: list[Any] = []
    often = {"steps_per_generation": 1, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4}
    trainer = zopro(tmp_path, reward_funcs=noting(seen), max_steps=1, num_generations=4, **often)
    trainer.train_dataset = Dataset.from_list([{"prompt": "tea"}] * 4)
    trainer.train()
    assert len(seen) == 2 and seen[0] != seen[1]


@pytest.mark.parametrize("build", [zopro, es])
def test_every_row_of_an_evaluation_has_an_answer_of_its_own(build: Any, tmp_path: Path) -> None:
    asked: list[list[Any]] = []
    rows = Dataset.from_list([{"prompt": "tea"}] * 12)
    for size in (4, 12):
        seen: list[Any] = []
        options = {"num_generations_eval": 1} if build is zopro else {}
        trainer: ZOPrOTrainer | ESTrainer = build(
            tmp_path, reward_funcs=noting(seen), per_device_eval_batch_size=size, max_completion_length=6, **options
        )
        first = trainer.evaluate(rows)["eval_reward"]
        assert trainer.evaluate(rows)["eval_reward"] == first
        half = len(seen) // 2
        assert seen[:half] == seen[half:], "a function of the rows"
        asked.append([pair for batch in seen[:half] for pair in batch])
    assert asked[0] == asked[1]
    assert len(set(asked[0])) > 8, "of 12, short ones among them"


def test_a_prediction_leaves_nothing_to_an_evaluation(tmp_path: Path) -> None:
    trainer = zopro(tmp_path)
    alone = trainer.evaluate()["eval_reward"]
    trainer.predict(Dataset.from_list([{"prompt": "tea"}] * 8))
    assert trainer.evaluate()["eval_reward"] == alone


@pytest.mark.parametrize("build", [zopro, es])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_completion_length": None}, r"^max_completion_length: must be a whole number .*, got None\. Give the most"),
        ({"max_completion_length": 0}, r"^max_completion_length: must be a whole number of at least 1, got 0\."),
        (
            {"generation_kwargs": {"max_new_tokens": 2.5}},
            r"^generation_kwargs: max_new_tokens: must be a whole .* 2\.5\.",
        ),
    ],
)
def test_answers_need_a_limit(build: Any, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        build(tmp_path, **options)
    build(tmp_path, max_completion_length=None, generation_kwargs={"max_new_tokens": 2})
