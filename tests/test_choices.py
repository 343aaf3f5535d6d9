"""Registries: every name stands for something, wrong ones are refused, and variants of one's own need no line of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from one_run import no_report
from tiny_runs import config, write_inputs
from zopro.choices import DIRECTIONS, METHODS, REGISTRIES, Choice, Method, Registry, imported
from zopro.compare.plan import Plan
from zopro.config.reading import FIELDS
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.loop.replay import replay
from zopro.store.journal import read
from zopro.train.methods import mezo
from zopro.zo import Directions, Targeted
from zopro.zo.directions import noise_source

BY_KEY = {registry.key: registry for registry in REGISTRIES}

DIRECTION = '''
import torch
from zopro.zo import Directions
from zopro.zo.directions import tensor_generator

class Sparse(Directions):
    """Gaussian noise on a random half of the entries."""

    def tensor(self, name, like, seed, step):
        generator = tensor_generator(name, seed, step, like.device)
        noise = torch.randn(like.shape, generator=generator, device=like.device)
        return noise * (torch.rand(like.shape, generator=generator, device=like.device) < 0.5)
'''

METHOD = """
from dataclasses import replace
from zopro.choices import Method
from zopro.train.methods import mezo

def train(inputs):
    return mezo(replace(inputs, config=replace(inputs.config, queries=2)))

averaged = Method("averaged", train, "mezo with two queries a step", self_starting=True)
"""


@pytest.mark.parametrize("key", BY_KEY)
def test_every_name_stands_for_something(key: str) -> None:
    registry: Registry[Choice] = BY_KEY[key]
    assert FIELDS[key].metadata["choices"] is registry
    for choice in registry.values():
        assert callable(choice.load()) and choice.help
        assert f"{choice.name} ({choice.help})" in FIELDS[key].metadata["help"]


@pytest.mark.parametrize("key", BY_KEY)
def test_an_unknown_name_is_refused_with_all_that_are_known(key: str) -> None:
    registry = BY_KEY[key]
    almost = next(iter(registry)) + "x"
    with pytest.raises(InputError) as refused:
        registry.check(almost)
    assert str(refused.value).startswith(f"{key}: must be one of {', '.join(registry)}")
    assert str(refused.value).endswith(f"got {almost!r}. Did you mean '{next(iter(registry))}'?")
    own = any(choice.prefix == "python" for choice in registry.values())  # which looks at the form itself
    for name in ("", "python", "python:", "model:", ":x", *([] if own else ["python:module", "python::name"])):
        with pytest.raises(InputError, match=f"^{key}: must be one of"):
            registry[name]


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="name: must be new among"):
        METHODS.add(Method("mezo", mezo, "again"))


def test_every_direction_is_made_by_its_name() -> None:
    update = {"w": torch.ones(3, 4)}
    for choice in DIRECTIONS.values():
        made = noise_source(choice.name, update)
        assert isinstance(made, Directions) and DIRECTIONS.name_of(type(made)) == choice.name
        assert all(hasattr(made, kept) for kept in choice.keeps)
    assert DIRECTIONS.name_of(Targeted) is None


@pytest.fixture(scope="module")
def mine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A module outside of the package with a direction and a method."""
    folder = tmp_path_factory.mktemp("mine")
    (folder / "my_variants.py").write_text(DIRECTION + METHOD)
    sys.path.append(str(folder))
    yield "my_variants"
    sys.path.remove(str(folder))


FEW = {"policy_steps": 2, "iterations": 1, "eval_prompts": 2, "pair_prompts": 2}
FAULTY = """
from zopro.choices import Method

def train(inputs):
    return 3

def fails(inputs):
    raise KeyError("beta2")

nothing = Method("nothing", train, "", self_starting=True)
rated = Method("rated", train, "", rate="nope")
used = Method("used", train, "", uses="gradients")
heeding = Method("heeding", train, "", heeds=("stepp",))
preset = Method("preset", train, "", preset="papr")
"""


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("nothing", "must return a trainer of transformers, got 'python:faulty:nothing', which made int"),
        ("fails", "must return a trainer of transformers, got 'python:faulty:fails', which raised KeyError: 'beta2'"),
        ("rated", "its rate must be a key of the configuration, got .* with rate 'nope'"),
        ("used", "must have uses FUNCTION_VALUES, SWEEP or BACK_PROPAGATION"),
        ("heeding", "its heeds must be of step, directions, evolution, guided, got .* with heeds 'stepp'"),
        ("preset", "its preset must be of default, paper, got .* with preset 'papr'"),
    ],
)
def test_methods_that_are_not_as_they_should_be(
    name: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "faulty.py").write_text(FAULTY)
    monkeypatch.syspath_prepend(str(tmp_path))
    settings = config(write_inputs(tmp_path), tmp_path / "run", iterations=1, method=f"python:faulty:{name}")
    with pytest.raises(InputError, match=f"^method: {line}"):
        pipeline.run(settings, quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options",
    [
        {"method": "mezo", "warm_start": "spsa", "noise": "python:my_variants:Sparse"},
        {"method": "zopro", "warm_start": "sft", "noise": "python:my_variants:Sparse"},
        {"method": "python:my_variants:averaged"},
    ],
    ids=["direction", "noise of targeted", "method"],
)
def test_variants_from_outside_run_are_journalled_and_replayed(
    options: dict[str, str], mine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_report(monkeypatch)
    out = tmp_path / "run"
    summary = pipeline.run(config(write_inputs(tmp_path), out, **FEW, **options), quiet=True)
    assert summary["method"] == options["method"]
    journal = read(out / "iterations" / "000" / "journal.jsonl")
    if "noise" in options:
        kind = journal.header.directions
        assert (kind.get("noise") or kind)["kind"] == options["noise"]
    else:
        assert [len(step.record.coefficients) for step in journal.steps] == [2, 2]
    assert replay(out, tmp_path / "again")["equal"] is True


def test_variants_from_outside_are_compared(mine: str) -> None:
    assert Plan(("mezo", f"python:{mine}:averaged"), steps=1).methods[1] == "python:my_variants:averaged"
    with pytest.raises(InputError, match=r"^method: 'my_variants' has no 'average'. Did you mean 'averaged'"):
        METHODS[f"python:{mine}:average"]
    assert METHODS[f"python:{mine}:averaged"].self_starting


def test_the_working_directory_stays_importable_behind_the_path_of_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "calls_late.py").write_text("def f():\n    import called_late\n    return called_late.x\n")
    (tmp_path / "called_late.py").write_text("x = 7\n")
    monkeypatch.chdir(tmp_path)
    path = [place for place in sys.path if place]
    monkeypatch.setattr(sys, "path", [*path])
    assert [imported("calls_late:f", "reward")() for _ in range(2)] == [7, 7]
    assert sys.path == [*path, ""]
    monkeypatch.setattr(sys, "path", ["", *path])  # as `python -c` has it
    imported("calls_late:f", "reward")
    assert sys.path == ["", *path]
