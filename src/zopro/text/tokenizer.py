"""The tokenizer of a model, made to encode a chat as the model's own chat template does."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import cached_file

from zopro.config.model import GGUF, check_there, no_such_model
from zopro.errors import InputError, out_of_memory
from zopro.text.chat import QUESTION, added, added_start, check_end, render, turn_of

CHATML = (
    "{%- for message in messages -%}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)
_WITH_BOS = "{{ bos_token }}"
PROCESSOR_TEMPLATE = "chat_template.json"  # where processors of images kept the template before it was the tokenizer's


def load_tokenizer(model: str, trust_remote_code: bool = False, as_published: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a model or GGUF file, padding on the left, with a pad token (or EOS) and a chat template.

    A tokenizer without a template gets ChatML, begun with BOS if there is one that encoding does not add. Unless
    `as_published`, encoding no longer ends a text with EOS, as a prompt would, and no longer begins it with BOS where
    the template writes that and the first word would be encoded otherwise than in the template's own text. As published,
    the template writes the BOS that encoding adds to a text: who serves chats encodes what it renders without adding one.

    Raises:
        InputError: there is no such tokenizer, it has no EOS token (a completion could not end), or it cannot be
            kept from adding tokens to the end of a prompt.
    """
    check_there(model)
    try:
        if model.endswith(GGUF):
            tokenizer = _of_gguf(model)
        else:
            tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code, padding_side="left")
    except Exception as error:  # files that are broken, or of another library's making, raise anything
        if out_of_memory(error):
            raise
        raise cannot_load("tokenizer", model, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"model: the tokenizer of {model!r} has no EOS token, which ends a completion. Set one.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.chat_template is None:
        tokenizer.chat_template = _processor_template(model)
    if tokenizer.chat_template is None:
        bos = _WITH_BOS if tokenizer.bos_token_id is not None and not added_start(tokenizer) else ""
        tokenizer.chat_template = bos + CHATML
    if as_published:
        _render_as_encoded(tokenizer)
    else:
        _encode_as_rendered(tokenizer)
    return tokenizer


def _of_gguf(file: str) -> PreTrainedTokenizerBase:
    """The tokenizer in a GGUF file, in a folder of its own: what lies beside the file may be another model's."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / Path(file).name).symlink_to(Path(file).absolute())
        found: PreTrainedTokenizerBase = PreTrainedTokenizerFast.from_pretrained(
            folder, gguf_file=Path(file).name, padding_side="left"
        )
    found.name_or_path = file
    return found


def _encode_as_rendered(tokenizer: PreTrainedTokenizerBase) -> None:
    start, end = added(tokenizer)
    if end and not _add_only(tokenizer, start):
        check_end(tokenizer, "model")
    text, asked = added_start(tokenizer), _asked(tokenizer)
    if text and asked.startswith(text):
        own = tokenizer(asked, add_special_tokens=False)["input_ids"]
        if tokenizer(asked.removeprefix(text))["input_ids"] != own:
            _add_only(tokenizer, [])


def _render_as_encoded(tokenizer: PreTrainedTokenizerBase) -> None:
    text, asked = added_start(tokenizer), _asked(tokenizer)
    if asked and text and text == tokenizer.bos_token and not asked.startswith(text):
        found: str | dict[str, str] = tokenizer.chat_template
        if isinstance(found, dict):  # by name; the default one is what a question is rendered with
            tokenizer.chat_template = {
                name: one if "bos_token" in one else _WITH_BOS + one for name, one in found.items()
            }
        else:
            tokenizer.chat_template = _WITH_BOS + found


def _asked(tokenizer: PreTrainedTokenizerBase) -> str:
    """A question as the template puts it; nothing where it cannot."""
    turn = turn_of(tokenizer)
    question = [{"role": "user", "content": QUESTION}]
    return "" if turn.problem else render(tokenizer, turn, question, add_generation_prompt=True)


def _add_only(tokenizer: Any, start: list[int]) -> bool:
    """Let encoding add these tokens before a text and none after it; whether that is what it does now."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        tokens = tokenizer.convert_ids_to_tokens(start)
        backend.post_processor = TemplateProcessing(
            single=[*tokens, "$A"], pair=[*tokens, "$A", "$B"], special_tokens=list(zip(tokens, start, strict=True))
        )
    return added(tokenizer) == (start, [])


def _processor_template(model: str) -> str | None:
    """The chat template of a checkpoint that keeps it beside its image processor."""
    try:
        path = cached_file(model, PROCESSOR_TEMPLATE, _raise_exceptions_for_missing_entries=False)
        template = None if path is None else json.loads(Path(path).read_text("utf-8"))["chat_template"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return template if isinstance(template, str) else None


def cannot_load(what: str, name: str, error: Exception) -> InputError:
    """The one line that says why a model's files cannot be read."""
    if not Path(name).exists() and isinstance(error, OSError):
        if "gated" in str(error):
            return InputError(f"model: {name!r} is gated. Ask for access on its page of the Hub, then 'hf auth login'.")
        if "couldn't connect" in str(error):
            return InputError(f"model: {name!r} is no folder, nor in the cache, and the Hub cannot be reached.")
        return no_such_model(name)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    reason = " ".join(lines[: 1 + lines[0].endswith(":")])
    if not isinstance(error, (OSError, ValueError, RuntimeError, ImportError)):
        reason = f"{type(error).__name__}: {reason}"
    if "trust_remote_code" in str(error):
        return InputError(
            f"model: {name!r} comes with Python code of its own, which is not run unasked. Read it, then set "
            "trust_remote_code if you trust it."
        )
    if "ignore_mismatched_sizes" in reason:
        reason = "its weights do not have the shapes that its config.json says"
    if "instantiate the backend tokenizer" in reason:
        reason = "it must hold tokenizer.json, or another file of a tokenizer"
    return InputError(f"model: cannot load the {what} of {name!r}: {reason}")
