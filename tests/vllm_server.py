"""A server that speaks as vLLM 0.32 does and answers by a tiny transformers model; it misbehaves as it is told.

What real servers say was recorded; tests/engine/servers/test_vllm.py holds both to the same numbers. Adapters are read
from their files and added to the weights here, without PEFT.
"""

from __future__ import annotations

import copy
import json
import threading
from collections.abc import Callable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file


class Refused(Exception):
    """With a status."""


class VLLMServer(ThreadingHTTPServer):
    """Knobs and records.

    Attributes:
        tampers: called with (path, body) before a request is answered; it may wait, or raise ConnectionError, upon which
            the connection is closed without a word.
        deaf: modules on which adapters are ignored, silently.
        key: one that it wants.
        updating: it takes adapters at run time.
        loaded: names that were loaded, in order.
        scored, sampled: rows answered, by model.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, model: Any, tokenizer: Any, port: int = 0, max_rank: int = 8, context: int = 96) -> None:
        super().__init__(("127.0.0.1", port), Handler)
        self.model, self.tokenizer, self.max_rank, self.context = model, tokenizer, max_rank, context
        self.adapters: dict[str, Any] = {}
        self.tampers: Callable[[str, Any], Any] = lambda path, body: None
        self.deaf: tuple[str, ...] = ()
        self.key = ""
        self.updating = True
        self.loaded: list[str] = []
        self.scored: list[str] = []
        self.sampled: list[str] = []
        self.lock = threading.Lock()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Who hangs up on a stall leaves no traceback."""

    def close(self) -> None:
        """As if it were killed: nobody answers any more."""
        self.shutdown()
        self.server_close()

    def answer(self, path: str, body: Any) -> Any:
        if path == "/v1/models":
            cards = [{"id": "base", "parent": None, "max_model_len": self.context}]
            return {"data": [*cards, *({"id": name, "parent": "base", "max_model_len": None} for name in self.adapters)]}
        if path == "/metrics":
            return 'vllm:lora_requests_info{max_lora="3",running_lora_adapters="",waiting_lora_adapters=""} 1.0'
        if path == "/tokenize":
            return {"tokens": self.tokenizer(body["prompt"], add_special_tokens=False)["input_ids"]}
        if path == "/v1/load_lora_adapter" and self.updating:
            return self.load(body["lora_name"], Path(body["lora_path"]))
        if path == "/v1/unload_lora_adapter" and self.updating:
            if self.adapters.pop(body["lora_name"], None) is None:
                raise Refused(404, f"The lora adapter '{body['lora_name']}' cannot be found.")
            return "Success"
        if path == "/v1/completions":
            prompts = body["prompt"] if isinstance(body["prompt"][0], list) else [body["prompt"]]
            return {"choices": [self.complete(index, prompt, body) for index, prompt in enumerate(prompts)]}
        raise Refused(404, None)

    def load(self, name: str, path: Path) -> str:
        if name in self.adapters:
            raise Refused(400, f"The lora adapter '{name}' has already been loaded.")
        if not (path / "adapter_model.safetensors").is_file():
            raise Refused(404, f"Loading lora {name} failed: No adapter found for {path}")
        settings = json.loads((path / "adapter_config.json").read_text())
        tensors = load_file(path / "adapter_model.safetensors")
        if settings["r"] > self.max_rank:
            raise Refused(500, f"LoRA rank {settings['r']} is greater than max_lora_rank {self.max_rank}.")
        with self.lock, torch.no_grad():
            model = copy.deepcopy(self.model)
            for key in tensors:
                if key.endswith("lora_A.weight"):
                    module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                    scale = settings["lora_alpha"] / settings["r"]
                    if not module.endswith(self.deaf or "-"):
                        added = scale * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
                        model.get_parameter(f"{module}.weight").add_(added)
            self.adapters[name] = model
        self.loaded.append(name)
        return "Success"

    def complete(self, index: int, prompt: list[int], body: Any) -> Any:
        name = body["model"]
        if name != "base" and name not in self.adapters:
            raise Refused(404, f"The model `{name}` does not exist.")
        if len(prompt) + body["max_tokens"] > self.context:
            raise Refused(400, f"This model's maximum context length is {self.context} tokens.")
        model = self.model if name == "base" else self.adapters[name]
        with self.lock, torch.no_grad():
            if body.get("prompt_logprobs") is not None:
                self.scored.append(name)
                known = self.logprobs(model, prompt)
                scores = [{str(t): {"logprob": float(row[t])}} for row, t in zip(known, prompt[1:], strict=False)]
                return {"index": index, "prompt_logprobs": [None, *scores], "token_ids": None, "logprobs": None}
            self.sampled.append(name)
            draw = torch.Generator().manual_seed(body.get("seed") or 0)
            ids, found = list(prompt), []
            for _ in range(body["max_tokens"]):
                last = self.logprobs(model, ids)[-1]
                heat = body["temperature"]
                token = int(torch.multinomial((last / heat).softmax(-1), 1, generator=draw) if heat else last.argmax())
                ids.append(token)
                found.append(float(last[token]))
                if token in body.get("stop_token_ids", ()):
                    break
            new = ids[len(prompt) :] if body.get("return_token_ids") else None
            return {"index": index, "token_ids": new, "logprobs": {"token_logprobs": found}, "prompt_logprobs": None}

    def logprobs(self, model: Any, ids: list[int]) -> torch.Tensor:
        return model(torch.tensor([ids])).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]


class Handler(BaseHTTPRequestHandler):
    server: VLLMServer

    def do_GET(self) -> None:
        self.reply(None)

    def do_POST(self) -> None:
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body: Any) -> None:
        try:
            if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
                raise Refused(401, f"Unauthorized: {self.headers['Authorization']}")
            self.server.tampers(self.path, body)
            status, said = 200, self.server.answer(self.path, body)
        except Refused as error:
            status, message = error.args
            said = {"detail": "Not Found"} if message is None else {"error": {"message": message, "code": status}}
        except ConnectionError:
            self.close_connection = True
            return
        data = (said if isinstance(said, str) else json.dumps(said)).encode()
        with suppress(OSError):
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass
