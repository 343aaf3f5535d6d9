"""What `python -m vllm.entrypoints.openai.api_server` runs in tests: it forwards to a `vllm_server.VLLMServer`.

Started by zopro, so in a process of its own, without torch. The environment says what it does: FORWARD_TO, the address;
FORWARD_NOTES, a file that gets its arguments, its process and that of a child which would outlive it; FORWARD_LAST, the
words with which it ends at once.
"""

from __future__ import annotations

import http.client
import json
import os
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

KEY = os.environ.get("VLLM_API_KEY")


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, said = 401, b"no key"
        if KEY and self.headers["Authorization"] == f"Bearer {KEY}":
            connection = http.client.HTTPConnection(urlsplit(os.environ["FORWARD_TO"]).netloc)
            connection.request(self.command, self.path, body or None)
            response = connection.getresponse()
            status, said = response.status, response.read()
            connection.close()
        self.send_response(status)
        self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    do_POST = do_GET

    def log_message(self, *args: Any) -> None:
        pass


def main() -> None:
    child = subprocess.Popen(["sleep", "600"])
    notes = {"arguments": sys.argv[1:], "processes": [os.getpid(), child.pid, os.getppid()]}
    if path := os.environ.get("FORWARD_NOTES"):
        with Path(path).open("a") as file:
            file.write(json.dumps(notes) + "\n")
    if words := os.environ.get("FORWARD_LAST"):
        sys.exit(words)
    port = int(sys.argv[sys.argv.index("--port") + 1])
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


if __name__ == "__main__":
    main()
