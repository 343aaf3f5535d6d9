"""A server that speaks the chat protocol and misbehaves as it is told."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

KEY = "sk-proj-Ab12Cd34Ef56Gh78"


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


def assert_silent(text: str) -> None:
    """No eight characters of the key are in the text."""
    assert not [KEY[i : i + 8] for i in range(len(KEY) - 7) if KEY[i : i + 8] in text]
