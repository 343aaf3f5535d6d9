"""An adapter that lies on the Hub is the adapter that it is in a folder: fetched whole, once, and no pickle of it."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import constants
from huggingface_hub.errors import LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from tiny_runs import write_inputs
from zopro.engine.local import starts
from zopro.engine.local.starts import load_start, start_adapter, tokenizer_home
from zopro.errors import InputError
from zopro.text.tokenizer import load_tokenizer

CPU = torch.device("cpu")
IDS = torch.tensor([[5, 6, 70, 8, 9]])
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"


class Hub(ThreadingHTTPServer):
    """Gives out the files of `folders`, by the names of repositories."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folders: dict[str, Path] = {}
        self.asked: list[str] = []
        self.broken = ""  # the file that it fails to give out


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = self.path.split("?")[0].split("/")
        folder, file = self.server.folders.get("/".join(parts[1:3])), parts[-1]
        path = None if folder is None else folder / file
        if "resolve" in parts:  # the library asks for more than files
            self.server.asked.append(file)
        broken = file == self.server.broken
        found = path is not None and path.is_file() and not broken
        body = path.read_bytes() if path is not None and found else b""
        self.send_response(403 if broken else 200 if found else 404)
        headers = {"X-Repo-Commit": "a" * 40, "ETag": f'"{hashlib.sha1(body).hexdigest()}"', "Content-Length": len(body)}
        for key, value in (headers | ({} if found or broken else {"X-Error-Code": "EntryNotFound"})).items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    server = Hub()
    address = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # Made once, with the address of then: after other tests transformers would wait for the real Hub.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def adapter(tmp_path: Path, hub: Hub) -> Path:
    """The folder that the Hub gives out as me/adapter: an adapter that changes every answer, without a tokenizer."""
    base = write_inputs(tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: dict[str, Any] = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}
        model = AutoModelForCausalLM.from_pretrained(base / "model")
        get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).save_pretrained(tmp_path / "adapter")
    hub.folders["me/adapter"] = tmp_path / "adapter"
    return tmp_path / "adapter"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits


def test_it_is_what_it_is_in_a_folder_with_its_own_tokenizer(hub, adapter, tmp_path, monkeypatch):
    tokenizer = load_tokenizer(str(tmp_path / "model"))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(adapter)
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    assert tokenizer_home("me/adapter") == "me/adapter", "before its files are in the cache"
    expected = logits(load_start(str(adapter), torch.float32, CPU))
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, adapter)), expected)
    assert torch.equal(logits(load_start("me/adapter", torch.float32, CPU)), expected)
    assert tokenizer_home("me/adapter") == "me/adapter", "and after"
    assert load_tokenizer("me/adapter").chat_template == TEMPLATE
    assert "adapter_model.bin" not in hub.asked

    hub.asked.clear()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert torch.equal(logits(load_start("me/adapter", torch.float32, CPU)), expected)
    assert tokenizer_home("me/adapter") == "me/adapter" and start_adapter(str(adapter)) and not hub.asked


def test_its_base_s_tokenizer_where_it_has_none_and_a_request_for_what_may_have_changed(hub, adapter, tmp_path):
    assert tokenizer_home("me/adapter") == str(tmp_path / "model")
    assert {*hub.asked} == {"adapter_config.json", "config.json", "tokenizer_config.json", "adapter_model.safetensors"}
    hub.asked.clear()
    load_start("me/adapter", torch.float32, CPU)
    assert {*hub.asked} == {"adapter_config.json"}
    hub.asked.clear()
    hub.folders["me/model"] = tmp_path / "model"
    assert start_adapter("me/model") is start_adapter(str(tmp_path / "model")) is None
    assert hub.asked == ["adapter_config.json"], "a model costs no other request, and a folder none"


def test_what_cannot_be_fetched_is_one_line(hub, adapter, monkeypatch):
    hub.broken = "adapter_model.safetensors"
    with pytest.raises(InputError, match=r"^model: adapter_model.safetensors of .* cannot be fetched \(.*403"):
        start_adapter("me/adapter")
    line = "^model: the adapter 'me/adapter' must have adapter_model.safetensors, which is not "
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=f"{line}in the Hub's cache, and HF_HUB_OFFLINE is set"):
        start_adapter("me/adapter")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    hub.broken = ""
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=f"{line}on the Hub"):
        start_adapter("me/adapter")


def test_without_a_network_what_is_in_the_cache_is_enough(hub, adapter, monkeypatch):
    folder = start_adapter("me/adapter").folder
    shutil.rmtree(folder.parents[1] / ".no_exist")  # as a download of the whole repository leaves it

    def unreachable(*args, **kwargs):
        raise LocalEntryNotFoundError("no network")

    monkeypatch.setattr(starts, "hf_hub_download", unreachable)
    assert start_adapter("me/adapter").folder == folder
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(InputError, match=r"adapter_model.safetensors of .* cannot be fetched \(no network\)"):
        start_adapter("me/adapter")


def test_one_that_is_a_model_too_is_refused_whatever_is_in_the_cache(hub, adapter):
    (adapter / "config.json").write_text("{}")
    for _ in range(2):
        with pytest.raises(InputError, match=r"which is both. Move one of them away, in a copy of yours\.$"):
            start_adapter("me/adapter")
