"""A Python that has "vLLM": this one, with a package of that name on its path that forwards to a server of the test."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import vllm_forwarding
from processes import gone


class Starts:
    """Where what was started writes itself down.

    Args:
        folder: an empty one.
        to: the server that it forwards to.
    """

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch, to: str = "") -> None:
        self.notes = folder / "notes.jsonl"
        package = folder / "vllm"
        (package / "entrypoints/openai").mkdir(parents=True)
        for inside in ("", "entrypoints", "entrypoints/openai"):
            (package / inside / "__init__.py").touch()
        (package / "platforms.py").write_text("class current_platform:\n    device_type = 'cpu'\n")
        shutil.copy(vllm_forwarding.__file__, package / "entrypoints/openai/api_server.py")
        for name, value in {"PYTHONPATH": str(folder), "FORWARD_NOTES": str(self.notes), "FORWARD_TO": to}.items():
            patch.setenv(name, value)
        patch.setattr("shutil.which", lambda name: None if name == "vllm" else name)

    def noted(self) -> list[dict[str, Any]]:
        """arguments and processes of each start so far."""
        return [json.loads(line) for line in self.notes.read_text().splitlines()]

    def gone(self) -> bool:
        """Whether nothing is left of any of them, soon."""
        return gone([process for start in self.noted() for process in start["processes"]])
