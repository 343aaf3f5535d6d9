"""The endpoint judge against a server that lies, stalls, limits, fails and hangs up; its key stays where it is."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tiny_runs import config, write_inputs
from zopro import cli
from zopro.analysis.page.report import write_report
from zopro.config import RunConfig
from zopro.errors import InputError
from zopro.judges import judge_pairs, make_judge
from zopro.judges.endpoint import OpenAIJudge, question, redacted
from zopro.judges.verdicts import Verdicts
from zopro.loop import pipeline

openai = pytest.importorskip("openai")
KEY = "sk-proj-Ab12Cd34Ef56Gh78"
PAIRS = [["short", "a longer answer"], ["the longest of them", "tiny"], ["middling", "also longer than that"]]
PROMPTS = ["one?", "two?", "three?"]
NONE: list[str | None] = [None] * 3


def chat(text: Any) -> bytes:
    message = {"role": "assistant", "content": text}
    return json.dumps({"id": "x", "object": "chat.completion", "choices": [{"index": 0, "message": message}]}).encode()


def shorter(asked: str) -> str:
    """An honest reply: the shorter one."""
    first, second = asked.split("Reply A:\n")[1].split("\n\nWhich reply")[0].split("\n\nReply B:\n")
    return "A" if len(first) < len(second) else "B"


class Server(ThreadingHTTPServer):
    """Answers each request by `behave(number of the request, question, handler)`, or honestly where that is None."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave: Callable[[int, str, Any], None] | None = None
        self.requests: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.lock = threading.Lock()
        self.release = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """The client hangs up on stalls: no traceback."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append(body)
            self.server.keys.add(self.headers["Authorization"])
        asked = body["messages"][0]["content"]
        if self.server.behave is None:
            self.say(200, chat(shorter(asked)))
        else:
            self.server.behave(number, asked, self)

    def say(self, status: int, body: bytes, kind: str = "application/json", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """A server on a thread, and a client whose backoff is short."""
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.01)
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    one = Server()
    thread = threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield one
    one.release.set()
    one.shutdown()
    one.server_close()
    thread.join()


def judge(server: Server, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("m", KEY, server.url, **{"timeout": 5.0, "max_retries": 2, "concurrency": 1, **options})


def test_both_orders_are_asked_and_the_better_answer_wins(server):
    for concurrency in (1, 3):
        result = judge_pairs(judge(server, concurrency=concurrency), PROMPTS, PAIRS, NONE)
        assert (result.winners, result.invalid) == ([0, 1, 0], 0)
    assert len(server.requests) == 2 * 2 * 3 and server.keys == {f"Bearer {KEY}"}
    first, second = (request["messages"][0]["content"] for request in server.requests[:2])
    assert first == question("one?", "short", "a longer answer") and second == question(
        "one?", "a longer answer", "short"
    )
    assert server.requests[0]["temperature"] == 0 and server.requests[0]["model"] == "m"


@pytest.mark.parametrize(
    ("replies", "winner"),
    [(("A", "A"), -1), (("b", "b"), -1), (("A", "tie"), 0), ((" **B**. ", "Tie"), 1), (("tie", "TIE"), -1)],
)
def test_a_liking_for_a_place_is_a_tie(server, replies, winner):
    server.behave = lambda number, asked, handler: handler.say(200, chat(replies[number]))
    assert judge_pairs(judge(server), PROMPTS[:1], PAIRS[:1], NONE[:1]).winners == [winner]


LIES = {
    "prose": chat("I would say that reply A is better."),
    "both": chat("A or B"),
    "nothing": chat(""),
    "null": chat(None),
    "a number": chat(1),
    "parts": chat([{"type": "text", "text": "A"}]),
    "no choices": b'{"choices": []}',
    "null choices": b'{"choices": null}',
    "another schema": b'{"answer": "A"}',
    "a choice that is none": b'{"choices": ["A"]}',
    "a list": b'["A"]',
    "text for JSON": b'"A"',
    "broken JSON": b'{"choices": [{"message": {"content": "A"',
    "bytes": b"\xff\xfe\x00A",
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("kind", ["application/json", "text/html"])
@pytest.mark.parametrize("lie", LIES)
def test_a_reply_that_cannot_be_read_is_asked_for_again_and_then_counted(server, lie, kind):
    server.behave = lambda number, asked, handler: (
        handler.say(200, LIES[lie], kind) if "one?" in asked else handler.say(200, chat(shorter(asked)))
    )
    result = judge_pairs(judge(server), PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid) == ([-1, 1, 0], 1)
    assert result.reasons == {"reply is not A, B or tie": 1}
    assert len(server.requests) == 2 + 2 * 2, "twice for the pair that failed, in one order"


def test_one_lie_is_forgiven(server):
    server.behave = lambda number, asked, handler: handler.say(200, chat("Hm." if number == 0 else shorter(asked)))
    assert judge_pairs(judge(server), PROMPTS, PAIRS, NONE).winners == [0, 1, 0]


def hang_up(handler: Handler) -> None:
    handler.connection.close()


def cut_off(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices"')
    handler.wfile.flush()
    handler.connection.close()


def stall(handler: Handler) -> None:
    handler.server.release.wait(5)


TROUBLE: dict[str, Callable[[Handler], None]] = {
    "rate limit": lambda handler: handler.say(429, b"{}", Retry_After="0.01"),
    "rate limit without a time": lambda handler: handler.say(429, b"slow down", "text/plain"),
    "server error": lambda handler: handler.say(500, b"<html>oops</html>", "text/html"),
    "gateway": lambda handler: handler.say(503, b""),
    "hangs up": hang_up,
    "hangs up in the middle": cut_off,
    "stalls": stall,
}


@pytest.mark.parametrize("trouble", TROUBLE)
def test_passing_trouble_is_waited_out(server, trouble):
    def behave(number: int, asked: str, handler: Handler) -> None:
        if number < 2:
            TROUBLE[trouble](handler)
        else:
            handler.say(200, chat(shorter(asked)))

    server.behave = behave
    result = judge_pairs(judge(server, timeout=0.3), PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid) == ([0, 1, 0], 0)
    assert len(server.requests) == 2 + 6


def test_the_wait_is_as_long_as_the_endpoint_asks(server):
    times: list[float] = []

    def behave(number: int, asked: str, handler: Handler) -> None:
        times.append(time.perf_counter())
        if number == 0:
            handler.say(429, b"{}", Retry_After="0.4")
        else:
            handler.say(200, chat("A"))

    server.behave = behave
    judge_pairs(judge(server), PROMPTS[:1], PAIRS[:1], NONE[:1])
    assert times[1] - times[0] >= 0.4


@pytest.mark.parametrize("trouble", [*TROUBLE, "no such model", "bad key"])
def test_lasting_trouble_stops_and_keeps_the_verdicts(server, tmp_path, trouble):
    more = {
        "no such model": lambda handler: handler.say(404, json.dumps({"error": {"message": "no model m"}}).encode()),
        "bad key": lambda handler: handler.say(401, json.dumps({"error": {"message": f"bad key {KEY}"}}).encode()),
    }
    broken = {**TROUBLE, **more}[trouble]
    server.behave = lambda number, asked, handler: (
        handler.say(200, chat(shorter(asked))) if "one?" in asked else broken(handler)
    )
    prompts, pairs = [*PROMPTS, "four?", "five?"], [*PAIRS, ["x", "yy"], ["zzz", "z"]]
    path = tmp_path / "verdicts.jsonl"
    with pytest.raises(InputError, match=r"openai:m failed on 3 pairs in a row, last on pair 3 .*--resume") as error:
        judge_pairs(judge(server, timeout=0.1, max_retries=1), prompts, pairs, [None] * 5, Verdicts(path))
    assert_silent(str(error.value))
    assert error.value.__cause__ is None and error.value.__context__ is None
    server.behave, before = None, len(server.requests)
    result = judge_pairs(judge(server), prompts, pairs, [None] * 5, Verdicts(path))
    assert result.winners == [0, 1, 0, 0, 1]
    asked = [request["messages"][0]["content"] for request in server.requests[before:]]
    assert not [text for text in asked if "one?" in text], "the first pair's verdict was kept"
    assert len(set(asked)) == 2 * 4


def test_a_trickle_does_not_hold_a_run_for_ever(server, monkeypatch):
    def trickle(number: int, asked: str, handler: Handler) -> None:
        handler.send_response(200)
        handler.send_header("Content-Length", "100000")
        handler.end_headers()
        while not handler.server.release.wait(0.02):
            handler.wfile.write(b" ")

    server.behave = trickle
    one = judge(server, timeout=0.2)
    one.longest = 0.5
    with pytest.raises(InputError, match=r"openai:m gave no answer within 0\.5 seconds, retries included"):
        judge_pairs(one, PROMPTS, PAIRS, NONE)


@pytest.mark.parametrize("concurrency", [1, 3])
def test_a_model_that_takes_no_temperature_is_asked_without(server, concurrency):
    together = threading.Barrier(concurrency)

    def behave(number: int, asked: str, handler: Handler) -> None:
        if "temperature" in server.requests[number]:
            together.wait(5)
            handler.say(400, json.dumps({"error": {"message": "Unsupported value: 'temperature'"}}).encode())
        else:
            handler.say(200, chat(shorter(asked)))

    server.behave = behave
    result = judge_pairs(judge(server, concurrency=concurrency), PROMPTS, PAIRS, NONE)
    assert (result.winners, result.invalid) == ([0, 1, 0], 0)
    assert sum("temperature" in request for request in server.requests) == concurrency


@pytest.mark.parametrize("text", [KEY, f'"{KEY}"', f"x{KEY[3:11]}...", f"Bearer {KEY}", KEY * 2])
def test_keys_are_taken_out_of_words(text):
    clean = redacted(f"before {text} after", KEY)
    assert "[redacted]" in clean and clean.startswith("before ") and clean.endswith(" after")
    assert_silent(clean)


def assert_silent(text: str) -> None:
    """No eight characters of the key are in the text."""
    assert not [KEY[i : i + 8] for i in range(len(KEY) - 7) if KEY[i : i + 8] in text]


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


def test_without_the_package_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'zopro\[openai\]'"):
        OpenAIJudge("m", KEY)


def test_a_run_keeps_the_key_to_itself_and_its_verdicts_over_a_stop(server, tmp_path, monkeypatch, capsys):
    """The server fails, repeats the key in its errors and its replies; then the run is continued with another address."""
    folder, run = write_inputs(tmp_path), tmp_path / "run"
    monkeypatch.setattr(pipeline.write, "refresh", lambda run: None)
    monkeypatch.setattr(pipeline.write, "finish", write_report)
    monkeypatch.setenv("THE_JUDGES_KEY", KEY)
    failing = threading.Event()

    def behave(number: int, asked: str, handler: Handler) -> None:
        if number >= 6 and not failing.is_set():
            handler.say(401, json.dumps({"error": {"message": f"Incorrect API key provided: {KEY}"}}).encode())
        else:
            handler.say(200, chat(f"My key is {KEY}." if number % 5 == 0 else shorter(asked)))

    server.behave = behave
    options = {"judge": "openai:m", "judge_base_url": server.url, "judge_api_key_env": "THE_JUDGES_KEY", "iterations": 1}
    settings = config(folder, run, **options, judge_concurrency=1)
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
