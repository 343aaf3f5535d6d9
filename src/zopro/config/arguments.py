"""A configuration on the command line: a YAML file of keys, and `--key value` for each of them, which wins."""

from __future__ import annotations

import argparse
from typing import Any

from zopro.config import GROUPS, RunConfig


def add_configuration(command: argparse.ArgumentParser) -> None:
    """The arguments that `configuration` reads: CONFIG, and an option for each key."""
    command.add_argument("config", metavar="CONFIG", help="YAML file of configuration keys")
    for group in GROUPS:
        section = command.add_argument_group((group.__doc__ or "").rstrip("."))
        for name, field in group.__dataclass_fields__.items():
            flag = {"nargs": "?", "const": "true"} if field.type == "bool" else {}
            shared: dict[str, Any] = {"dest": f"key.{name}", "default": argparse.SUPPRESS, "metavar": "VALUE", **flag}
            section.add_argument(f"--{name}", help=field.metadata["help"].replace("%", "%%"), **shared)
            if "_" in name:
                section.add_argument(f"--{name.replace('_', '-')}", help=argparse.SUPPRESS, **shared)


def configuration(args: argparse.Namespace, **given: str) -> RunConfig:
    """The configuration that was typed; `given` keys win over it.

    Raises:
        InputError: what `zopro.config.reading.load_config` refuses.
    """
    from zopro.config.reading import load_config

    typed = {name.removeprefix("key."): value for name, value in vars(args).items() if name.startswith("key.")}
    return load_config(args.config, {**typed, **given})
