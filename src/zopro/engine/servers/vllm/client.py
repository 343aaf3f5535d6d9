"""One vLLM server, asked over its OpenAI-compatible HTTP interface. Token ids go out, token ids and log-probs come back.

server = Server("http://127.0.0.1:8000")
server.greet()
server.load("zopro-1", Path("/dev/shm/zopro/1"))
server.sample("zopro-1", prompts, seeds, options); server.score("zopro-1", rows, counts); server.unload("zopro-1")

A key comes from the environment alone (VLLM_API_KEY, as for the server itself), and is taken out of what the server says.
"""

from __future__ import annotations

import http.client
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from operator import index
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from zopro.config.addresses import VLLM_KEY
from zopro.engine import Sampling
from zopro.engine.servers.check import AGREE, apart
from zopro.system.secrets import from_environment, redacted

PROBE = 10.0  # seconds for a server to say that it is there
SLOTS = 4  # adapters that a server has at once, where it does not say
REMEDIES = (
    ("No adapter found", "set adapter_folder to a folder that the server sees by the same path"),
    ("max_lora_rank", "start it with a --max-lora-rank of lora_r or more"),
    ("target modules", "leave out what it names of lora_target_modules"),
    ("/v1/load_lora_adapter says 404: {", "start it with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"),
    ("says 401", f"export its key as {VLLM_KEY}"),
    ("maximum context length", "start it with a larger --max-model-len"),
    ("CERTIFICATE_VERIFY_FAILED", "export the file of its certificate, or of its authority's, as SSL_CERT_FILE"),
)
"""What is found in a server's complaint, and what helps."""
PROBED = "The quick brown fox jumps over the lazy dog."  # whose log-probs tell one model from another
HIDDEN = (404, 405)  # said of /tokenize where what stands before a server lets /v1 through alone
ROUNDED = 1e-3  # nats above 0 that a log-prob of about 0 may be by rounding
MOST_ROWS = 256  # requests under way at one server, as vLLM's own --max-num-seqs

T = TypeVar("T")


class Failed(Exception):
    """A server did not do what it was asked; the text says why, in a few words.

    status: of its answer by HTTP; 0 where it gave none.
    """

    def __init__(self, why: str, status: int = 0) -> None:
        super().__init__(why)
        self.status = status


class OtherWeights(Failed):
    """A server holds other weights than it did."""


class Server:
    """Where a server is, and what it has said about itself.

    Args:
        url: http://HOST:PORT, without a path or with the one that comes before /v1.
        timeout: seconds for any one answer.
        key: that it asks for; by default the environment's.

    Attributes:
        base: the model's name there.
        context: tokens of prompt and answer together.
        slots: adapters in one of its batches.
        rows: requests under way at once, each of which is a connection.
        vocabulary: tokens of the model, as whoever asks knows it.
        key: that it asks for; empty where it asks for none.
    """

    base, context, slots, rows, vocabulary = "", 0, SLOTS, MOST_ROWS, 2**31

    def __init__(self, url: str, timeout: float = 600.0, key: str | None = None) -> None:
        parts = urlsplit(url)
        self.url, self.timeout = url.rstrip("/"), timeout
        secure = parts.scheme == "https"
        # Without a port the end of an IPv6 address would be taken for one.
        self._place = parts.hostname or "", parts.port or (443 if secure else 80)
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._open = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        self.key = from_environment(VLLM_KEY) if key is None else key
        self._rows = threading.BoundedSemaphore(self.rows)
        self._loaded: set[str] = set()
        self._left: set[str] = set()  # of those loaded: not wanted any more, but not unloaded yet
        self._probe: tuple[list[int], list[float]] = [], []

    def greet(self) -> None:
        """Ask what it serves, and for one token. Raises Failed: it is not there, or not ready."""
        with readable(self.key):
            cards = self._ask("GET", "/v1/models", timeout=PROBE)["data"]
            name, context = next((card["id"], int(card["max_model_len"])) for card in cards if not card.get("parent"))
        if self.base and (name, context) != (self.base, self.context):
            raise Failed(f"it serves another model than before, {name}")
        self.base, self.context = name, context
        self._recognise(max(PROBE, self.timeout / 10))
        self._rows = threading.BoundedSemaphore(self.rows)  # not those that requests of a stall hold
        said = ""
        with suppress(Failed):  # what stands before the server may hide it
            said = self._text("GET", "/metrics", timeout=PROBE)
        slots = re.search(r'max_lora="(\d{1,9})"', said)
        self.slots = max(1, int(slots[1])) if slots else SLOTS
        self._left |= self._loaded  # of before it was left out
        self._tidy()

    def _recognise(self, timeout: float) -> None:
        """Ask for log-probs of a fixed text. Raises OtherWeights: they are not those of before."""
        ids, known = self._probe
        try:
            ids = ids or (self.tokens(PROBED, timeout) or [0])[: self.context - 1]
        except Failed as failed:
            if failed.status not in HIDDEN:
                raise
            ids = list(range(16))[: self.context - 1]
        (found,) = self.score(self.base, [ids], [len(ids) - 1], timeout)
        if known and (between := apart(found, known)) > AGREE:
            raise OtherWeights(f"its weights are not those of before: log-probs differ by {between:.2g} nats a token")
        self._probe = ids, found

    def stop(self) -> object:
        """One that was started elsewhere goes on."""

    def tokens(self, text: str, timeout: float | None = None) -> list[int]:
        """As the server encodes a text, adding nothing."""
        asked = {"model": self.base, "prompt": text, "add_special_tokens": False}
        with readable(self.key):
            return list(self._ask("POST", "/tokenize", asked, timeout)["tokens"])

    def load(self, name: str, folder: Path) -> None:
        """Have an adapter by a name that no cache knows: blocks of earlier prompts are kept by it."""
        self._tidy()
        self._loaded.add(name)
        self._text("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(folder)})

    def unload(self, name: str) -> None:
        """Forget an adapter; one that it does not have is as well. Where the server does not, it is asked again later."""
        self._left.add(name)
        self._tidy()

    def _tidy(self) -> None:
        for name in sorted(self._left):
            try:
                self._text("POST", "/v1/unload_lora_adapter", {"lora_name": name}, PROBE)
            except Failed as failed:
                if not failed.status:  # it is not there, and would be waited for again
                    return
                if failed.status not in (400, 404):  # which say that it has none of that name
                    continue
            self._left.discard(name)
            self._loaded.discard(name)

    def sample(
        self, model: str, prompts: Sequence[Sequence[int]], seeds: Sequence[int], options: Sampling
    ) -> list[tuple[list[int], list[float]]]:
        """Tokens and their log-probs, in nats, before temperature and truncation: one answer to each prompt.

        All is said that the server would otherwise take from the model's own generation_config.json.
        """
        how: dict[str, Any] = {
            "max_tokens": options.max_new_tokens, "temperature": options.temperature if options.do_sample else 0.0,
            "top_k": options.top_k or 0, "top_p": options.top_p, "min_p": options.min_p or 0.0,
            "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "stop_token_ids": list(options.eos_token_ids), "ignore_eos": True, "logprobs": 0, "return_token_ids": True,
        }  # fmt: skip

        stops = frozenset(options.eos_token_ids)

        def answer(prompt: Sequence[int], seed: int) -> tuple[list[int], list[float]]:
            with self._rows, readable(self.key):
                (choice,) = self._complete(model, prompt=list(prompt), seed=seed, **how)
                tokens, scores = [*map(index, choice["token_ids"])], list(choice["logprobs"]["token_logprobs"])
                if len(tokens) != len(scores):
                    raise ValueError(f"{len(tokens)} tokens with {len(scores)} log-probs")
                if strange := [token for token in tokens if not 0 <= token < self.vocabulary]:
                    raise ValueError(f"token {strange[0]} of a vocabulary of {self.vocabulary}")
                whole = tokens[: options.max_new_tokens]
                end = next((at for at, token in enumerate(whole, 1) if token in stops), options.max_new_tokens)
                if len(tokens) != end:
                    raise ValueError(
                        f"length {len(tokens)}, not {end}: an answer ends with its first stop or after max_tokens"
                    )
                return tokens, [number(score) for score in scores]

        calls = [lambda p=p, s=s: answer(p, s) for p, s in zip(prompts, seeds, strict=True)]
        return together(calls)

    def score(
        self, model: str, rows: Sequence[Sequence[int]], counts: Sequence[int], timeout: float | None = None
    ) -> list[list[float]]:
        """Log-probs, in nats, of the last `counts` tokens of each row, none of which is its first."""
        asked = {"prompt": [list(row) for row in rows], "max_tokens": 1, "temperature": 0, "prompt_logprobs": 0}
        found = self._complete(model, timeout, **asked)
        with readable(self.key):
            by_row = {choice["index"]: choice["prompt_logprobs"] for choice in found}
            return [
                [number(by_row[n][place][str(row[place])]["logprob"]) for place in range(len(row) - count, len(row))]
                for n, (row, count) in enumerate(zip(rows, counts, strict=True))
            ]

    def _complete(self, model: str, timeout: float | None = None, **asked: Any) -> list[dict[str, Any]]:
        with readable(self.key):
            return list(self._ask("POST", "/v1/completions", {"model": model, **asked}, timeout)["choices"])

    def _ask(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> dict[str, Any]:
        with readable(self.key):
            return dict(json.loads(self._text(method, path, body, timeout)))

    def _text(self, method: str, path: str, body: Any = None, timeout: float | None = None) -> str:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self.key}"} if self.key else {})
        try:
            with closing(self._open(*self._place, timeout=timeout or self.timeout)) as connection:
                connection.request(method, self._path + path, None if body is None else json.dumps(body), headers)
                response = connection.getresponse()
                text = response.read().decode("utf-8", "replace")
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # of a name that none can have, too
            why = f"{type(error).__name__}: {error}"
            raise Failed("; ".join([why, *_remedies(why)])) from None
        if response.status != 200:
            elsewhere = response.headers.get("Location")
            reason = _reason(text) if elsewhere is None else f"it is at {elsewhere}, which would be the address to give"
            says = f"{path} says {response.status}: "
            shown = says + redacted(reason, self.key)[:300]
            raise Failed("; ".join([shown, *_remedies(says + reason)]), response.status)
        return text


def _remedies(complaint: str) -> list[str]:
    """What helps."""
    return [remedy for sign, remedy in REMEDIES if sign in complaint]


def _reason(text: str) -> str:
    """What a server says of its refusal, in one line."""
    with suppress(ValueError, KeyError, TypeError):
        text = json.loads(text)["error"]["message"]
    return " ".join(str(text).split())


@contextmanager
def readable(key: str) -> Iterator[None]:
    """A context in which an answer of another form than vLLM's is the server's failure, told without the key."""
    try:
        yield
    except (LookupError, TypeError, ValueError, StopIteration, RecursionError) as error:
        why = redacted(f"{type(error).__name__}: {error}", key)
        raise Failed(f"an answer of another form than vLLM 0.32's ({why})") from None


def number(value: Any) -> float:
    """A log-prob. Raises ValueError: it is none."""
    if type(value) not in (int, float) or not -1e30 < value < ROUNDED:
        raise ValueError(f"a log-prob of {value!r:.40}")
    return float(value)


def together(calls: Sequence[Callable[[], T]]) -> list[T]:
    """The results of calls that are made at once, each in a thread that no exit waits for. Raises the first error."""
    said: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()
    for number, call in enumerate(calls):
        in_background(number, call, said)
    results: dict[int, T] = {}
    for _ in calls:
        number, result = said.get()
        if isinstance(result, BaseException):
            raise result
        results[number] = result
    return [results[number] for number in range(len(calls))]


def in_background(number: int, call: Callable[[], T], said: queue.SimpleQueue[tuple[int, T | BaseException]]) -> None:
    """Call in a thread, and put (number, result or error) into the queue."""

    def run() -> None:
        try:
            said.put((number, call()))
        except BaseException as error:
            said.put((number, error))

    threading.Thread(target=run, daemon=True).start()
