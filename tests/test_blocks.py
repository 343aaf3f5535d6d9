"""README, docs and examples do what they say: each of their code blocks is run as it stands, page by page and in order.

They find a tiny model under every name that they give one, a finished run as RUN, and short settings in every
configuration. What is not run is in NOT_RUN, with its reason; of that, programs and options are looked up.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from transformers import PrinterCallback, ProgressCallback

import zopro
from blocks import Block, blocks
from one_run import no_embedding, no_figures
from stocked import ANSWERED, DATA, MODELS, ROOT, ROWS, SHORT, fill, given, short
from zopro import cli, demo
from zopro.analysis.numbers import chance
from zopro.cli import init
from zopro.compare import run as comparing
from zopro.compare import worker
from zopro.config import RunConfig
from zopro.demo import model as demo_model
from zopro.loop import pipeline
from zopro.system.imports import importing
from zopro.train import slope_check
from zopro.zo import strategy

LAB = sorted((ROOT / "docs/lab").glob("*.md"))
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *EXAMPLES]
RUN = [page for page in PAGES if any(block.language != "text" for block in blocks(page))]

NOT_RUN = {
    r"make (demo|test|test-gpu)$|pip install ": "these tests run in what they install; make calls pytest and zopro demo",
    r"torchrun|accelerate launch|init_process_group": "several processes: test_ranks_run.py, test_ranks.py",
    r"python benchmarks/": "measurements, minutes to hours each",
    r"zopro bench step": "processes of its own: tests/bench/test_bench.py",
    r"zopro compare chat\.yaml": "the synopsis before it is run",
    r"--engine llamacpp:": "needs the extra llamacpp: tests/loop/test_llamacpp_run.py",
    r"--engine vllm|python -m vllm|vllm serve": "needs a server: tests/loop/test_vllm_run.py",
    r"--judge openai:|OPENAI_API_KEY": "needs an endpoint: tests/judges",
    r"llama-cli|ollama": "programs of others",
}
"""What a block or a command has that is not run, and why."""

LONG = {"run": "README.md", "demo": "interplay.md", "compare": "commands.md"}
"""Where a command of seconds is run to its end. Elsewhere a run is a --dry-run and leaves RUN; others are read only."""

MEANT = {"KIND": "arithmetic", "N": "1", "S": "1", "K": "3", "NAMES": "mezo", "TEXT": "tea", "FOLDER": "theirs/policy"}
"""What a synopsis leaves open. RUN, DIR, PATH and CONFIG.yaml are files and folders of these names."""


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with all that pages name: models, rows, a short copy of examples, RUN and its CONFIG.yaml."""
    folder = tmp_path_factory.mktemp("stock")
    config = fill(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        quick(patch)
        zopro.run("CONFIG.yaml")
    (folder / "CONFIG.yaml").write_text(yaml.safe_dump(config | {"output_dir": ""}))
    yield folder


def quick(patch: pytest.MonkeyPatch) -> None:
    """Without figures, searches for an eps, libraries' logs and other processes; the demo's own settings short."""
    no_figures(patch)
    patch.setattr(comparing, "write_plots", lambda result, folder: [])
    patch.setattr(chance, "DRAWS", chance.BATCH)
    patch.setattr(slope_check, "auto_eps", lambda loss_at, scale: (1e-3, 1e-7))
    patch.setattr(strategy, "search_eps", lambda *args: (1e-3, 1e-7, True))
    patch.setattr(strategy, "holding_noise", lambda *args: 1e-7)
    no_embedding(patch)
    for drawn in ("page", "_figures", "_share"):
        patch.setattr(pipeline.write, drawn, lambda *args, **kwargs: None)
    patch.setattr(sys, "stdin", io.StringIO("tea?\n"))
    patch.setattr(cli, "_set_verbosity", lambda verbose: None)
    patch.setattr(comparing, "_launch", lambda described, log: worker.main(str(described)))
    patch.setattr(init, "PROBLEMS", ROWS)
    own = {"iterations", "max_prompt_length", "max_completion_length"}
    patch.setattr(demo, "SETTINGS", demo.SETTINGS | {key: value for key, value in SHORT.items() if key not in own})
    make, write = demo_model.write, demo.task.write
    patch.setattr(demo_model, "write", lambda *args: make(*args, steps=1))
    patch.setattr(demo.task, "write", lambda *args: write(*args, train_rows=ROWS, test_rows=4))
    for shown in (PrinterCallback, ProgressCallback):
        patch.setattr(shown, "on_log", lambda *args, **kwargs: None)


@pytest.fixture
def place(stock: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for a page, with links to the stock."""
    here = tmp_path / "here"
    here.mkdir()
    for name in ("PATH", "CONFIG.yaml", "rows.jsonl", *ANSWERED, *(data.split("/")[0] for data in DATA)):
        (here / name).symlink_to(stock / name)
    for name in MODELS[:-1]:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).symlink_to(stock / "PATH")
    shutil.copytree(stock / "examples", here / "examples")
    (here / "examples/HuggingFaceTB").symlink_to(here / "HuggingFaceTB")
    shutil.copytree(stock / "RUN", here / "RUN")
    shutil.copy(stock / "CONFIG.yaml", here / "config.yaml")
    for part in ("policy", "reward"):
        shutil.copytree(stock / "RUN" / part, here / "theirs" / part)
    monkeypatch.chdir(here)
    monkeypatch.syspath_prepend(here)
    quick(monkeypatch)
    before = set(sys.modules)
    yield here
    for name in set(sys.modules) - before:
        if str(here) in str(getattr(sys.modules[name], "__file__", "")):
            del sys.modules[name]


def reason(text: str) -> str:
    """Why it is not run, or nothing."""
    return next((why for pattern, why in NOT_RUN.items() if re.search(pattern, text)), "")


@pytest.mark.parametrize("page", RUN, ids=lambda page: page.name)
def test_every_block_runs(page: Path, place: Path) -> None:
    for block in blocks(page):
        if block.note.startswith("as "):
            Path(block.note.removeprefix("as ")).write_text(block.text)
        if block.language == "python" and not reason(block.text):
            with importing():
                exec(compile(block.text, str(block), "exec"), given(block))
        elif block.language == "yaml":
            RunConfig.from_dict({"model": "PATH", "task": "verifiable", "train_data": "x"} | yaml.safe_load(block.text))
        elif block.language == "sh":
            at = os.getcwd()
            for line in [block.text] if block.text.startswith("for ") else block.commands():
                run_line(block, line)
            os.chdir(at)
        else:
            assert block.language in ("text", "python"), f"{block}: which language?"


def run_line(block: Block, line: str) -> None:
    """As a shell would, in this process."""
    if reason(line) or (line.startswith(("zopro ", "[")) and re.search(r"[\[|]|\.\.\.", line)):
        looked_up(block, line)
        line = "" if reason(line) or "..." in re.sub(r"\[.*?\]", "", line) else minimal(line)
    while line.startswith("cd "):
        folder, _, line = line[3:].partition(" && ")
        os.chdir(folder)
    if line.startswith("zopro "):
        typed(block, line)
    elif line.startswith("python -c "):
        exec(shlex.split(line)[2], {})
    elif line:
        subprocess.run(["bash", "-ec", line], check=True)


@pytest.mark.parametrize("page", LAB, ids=lambda page: page.name)
def test_what_the_lab_measured_with_is_accepted(page: Path) -> None:
    """Hours of a real model: options and their values are read, no more."""
    for block in blocks(page):
        if block.language == "python":
            exec(compile(block.text, str(block), "exec"), {})
        for line in block.commands() if block.language == "sh" else []:
            looked_up(block, line)
            words = words_of(line)
            if words and not re.search(r"[\[|]|\.\.\.", line):
                cli._parser().parse_args([MEANT.get(word, word) for word in words])


@pytest.mark.parametrize("page", [page for page in [*PAGES, *LAB] if page.suffix == ".md"], ids=lambda page: page.name)
def test_commands_in_sentences_have_the_options_that_they_name(page: Path) -> None:
    text = re.sub(r"(?ms)^ *```.*?^ *```$", "", page.read_text("utf-8"))
    for line in re.findall(r"`(zopro [^`]*)`", text):
        assert line.split()[1] in {*OPTIONS, "COMMAND"}, line
        looked_up(Block(page, 0, "sh", line), " ".join(line.split()))


def test_nothing_is_excused_that_is_not_there() -> None:
    text = "\n".join(block.text for page in PAGES for block in blocks(page))
    assert [pattern for pattern in NOT_RUN if not re.search(pattern, re.sub(r"\\\n\s*", "", text), re.M)] == []


def test_readme_has_few_numbers() -> None:
    """Outside of its commands; everything else that was measured is in docs/lab."""
    text = re.sub(r"(?ms)^```.*?^```$|^ {4}.*?$|<!--.*?-->|\]\(.*?\)", "", (ROOT / "README.md").read_text("utf-8"))
    assert len(re.findall(r"(?<![\w.])\d+(?:\.\d+)*", text)) <= 25


def minimal(line: str) -> str:
    """A synopsis without what may be left out, of a choice the first."""
    line = re.sub(r"\(([^|)]*)[^)]*\)", r"\1", re.sub(r"\[[^]]*\]", "", line))
    return " ".join(MEANT.get(word, word) for word in line.split())


def typed(block: Block, line: str) -> None:
    """A zopro command, with the block's further options; a folder DIR is new to each that writes it."""
    line, _, file = line.partition(" > ")
    words = [match for word in shlex.split(line)[1:] for match in sorted(map(str, Path().glob(word))) or [word]]
    more = [] if block.note.startswith("as ") else shlex.split(block.note)
    if words[0] == "data":
        more += ["--rows", str(ROWS)]
    if words[0] == "demo":
        more += ["--iterations", "2"]
    if LONG.get(words[0], block.page.name) != block.page.name and not {"--resume", "--dry-run"} & set(words):
        args = cli._parser().parse_args([*words, *more])
        out = vars(args).get("key.output_dir") or vars(args).get("out")
        if out and not Path(out).exists():
            shutil.copytree("RUN", out)
        if words[0] != "run":
            return
        more = [*more, "--dry-run", "--output_dir", ""]
    if "--out DIR" in line:
        shutil.rmtree("DIR", ignore_errors=True)
    said, failed = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(failed):
        code = cli.main([*words, *more])
    assert code == 0, f"{block}: {line}\n{failed.getvalue()[-2000:]}"
    assert said.getvalue().strip(), f"{block}: {line}: says nothing"
    if file:
        Path(file).write_text(said.getvalue())
    for written in Path().glob("*.yaml"):
        if words[0] == "init" and not written.is_symlink():
            short(written)


def words_of(line: str) -> list[str]:
    """Of a zopro command, however it is launched; of others none."""
    typed = re.match(r"(?:\w+=\S+ )*(?:(?:torchrun|accelerate) .*-m )?zopro (.*)", line)
    return shlex.split(typed[1].partition(" > ")[0]) if typed else []


def looked_up(block: Block, line: str) -> None:
    """That programs and options of a line exist."""
    command = words_of(line)
    if script := re.search(r"benchmarks/\S+\.py", line):
        text = (ROOT / script[0]).read_text("utf-8")
    elif command and command[0] in OPTIONS:
        text = " ".join(OPTIONS[command[0]])
    else:
        return
    for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", line.partition(script[0] if script else "zopro ")[2]):
        assert option == "--key" or option.removeprefix("--") in text, f"{block}: {line}: {option}"


def commands_of(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    return next((action.choices for action in parser._actions if isinstance(action.choices, dict)), {})


def options_of(command: argparse.ArgumentParser) -> list[str]:
    """Its own, and those of the commands below it."""
    below = [option for inner in commands_of(command).values() for option in options_of(inner)]
    return [*command._option_string_actions, *below]


OPTIONS = {name: options_of(command) for name, command in commands_of(cli._parser()).items()}
