"""Lets every test file import the shared builders: `from tiny import tiny_model, tiny_tokenizer`."""

import sys
from collections.abc import Generator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from zopro.system.imports import importing

sys.path.insert(0, str(Path(__file__).parent))

settings.register_profile("zopro", deadline=None, derandomize=True)  # the same examples on every machine
settings.load_profile("zopro")

THREADS = torch.get_num_threads()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting tests imports everything; transformers collects garbage after every training."""
    with importing():
        return (yield)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _as_many_threads_as_in_the_beginning() -> None:
    """numba's first use changes torch's number, and threads without a core of their own wait on each other."""
    torch.set_num_threads(THREADS)
