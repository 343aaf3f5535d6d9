"""`max_kl` ends a policy iteration: its journal is whole, replay and resume agree, and one line says why."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from one_run import metrics, no_report
from tiny_runs import config, fingerprint
from zopro.config import RunConfig
from zopro.loop import pipeline, policies
from zopro.loop.bound import BoundCallback
from zopro.loop.improvement import follower, not_improved
from zopro.loop.replay import replay

FAST = {
    "dtype": "float32", "iterations": 1, "warm_start": "spsa", "policy_steps": 6, "learning_rate": 0.02,
    "eval_prompts": 2, "pair_prompts": 2, "checkpoint_steps": 1,
}  # fmt: skip


def steps(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "iterations/000/journal.jsonl").read_text().splitlines()[1:]]


def step_kls(run: Path) -> list[float]:
    lines = [line for line in metrics(run) if line["stage"] == "policy" and line.get("step") and "reward" in line]
    return [line["kl_per_token"] * line["completions/mean_length"] for line in lines]


@pytest.fixture(scope="module")
def runs(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """free: without a bound. bounded: with a quarter of the largest KL of its steps. killed: as bounded, killed where the
    stage would have saved its policy, and resumed."""
    made, save, bound = {}, policies.Policies.save, 0.0
    for name in ("free", "bounded", "killed"):
        settings = config(folder, tmp_path_factory.mktemp(name) / "run", max_kl=bound, **FAST)
        made[name] = Path(settings.output_dir)
        with pytest.MonkeyPatch.context() as patch:
            no_report(patch)
            if name == "killed":

                def fails(self: Any, model: Any, path: Path) -> None:
                    if "policy" in str(path):
                        raise KeyboardInterrupt
                    save(self, model, path)

                patch.setattr(policies.Policies, "save", fails)
                with pytest.raises(KeyboardInterrupt):
                    pipeline.run(settings, quiet=True)
                patch.setattr(policies.Policies, "save", save)
            pipeline.run(settings, quiet=True, resume=name == "killed")
        bound = bound or max(step_kls(made["free"])) / 4
    return made


def test_it_stops_at_the_first_step_beyond(runs: dict[str, Path]) -> None:
    free = step_kls(runs["free"])
    bound = max(free) / 4
    first = next(number for number, kl in enumerate(free, 1) if kl > bound)
    assert 1 < first < len(free), "this test is of a stop in the middle"
    assert step_kls(runs["bounded"]) == free[:first]
    assert steps(runs["bounded"]) == steps(runs["free"])[:first]


def test_replay_and_resume_agree(runs: dict[str, Path], tmp_path: Path) -> None:
    assert fingerprint(runs["killed"]) == fingerprint(runs["bounded"])
    assert replay(runs["bounded"], tmp_path / "again")["equal"]


def test_one_line_says_why() -> None:
    said: list[str] = []
    bound = BoundCallback(10.0, said.append, "policy 1", "learning_rate", "the start")
    control = SimpleNamespace(should_training_stop=False, should_save=True)
    state = SimpleNamespace(global_step=3, max_steps=40)
    bound.on_log(None, state, control, logs={"kl": 0.5, "completions/mean_length": 20.0})
    assert not said and not control.should_training_stop and control.should_save
    bound.on_log(None, state, control, logs={"kl": 0.5, "completions/mean_length": 20.5})
    assert control.should_training_stop and not control.should_save
    assert said == [
        "policy 1: stopped after step 3 of 40: its answers are 10.25 nats from the start, above max_kl: 10. Lower "
        "learning_rate, or raise beta or max_kl."
    ]
    bound.on_log(None, state, control, logs={"kl": float("nan"), "completions/mean_length": 20.5})
    assert len(said) == 2, "nothing that is no number is below a bound"


def test_steps_without_a_kl_are_said_once() -> None:
    said: list[str] = []
    bound = BoundCallback(10.0, said.append, "policy 0", "es_learning_rate", "SFT")
    for _ in range(2):
        bound.on_log(None, SimpleNamespace(global_step=1, max_steps=2), SimpleNamespace(), logs={"reward": 1.0})
    assert said == ["policy 0: its steps measure no KL, so max_kl is looked at when it is evaluated"]


@pytest.mark.parametrize(
    ("options", "iteration", "name"),
    [
        ({"method": "zopro"}, 0, "zopro"),
        ({"method": "zopro"}, 1, ""),
        ({"method": "zopro", "preset": "paper"}, 0, ""),
        ({"method": "zopro-paper"}, 0, ""),
        ({"method": "mezo"}, 0, ""),
    ],
)
def test_who_follows_a_short_update(options: dict[str, str], iteration: int, name: str) -> None:
    assert follower(RunConfig(model="m", task="chat", train_data="x", **options), iteration) == name


def test_a_gain_that_may_be_chance_is_said() -> None:
    before = [{"reward": 0.0}, {"reward": 1.0}, {"reward": None}, {"reward": 2.0}]
    after = [{"reward": 1.0}, {"reward": 0.5}, {"reward": 3.0}, {"reward": 2.0}]
    note = not_improved(before, after, "iteration 0", "learning_rate", 2.0) or ""
    assert note.startswith("iteration 0: no improvement that can be told from chance: reward 0.167 [")
    assert "a higher learning_rate, or" in note
    far = not_improved(before, after, "iteration 0", "learning_rate", 114.7) or ""
    assert "; not a higher learning_rate: it is 114.70 nats an answer from its start already." in far
    still = not_improved(before, after, "iteration 0", "learning_rate", -0.03) or ""
    assert still.startswith("iteration 0: the policy has hardly moved: KL -0.03 nats an answer, reward 0.167 [")
    followed = not_improved(before, after, "iteration 0", "first_order_learning_rate", 0.04, "zopro") or ""
    assert followed.endswith("however short that is. Raise first_order_learning_rate if zopro gains nothing.")
    better = [{**row, "reward": 5.0 + (row["reward"] or 0.0)} for row in before]
    assert not_improved(before, better, "iteration 0", "learning_rate", 0.0) is None
    several = [{"reward": 0.0, "sampled_reward": 1.0}] * 2, [{"reward": 0.0, "sampled_reward": 2.0}] * 2
    assert not_improved(*several, "iteration 0", "learning_rate", 2.0) is None, "of several answers their mean counts"
