"""docs/trainers.md: the slope of the differences is the one that the base class's own loss has by autograd."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from trl import (
    DPOTrainer,
    GRPOTrainer,
    KTOTrainer,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
    SFTTrainer,
)

from tiny_slopes import CONFIGS, NEEDED, build, classes, policy, slopes
from tiny_trainers import zopro
from zopro import ESConfig, GuidedConfig, ZOPrOConfig, zeroth_order
from zopro.train import slope_check
from zopro.train.slope import TRIES, GradientSlope

pytestmark = pytest.mark.usefixtures("random_state")


def rows_of(section: str) -> list[list[str]]:
    """The cells of the tables in a section of docs/trainers.md."""
    page = (Path(__file__).parents[2] / "docs" / "trainers.md").read_text(encoding="utf-8")
    text = page.partition(f"\n## {section}\n")[2].partition("\n## ")[0]
    return [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| `")
    ]


def table() -> list[tuple[str, str, Any, str]]:
    """(trainer, option, value, verdict) of each value in docs/trainers.md."""
    return [
        (trainer, option, value, verdict)
        for trainer, option, values, verdict in rows_of("TRL's trainers")
        for value in yaml.safe_load(f"[{values}]")
    ]


@pytest.mark.parametrize(("trainer", "option", "value", "verdict"), table())
def test_each_loss_of_the_table(
    trainer: str, option: str, value: Any, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the check lets it pass, at a distance of our own: searching for one takes longer than all the rest."""
    monkeypatch.setattr(slope_check, "auto_eps", lambda loss_at, scale: (1e-3, 1e-7))
    trainer_cls, _ = classes(trainer)
    if verdict == "refused":
        with pytest.raises(ValueError, match="trainer_cls: must take its loss from compute_loss"):
            zeroth_order(trainer_cls)
        return
    made = build(trainer_cls, tmp_path, **{option: value}, **NEEDED.get((option, value), {}))
    measured, slope = slopes(made)
    assert abs(slope) > 1e-3
    assert measured == pytest.approx(slope, rel=1e-2, abs=1e-4)
    assert set(made._slope._freezes.values()) == {verdict == "handled"} and made._slope.tries < TRIES, "compared"


def loss_types(trainer_cls: type) -> set[str]:
    """The strings that a trainer compares its loss_type with."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(sys.modules[trainer_cls.__module__]))):
        if isinstance(node, ast.Compare) and "loss_type" in ast.unparse(node.left):
            constants = [leaf for side in node.comparators for leaf in ast.walk(side) if isinstance(leaf, ast.Constant)]
            found |= {leaf.value for leaf in constants if isinstance(leaf.value, str)}
    return found


@pytest.mark.parametrize("trainer_cls", [SFTTrainer, RewardTrainer, DPOTrainer, KTOTrainer, RLOOTrainer, GRPOTrainer])
def test_the_table_has_every_loss_type_that_trl_has(trainer_cls: type) -> None:
    listed = {value for trainer, option, value, _ in table() if trainer == trainer_cls.__name__ and option == "loss_type"}
    known = loss_types(trainer_cls)
    assert known <= listed and (known or "loss_type" not in CONFIGS[trainer_cls].__dataclass_fields__)


def test_the_page_has_every_option_that_our_configurations_add_to_trl_s() -> None:
    words = [
        (re.findall(r"\w+", names), re.findall(r"\w+", kinds)) for names, kinds, _ in rows_of("Options of their own")
    ]
    told = sorted((kind, name) for names, kinds in words for name in names for kind in kinds)
    ours = [(kind, field.name) for kind in (ESConfig, GuidedConfig, ZOPrOConfig) for field in dataclasses.fields(kind)]
    assert told == sorted((kind.__name__, name) for kind, name in ours if name not in RLOOConfig.__dataclass_fields__)


def test_without_it_differences_take_the_slope_of_another_function(tmp_path: Path) -> None:
    trainer = build(DPOTrainer, tmp_path, use_weighting=True)
    trainer._slope = GradientSlope(trainer, check=False)
    trainer._slope.closure = lambda loss, inputs, search: lambda: loss(trainer, inputs)
    measured, slope = slopes(trainer)
    assert abs(measured - slope) > 0.2 * abs(slope)


@pytest.mark.parametrize("surrogate", ["clipped", "log_ratio"])
def test_the_known_losses_of_zopro_have_the_slope_of_rloo_s(surrogate: str, tmp_path: Path) -> None:
    options = {"eps": 1e-4, "second_moment_beta": 0.0, "max_steps": 1, "learning_rate": 0.0}
    trainer = zopro(tmp_path, model=policy(), surrogate=surrogate, **options)
    measured, slope = slopes(trainer)
    assert measured == pytest.approx(slope, rel=2e-2) and abs(slope) > 1e-2
    assert not trainer._slope._freezes, "neither searched nor compared"
