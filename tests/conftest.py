"""Lets every test file import the shared builders: `from tiny import tiny_model, tiny_tokenizer`."""

import functools
import gc
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from zopro.system.imports import importing

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the Hub is asked for nothing, and not waited for where it is out of reach
os.environ.setdefault("NUMBA_DISABLE_JIT", "1")  # UMAP of three points takes milliseconds, and ten seconds to compile

settings.register_profile("zopro", deadline=None, derandomize=True)  # the same examples on every machine
settings.load_profile("zopro")

RANKS = [
    *("loop/test_ranks_run", "loop/test_crash_matrix", "zo/test_es", "zo/test_ranks", "train/test_es_ranks"),
    *("train/test_slope", "train/test_cut_steps"),
]
"""Files whose processes are forked from one server, which takes seconds to import everything: one worker runs them."""
SLOW = [
    *RANKS,
    *("loop/test_pipeline", "compare/test_compare", "loop/test_verifiable_run", "loop/test_resume", "loop/test_replay"),
    *("analysis/test_projection", "test_blocks", "bench/test_bench", "loop/test_vllm_run"),
]
"""Run first, so that no worker waits at the end for a long file of another."""


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collecting tests imports everything; transformers collects garbage after every training."""
    with importing():
        return (yield)


def _name(nodeid: str) -> str:
    return nodeid.partition("::")[0].removeprefix("tests/").removesuffix(".py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {name: number for number, name in enumerate(SLOW)}
    items.sort(key=lambda item: place.get(_name(item.nodeid), len(SLOW)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` in the order of the files, and with `RANKS` as one of them."""
    if config.getoption("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class Scheduling(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return "ranks" if _name(nodeid) in RANKS else super()._split_scope(nodeid)

    config.option.loadscopereorder = False
    return Scheduling(config, log)


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("cuda"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU")


@pytest.fixture(autouse=True)
def _what_stays_is_not_looked_through_again(request: pytest.FixtureRequest, _looked_at: list[tuple[str, int]]) -> None:
    """A trainer collects garbage at its end; what files before and modules have left for good took it 0.1 s each time."""
    now = str(request.path), len(sys.modules)
    if now != _looked_at[-1]:
        _looked_at[:] = [now]
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session")
def _looked_at() -> list[tuple[str, int]]:
    return [("", 0)]


@pytest.fixture(scope="session", autouse=True)
def _the_disk_is_not_waited_for() -> None:
    """No test cuts the power, and each file waits for 4 ms for the disk to have it."""
    os.fsync = lambda descriptor: None  # type: ignore[assignment]


@pytest.fixture(scope="session", autouse=True)
def _packages_are_looked_for_once() -> None:
    """accelerate reads PEFT's metadata from the disk at every step of a trainer: 2 ms each time."""
    from accelerate.utils import imports

    imports._is_package_available = functools.cache(imports._is_package_available)


@pytest.fixture(scope="session", autouse=True)
def _cards_are_compiled_once() -> None:
    """PEFT writes a card beside every adapter, and compiles its template for each."""
    import jinja2

    jinja2.Environment.compile = functools.cache(jinja2.Environment.compile)  # type: ignore[method-assign]


@pytest.fixture(scope="session", autouse=True)
def _seeds_of_no_device_are_not_noted() -> None:
    """Torch keeps each seed for a device to come, with its caller's stack: 2 ms each time."""
    import torch

    if not torch.cuda.is_available():
        for module in (torch.cuda.random, torch.xpu.random, torch.mtia):
            module._lazy_call = lambda call, **seeds: None  # type: ignore[attr-defined]


@pytest.fixture(scope="session", autouse=True)
def _rows_in_memory_have_any_name() -> None:
    """datasets pickles rows and functions to name what it would keep on the disk: 5 ms each time."""
    if "datasets" in sys.modules:
        from datasets import arrow_dataset, fingerprint

        for module in (arrow_dataset, fingerprint):
            module.generate_fingerprint = module.update_fingerprint = lambda *_: fingerprint.generate_random_fingerprint()


@pytest.fixture(scope="session", autouse=True)
def _no_block_is_compiled_alone() -> None:
    """accelerate looks through all modules for such a block whenever it unwraps a model: 1 ms each time."""
    from accelerate.utils import other

    other.has_compiled_regions = lambda module: False


@pytest.fixture
def random_state() -> Generator[None, None, None]:
    """Torch's global state, seeded for the test and given back after it."""
    import torch

    from zopro.system.random_state import preserve_random_state

    with preserve_random_state():
        torch.manual_seed(0)
        yield


@pytest.fixture(scope="session", autouse=True)
def _threads() -> int:
    import torch  # not above: the process that only hands out tests needs none

    return torch.get_num_threads()


@pytest.fixture(autouse=True)
def _as_many_threads_as_in_the_beginning(_threads: int) -> None:
    """numba's first use changes torch's number, and threads without a core of their own wait on each other."""
    import torch

    torch.set_num_threads(_threads)
