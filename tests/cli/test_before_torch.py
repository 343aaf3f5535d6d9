"""What can be refused by names and paths is refused in a moment: before torch, and what takes as long, is imported."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tiny_runs import config
from zopro import cli

# Command -> what is typed after it, and how the line begins.
REFUSED: dict[str, list[tuple[str, str]]] = {
    "init": [
        ("nonsense", "TASK: must be one of"),
        ("chat --out good.yaml --data x", "--out: must be a new file"),
        ("chat --out new.yaml --data none.jsonl", "--data: no such file, folder or Hub data set id: 'none.jsonl'"),
        ("chat --out .", "--out: must be a new file, got the folder '.'"),
        ("chat --out new/..", "--out: must be a new file, got the folder 'new/..'"),
        ("chat --out /", "--out: must be a new file, got the folder '/'"),
    ],
    "demo": [("--out full", "output_dir: must be empty"), ("--iterations 0 --out new", "iterations: must be greater")],
    "run": [
        ("none.yaml", "CONFIG: must be a readable YAML file"),
        ("good.yaml --model ./none", "model: no folder and no Hub id"),
        ("good.yaml --model a/b/none", "model: no folder and no Hub id"),
        ("good.yaml --engine llamacpp:none.gguf --reward exact --sft_steps 0 --warm_start spsa", "engine: must be given"),
        ("good.yaml --train_data none.jsonl", "train_data: no such file"),
        ("good.yaml --eval_data ./none", "eval_data: no such file"),
        ("good.yaml --judge model:./none", "judge: no folder and no Hub id"),
        ("good.yaml --reward model:./none", "reward: no folder and no Hub id"),
        ("good.yaml --reward length:9-4", "reward: length must be MIN-MAX"),
        ("good.yaml --reward regex:(", "reward: regex must be a regular expression"),
        ("begun --resume", "CONFIG: must be a readable YAML file, got 'begun'"),
        ("good.yaml --output_dir full", "output_dir: must be empty or a run"),
        ("good.yaml --output_dir begun --lora_r 2", "output_dir: begun belongs to another config"),
        ("good.yaml --output_dir begun", "output_dir: begun holds a run already"),
        ("good.yaml --resume", "--resume: must be given with the output_dir"),
    ],
    "replay": [
        ("none --out new", "RUN: must be a run directory"),
        ("begun --out new", "--iteration: must be a zeroth-order one"),
        ("walked --out full", "--out: must be a new or empty folder"),
        ("walked --out rows.jsonl/new", "--out: must be a folder that can be written to"),
        ("walked --to-step 3 --out new", "--to-step: must lie in [0, 2]"),
    ],
    "compare": [
        ("none.yaml --methods mezo --steps 1", "CONFIG: must be a readable YAML file"),
        ("good.yaml --methods mezzo --steps 1", "--methods: must be one of"),
        ("good.yaml --methods mezo --answers 1", "answers: must be enough for a step"),
        ("good.yaml --methods mezo --steps 0", "--steps: must be greater than 0, got 0."),
        ("good.yaml --methods mezo --steps 1 --model ./none", "model: no folder and no Hub id"),
        ("good.yaml --methods mezo --steps 1 --lora_r 2 --out compared", "output_dir: compared/shared belongs to"),
    ],
    "analyse": [
        ("none", "RUN: must be a run directory"),
        ("full", "RUN: must hold the folders sft and policy"),
        ("--policy none --reward full", "--policy: must be a folder of checkpoints"),
        ("walked --out rows.jsonl", "--out: must be a folder"),
    ],
    "analyze": [("none", "RUN: must be a run directory")],
    "generate": [
        ("none --prompt hello", "RUN: must be a run directory"),
        ("begun --prompt hello", "RUN: must hold a finished policy"),
        ("walked --iteration 4 --prompt hello", "--iteration: must be one of 1, got 4"),
        ("away --prompt hello", "model: no folder and no Hub id"),
        ("walked --prompt hello --temperature -1", "--temperature: must not be negative"),
        ("walked --prompt hello caf\udce9", "--prompt: must be text in UTF-8, got '\\udce9' in it"),
    ],
    "chat": [
        ("none", "RUN: must be a run directory"),
        ("begun", "RUN: must hold a finished policy"),
        ("walked --iteration 4", "--iteration: must be one of 1, got 4"),
        ("away", "model: no folder and no Hub id"),
        ("walked --temperature -1", "--temperature: must not be negative"),
    ],
    "export": [
        ("none --out new", "RUN: must be a run directory"),
        ("walked --out full", "--out: must be a new or empty folder"),
        ("walked --out rows.jsonl/new", "--out: must be a folder that can be written to"),
        ("away --out new", "model: no folder and no Hub id"),
        (
            "walked --out new --gguf --merged",
            "--gguf: must be given for an adapter alone, got a model. Leave --merged out",
        ),
        ("whole --out new --gguf", "--gguf: must be given for an adapter alone, got a model. Convert it"),
    ],
    "bench": [
        ("step --peer verl", "peer: must be one of"),
        ("step --model ./none", "model: no folder and no Hub id"),
        ("step --size 2b", "size: must be one of"),
        ("step --vocab-size 0", "vocab_size: must be at least 32, got 0"),
        ("step --seed -1", "seed: must not be negative, got -1"),
        (f"step --seed {2**70}", "seed: must be less than 2^32"),
    ],
    "data": [
        ("chess --rows 2", "argument KIND"),
        ("countdown --rows 2 --out full", "--out: "),
        ("countdown --rows 2 --out rows.jsonl/new.jsonl", "--out: must be a file that can be written"),
    ],
    "pairs": [
        ("good.yaml --out rows.jsonl --reward rouge", "--out: must be a new .jsonl file"),
        ("good.yaml --out rows.jsonl/new.jsonl --reward rouge", "--out: must be a file that can be written"),
        ("good.yaml --out new.jsonl", "reward: must be there before a run"),
        ("good.yaml --out new.jsonl --reward rouge --rows -2", "--rows: must be at least 1, got -2."),
        ("good.yaml --out new.jsonl --reward rouge --model ./none", "model: no folder and no Hub id"),
    ],
    "methods": [("--nonsense", "--nonsense: no such option")],
    "config-schema": [("--nonsense", "--nonsense: no such option")],
}
SCRIPT = """
import contextlib, io, json, sys
for name in ("torch", "transformers", "trl", "peft", "datasets", "accelerate"):
    sys.modules[name] = None  # from now on nobody can import it
from zopro import cli
for words in json.load(sys.stdin):
    said = io.StringIO()
    with contextlib.redirect_stderr(said):
        try:
            code = cli.main(words)
        except ImportError as error:
            code = f"{error}"
    print(json.dumps([words, code, said.getvalue()]))
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """full: a folder with other files. begun: a run that has done nothing. walked: one with a policy and a journal.
    whole: one whose policy is a whole model. away: one whose base is named from another folder."""
    path = tmp_path_factory.mktemp("typed")
    for name in ("full", "begun", "walked", "whole", "model", "compared/shared"):
        (path / name).mkdir(parents=True)
    (path / "full/other.txt").write_text("other")
    (path / "rows.jsonl").write_text("{}\n")
    settings = config(path, path / "new").to_dict() | {"model": "model", "train_data": "rows.jsonl", "output_dir": ""}
    for place in (
        "good.yaml",
        "begun/config.yaml",
        "walked/config.yaml",
        "whole/config.yaml",
        "compared/shared/config.yaml",
    ):
        (path / place).write_text(yaml.safe_dump(settings))
    for place in ("policy/001/adapter_model.safetensors", "policy/001/adapter_config.json", "sft/x"):
        (path / "walked" / place).parent.mkdir(parents=True, exist_ok=True)
        (path / "walked" / place).write_text("{}")
    (path / "whole/policy/000").mkdir(parents=True)
    (path / "whole/policy/000/model.safetensors").write_text("{}")
    shutil.copytree(path / "walked", path / "away")
    (path / "away/config.yaml").write_text(yaml.safe_dump(settings | {"model": "./bases/mine"}))
    journal = path / "walked/iterations/001/journal.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text("{}\n" * 3)
    return path


def test_every_command_is_asked() -> None:
    commands = next(action.choices for action in cli._parser()._actions if action.dest == "command")
    assert set(REFUSED) == set(commands or ()), "say what the new command refuses before it imports torch"


def test_refusals_do_not_wait_for_torch(folder: Path) -> None:
    cases = [([command, *typed.split()], line) for command, lines in REFUSED.items() for typed, line in lines]
    before = sorted(folder.rglob("*"))
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        input=json.dumps([words for words, _ in cases]),
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    answers = map(json.loads, done.stdout.splitlines())
    for (words, begins), (asked, code, said) in zip(cases, answers, strict=True):
        assert asked == words
        assert code == 2 and said.startswith(f"zopro: error: {begins}") and said.count("\n") == 1, (words, code, said)
    assert sorted(folder.rglob("*")) == before
