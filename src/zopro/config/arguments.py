"""A configuration on the command line: a YAML file of keys, and `--key value` for each of them, which wins."""

from __future__ import annotations

import argparse
import os
from collections.abc import Collection
from typing import Any

from zopro.config import GROUPS, RunConfig
from zopro.config.defaults import default_of
from zopro.config.values import text

FIRST = (
    "model",
    "task",
    "train_data",
    "eval_data",
    "reward",
    "method",
    "iterations",
    "policy_steps",
    "num_generations",
    "max_completion_length",
    "lora_r",
    "output_dir",
)
"""The keys that people change first: `--help` shows them, `--help-all` shows all."""


class _HelpAll(argparse.Action):
    """Prints the help with every key, and exits."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option: str | None = None) -> None:
        for action in parser._actions:
            action.help = getattr(action, "full_help", action.help)
        parser.print_help()
        parser.exit()


def add_configuration(
    command: argparse.ArgumentParser, without: Collection[str] = (), hidden: Collection[str] = ()
) -> None:
    """The arguments that `configuration` reads: CONFIG, and an option for each key but those `without` use here; no help
    shows the `hidden` ones, which the command has by another name."""
    command.add_argument("config", metavar="CONFIG", help="YAML file of configuration keys")
    command.add_argument("--help-all", action=_HelpAll, nargs=0, help="show this help with every key, and exit")
    for group in GROUPS:
        section = command.add_argument_group((group.__doc__ or "").rstrip("."))
        for name, field in group.__dataclass_fields__.items():
            if name in without:
                continue
            flag = {"nargs": "?", "const": "true"} if field.type in ("bool", "bool | int") else {}
            shared: dict[str, Any] = {"dest": f"key.{name}", "default": argparse.SUPPRESS, "metavar": "VALUE", **flag}
            action = section.add_argument(f"--{name}", help=argparse.SUPPRESS, **shared)
            if name not in hidden:
                action.full_help = _help(field)  # type: ignore[attr-defined]
            if name in FIRST and name not in hidden:
                action.help = _help(field)


def _help(field: Any) -> str:
    about, default = field.metadata["help"], default_of(field)
    default = ",".join(default) if isinstance(default, list) else default
    if isinstance(default, int | float | str) and default != "":
        about += f" (default: {str(default).lower() if isinstance(default, bool) else default})"
    return str(about).replace("%", "%%")


def path(word: str) -> str:
    """The type of arguments that are paths: with the folder that ~ or ~user stands for, as in a configuration."""
    try:
        found = os.path.expanduser(text(word))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a path in UTF-8 without control characters, got {word!r}") from None
    if not found:
        raise argparse.ArgumentTypeError("must be a path, got ''")
    return found


def configuration(args: argparse.Namespace, **given: str) -> RunConfig:
    """The configuration that was typed; `given` keys win over it.

    Raises:
        InputError: what `zopro.config.reading.load_config` refuses.
    """
    from zopro.config.reading import load_config

    typed = {name.removeprefix("key."): value for name, value in vars(args).items() if name.startswith("key.")}
    return load_config(args.config, {**typed, **given})
