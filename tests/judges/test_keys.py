"""The endpoint's key stays where it is: in the environment, in no message and in no file."""

from __future__ import annotations

import json
import threading

import pytest

from endpoints import KEY, Handler, assert_silent, chat, shorter
from tiny_runs import config, write_inputs
from zopro import cli
from zopro.analysis.page.report import write_report
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.judges import make_judge
from zopro.judges.endpoint import OpenAIJudge
from zopro.loop import pipeline
from zopro.system.secrets import redacted

openai = pytest.importorskip("openai")


@pytest.mark.parametrize("text", [KEY, f'"{KEY}"', f"x{KEY[3:11]}...", f"Bearer {KEY}", KEY * 2])
def test_keys_are_taken_out_of_words(text):
    clean = redacted(f"before {text} after", KEY)
    assert "[redacted]" in clean and clean.startswith("before ") and clean.endswith(" after")
    assert_silent(clean)


@pytest.mark.parametrize("value", [KEY, "sk-1", "MY KEY", "A=B"])
def test_a_key_in_the_place_of_its_name_is_refused_and_not_shown(value):
    with pytest.raises(InputError, match="judge_api_key_env: must be the name") as error:
        RunConfig(model="m", task="chat", train_data="x", judge_api_key_env=value)
    assert value not in str(error.value)


@pytest.mark.parametrize(
    "url", ["ftp://x", "localhost:8000", f"https://user:{KEY}@host/v1", f"http://h/v1?key={KEY}", ""]
)
def test_an_address_with_a_key_in_it_is_refused_and_not_shown(url):
    with pytest.raises(InputError, match=r"judge_base_url: must be http\(s\)") as error:
        RunConfig(model="m", task="chat", train_data="x", judge_base_url=url)
    assert_silent(str(error.value))


def test_without_a_key_nothing_begins(monkeypatch):
    monkeypatch.delenv("MYPASTEDKEY", raising=False)
    options = RunConfig(model="m", task="chat", train_data="x", judge_api_key_env="MYPASTEDKEY")
    with pytest.raises(InputError, match=r"judge_api_key_env: .* not set") as error:
        make_judge("openai:m", None, options=options)
    assert "MYPASTEDKEY" not in str(error.value), "it may be a key after all"


@pytest.mark.parametrize("key", ["first-secret-1\nsecond-secret-2", "clé-secret-1"])
def test_a_key_that_no_header_can_hold_is_refused_and_not_shown(key, monkeypatch):
    monkeypatch.setenv("MY_KEY", key)
    options = RunConfig(model="m", task="chat", train_data="x", judge_api_key_env="MY_KEY")
    with pytest.raises(InputError, match="judge_api_key_env: must hold a key of printable ASCII characters") as error:
        make_judge("openai:m", None, options=options)
    assert "secret" not in str(error.value)


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'openai>="):
        OpenAIJudge("m", KEY)


def test_a_run_keeps_the_key_to_itself_and_its_verdicts_over_a_stop(server, tmp_path, monkeypatch, capsys):
    """The server fails, repeats the key in its errors and its replies; then the run is continued with another address."""
    folder, run = write_inputs(tmp_path), tmp_path / "run"
    monkeypatch.setattr(pipeline.write, "refresh", lambda run: None)
    monkeypatch.setattr(pipeline.write, "finish", write_report)
    monkeypatch.setenv("THE_JUDGES_KEY", KEY)
    failing = threading.Event()

    def behave(number: int, asked: str, handler: Handler) -> None:
        if not failing.is_set() and any(path.read_text() for path in run.rglob("verdicts.jsonl")):
            handler.say(401, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode())
        else:
            handler.say(200, chat(f"My key is {KEY}." if number % 5 == 0 else shorter(asked)))

    server.behave = behave
    options = {"judge": "openai:m", "judge_base_url": server.url, "judge_api_key_env": "THE_JUDGES_KEY", "iterations": 1}
    # So many that the server fails often enough in a row, whatever answers are drawn.
    settings = config(folder, run, **options, judge_concurrency=1, pair_prompts=16)
    (tmp_path / "config.yaml").write_text(json.dumps(settings.to_dict()))
    assert cli.main(["run", str(tmp_path / "config.yaml")]) == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("zopro: error: judge: must say which answer") and "Traceback" not in err
    verdicts = list(run.rglob("verdicts.jsonl"))
    assert len(verdicts) == 1 and (kept := len(verdicts[0].read_text().splitlines())) > 0
    failing.set()
    before = len(server.requests)
    words = ["run", str(tmp_path / "config.yaml"), "--resume", "--judge_base_url", server.url + "/", "--json"]
    assert cli.main(words) == 0
    out, more = capsys.readouterr()
    assert len(server.requests) > before and kept > 0
    assert not list(run.rglob("verdicts.jsonl")), "gone when their stage is done"
    for path in [path for path in tmp_path.rglob("*") if path.is_file()]:
        assert_silent(path.read_bytes().decode("latin-1"))
    assert_silent(err + out + more)
    assert "THE_JUDGES_KEY" in (run / "config.yaml").read_text() and (run / "report.html").is_file()


@pytest.mark.parametrize("key", ["", "t", "1", "EMPTY"])
def test_a_key_that_is_none_hides_no_words(key):
    """An endpoint that wants none gets any text."""
    text = "Error code: 400 - 'temperature' is not supported here: EMPTY"
    assert redacted(text, key) == text


@pytest.mark.parametrize("key", ["temperature", "t"])
def test_what_is_looked_for_in_a_message_is_found_whatever_the_key(key, server):
    def behave(number: int, asked: str, handler: Handler) -> None:
        if "temperature" in server.requests[number]:
            handler.say(400, json.dumps({"error": {"message": "Unsupported value: 'temperature'"}}).encode())
        else:
            handler.say(200, chat(shorter(asked)))

    server.behave = behave
    judge = OpenAIJudge("m", key, server.url, max_retries=0)
    assert judge(["one?"], [["short", "a longer answer"]], [None]) == [0]
