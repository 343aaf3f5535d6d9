"""Writes docs/configuration.md from the help texts in zopro.config; `make docs` runs it, a test keeps them in step."""

from __future__ import annotations

from pathlib import Path

from zopro.config import GROUPS
from zopro.config.defaults import BY_ENGINE, default_of

TARGET = Path(__file__).with_name("configuration.md")

INTRODUCTION = """# Configuration

<!-- Written by docs/make_configuration.py from src/zopro/config: edit the help texts there, then `make docs`. -->

`zopro run CONFIG.yaml --key value` reads these keys from the file and from the command line; the command line wins,
and a key that neither names takes its default. The file is flat: one `key: value` a line. Lists are `[a, b]` in the
file and `a,b` on the command line; booleans are `true` and `false`. Relative paths start at the working directory. A
key that does not exist, a value of the wrong type and a value out of range are refused before anything is loaded.

`task` and `train_data` have no default, nor has `model`, which may be left out with `engine: llamacpp:FILE` alone.
"""


def text() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for group in GROUPS:
        title = (group.__doc__ or "").rstrip(".")
        rows = [
            f"| `{name}` | {_default(field)}{_by_engine(name)} | {field.metadata['help'].replace('|', chr(92) + '|')} |"
            for name, field in group.__dataclass_fields__.items()
        ]
        parts.append("\n".join([f"## {title}", "", "| Key | Default | Meaning |", "|---|---|---|", *rows]) + "\n")
    return "\n".join(parts)


def _default(field) -> str:
    return _written(default_of(field))


def _written(value) -> str:
    value = ", ".join(value) if isinstance(value, list) else value
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{value}`" if value != "" else ""


def _by_engine(name: str) -> str:
    """The defaults that depend on the engine, as ", with llamacpp and vllm `0`"."""
    engines: dict[str, list[str]] = {}
    for engine, defaults in BY_ENGINE.items():
        if name in defaults:
            engines.setdefault(_written(defaults[name]), []).append(engine)
    return "".join(f"; {' and '.join(names)}: {value}" for value, names in engines.items())


if __name__ == "__main__":
    TARGET.write_text(text(), encoding="utf-8")
