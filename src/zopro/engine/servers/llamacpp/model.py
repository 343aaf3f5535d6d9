"""A GGUF model in this process: tokens in, logits out, with one adapter over it at a time.

model = Model("model.gguf")
with model.adapter(data):                                        # the bytes of a GGUF adapter
    model.begin(cells=64, rows=1, outputs=1)
    logits = model.read(tokens, range(len(tokens)), [0] * len(tokens), [False] * (len(tokens) - 1) + [True])
"""

from __future__ import annotations

import ctypes as c
import os
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from zopro.engine.servers.adapters import shared_folder
from zopro.engine.servers.llamacpp import library as lib
from zopro.errors import InputError

PIECE = 512  # tokens that go through the network at once; more take memory and save no time on a CPU
MOST_ROWS = 256  # LLAMA_MAX_SEQ
F32 = 0  # llama_ftype and ggml_type
PADDED = 256  # of which llama.cpp makes a context's length a multiple
LONG_FACTORS = "rope_factors_long.weight"


class Model:
    """A GGUF file, loaded by llama.cpp.

    Args:
        path: of the file; of a split one its first.
        threads: by default as many as torch has when it reads.
        gpu_layers: layers that go to a GPU, if the library is built for one; -1: all.
        head_only: read what the file says of itself, and no weights; nothing can be asked of the network.

    Raises InputError: no such file, none that llama.cpp can load, or a network that cannot be driven.
    """

    _cells = _rows = _outputs = _piece = 0
    _adapter: Any = None

    def __init__(
        self, path: str | Path, threads: int | None = None, gpu_layers: int = -1, head_only: bool = False
    ) -> None:
        self.api, self.path = lib.opened(), Path(path)
        self._held: dict[str, Any] = {}  # what the library has given out: a context, the model
        self.close = weakref.finalize(self, _free, self.api, self._held)
        """Give the memory back; done at the latest before the interpreter ends, after which it would crash."""
        self.threads, self._head_only = threads, head_only
        if not self.path.is_file():
            raise InputError(f"engine: llamacpp must be given a GGUF file, got {str(path)!r}, which is none.")
        params = self.api.llama_model_default_params()
        params.n_gpu_layers, params.vocab_only = gpu_layers, head_only
        lib.said.clear()
        self._model = self.api.llama_model_load_from_file(os.fsencode(self.path), params)
        if not self._model:
            raise InputError(f"engine: llama.cpp cannot load {str(path)!r}{lib.why()}.")
        self._held["model"] = self._model
        self._vocabulary = self.api.llama_model_get_vocab(self._model)
        self.vocab_size: int = self.api.llama_vocab_n_tokens(self._vocabulary)
        self.trained_context: int = self.api.llama_model_n_ctx_train(self._model)
        for is_it, what in (
            (self.api.llama_model_is_recurrent, "recurrent"),
            (self.api.llama_model_is_hybrid, "partly recurrent"),
            (self.api.llama_model_has_encoder, "an encoder"),
        ):
            if is_it(self._model):
                raise InputError(
                    f"engine: llamacpp must be given a decoder with attention alone, got one that is {what}."
                )

    @cached_property
    def architecture(self) -> str:
        return self.metadata("general.architecture") or ""

    @cached_property
    def most_cells(self) -> int | None:
        """Tokens of all rows that may be held at once; None: as many as there is memory for.

        Of a LongRoPE file its original context. In a longer one llama.cpp takes the long factors for short rows too, so
        that what a row reads would depend on how many were ever held at once.
        """
        if LONG_FACTORS not in self.tensors:
            return None
        said = self.metadata(f"{self.architecture}.rope.scaling.original_context_length")
        return max(PADDED, int(said or self.trained_context) // PADDED * PADDED)

    @property
    def context_length(self) -> int:
        """Tokens of a prompt and its answer."""
        return min(self.trained_context, self.most_cells or self.trained_context)

    def check_room(self, tokens: int) -> None:
        """Raise InputError where a LongRoPE file must not hold so many tokens."""
        if self.most_cells is not None and tokens > self.most_cells:
            raise InputError(
                f"prompts: with their answers must fit in {self.most_cells} tokens, the original context of "
                f"{self.path.name}, beyond which llama.cpp changes what short rows give too (LongRoPE), got {tokens}. "
                "Shorten either."
            )

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys."""
        if self._head_only:
            said = [self.metadata(f"{self.architecture}.attention.head_count{suffix}") for suffix in ("", "_kv")]
            return int(said[0] or 0), int(said[1] or said[0] or 0)
        return self.api.llama_model_n_head(self._model), self.api.llama_model_n_head_kv(self._model)

    @property
    def exact(self) -> bool:
        """Whether its weights are fp32; the cache of keys and values then is, too."""
        return bool(self.api.llama_model_ftype(self._model) == F32)

    @cached_property
    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name, the fastest dimension last."""
        found: dict[str, tuple[int, ...]] = {}
        count = int(self.metadata("split.count") or 1)
        for number in range(1, count + 1):
            name = self.path.name.replace(f"-00001-of-{count:05d}", f"-{number:05d}-of-{count:05d}")
            found |= self._tensors_of(self.path.with_name(name))
        return found

    def _tensors_of(self, path: Path) -> dict[str, tuple[int, ...]]:
        file = self.api.gguf_init_from_file(os.fsencode(path), lib.FileParams(True, None))
        found = {}
        for index in range(self.api.gguf_get_n_tensors(file)):
            sizes = self.api.gguf_get_tensor_ne(file, index)[:4]
            while len(sizes) > 1 and sizes[-1] == 1:
                sizes.pop()
            found[self.api.gguf_get_tensor_name(file, index).decode()] = tuple(sizes[::-1])
        self.api.gguf_free(file)
        return found

    @cached_property
    def stops(self) -> list[int]:
        """Tokens that end an answer, as llama.cpp knows them: of the file's head, and by their names."""
        return [token for token in range(self.vocab_size) if self.api.llama_vocab_is_eog(self._vocabulary, token)]

    def metadata(self, key: str) -> str | None:
        """A value of the file's head as text; None where there is none. Lists have none."""
        size = self.api.llama_model_meta_val_str(self._model, key.encode(), None, 0)
        if size < 0:
            return None
        buffer = c.create_string_buffer(size + 1)
        self.api.llama_model_meta_val_str(self._model, key.encode(), buffer, size + 1)
        return buffer.value.decode("utf-8", "replace")

    def tokens(self, text: str) -> list[int]:
        """Of a text as llama.cpp itself encodes it: special tokens are read, none are added."""
        raw = text.encode()
        buffer = (c.c_int32 * (len(raw) + 8))()
        count = self.api.llama_tokenize(self._vocabulary, raw, len(raw), buffer, len(buffer), False, True)
        if count < 0:
            raise ValueError(f"text: llama.cpp cannot encode it, got {text!r}")
        return list(buffer[:count])

    @contextmanager
    def adapter(self, data: bytes | None) -> Iterator[None]:
        """Within the context the network has this adapter (None: none). Raises InputError: llama.cpp refuses it.

        The file lives in shared memory under a name of its own, and only until it is read: nothing can take it for
        another's.
        """
        if data is None:
            yield
            return
        handle, name = tempfile.mkstemp(".gguf", "zopro-", shared_folder())
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            lib.said.clear()
            adapter = self.api.llama_adapter_lora_init(self._model, os.fsencode(name))
        finally:
            os.unlink(name)
        if not adapter:
            raise InputError(f"engine: llama.cpp refuses the adapter{lib.why()}.")
        self._adapter = adapter
        self._set_adapter()
        try:
            yield
        finally:
            self._adapter = None
            self._set_adapter()
            self.api.llama_adapter_lora_free(adapter)

    def _set_adapter(self) -> None:
        context = self._held.get("context")
        if context is None:
            return
        given = [self._adapter] if self._adapter else []
        count = len(given)
        adapters, scales = (c.c_void_p * 1)(*given), (c.c_float * 1)(1.0)
        if self.api.llama_set_adapters_lora(context, adapters, count, scales):
            raise RuntimeError(f"engine: llama.cpp does not take the adapter{lib.why()}")

    def begin(self, cells: int, rows: int, outputs: int) -> None:
        """Forget everything read, and have room for so many tokens in so many rows, and for rows of logits at once.

        Raises InputError: there is no memory for it, or it is more than the file must hold.
        """
        self.check_room(cells)
        if "context" not in self._held or cells > self._cells or rows > self._rows or outputs > self._outputs:
            self._open(max(cells, self._cells), max(rows, self._rows), max(outputs, self._outputs))
        threads = self.threads or torch.get_num_threads()
        self.api.llama_set_n_threads(self._held["context"], threads, threads)
        self.api.llama_memory_clear(self._memory, False)

    def _open(self, cells: int, rows: int, outputs: int) -> None:
        _free_context(self.api, self._held)
        params = self.api.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = -(-cells // PADDED) * PADDED, rows, True
        params.n_batch = params.n_ubatch = min(PIECE, params.n_ctx)
        params.n_outputs_max = params.n_outputs_max_per_seq = max(rows, outputs)  # it aborts if there are fewer than rows
        if self.exact:
            params.type_k = params.type_v = F32
            params.flash_attn_type = 0
        lib.said.clear()
        context = self.api.llama_init_from_model(self._model, params)
        if not context:
            raise InputError(
                f"engine: llama.cpp has no room for {rows} rows with {cells} tokens in all{lib.why()}. "
                "Take fewer or shorter answers at once."
            )
        self._held["context"] = context
        self._memory = self.api.llama_get_memory(context)
        self._cells, self._rows, self._piece = params.n_ctx, rows, params.n_batch
        self._outputs = params.n_outputs_max
        self._set_adapter()

    def copy(self, source: int, target: int) -> None:
        """Row `target` begins with all that row `source` has read."""
        self.api.llama_memory_seq_cp(self._memory, source, target, -1, -1)

    def read(self, tokens: Sequence[int], places: Sequence[int], rows: Sequence[int], wanted: Sequence[bool]) -> Tensor:
        """Logits (wanted, V), fp32 and new, behind tokens at places (from 0) in their rows."""
        found: list[Tensor] = []
        start = 0
        while start < len(tokens):
            end, outputs = start, 0
            while end < len(tokens) and end - start < self._piece and outputs + wanted[end] <= self._outputs:
                outputs += wanted[end]
                end += 1
            found.append(self._decode(tokens[start:end], places[start:end], rows[start:end], wanted[start:end]))
            start = end
        return found[0] if len(found) == 1 else torch.cat(found)

    def _decode(
        self, tokens: Sequence[int], places: Sequence[int], rows: Sequence[int], wanted: Sequence[bool]
    ) -> Tensor:
        n = len(tokens)
        own = (c.c_int32 * n)(*rows)
        pointer, size = c.POINTER(c.c_int32), c.sizeof(c.c_int32)
        each = (pointer * n)(*(c.cast(c.byref(own, i * size), pointer) for i in range(n)))
        ids, at, ones = (c.c_int32 * n)(*tokens), (c.c_int32 * n)(*places), (c.c_int32 * n)(*([1] * n))
        asked = (c.c_int8 * n)(*wanted)
        status = self.api.llama_decode(self._held["context"], lib.Batch(n, ids, None, at, ones, each, asked))
        if status:
            raise RuntimeError(f"engine: llama.cpp failed with status {status}{lib.why()}")
        outputs = sum(wanted)
        if not outputs:
            return torch.empty(0, self.vocab_size)
        logits = self.api.llama_get_logits(self._held["context"])
        memory = (c.c_float * (outputs * self.vocab_size)).from_address(c.addressof(logits.contents))
        return torch.frombuffer(memory, dtype=torch.float32).view(outputs, self.vocab_size).clone()


def _free_context(api: Any, held: dict[str, Any]) -> None:
    if "context" in held:
        api.llama_free(held.pop("context"))


def _free(api: Any, held: dict[str, Any]) -> None:
    _free_context(api, held)
    if "model" in held:
        api.llama_model_free(held.pop("model"))
