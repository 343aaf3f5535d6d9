"""A terminal that keeps what is drawn on it."""

from __future__ import annotations

import io
import re


class FakeScreen(io.StringIO):
    encoding = "utf-8"

    def isatty(self) -> bool:
        return True

    def words(self) -> str:
        return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", self.getvalue())
