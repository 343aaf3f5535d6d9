"""From a YAML file and `--key value` words to a checked `RunConfig`; nothing is loaded or written here.

Words from the command line win over the file.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from zopro.config import RunConfig
from zopro.errors import InputError


class _Loader(yaml.SafeLoader):
    """YAML in which no key stands twice; of two values PyYAML itself would drop the first. `<<` may be repeated.

    Whole numbers are decimal with leading zeros too, as on the command line. Numbers and dates are kept as they are typed
    where a key's value is a text: 1.10 is no 1.1 in the name of a folder.
    """

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[tuple[str, str], int] = {}
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            name = key.tag, key.value
            if name in lines and not key.tag.endswith(":merge"):
                problem = f"{key.value!r} stands in line {lines[name]} too, leave one of them out"
                raise yaml.composer.ComposerError(problem=problem, problem_mark=key.start_mark)
            lines[name] = key.start_mark.line + 1
        node.value = [(key, _as_typed(value) if key.value in _TEXTS else value) for key, value in node.value]
        return node

    def construct_yaml_int(self, node: Any) -> int:
        text = self.construct_scalar(node)
        leading = re.fullmatch(r"[-+]?0[0-9_]+", text)  # octal in YAML 1.1, but not on the command line
        return int(text.replace("_", "")) if leading else super().construct_yaml_int(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _as_typed(node: Any) -> Any:
    if node.tag.removeprefix("tag:yaml.org,2002:") not in ("int", "float", "timestamp"):
        return node
    return yaml.ScalarNode("tag:yaml.org,2002:str", node.value, node.start_mark, node.end_mark)


FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
_TEXTS = [name for name, field in FIELDS.items() if field.type == "str"]


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read the YAML file at `path`, let `overrides` win, and check the result.

    Raises `InputError` for a missing file, YAML that does not parse, a key that is given twice or unknown, and a value of
    the wrong type.
    """
    return RunConfig.from_dict({**read_yaml(Path(path)), **(overrides or {})})


def read_yaml(path: Path) -> dict[str, Any]:
    """The keys and values in the file. Raises `InputError` where it has none."""
    try:
        values = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        inside = list(path.glob("*.yaml"))  # of a folder
        remedy = f" Give the file in it: {inside[0]}." if len(inside) == 1 else ""
        raise InputError(f"CONFIG: must be a readable YAML file, got '{path}' ({error.strerror}).{remedy}") from None
    except UnicodeDecodeError:
        raise InputError(f"CONFIG: must be a YAML file in UTF-8, got '{path}'.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise InputError(f"CONFIG: must be valid YAML, got '{path}'{where}: {problem}.") from None
    except Exception as error:  # what PyYAML lets through: a date that is none, brackets without end, !!int ""
        raise InputError(f"CONFIG: must be valid YAML, got '{path}': {type(error).__name__} ({error}).") from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise InputError(f"CONFIG: must hold 'key: value' lines, got a {type(values).__name__} in '{path}'.")
    return values
