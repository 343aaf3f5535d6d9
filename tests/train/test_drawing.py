"""How trainers on the engine draw answers: TRL's arguments are heeded or refused, and rows keep their own columns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, IterableDataset
from trl import RLOOConfig, RLOOTrainer

from tiny_trainers import PROMPTS, TOKENIZER, es, head_only, online, quiet, settings, zopro
from zopro import ESConfig, ESTrainer, ZOPrOConfig, ZOPrOTrainer
from zopro.engine import Sampling
from zopro.errors import InputError
from zopro.train.drawing import drawing
from zopro.train.guided import GuidedConfig, GuidedTrainer
from zopro.train.rows import check_evaluated

SMALL = {"max_steps": 1, "learning_rate": 0.0}
BUILDS: dict[str, Any] = {
    "zopro": lambda folder, **o: zopro(folder, **{"num_generations": 2, "per_device_train_batch_size": 8, **SMALL, **o}),
    "es": lambda folder, **o: es(folder, **{"population": 2, **SMALL, **o}),
}


@pytest.mark.parametrize("kind", BUILDS)
def test_generation_kwargs_win_as_in_trl(kind: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def noted(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    given = {"do_sample": False, "max_new_tokens": 2, "top_k": None}
    BUILDS[kind](tmp_path, reward_funcs=noted, generation_kwargs=given, top_k=1).train()
    longest = max(len(TOKENIZER(text)["input_ids"]) for _, text in seen)
    assert longest == 2, "of 6"
    if kind == "zopro":
        ours, seen[:] = dict(seen), []
        options = {"num_generations": 2, "per_device_train_batch_size": 8, "gradient_checkpointing": False, **SMALL}
        online(RLOOTrainer, RLOOConfig, tmp_path, {**options, "reward_funcs": noted, "generation_kwargs": given}).train()
        assert len(set(seen)) == 4 and dict(seen) == ours, "greedy"


def test_the_engine_is_asked_for_what_the_arguments_say(tmp_path: Path) -> None:
    plain = {"max_new_tokens": 9, "do_sample": True, "temperature": 0.5, "top_k": None, "top_p": 0.9, "min_p": None}
    args = ZOPrOConfig(str(tmp_path), use_cpu=True, max_completion_length=9, temperature=0.5, top_p=0.9)
    assert drawing(args) == plain
    args.generation_kwargs, args.cache_implementation = {"top_k": 3, "min_p": 0.1, "temperature": None}, "static"
    assert drawing(args) == {**plain, "top_k": 3, "min_p": 0.1}


def test_log_probs_of_another_temperature_are_not_taken_for_the_policy_s(tmp_path: Path) -> None:
    for given, taken in (({}, True), ({"temperature": 1.0}, True), ({"temperature": 0.5}, False)):
        trainer = BUILDS["zopro"](tmp_path, generation_kwargs=given)
        rollout = trainer.engine.sample([[2]], 2, Sampling(3, [1], 0))[0]
        assert trainer._drawn_from(trainer.model, rollout, rollout.completion_ids) == taken


@pytest.mark.parametrize("kind", BUILDS)
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"repetition_penalty": 1.2}, r"^repetition_penalty: must be 1, .*, got 1\.2\. Leave it out\.$"),
        ({"temperature": 0.0}, r"^temperature: must be above 0, for greedy answers \(do_sample=False\) too, got 0\.0\.$"),
        ({"temperature": "1"}, r"^temperature: must be a finite number, got '1'\.$"),
        ({"top_p": 2.0}, r"^top_p: must lie in \(0, 1\], got 2\.0\.$"),
        ({"top_p": None}, r"^top_p: must lie in \(0, 1\], got None\.$"),
        ({"top_k": -1}, r"^top_k: must be a whole number of at least 1, or None, got -1\.$"),
        ({"top_k": 2.5}, r"^top_k: must be a whole number, got 2\.5\.$"),
        ({"min_p": "x"}, r"^min_p: must be a finite number, got 'x'\.$"),
        ({"generation_kwargs": {"min_p": "x"}}, r"^min_p: must lie in \[0, 1\], got 'x'\.$"),
        ({"learning_rate": "1e-3"}, r"^learning_rate: must be a finite number .*, got '1e-3'\.$"),
        (
            {"reward_clip_range": [2.0]},
            r"^reward_clip_range: must be two numbers, the lower one first, got \[2\.0\]\. Give",
        ),
        (
            {"reward_clip_range": 5.0},
            r"^reward_clip_range: must be two numbers, .*, got 5\.0\. Give \(-10, 10\), say, or leave",
        ),
        ({"reward_clip_range": [2.0, 1.0]}, r"^reward_clip_range: must be two numbers, .*, got \[2\.0, 1\.0\]\. Give"),
        ({"generation_kwargs": {"repetition_penalty": 1.2}}, r"^repetition_penalty: must be 1, .*, got 1\.2\."),
        (
            {"generation_kwargs": {"top_k": 3, "suppress_tokens": [2], "min_new_tokens": 6}},
            r"^generation_kwargs: must be of .*, got min_new_tokens, suppress_tokens\. Leave out the others\.$",
        ),
    ],
)
def test_what_the_engine_cannot_do_is_refused(kind: str, options: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        BUILDS[kind](tmp_path, **options)


@pytest.mark.parametrize("name", ["use_vllm", "use_transformers_continuous_batching"])
def test_members_are_displaced_by_the_engine_alone(name: str) -> None:
    with pytest.raises(InputError, match=f"^{name}: must be off"):
        ESConfig(use_cpu=True, **{name: True})


# Rows.

TRAINERS = {"zopro": (ZOPrOTrainer, ZOPrOConfig), "es": (ESTrainer, ESConfig), "guided": (GuidedTrainer, GuidedConfig)}


def built(kind: str, folder: Path, rows: Any, reward: Any = None) -> Any:
    trainer, config = TRAINERS[kind]
    sizes = {"population": 2} if kind == "es" else {"num_generations": 2, "beta": 0.0}
    args = config(**settings(folder, **{**SMALL, "max_completion_length": 2, **sizes}))
    reward = reward or (lambda completions, **columns: [0.0] * len(completions))
    return quiet(trainer(head_only(), reward, args, rows, processing_class=TOKENIZER))


@pytest.mark.parametrize("kind", ["zopro", "es"])
def test_a_column_called_row_is_the_user_s(kind: str, tmp_path: Path) -> None:
    seen: list[Any] = []

    def noted(completions: list[str], row: list[str], **columns: Any) -> list[float]:
        seen.extend(row)
        return [0.0] * len(completions)

    trainer = built(kind, tmp_path, Dataset.from_list([{"prompt": p, "row": f"id-{p}"} for p in PROMPTS]), noted)
    trainer.train()
    assert set(seen) <= {f"id-{p}" for p in PROMPTS} and seen and trainer.last_batch.rows == []


@pytest.mark.parametrize(("kind", "needed"), [("zopro", 2), ("es", 4)])
def test_fewer_prompts_than_a_step_takes_are_refused(kind: str, needed: int, tmp_path: Path) -> None:
    rows = Dataset.from_list([{"prompt": p} for p in PROMPTS])
    said = rf"^train_dataset: must have at least the {needed} prompts .*, got {needed - 1}\. Add rows, or lower"
    with pytest.raises(InputError, match=said):
        built(kind, tmp_path, rows.select(range(needed - 1))).train()
    assert built(kind, tmp_path, rows.select(range(needed))).train().global_step == 1


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"question": p} for p in PROMPTS], r"a column 'prompt', got question\. Rename it\.$"),
        ([{"prompt": p, "completions": ""} for p in PROMPTS], r"not have a column 'completions', .* or remove it\.$"),
        ([{"prompt": p} for p in ("tea", None, "cup", "yes")], r"prompts that are texts .*, got None in row 2\. Drop"),
        ([{"prompt": [3, 4]}] * 4, r"prompts that are texts .*, got \[3, 4\] in row 1\. Drop"),
        ([{"prompt": []}] * 4, r"prompts that are texts .*, got \[\] in row 1\. Drop"),
        ([*[{"prompt": "tea"}] * 30, {"prompt": None}], r"prompts that are texts .*, got None in row 31\. Drop"),
    ],
    ids=["no prompt", "the trainer's own name", "null", "ids", "no message", "a null far below"],
)
def test_rows_without_a_prompt_are_refused(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    trainer = built("zopro", tmp_path, Dataset.from_list(rows))
    with pytest.raises(InputError, match=rf"^train_dataset: must (have )?{said}"):
        trainer.train()
    trainer.eval_dataset, trainer.train_dataset = trainer.train_dataset, Dataset.from_list([{"prompt": "tea"}] * 8)
    trainer.args.eval_strategy = "steps"
    for evaluate in (trainer.train, trainer.evaluate):
        with pytest.raises(InputError, match=rf"^eval_dataset: must (have )?{said}"):
            evaluate()
    with pytest.raises(InputError, match=rf"^eval_dataset\['a'\]: must (have )?{said}"):
        trainer.evaluate({"a": trainer.eval_dataset})


def test_what_is_evaluated_is_rows() -> None:
    good = Dataset.from_list([{"prompt": "tea"}, {"prompt": None}])
    check_evaluated(good.select([0]))  # the null is none of its rows
    check_evaluated("a", {"a": good})
    check_evaluated([{"prompt": "tea"}])
    for rows, said in (
        ("rows.jsonl", r"must be a Dataset, got 'rows\.jsonl'\. Use datasets\.load_dataset\."),
        (5, "must be a Dataset, got 5"),
        (good.select([]), r"must have rows, got none\. Add some\."),
        ([{"question": "tea"}], "must have prompts .*, got None in row 1"),
    ):
        with pytest.raises(InputError, match=f"^eval_dataset: {said}"):
            check_evaluated(rows)


def test_a_stream_of_too_few_prompts_is_refused(tmp_path: Path) -> None:
    rows = IterableDataset.from_generator(lambda: iter([{"prompt": "tea"}]))
    said = r"^train_dataset: must have at least the 2 prompts .*, got a shorter stream\. Add rows, or lower per_device"
    with pytest.raises(InputError, match=said):
        built("zopro", tmp_path, rows).train()
