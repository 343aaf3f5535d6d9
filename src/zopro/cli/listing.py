"""`zopro methods` and `zopro config-schema`: what can be chosen, for people and for editors. Neither imports torch."""

from __future__ import annotations

import argparse
import json
from typing import Any

from zopro.choices import METHODS, REGISTRIES
from zopro.system.terminal import Page, Table


def add_methods(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "methods",
        help="what a policy can be optimised by, and all other names that a configuration may hold",
        description="List the methods, and what each uses: function values only, or back-propagation. Then all other "
        "names that a configuration may hold: noise, judges, tasks, rewards, engines.",
    )
    command.set_defaults(handler=_methods)
    return command


def add_schema(commands: Any) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(
        "config-schema",
        help="the configuration as a JSON schema, for editors",
        description="Print the keys of a configuration as a JSON schema, from which editors complete names and mark "
        "mistakes.",
    )
    command.set_defaults(handler=_schema)
    return command


def _methods(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    others = [registry for registry in REGISTRIES if registry is not METHODS]
    tables: list[str | Table] = []
    for registry in others:
        tables += ["", Table([(registry.key, ""), *((choice.name, choice.help) for choice in registry.values())])]
    rows = [(method.name, method.uses, method.help, method.rate) for method in METHODS.values()]
    shown = Table([("method", "uses", "", "learning rate"), *rows])
    methods = [dict(zip(("name", "uses", "help", "learning_rate"), row, strict=True)) for row in rows]
    found = {"methods": methods, **{registry.key: {c.name: c.help for c in registry.values()} for registry in others}}
    return found, Page(shown, *tables, "", "In place of a name, python:MODULE:NAME takes yours: docs/extending.md.")


def _schema(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    from zopro.config.schema import schema

    found = schema()
    return found, json.dumps(found, indent=2, ensure_ascii=False)
