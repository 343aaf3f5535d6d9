"""Lets every test file import the shared builders: `from tiny import tiny_model, tiny_tokenizer`."""

import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("zopro", deadline=None, derandomize=True)  # the same examples on every machine
settings.load_profile("zopro")
