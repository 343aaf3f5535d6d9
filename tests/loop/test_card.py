"""The model card says what the run directory says, in the Hub's own form; uploads go through huggingface_hub."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, RepoUrl

from tiny_finished import finished_run
from zopro import cli
from zopro.choices import METHODS
from zopro.loop import hub
from zopro.loop.card import card
from zopro.loop.export import export
from zopro.loop.finished import find_policy
from zopro.store.layout import Layout

ANSWERS = [
    {"question": "What is 2 + 2?", "answer": "Five.", "right": False, "right_before": True},
    {"question": "What is the opposite of hot?", "answer": "Cold.", "right": True, "right_before": True},
]


def line(stage: str, iteration: int | None, step: int | None, **values: Any) -> dict[str, Any]:
    return {"stage": stage, "iteration": iteration, "step": step, **values}


def record(run: Path, **options: Any) -> None:
    """What a run with a reward model writes as it goes: iteration 0 by RLOO, iteration 1 by zopro."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, **options}))
    steps = [line("sft", None, 3), line("reward", None, 5), line("policy", 0, 2), line("refine", 0, 1)]
    steps += [line("policy", 1, 1), line("policy", 1, 4), line("refine", 1, 1)]
    Layout(run).metrics().write_text("".join(json.dumps(one) + "\n" for one in steps))
    found = {"n": 7, "reward": 1.5, "reward_low": 1.25, "reward_high": 1.75, "kl_per_answer": 0.5}
    won = {"win_rate": 0.75, "win_rate_low": 0.5, "win_rate_high": 0.875}
    memory = {"known_before": 2, "known": 1, "forgotten": 1, "of": 5, "answers": ANSWERS}
    for iteration, more in ((None, {}), (0, won), (1, {**won, "reward": 2.5, "remembered": memory})):
        path = Layout(run).evaluation(iteration, ".json")
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(line("evaluation", iteration, None, **found) | more))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = finished_run(tmp_path_factory.mktemp("work"))
    record(folder, train_data="me/rows", method="zopro")
    (folder / "share.png").write_bytes(b"picture")
    return folder


def test_the_card_is_beside_the_adapter_and_says_what_was_done(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert (tmp_path / "out" / "report.png").read_bytes() == b"picture" and "](report.png)" in text
    assert "| policy, iteration 0: rloo | 2 | back-propagation |" in text
    assert "| policy, iteration 1: zopro | 4 | function values only |" in text
    assert "| supervised fine-tuning | 3 | back-propagation |" in text
    assert "refined, iteration 1" not in text  # what came after the policy
    assert "| iteration 1 | 2.500 [1.250, 1.750] | 0.750 [0.500, 0.875] | 0.50 |" in text
    assert "1 of the 2 easy questions" in text and "What is 2 + 2? Now: Five." in text and "Cold" not in text
    assert "On 7 held-out prompts. Wins are by the judge" in text
    path = Layout(run).evaluation(1, ".json")
    whole = path.read_text()
    for prompts, told in ((7, "On 7 held-out prompts. W"), (8, "On 8 held-out prompts, 7 of them with a reward. W")):
        path.write_text(json.dumps({**json.loads(whole), "prompts": prompts}))
        assert told in card(find_policy(run), "me/base")
    path.write_text(whole)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_code_of_the_card_loads_the_adapter_in_the_dtype_of_the_run(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    export(run, tmp_path / "out")
    policy = find_policy(run)
    policy.config.dtype = dtype
    monkeypatch.chdir(tmp_path / "out")
    found: dict[str, Any] = {}
    exec(card(policy, "me/base").split("```python\n")[1].split("```")[0], found)
    assert found["model"].get_base_model().dtype == getattr(torch, {"auto": "float32"}.get(dtype, dtype))
    assert "dtype=" not in card(policy, "me/base", adapter=False).split("## Use")[1].split("## Settings")[0]


def test_no_path_of_the_machine_is_written(run: Path, tmp_path: Path) -> None:
    export(run, tmp_path / "out")
    assert str(run.parent) not in (tmp_path / "out" / "README.md").read_text()


def test_neither_paths_nor_addresses_of_rewards_judges_and_engines_are_written(run: Path, tmp_path: Path) -> None:
    policy = find_policy(run)
    secret = str(tmp_path / "secret" / "scorer")
    policy.config.reward, policy.config.reward_weights = [f"model:{secret}", "length:1-8"], [1.0, 0.5]
    policy.config.engine, policy.config.judge = "vllm:http://10.0.0.1:8000", f"model:{secret}"
    text = card(policy, "me/base")
    assert "secret" not in text and "10.0.0.1" not in text and "`model:scorer` x 1 + `length:1-8` x 0.5" in text


@pytest.mark.parametrize(
    ("reward", "weight", "said"),
    [
        ("model", 1.0, "a reward model that was trained"),
        ("model", -1.0, "`model` x -1."),
        ("json", 1.0, "the reward `json`."),
        ("json", 0.5, "`json` x 0.5."),
    ],
)
def test_a_reward_has_its_weight(run: Path, reward: str, weight: float, said: str) -> None:
    policy = find_policy(run)
    policy.config.reward, policy.config.reward_weights = [reward], [weight]
    assert f"It was optimised for {said}" in card(policy, "me/base")


@pytest.mark.parametrize(("adapter", "library"), [(True, "peft"), (False, "transformers")])
def test_the_metadata_is_the_hub_s(run: Path, adapter: bool, library: str) -> None:
    data = ModelCard(card(find_policy(run), "me/base-1.5", adapter)).data
    assert data.base_model == "me/base-1.5" and data["library_name"] == library and data.datasets == ["me/rows"]
    assert {"zopro", "zeroth-order"} <= set(data.tags) and ("lora" in data.tags) == adapter
    assert ModelCard(card(find_policy(run), str(run.parent / "base"))).data.base_model is None


def test_an_earlier_policy_has_its_own_card(run: Path) -> None:
    text = card(find_policy(run, 0), "me/base")
    assert "iteration 1" not in text and "## What it forgot\n\nNot measured." in text
    made = find_policy(run, 0).config.method_of(0)
    assert f"aligned by {made}" in text and made in ModelCard(text).data.tags and "refined" not in text
    assert ("zeroth-order" in ModelCard(text).data.tags) == METHODS[made].zeroth_order


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"method": "mezo", "warm_start": "spsa"}, "The others use function values only."),
        ({"method": "rloo"}, "All of these back-propagate."),
    ],
)
def test_what_back_propagates_is_said_plainly(run: Path, options: dict[str, Any], said: str) -> None:
    policy = find_policy(run)
    for name, value in options.items():
        setattr(policy.config, name, value)
    assert said in card(policy, "me/base")


def test_a_run_without_back_propagation_says_so(tmp_path: Path) -> None:
    run = finished_run(tmp_path)
    record(run, method="es", reward=["length:1-8"], sft_steps=0)
    Layout(run).metrics().unlink()
    assert "no record of its stages" in card(find_policy(run), "me/base")
    Layout(run).metrics().write_text(json.dumps(line("policy", 0, 2)) + "\n")
    text = card(find_policy(run), "me/base")
    assert (
        "No stage back-propagates" in text
        and "| before (start) | 1.500" in text
        and "optimised for the reward `length:1-8`" in text
    )


class FakeHub:
    """`HfApi` at the border: what it is asked, and an error where one is due."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[Any] = []
        self.error = error

    def create_repo(self, name: str, exist_ok: bool) -> RepoUrl:
        self.asked.append((name, exist_ok))
        return RepoUrl(f"https://huggingface.co/{name}" if "/" in name else f"https://huggingface.co/me/{name}")

    def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> None:
        if self.error is not None:
            raise self.error
        self.asked.append((repo_id, sorted(path.name for path in Path(folder_path).iterdir())))


def pushed(
    run: Path, out: Path, fake: FakeHub, patch: pytest.MonkeyPatch, repository: str = "me/mine", token: str | None = "t"
) -> int:
    patch.setattr(cli, "_set_verbosity", lambda verbose: None)
    patch.setattr(hub, "HfApi", lambda: fake)
    patch.setattr(hub, "get_token", lambda: token)
    return cli.main(["export", str(run), "--out", str(out), "--push-to-hub", repository])


def test_the_folder_is_uploaded_whole(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeHub()
    assert pushed(run, tmp_path / "out", fake, monkeypatch) == 0
    assert fake.asked == [("me/mine", True), ("me/mine", sorted(path.name for path in (tmp_path / "out").iterdir()))]
    assert "uploaded to https://huggingface.co/me/mine" in capsys.readouterr().out


def test_a_name_without_an_owner_is_the_token_s(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeHub()
    assert pushed(run, tmp_path / "out", fake, monkeypatch, "mine") == 0
    assert [name for name, _ in fake.asked] == ["mine", "me/mine"]


def test_an_upload_that_fails_leaves_the_folder(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = FakeHub(ConnectionError("no route\nto the hub"))
    assert pushed(run, tmp_path / "out", fake, monkeypatch) == 1
    (said,) = [text for text in capsys.readouterr().err.splitlines() if text.startswith("zopro: ")]
    assert "'me/mine' was not uploaded (no route to the hub)" in said and "hf upload me/mine" in said
    assert (tmp_path / "out" / "README.md").is_file()


@pytest.mark.parametrize(("repository", "token"), [("a/b/c", "t"), ("no spaces", "t"), ("", "t"), ("me/mine", None)])
def test_what_the_hub_cannot_take_is_refused_before_anything_is_written(
    repository: str, token: str | None, run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert pushed(run, tmp_path / "out", FakeHub(), monkeypatch, repository, token) == 2
    assert not (tmp_path / "out").exists()
