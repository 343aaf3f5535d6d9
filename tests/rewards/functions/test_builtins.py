"""Every built-in reward: its range, what it takes and refuses, and how TRL calls it."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rouge_score.rouge_scorer import RougeScorer
from sacrebleu.metrics.chrf import CHRF

from zopro.choices import REWARDS
from zopro.config.reading import load_config
from zopro.errors import InputError
from zopro.rewards.functions import reward_function
from zopro.tasks import load_rows

PARAMETERS = {"regex": "[0-9]{1,2}", "length": "2-4", "json": "name,age"}
BUILTINS = [choice for choice in REWARDS.values() if not (choice.trained or choice.network or choice.prefix == "python")]
SPECS = [f"{choice.prefix}:{PARAMETERS[choice.prefix]}" if choice.prefix else choice.name for choice in BUILTINS]
COLUMNS = {"answer": "7", "nums": [3, 4], "target": 7}


def scores(spec: str, *texts: Any, **columns: Any) -> list[float | None]:
    """As TRL calls it: every column once for each completion, and more that a reward need not know."""
    repeated = {name: [value] * len(texts) for name, value in (COLUMNS | columns).items()}
    return reward_function(spec)(
        prompts=["?"] * len(texts),
        completions=list(texts),
        completion_ids=[[1]] * len(texts),
        trainer_state=None,
        **repeated,
    )


@pytest.mark.parametrize("spec", SPECS)
@given(
    text=st.one_of(st.text(), st.text('0123456789+-*/()=.,{}[]" \\boxed#e'), st.from_regex(r"\A[-(\d][-+*/() \d=]*\Z"))
)
def test_rewards_lie_between_0_and_1(spec: str, text: str) -> None:
    (score,) = scores(spec, text)
    assert score is not None and 0 <= score <= 1


RIGHT = {
    "exact": ("7", "17"),
    "contains": ("it is 7.", "17"),
    "regex": ("a1", "a"),
    "length": ("one two", "one"),
    "json": ('{"name": 1, "age": 2}', "{'name': 1}"),
    "maths": ("so 7", "so 7 or 8"),
    "countdown": ("3 + 4", "7"),
    "chrf": ("7", "17"),
    "rouge": ("it is 7", "it is 17"),
}


@pytest.mark.parametrize("spec", SPECS)
def test_right_answers_get_1_in_any_form_and_wrong_ones_less(spec: str) -> None:
    right, wrong = RIGHT[spec.partition(":")[0]]
    row = {"answer": right} if spec == "rouge" else {}  # which is of pairs of words too
    messages = [[{"role": "assistant", "content": text}] for text in (right, wrong)]
    assert scores(spec, right, wrong, **row) == scores(spec, *messages, **row)
    assert scores(spec, right, **row) == [1.0] and scores(spec, wrong, **row)[0] < 1


@pytest.mark.parametrize("spec", SPECS)
def test_what_a_model_may_say_breaks_nothing(spec: str) -> None:
    nasty = ["", "9" * 6000, "(" * 3000, "[" * 100_000, "1/0", "2 ** 9 ** 9 ** 9", "1e999999999", "\x00", "\ud800", "NaN"]
    assert all(
        (score is not None and 0 <= score < 1) or spec.startswith(("regex", "json")) for score in scores(spec, *nasty)
    )
    assert scores(spec, []) == scores(spec, "")


@pytest.mark.parametrize(
    ("spec", "line"),
    [
        ("exct", f"reward: must be one of {', '.join(REWARDS)}, got 'exct'. Did you mean 'exact'?"),
        ("exact:7", f"reward: must be one of {', '.join(REWARDS)}, got 'exact:7'. Did you mean 'exact'?"),
        ("regex", f"reward: must be one of {', '.join(REWARDS)}, got 'regex'. Did you mean 'regex:PATTERN'?"),
        ("regx:a", f"reward: must be one of {', '.join(REWARDS)}, got 'regx:a'. Did you mean 'regex:PATTERN'?"),
        ("regex:*", "reward: regex must be a regular expression of Python, got '*' (nothing to repeat at position 0)."),
        ("length:60", "reward: length must be MIN-MAX in words, such as length:20-60, got '60'."),
        ("length:9-3", "reward: length must be MIN-MAX in words, such as length:20-60, got '9-3'."),
        ("length:0-0", "reward: length must be MIN-MAX in words, such as length:20-60, got '0-0'."),
        ("json:a,,b", "reward: json must be followed by keys with commas between them, got 'a,,b'."),
        ("model", "reward: must be a function, got 'model', a model."),
        ("python:math:tauu", "reward: 'math' has no 'tauu'. Did you mean 'tau'?"),
        ("python:math:tau", "reward: must be callable, got 'math:tau', which is float."),
        (
            "python:json:JSONDecoder",
            "reward: must be a function or an object, got 'json:JSONDecoder', a class. Name an object of it.",
        ),
    ],
)  # fmt: skip
def test_a_wrong_name_gets_one_line(spec: str, line: str) -> None:
    with pytest.raises(InputError) as error:
        reward_function(spec)
    assert str(error.value) == line


@pytest.mark.parametrize("spec", ["exact", "contains", "maths", "countdown", "chrf", "rouge"])
def test_rows_without_an_answer_have_no_reward_and_those_without_the_column_are_refused(spec: str) -> None:
    assert scores(spec, "7", answer=None, nums=None) == [None]
    with pytest.raises(InputError, match=f"^reward: {spec} needs the column"):
        reward_function(spec)(prompts=["?"], completions=["7"])


@pytest.mark.parametrize("spec", ["exact", "contains"])
def test_a_whole_number_that_a_table_keeps_as_a_float_is_one(spec: str) -> None:
    said, answers = ["4", "4.0", "0.5", "4"], [4.0, 4.0, 0.5, "4.0"]
    assert reward_function(spec)(prompts=["?"] * 4, completions=said, answer=answers) == [1.0, 0.0, 1.0, 0.0]


def test_an_answer_may_be_one_of_several() -> None:
    assert scores("exact", "b", "c", answer=["a", "b"]) == [1, 0]
    assert scores("maths", "8", "9", answer="3 + 5 = 8\n#### 8") == [1, 0]


def test_nearness_is_the_metric_s_of_the_nearest_reference() -> None:
    text, references = "the small cat sat down", ["a small cat sat there", "the small cats sit down"]
    of_one = [CHRF().sentence_score(text, [reference]).score / 100 for reference in references]
    assert scores("chrf", text, answer=references) == [pytest.approx(max(of_one))] and min(of_one) < max(of_one)
    assert scores("chrf", text, answer=references[1]) == [pytest.approx(of_one[1])]
    kinds = ("rouge1", "rouge2", "rougeL")
    measures = RougeScorer(kinds, use_stemmer=True).score(references[0], text)
    expected = sum(measures[kind].fmeasure for kind in kinds) / 3
    assert scores("rouge", "Paris", "Lutetia", answer="Paris") == [1, 0], "one word has no pairs"
    assert scores("rouge", text, answer=references[0]) == [pytest.approx(expected)]
    assert scores("rouge", text, answer=["...", None]) == [None], "no word to compare with"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(
            (text, 1.0)
            for text in ("```json\n{}\n```", " ```JSON\r\n{}\r\n```\n", "```  \n\n[1]\n\n  ```", "{} ", '"```"')
        ),
        *((text, 0.0) for text in ("```{}```", "```json\n{}```", "```json {}\n```", "```\n```", "```", "```json\n\n```")),
        *(
            (text, 0.0)
            for text in ("```js\n{}\n```", "Here:\n```\n{}\n```", "```json\n{}", "\u00a0{}", "```\n\u00a0{}\n```")
        ),
    ],
)
def test_a_fence_is_no_part_of_json(text: str, value: float) -> None:
    assert scores("json", text) == [value]


def test_a_fence_is_looked_for_in_linear_time() -> None:
    started = time.process_time()
    assert scores("json", "```json" + "\n" * 4000 + "}", "```json\n{}" + "\n  " * 4000 + "}") == [0, 0]
    assert time.process_time() - started < 2  # seconds; cubic, it would be minutes


def test_they_need_no_torch() -> None:
    code = "import sys, zopro.rewards.functions, zopro.tasks.generated; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("reward_*.yaml"))


def test_every_built_in_reward_has_an_example_that_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(EXAMPLES[0].parent.parent)
    configs = [load_config(path) for path in EXAMPLES]
    used = {name for config in configs for name in config.reward}
    assert {choice.prefix or choice.name for choice in BUILTINS} <= {name.partition(":")[0] for name in used}
    for config in configs:
        assert config.task == "verifiable" and not config.trains_reward
        for name in config.reward:
            assert name.startswith("python:") or reward_function(name)
        if "prompts" in config.train_data:
            assert len(load_rows(str(EXAMPLES[0].with_name(Path(config.train_data).name)))) >= 2 * config.eval_prompts


def test_the_examples_own_rewards_are_some(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES[0].parent))
    texts = ["a big house", "", "tiny, tiny words!"]
    found = reward_function("python:my_rewards:short_words")(prompts=["?"] * 3, completions=texts, level=[1] * 3)
    assert found == [2 / 3, None, 2 / 3]
    prompts: list[Any] = ["Translate.\n\nThe house is big.", [{"role": "user", "content": "The house is big."}], "?"]
    answers: list[Any] = ["The house is big.", [{"role": "assistant", "content": "The Haus is groß."}], ""]
    found = reward_function("python:my_rewards:new_words")(prompts=prompts, completions=answers)
    assert found == [0, pytest.approx(0.5 / 0.7), 0]
