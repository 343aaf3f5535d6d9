"""What README and docs tell people to type is accepted; the README's first commands and Python run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

from one_run import no_figures
from tiny import tiny_model, tiny_tokenizer
from zopro import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")
HUB_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"  # README's; here a folder of this name
SHORT = {"iterations": 1, "policy_steps": 1, "sft_steps": 1, "reward_steps": 1, "refine_steps": 1, "pair_prompts": 2,
         "eval_prompts": 4, "max_completion_length": 130, "max_prompt_length": 120}  # fmt: skip


def commands(text: str) -> list[str]:
    """`zopro` commands in indented lines, without comments; lines that go on are joined, synopses left out."""
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    typed = [line.strip().partition(" #")[0].strip() for line in lines if re.match(r" {4}zopro \S", line)]
    return [line for line in typed if not re.search(r"[\[\]|]|\.\.\.", line)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_accepted(page: Path) -> None:
    for line in commands(page.read_text(encoding="utf-8")):
        words = shlex.split(line)[1:]
        words = words[: words.index(">")] if ">" in words else words
        numbers = {"N": "1", "S": "1", "I": "1", "M": "1", "X": "0.5", "DIR": "dir"}
        cli._parse([numbers.get(word, word) for word in words])


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with a tiny model where README's would come from the Hub; runs without figures."""
    monkeypatch.chdir(tmp_path)
    no_figures(monkeypatch)
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)
    tokenizer = tiny_tokenizer((ROOT / "src/zopro/tasks/shipped/chat.jsonl").read_text().splitlines())
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    model = tiny_model("llama", tokenizer, max_position_embeddings=512)
    model.save_pretrained(tmp_path / HUB_ID)
    tokenizer.save_pretrained(tmp_path / HUB_ID)
    return tmp_path


def typed(line: str, capsys: pytest.CaptureFixture[str], **flags: Any) -> Any:
    """Run a line as a shell would, with an option for each flag."""
    words = [match for word in shlex.split(line)[1:] for match in sorted(map(str, Path().glob(word))) or [word]]
    more = [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    assert cli.main([*words, *more, "--json"]) == 0, capsys.readouterr().err
    return json.loads(capsys.readouterr().out)


def test_the_first_commands_run(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = commands(README)
    init, run, generate, verifiable, evolve = lines[:5]
    assert [line.split()[1] for line in lines[:5]] == ["init", "run", "generate", "init", "run"]
    typed(init, capsys)
    assert Path(typed(run, capsys, **SHORT)["report"]).is_file()
    assert typed(generate, capsys)["answers"]
    typed(verifiable, capsys)
    short = {key: value for key, value in SHORT.items() if key not in ("sft_steps", "reward_steps", "refine_steps")}
    found = typed(evolve, capsys, **{**short, "max_completion_length": 8, "population": 4, "iterations": 2})
    assert found["method"] == "es" and "accuracy" in json.dumps(found)


def test_the_python_runs(small: Path) -> None:
    block = re.findall(r"```python\n(.*?)```", README, re.S)[0]
    exec(compile(block, "README.md", "exec"), {})
