"""The configuration as a JSON schema, for editors that complete keys and mark what is wrong as it is typed.

zopro config-schema > zopro.schema.json
"""

from __future__ import annotations

import dataclasses
from typing import Any

from zopro.choices import Registry
from zopro.config import RunConfig


def schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a configuration file: every key's type, default, help and choices.

    Names with a part of one's own (`python:MODULE:NAME`) are patterns beside the names that are known. An empty value
    stands for the default. No key is required: each may be given on the command line.
    """
    from pydantic import TypeAdapter  # a quarter of a second, which no other command needs

    found = TypeAdapter(RunConfig).json_schema()
    for key in dataclasses.fields(RunConfig):
        described = found["properties"][key.name]
        described["description"] = key.metadata["help"]
        limits = _limited(key.metadata.get("choices", ()), described)
        described |= {"items": described["items"] | limits} if limits and "items" in described else limits
    found |= {"$schema": "https://json-schema.org/draft/2020-12/schema", "additionalProperties": False}
    return found


def _limited(choices: Any, described: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(choices, Registry):
        return {"enum": list(choices)} if choices else {}
    plain = [choice.name for choice in choices.values() if not choice.prefix]
    prefixes = sorted({choice.prefix for choice in choices.values() if choice.prefix} | {"python"})
    empty = [""] if described.get("default") == "" else []
    return {"anyOf": [{"enum": [*empty, *plain]}, {"pattern": f"^({'|'.join(prefixes)}):.+"}]}
