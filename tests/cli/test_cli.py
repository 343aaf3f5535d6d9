"""The command line as a user types it, on bad input too."""

from __future__ import annotations

import json
import math
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import zopro
from keys import read_value
from zopro import cli
from zopro.choices import METHODS
from zopro.config import GROUPS, RunConfig
from zopro.config.reading import load_config
from zopro.errors import InputError

ROOT = Path(__file__).parents[2]
NEEDED = "model: some-model\ntask: chat\ntrain_data: rows.jsonl\n"


@pytest.fixture(autouse=True)
def in_an_empty_folder(tmp_path, monkeypatch):
    """Nothing a command writes by default lands in the checkout; what it changes in the process is undone."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_set_verbosity", lambda verbose: None)


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.yaml").write_text(f"{NEEDED}iterations: 2\nsft_learning_rate: 2e-4\n")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return "config.yaml"


@pytest.fixture
def pipeline(monkeypatch):
    """The configurations that reach the pipeline; it does nothing with them but print and return a summary."""
    seen: list[tuple[RunConfig, bool, bool]] = []

    def run(config, *, resume=False, quiet=False, live=False):
        seen.append((config, resume, live))
        print("a library prints to stdout")
        return {"run": "runs/x", "win_rate": math.nan, "stages": {"sft": 1.5}}

    monkeypatch.setattr("zopro.loop.pipeline.run", run)
    monkeypatch.setattr("zopro.demo.table", lambda summary: f"table of {summary['run']}")
    return seen


def refused(capsys, *argv: str) -> str:
    """The one line that a bad command prints; nothing else is printed and nothing is written."""
    before = sorted(Path().rglob("*"))
    assert cli.main(argv) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("zopro: error: ") and err.count("\n") == 1
    assert sorted(Path().rglob("*")) == before
    return err.removeprefix("zopro: error: ").strip()


def test_help_and_version_cost_nothing():
    code = (
        "import sys, zopro.cli\n"
        "try: zopro.cli.main(sys.argv[1:])\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "assert not {'torch', 'transformers', 'trl', 'yaml'} & set(sys.modules)"
    )
    for words, answer in ((["--version"], f"zopro {zopro.__version__}"), (["run", "--help"], "--num_generations")):
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert answer in done.stdout


def test_a_launcher_s_many_processes_share_runs_only(pipeline, config, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert refused(capsys, "demo").startswith("demo: must be started as one process")
    assert cli.main(["run", config]) == 0 and len(pipeline) == 1
    monkeypatch.setattr("zopro.loop.pipeline.run", lambda config, resume, live: {})
    capsys.readouterr()
    assert cli.main(["run", config, "--json"]) == 0
    assert capsys.readouterr().out == "", "the first process has the result"


@pytest.mark.parametrize("value", ["", "many", "0", "-1"])
def test_a_launcher_that_tells_no_number(value, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", value)
    assert refused(capsys, "methods").startswith("WORLD_SIZE: must be a whole number of at least 1, as launchers ")


def test_python_m_is_the_same_command(config):
    words = [sys.executable, "-m", "zopro", "run", config, "--iteratons", "3"]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "zopro: error: --iteratons: no such option of 'zopro run'. Did you mean '--iterations'?\n"


def test_every_key_is_an_option_with_its_help(capsys):
    with pytest.raises(SystemExit):
        cli.main(["run", "--help-all"])
    words = " ".join(capsys.readouterr().out.split())
    for group in GROUPS:
        for name, field in group.__dataclass_fields__.items():
            assert f"--{name} " in words
            assert field.metadata["help"].split(" ")[0] in words


def test_file_and_command_line_become_one_config(config, pipeline, capsys):
    argv = [
        "run",
        config,
        "--iterations",
        "3",
        "--eval-prompts=7",
        "--trust_remote_code",
        "--report_to",
        "wandb,trackio",
    ]
    assert cli.main(argv) == 0
    ((made, resume, live),) = pipeline
    assert (made.model, made.iterations, made.eval_prompts, made.sft_learning_rate) == ("some-model", 3, 7, 2e-4)
    assert made.trust_remote_code is True and made.report_to == ["wandb", "trackio"] and not resume and not live
    out, err = capsys.readouterr()
    assert out == "table of runs/x\n" and "a library prints" in err


def test_json_is_one_object_alone_on_stdout(config, pipeline, capsys):
    assert cli.main(["run", config, "--resume", "--live", "--json", "--output_dir", "runs/x"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {"run": "runs/x", "win_rate": None, "stages": {"sft": 1.5}}
    assert out.count("\n") == 1 and pipeline[0][1:] == (True, True)


def test_demo_takes_its_options(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr("zopro.demo.run", lambda out, **options: seen.update(out=out, **options) or {"run": out})
    monkeypatch.setattr("zopro.demo.table", lambda summary: "the table")
    assert cli.main(["demo", "--out", "there", "--seed", "4", "--iterations", "5"]) == 0
    assert seen == {"out": "there", "seed": 4, "iterations": 5}
    assert capsys.readouterr().out == "the table\n"


def test_interruption_is_one_line(config, monkeypatch, capsys):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("zopro.loop.pipeline.run", interrupted)
    assert cli.main(["run", config]) == 130
    assert capsys.readouterr().err.strip() == "zopro: interrupted"


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{NEEDED}learning_rat: 1\n", "learning_rat: no such configuration key. Did you mean 'learning_rate'?"),
        (f"{NEEDED}iterations: many\n", "iterations: must be a whole number, got 'many'."),
        (f"{NEEDED}iterations: 1.5\n", "iterations: must be a whole number, got 1.5."),
        (f"{NEEDED}beta: true\n", "beta: must be a finite number, got True."),
        (f"{NEEDED}beta: 0\nmethod: online-dpo\n", "beta: must be greater than 0 with method online-dpo"),
        (f"{NEEDED}trust_remote_code: maybe\n", "trust_remote_code: must be true or false, got 'maybe'."),
        (f"{NEEDED}num_generations: 1\n", "num_generations: must be at least 2"),
        ("task: chat\ntrain_data: x\n", "model: must be set"),
        ("", "model: must be set"),
        (f'{NEEDED}"a\\e[31mb": 1\n', "a?[31mb: no such configuration key."),
        ("- a\n- b\n", "CONFIG: must hold 'key: value' lines, got a list in 'config.yaml'."),
        ("a: [1\n", "CONFIG: must be valid YAML, got 'config.yaml' line 2"),
        ("a: !!python/object/apply:os.getcwd []\n", "CONFIG: must be valid YAML, got 'config.yaml' line 1"),
    ],
)
def test_a_bad_file_gets_one_line(capsys, text, line):
    Path("config.yaml").write_text(text)
    assert refused(capsys, "run", "config.yaml").startswith(line)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["rum"], "argument COMMAND: invalid choice: 'rum'"),
        (["run"], "the following arguments are required: CONFIG"),
        (
            ["run", "absent.yaml"],
            "CONFIG: must be a readable YAML file, got 'absent.yaml' (No such file or directory).",
        ),
        (["run", "."], "CONFIG: must be a readable YAML file, got '.'"),
        (["run", "config.yaml", "--seed", "-1"], "seed: must not be negative, got -1."),
        (["run", "config.yaml", "--seed", "1e3"], "seed: must be a whole number, got '1e3'."),
        (["run", "config.yaml", "--beta", "nan"], "beta: must be a finite number, got 'nan'."),
        (
            ["run", "config.yaml", "--method", "mezzo"],
            f"method: must be one of {', '.join(METHODS)}, python:MODULE:NAME, got 'mezzo'",
        ),
        (["run", "config.yaml", "--iter", "2"], "--iter: no such option of 'zopro run'."),
        (
            ["run", "config.yaml", "--num-generation=3"],
            "--num-generation: no such option of 'zopro run'. Did you mean '--n",
        ),
        (["run", "config.yaml", "more"], "more: is one argument too many for 'zopro run'."),
        (["run", "config.yaml", "--dry-run", "true"], "true: is one argument too many for 'zopro run'."),
        (["run", "--eval_greedy", "absent.yaml"], "CONFIG: must be a readable YAML file, got 'absent.yaml'"),
        (["run", "config.yaml", "--easy_questions", "300"], "easy_questions: must be true, false or a number"),
        (
            ["compare", "config.yaml", "--method", "mezo"],
            "--method: no such option of 'zopro compare'. Did you mean '--me",
        ),
        (["pairs", "config.yaml", "--output_dir", "x"], "--output_dir: no such option of 'zopro pairs'."),
        (["generate", "--promt", "x", "R"], "--promt: no such option of 'zopro generate'. Did you mean '--prompt'?"),
        (["--jsn", "methods"], "--jsn: no such option of 'zopro'."),
        (["demo", "--seed", "x"], "argument --seed: invalid int value: 'x'"),
        (["generate", "RUN"], "the following arguments are required: --prompt"),
        (["export", "RUN"], "the following arguments are required: --out"),
        (["bench"], "the following arguments are required: step"),
    ],
)
def test_a_bad_command_gets_one_line(config, capsys, words, line):
    assert refused(capsys, *words).startswith(line)


@pytest.mark.parametrize(("words", "meant"), [(["rum"], "run"), (["data", "arithmetik"], "arithmetic")])
def test_a_name_that_is_nearly_one_is_recognised(capsys, words, meant):
    assert refused(capsys, *words).endswith(f"Did you mean '{meant}'?")


def test_values_are_read_as_the_type_of_their_key():
    assert read_value("beta", "1e-3") == 1e-3
    assert read_value("iterations", 4.0) == 4
    assert read_value("eps", 1e-5) == "1e-05"
    assert read_value("lora_target_modules", ["q_proj", "v_proj"]) == "q_proj,v_proj"
    assert read_value("trust_remote_code", "False") is False
    assert read_value("report_to", "none") == []
    with pytest.raises(InputError, match="a text"):
        read_value("model", {"a": 1})


def test_an_empty_value_is_the_default():
    Path("config.yaml").write_text(f"{NEEDED}eval_data:\nseed:\n")
    assert load_config("config.yaml") == RunConfig(model="some-model", task="chat", train_data="rows.jsonl")


def test_a_written_config_is_read_back(tmp_path):
    import yaml

    config = RunConfig(model="m", task="chat", train_data="x", eps="1e-5", report_to=["wandb"], beta=0.1)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config.to_dict()))
    assert load_config(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("written", ["1e-5", "1.0e-5", "0.00001", "'1e-5'"])
def test_a_number_is_the_same_configuration_however_it_is_written(written):
    Path("config.yaml").write_text(f"{NEEDED}eps: {written}\n")
    needed = {"model": "some-model", "task": "chat", "train_data": "rows.jsonl"}
    assert load_config("config.yaml") == RunConfig(**needed, eps="1e-5") == RunConfig.from_dict({**needed, "eps": 1e-5})


def test_libraries_are_quiet_but_zopro_is_heard(monkeypatch):
    monkeypatch.undo()
    with warnings.catch_warnings(record=True) as heard, monkeypatch.context() as patch:
        patch.setattr("logging.basicConfig", lambda **options: None)
        patch.setattr("os.environ", {})
        cli._set_verbosity(False)
        warnings.warn_explicit("noise", UserWarning, "a.py", 1, module="transformers.trainer")
        warnings.warn_explicit("news", UserWarning, "b.py", 1, module="zopro.zo.spsa")
    assert [str(warning.message) for warning in heard] == ["news"]


def test_the_configuration_page_is_in_step():
    page = runpy.run_path(str(ROOT / "docs" / "make_configuration.py"))
    assert page["TARGET"].read_text("utf-8") == page["text"](), "run `make docs`"


def test_public_names_resolve():
    for name in zopro.__all__:
        assert getattr(zopro, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Spsa'"):
        _ = zopro.Spsa


def test_what_ends_the_process_does_not_end_a_command_well(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_demo", lambda args: sys.exit(0))
    assert cli.main(["demo"]) == 2
    assert capsys.readouterr().err == "zopro: error: demo: code of yours must not end the process, got sys.exit(0).\n"
