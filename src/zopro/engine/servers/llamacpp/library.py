"""llama.cpp's C API, as the wheel `xllamacpp` exports it: declarations for one version, and a check that they hold.

The API passes structs by value and changes them every few weeks, so that a field can lie elsewhere in the next version
without any error. So the version is pinned (the extra `llamacpp`), and what the library says its defaults are is
compared, field by field, with what they were in that version.
"""

from __future__ import annotations

import ctypes as c
from collections import deque
from functools import cache
from typing import Any

from zopro.errors import InputError, pip_install

VERSION = "2026.10.11549"
"""Of xllamacpp, whose structs are declared here."""

SPARE = 256  # bytes behind a struct, so that a longer one does not write past ours


class Batch(c.Structure):
    """llama_batch: n tokens, each with its position, its sequences, and whether its logits are wanted."""

    _fields_ = (
        ("n_tokens", c.c_int32),
        ("token", c.POINTER(c.c_int32)),
        ("embd", c.c_void_p),
        ("pos", c.POINTER(c.c_int32)),
        ("n_seq_id", c.POINTER(c.c_int32)),
        ("seq_id", c.POINTER(c.POINTER(c.c_int32))),
        ("logits", c.POINTER(c.c_int8)),
    )


class ModelParams(c.Structure):
    """llama_model_params."""

    _fields_ = (
        *((name, c.c_void_p) for name in ("devices", "tensor_buft_overrides")),
        *((name, c.c_int32) for name in ("n_gpu_layers", "split_mode", "load_mode", "lazy_mode", "main_gpu")),
        *(
            (name, c.c_void_p)
            for name in ("tensor_split", "progress_callback", "progress_callback_user_data", "kv_overrides")
        ),
        *(
            (name, c.c_bool)
            for name in ("vocab_only", "check_tensors", "use_extra_bufts", "no_host", "no_alloc", "load_mtp")
        ),
        ("spare", c.c_uint8 * SPARE),
    )


class ContextParams(c.Structure):
    """llama_context_params."""

    _fields_ = (
        *(
            (name, c.c_uint32)
            for name in (
                "n_ctx",
                "n_batch",
                "n_ubatch",
                "n_seq_max",
                "n_rs_seq",
                "n_outputs_max",
                "n_outputs_max_per_seq",
            )
        ),
        *(
            (name, c.c_int32)
            for name in ("n_threads", "n_threads_batch", "ctx_type", "rope_scaling_type", "pooling_type")
        ),
        *((name, c.c_int32) for name in ("attention_type", "flash_attn_type")),
        *((name, c.c_float) for name in ("rope_freq_base", "rope_freq_scale", "yarn_ext_factor", "yarn_attn_factor")),
        *((name, c.c_float) for name in ("yarn_beta_fast", "yarn_beta_slow")),
        ("yarn_orig_ctx", c.c_uint32),
        ("defrag_thold", c.c_float),
        *((name, c.c_void_p) for name in ("cb_eval", "cb_eval_user_data")),
        *((name, c.c_int32) for name in ("type_k", "type_v")),
        *((name, c.c_void_p) for name in ("abort_callback", "abort_callback_data", "unnamed")),
        *((name, c.c_bool) for name in ("embeddings", "offload_kqv", "no_perf", "op_offload", "swa_full", "kv_unified")),
        ("samplers", c.c_void_p),
        ("n_samplers", c.c_size_t),
        ("spare", c.c_uint8 * SPARE),
    )


class FileParams(c.Structure):
    """gguf_init_params."""

    _fields_ = (("no_alloc", c.c_bool), ("ctx", c.c_void_p))


_MODEL_DEFAULTS = {"n_gpu_layers": -1, "split_mode": 1, "load_mode": -1, "lazy_mode": 1, "main_gpu": 0}
_MODEL_DEFAULTS |= {"vocab_only": False, "check_tensors": False, "use_extra_bufts": True, "no_host": False}
_CONTEXT_DEFAULTS: dict[str, Any] = {"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_outputs_max": 0}
_CONTEXT_DEFAULTS |= {"n_outputs_max_per_seq": 1, "n_threads": 4, "n_threads_batch": 4, "rope_scaling_type": -1}
_CONTEXT_DEFAULTS |= {"pooling_type": -1, "attention_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0}
_CONTEXT_DEFAULTS |= {"defrag_thold": -1.0, "type_k": 1, "type_v": 1, "embeddings": False, "offload_kqv": True}
_CONTEXT_DEFAULTS |= {"no_perf": True, "op_offload": True, "swa_full": True, "kv_unified": False}

_P, _I, _S, _B = c.c_void_p, c.c_int32, c.c_char_p, c.c_bool
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_P, _P]),
    "llama_model_default_params": (ModelParams, []),
    "llama_context_default_params": (ContextParams, []),
    "llama_model_load_from_file": (_P, [_S, ModelParams]),
    "llama_model_free": (None, [_P]),
    "llama_init_from_model": (_P, [_P, ContextParams]),
    "llama_free": (None, [_P]),
    "llama_set_n_threads": (None, [_P, _I, _I]),
    "llama_n_ctx": (c.c_uint32, [_P]),
    "llama_n_seq_max": (c.c_uint32, [_P]),
    "llama_model_get_vocab": (_P, [_P]),
    "llama_model_ftype": (_I, [_P]),
    "llama_model_desc": (_I, [_P, _P, c.c_size_t]),
    "llama_model_n_ctx_train": (_I, [_P]),
    "llama_model_n_head": (_I, [_P]),
    "llama_model_n_head_kv": (_I, [_P]),
    "llama_model_is_recurrent": (_B, [_P]),
    "llama_model_is_hybrid": (_B, [_P]),
    "llama_model_has_encoder": (_B, [_P]),
    "llama_model_meta_val_str": (_I, [_P, _S, _P, c.c_size_t]),
    "llama_model_chat_template": (_S, [_P, _S]),
    "llama_vocab_n_tokens": (_I, [_P]),
    "llama_vocab_is_eog": (_B, [_P, _I]),
    "llama_tokenize": (_I, [_P, _S, _I, c.POINTER(_I), _I, _B, _B]),
    "llama_get_memory": (_P, [_P]),
    "llama_memory_clear": (None, [_P, _B]),
    "llama_memory_seq_cp": (None, [_P, _I, _I, _I, _I]),
    "llama_decode": (_I, [_P, Batch]),
    "llama_get_logits": (c.POINTER(c.c_float), [_P]),
    "llama_adapter_lora_init": (_P, [_P, _S]),
    "llama_adapter_lora_free": (None, [_P]),
    "llama_set_adapters_lora": (_I, [_P, c.POINTER(_P), c.c_size_t, c.POINTER(c.c_float)]),
    "gguf_init_from_file": (_P, [_S, FileParams]),
    "gguf_free": (None, [_P]),
    "gguf_get_n_tensors": (c.c_int64, [_P]),
    "gguf_get_tensor_name": (_S, [_P, c.c_int64]),
    "gguf_get_tensor_ne": (c.POINTER(c.c_int64), [_P, c.c_int64]),
}

said: deque[str] = deque(maxlen=20)
"""The last warnings and errors that the library logged; it returns no reason with a failure."""


@c.CFUNCTYPE(None, c.c_int, c.c_char_p, c.c_void_p)
def _log(level: int, text: bytes, _: Any) -> None:
    if level >= 3:  # warnings and errors
        said.append(text.decode("utf-8", "replace").strip())


def why() -> str:
    """What the library said last, for a message; empty where it said nothing.

    The last line of a model that it cannot load says no more than that; the one before it says why.
    """
    reasons = [line for line in said if not line.endswith("failed to load model")] or list(said)
    return f" ({reasons[-1]})" if reasons else ""


@cache
def opened() -> Any:
    """The loaded library. Raises InputError: not installed, without a C API, or of another version."""
    try:
        import xllamacpp.xllamacpp as built
    except ImportError:
        raise InputError(f"engine: llamacpp must have its library. Install it: {pip_install('llamacpp')}") from None
    try:
        loaded = c.CDLL(built.__file__)
        for name, (result, arguments) in _SIGNATURES.items():
            function = getattr(loaded, name)
            function.restype, function.argtypes = result, arguments
    except (OSError, AttributeError) as error:
        raise _other(str(error)) from error
    loaded.llama_log_set(_log, None)
    loaded.llama_backend_init()
    for params, defaults in (
        (loaded.llama_model_default_params(), _MODEL_DEFAULTS),
        (loaded.llama_context_default_params(), _CONTEXT_DEFAULTS),
    ):
        for name, default in defaults.items():
            if getattr(params, name) != default:
                raise _other(f"the default of {name} is {getattr(params, name)}, not {default}")
    return loaded


def _other(reason: str) -> InputError:
    return InputError(
        f"engine: llamacpp must have the library of xllamacpp {VERSION}, got one with another interface ({reason}). "
        f"Install that version: {pip_install('llamacpp')}"
    )
