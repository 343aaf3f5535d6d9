"""The configuration as a JSON schema, for editors that complete keys and mark what is wrong as it is typed.

zopro config-schema > zopro.schema.json
"""

from __future__ import annotations

import dataclasses
from typing import Any

from zopro.choices import Registry
from zopro.config import RunConfig
from zopro.config.values import TRUTH

_NUMBER = {"type": "string", "pattern": "^[-+]?[0-9.]"}  # in quotes, or as 2e-4 is read by YAML 1.1
_TRUTH = {"type": "string", "enum": list(TRUTH)}
_FORMS: dict[str, list[dict[str, Any]]] = {
    "bool": [_TRUTH],
    "bool | int": [_TRUTH, _NUMBER],
    "int": [_NUMBER],
    "float": [_NUMBER],
    "float | str": [],
    "str": [{"type": ["number", "array"]}],
    "list[str]": [{"type": "string"}],
    "list[float]": [{"type": ["number", "string"]}],
}
"""Type of a key -> what else `zopro.config.values` reads as it."""


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file: every key's type, default, help and choices.

    Names with a part of one's own (`python:MODULE:NAME`) are patterns beside the names that are known. An empty value
    stands for the default. No key is required: each may be given on the command line.
    """
    from pydantic import TypeAdapter  # a quarter of a second, which no other command needs

    found = TypeAdapter(RunConfig).json_schema()
    for key in dataclasses.fields(RunConfig):
        form = found["properties"][key.name]
        about = {name: form.pop(name) for name in ("title", "default") if name in form}
        others = _FORMS[str(key.type)]
        if limits := _limited(key.metadata.get("choices", ()), about.get("default")):
            several = "items" in form
            form |= {"items": form["items"] | limits} if several else limits
            others = [{"type": "string", "anyOf": [limits, {"pattern": r"^\[|,"}]}] * several  # one name, or a list
        forms = [form, *others, {"type": "null"}]
        found["properties"][key.name] = {"anyOf": forms, **about, "description": key.metadata["help"]}
    found |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "additionalProperties": False}
    return found


def _limited(choices: Any, default: Any) -> dict[str, Any]:
    if not isinstance(choices, Registry):
        return {"enum": list(choices)} if choices else {}
    plain = [choice.name for choice in choices.values() if not choice.prefix]
    prefixes = sorted({choice.prefix for choice in choices.values() if choice.prefix} | {"python"})
    empty = [""] if default == "" else []
    return {"anyOf": [{"enum": [*empty, *plain]}, {"pattern": f"^({'|'.join(prefixes)}):.+"}]}
