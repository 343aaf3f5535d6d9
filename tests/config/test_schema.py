"""The JSON schema says of each key what the reader does."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from zopro import cli
from zopro.choices import METHODS
from zopro.config import RunConfig
from zopro.config.reading import FIELDS
from zopro.config.schema import schema
from zopro.errors import InputError

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("*.yaml"))
KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "null": type(None),
}


def allowed(value: Any, described: dict[str, Any]) -> bool:
    """Whether a value fits one key's part of the schema, by the words that ours uses."""
    if "anyOf" in described and not any(allowed(value, one) for one in described["anyOf"]):
        return False
    if "enum" in described and value not in described["enum"]:
        return False
    if "pattern" in described and not (isinstance(value, str) and re.search(described["pattern"], value)):
        return False
    if "items" in described and isinstance(value, list) and not all(allowed(one, described["items"]) for one in value):
        return False
    types = described.get("type", list(KINDS))
    return isinstance(value, tuple(KINDS[name] for name in ([types] if isinstance(types, str) else types)))


def test_every_key_has_its_type_default_and_help() -> None:
    found = schema()
    assert list(found["properties"]) == list(FIELDS) and found["additionalProperties"] is False
    for field in dataclasses.fields(RunConfig):
        described = found["properties"][field.name]
        assert described["description"] == field.metadata["help"]
        if field.default is not dataclasses.MISSING:
            assert (described["default"] == field.default and allowed(field.default, described)) or field.name == "task"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_fits_it(path: Path) -> None:
    properties = schema()["properties"]
    for key, value in yaml.safe_load(path.read_text()).items():
        assert allowed(value, properties[key]), (key, value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("reward", "chrf"),
        ("reward", "exact,length:1-8"),
        ("report_to", "none"),
        ("report_to", "wandb,trackio"),
        ("reward_weights", "0.5,-1"),
        ("reward_weights", 2),
        ("lora_target_modules", ["q_proj", "v_proj"]),
        ("output_dir", 7),
        ("seed", None),
        ("seed", "7"),
        ("learning_rate", "2e-4"),
        ("eval_greedy", "no"),
        ("easy_questions", 7),
    ],
)
def test_what_the_reader_takes_fits_it(key: str, value: Any) -> None:
    more = {"reward": ["exact", "json"]} if value == "0.5,-1" else {}
    RunConfig(**{"model": "m", "task": "verifiable", "train_data": "x", **more, key: value})
    assert allowed(value, schema()["properties"][key])


@pytest.mark.parametrize(
    ("key", "value"), [("seed", "many"), ("eval_greedy", 3), ("reward", ["chfr"]), ("reward", "chfr"), ("beta", [1])]
)
def test_mistakes_are_marked(key: str, value: Any) -> None:
    assert not allowed(value, schema()["properties"][key])


@pytest.mark.parametrize("key", [key for key, field in FIELDS.items() if field.metadata.get("choices")])
def test_what_it_refuses_is_refused(key: str) -> None:
    described = schema()["properties"][key]
    assert not allowed("nothing of the kind", described)
    needed, none = {"model": "m", "task": "chat", "train_data": "x"}, 7 if key == "sides" else "nothing of the kind"
    with pytest.raises(InputError, match=f"^{key}: must be one of"):
        RunConfig(**{**needed, key: none})


def test_the_commands_print_it_and_the_methods(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["config-schema"]) == 0
    assert json.loads(capsys.readouterr().out) == schema()
    assert cli.main(["methods", "--json"]) == 0
    assert [method["name"] for method in json.loads(capsys.readouterr().out)["methods"]] == list(METHODS)
    assert cli.main(["methods"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^{method.name}  +{method.uses}", shown, re.M) for method in METHODS.values())


def test_names_are_known_without_torch() -> None:
    modules = "zopro.config.reading, zopro.cli.listing, zopro.config.schema"
    code = f"import sys, {modules}; zopro.config.schema.schema(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
