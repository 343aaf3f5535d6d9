"""A vLLM server's address and key, the connections that servers share, adapters' folders: no server is asked."""

from __future__ import annotations

import ssl
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from zopro.engine.servers.vllm import publishing, sharing
from zopro.engine.servers.vllm.client import MOST_ROWS, Failed, Server
from zopro.engine.servers.vllm.publishing import Published, tidy
from zopro.engine.servers.vllm.sharing import Fleet
from zopro.errors import InputError


@pytest.mark.parametrize("key", ["first-secret-1\nsecond-secret-2", "clé-secret-1"])
def test_a_key_that_no_header_can_hold_is_refused_without_being_shown(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_API_KEY", key)
    with pytest.raises(InputError, match="VLLM_API_KEY: must hold a key of printable ASCII characters") as failed:
        Server("http://127.0.0.1:9")
    assert "secret" not in str(failed.value)
    given = Server("http://127.0.0.1:9", key=key)
    with pytest.raises(Failed) as said:
        given.greet()
    assert "secret" not in str(said.value)


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("http://[::1]", ("::1", 80)),
        ("https://[fe80::1]/path", ("fe80::1", 443)),
        ("http://[::1]:8000", ("::1", 8000)),
        ("http://host", ("host", 80)),
    ],
)
def test_an_address_without_a_port_has_its_schemes(url: str, place: tuple[str, int]) -> None:
    server = Server(url)
    connection = server._open(*server._place)
    assert (connection.host, connection.port) == place


def test_servers_share_the_connections_that_a_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharing, "files_at_once", lambda: sharing.OTHER_FILES + 300)
    for count, rows in ((1, MOST_ROWS), (3, 100), (400, 1)):
        servers = [Server(f"http://host{n}") for n in range(count)]
        Fleet(servers)
        assert {server.rows for server in servers} == {rows}


def test_what_cannot_be_removed_is_tried_again_and_killed_ones_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {"w.lora_A.weight": torch.zeros(1, 2), "w.lora_B.weight": torch.zeros(2, 1)}
    with Published(str(tmp_path)) as published:
        path = published.write(tensors, 1.0)
        with monkeypatch.context() as patched:  # no file can be opened, say
            patched.setattr(publishing.shutil, "rmtree", lambda *args, **kwargs: None)
            published.remove(path)
        assert path.exists()
    assert not path.exists()
    left = [tmp_path / name for name in (f"zopro-{'a' * 32}", f".zopro-{'b' * 32}.partial")]
    for folder in left:
        folder.mkdir()
    tidy(str(tmp_path))
    assert all(folder.exists() for folder in left)
    monkeypatch.setattr(publishing, "STALE", -1.0)
    tidy(str(tmp_path))
    assert not any(folder.exists() for folder in left)


def test_a_remedy_is_found_whatever_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is looked for in what the server says, of which the key's words are not shown."""
    said = b'{"error": {"message": "LoRA rank 8 is greater than max_lora_rank 4, key max_lora_rank"}}'
    answer = SimpleNamespace(status=500, read=lambda: said, headers={})
    there = SimpleNamespace(request=lambda *args: None, getresponse=lambda: answer, close=lambda: None)
    server = Server("http://127.0.0.1:9", key="max_lora_rank")
    monkeypatch.setattr(server, "_open", lambda *args, **kwargs: there)
    with pytest.raises(Failed, match=r"rank 8 .* \[redacted\] 4, key \[redacted\]; start it with a --max-lora-rank of"):
        server.load("one", Path("one"))


def test_a_redirection_is_not_followed_but_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Adapters that one address has would be sought at another."""
    answer = SimpleNamespace(status=307, read=lambda: b"", headers={"Location": "https://there/v1/models"})
    there = SimpleNamespace(request=lambda *args: None, getresponse=lambda: answer, close=lambda: None)
    server = Server("http://127.0.0.1:9")
    monkeypatch.setattr(server, "_open", lambda *args, **kwargs: there)
    with pytest.raises(Failed, match="/v1/models says 307: it is at https://there/v1/models, which would be the address"):
        server.greet()


@pytest.mark.parametrize(
    ("url", "why"), [("http://a b:8000", "InvalidURL: .*'a b'"), ("http://a..b:8000", "(gaierror|UnicodeError)")]
)
def test_an_address_that_none_can_have_is_a_servers_failure(url: str, why: str) -> None:
    for ask in (Server.greet, lambda server: server.load("one", Path("one"))):
        with pytest.raises(Failed, match=f"^{why}"):
            ask(Server(url))


def test_a_certificate_that_is_not_known_has_its_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*args: object, **kwargs: object) -> None:
        raise ssl.SSLCertVerificationError(1, "[SSL: CERTIFICATE_VERIFY_FAILED] self-signed certificate")

    server = Server("https://127.0.0.1:9")
    monkeypatch.setattr(server, "_open", refused)
    with pytest.raises(Failed, match=r"self-signed certificate.*; export the file of its certificate.* as SSL_CERT_FILE"):
        server.greet()
