"""Configurations of any content: each loads and comes back from the disk, or is refused by the name of its key."""

from __future__ import annotations

import dataclasses
import re
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from zopro.choices import METHODS
from zopro.config import WARM_STARTS, RunConfig
from zopro.config.guided import GUIDE_LOCAL, GUIDES
from zopro.config.reading import FIELDS, load_config
from zopro.config.step import PRESETS
from zopro.config.values import _READERS
from zopro.errors import InputError

few = settings(max_examples=120)
NEEDED = {"model": "m", "task": "chat", "train_data": "x"}
WORDS = ("", "none", "auto", "true", "1e-4", "inf", "-1", *METHODS, *PRESETS, *GUIDES, *GUIDE_LOCAL, *WARM_STARTS)
numbers = st.integers() | st.sampled_from([0, 1, 2, 8, 10**400]) | st.floats()
scalars = st.none() | st.booleans() | numbers | st.text(max_size=8) | st.sampled_from(WORDS) | st.dates() | st.binary()
anything = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=2))
keys = st.sampled_from([*FIELDS, *FIELDS, "learning_rat"]) | st.text(max_size=5) | st.none() | st.integers()
mappings = st.dictionaries(keys, anything, max_size=4).map(lambda values: {**NEEDED, **values})


def load(text: str) -> RunConfig:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path)


def round_trip(config: RunConfig) -> RunConfig:
    return load(yaml.safe_dump(config.to_dict(), sort_keys=False))


@few
@given(mappings)
def test_any_mapping_loads_or_is_refused_by_its_key(values: dict[Any, Any]) -> None:
    try:
        config = load(yaml.safe_dump(values, allow_unicode=True))
    except InputError as error:
        key = str(error).split(":")[0]
        assert key in map(str, values) or key == "CONFIG", error
        return
    assert round_trip(config) == config


@few
@given(st.sampled_from(list(FIELDS)), scalars | st.lists(st.text(max_size=4), max_size=3))
def test_any_value_of_any_key(key: str, value: Any) -> None:
    """One key at a time, so that every check is met by every kind of value."""
    try:
        config = load(yaml.safe_dump({**NEEDED, key: value}, allow_unicode=True))
    except InputError as error:
        assert str(error).startswith((f"{key}: must ", "CONFIG: must ")), error
        return
    assert round_trip(config) == config
    field = FIELDS[key]
    kinds = {
        "bool": bool,
        "bool | int": (bool, int),
        "int": int,
        "float": (int, float),
        "str": str,
        "list[str]": list,
        "list[float]": list,
        "float | str": (float, str),
    }
    assert isinstance(getattr(config, key), kinds[str(field.type)])


@few
@given(st.binary(max_size=40) | st.text(max_size=40).map(str.encode))
def test_any_bytes_are_a_configuration_or_are_refused(content: bytes) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_bytes(content)
        with pytest.raises(InputError):  # no bytes name a model by chance
            load_config(path)


HOSTILE = {
    "a: 2024-13-45": "CONFIG: must be valid YAML",
    "[" * 3000: "CONFIG: must be valid YAML",
    "model: &a [*a]": "model: must be a text",
    "beta: 1" + "0" * 400: "beta: must be a finite number",
    "seed: 9223372036854775808": "seed: must be less than 2^63",
    'output_dir: "a\\0b"': "output_dir: must be a text",
    "output_dir: !!binary aGk=": "output_dir: must be a text",
    "eps: inf": "eps: must be a number greater than 0, or auto",
    "report_to: [a, [b]]": "report_to: must be a list of words",
    "learning_rate: .nan": "learning_rate: must be a finite number",
    "? [a, b]\n: 1": "CONFIG: must be valid YAML",
    "1: 2": "1: no such configuration key",
    "seed: !!timestamp foo": "CONFIG: must be valid YAML",
    'seed: !!int ""': "CONFIG: must be valid YAML",
    "load_in_4bit: !!bool foo": "CONFIG: must be valid YAML",
    "target_language: no": "target_language: must be a text, got False. Put it in quotes.",
    "reward_weights: 0.5,,0.5": "reward_weights: must be a list of finite numbers, comma separated",
}


@pytest.mark.parametrize("text", HOSTILE, ids=lambda text: text[:24])
def test_what_yaml_can_do_to_a_configuration(text: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(HOSTILE[text])):
        load("".join(f"{key}: {value}\n" for key, value in NEEDED.items() if f"{key}:" not in text) + text)


def test_a_key_that_stands_twice_is_refused_with_both_lines() -> None:
    lines = "".join(f"{key}: {value}\n" for key, value in NEEDED.items())
    with pytest.raises(InputError, match=r"^CONFIG: must be valid YAML, got '.*' line 6: 'beta' stands in line 4 too"):
        load(lines + 'beta: 0.1\n\n"beta": 0.2\n')
    merged = load(lines + "<<: &a {beta: 0.1, max_kl: 5}\n<<: [{<<: *a, max_kl: 6, iterations: 7}]\nbeta: 0.2\n")
    assert (merged.beta, merged.iterations) == (0.2, 7) and merged.max_kl in (5, 6), "as YAML's merge keys have it"


@pytest.mark.parametrize(("typed", "meant"), [("010", 10), ("007", 7), ("08", 8), ("+010", 10), ("0x1F", 31)])
def test_a_whole_number_is_decimal_as_on_the_command_line(typed: str, meant: int, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text(
        f"model: m\ntask: chat\ntrain_data: x\nseed: {typed}\nreward: [model, json]\nreward_weights: [{typed}, 1]\n"
    )
    config = load_config(file)
    assert (config.seed, config.reward_weights) == (meant, [meant, 1])


@pytest.mark.parametrize("typed", ["1.10", "007", "12:30:00", "1_000", "2026-11-30T10:00:00", "1e3", "0x1F"])
def test_a_text_is_what_was_typed(typed: str) -> None:
    found = load("".join(f"{key}: {value}\n" for key, value in {**NEEDED, "output_dir": typed, "seed": "0x1F"}.items()))
    assert (found.output_dir, found.seed) == (typed, 31)


def test_words_that_mean_nothing_mean_it_after_a_round_trip_too() -> None:
    for words, meant in ((" none", []), (["", " "], []), (["a ", "b,c"], ["a", "b", "c"])):
        config = load(yaml.safe_dump({**NEEDED, "report_to": words}))
        assert config.report_to == meant and round_trip(config) == config


def test_every_key_has_a_reader() -> None:
    assert {str(field.type) for field in dataclasses.fields(RunConfig)} <= set(_READERS)
