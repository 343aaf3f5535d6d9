"""`model:PATH`: any sequence classifier with one output as a reward, with its own tokenizer and chat template.

It reads the conversation and the answer as its template writes them, as TRL's trainers have it. One without a template
reads prompt and answer as its tokenizer's pair of texts, which is how such classifiers are trained. What is longer than
the network reads loses its beginning, with a warning.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from zopro.engine.local.models import context_of
from zopro.errors import InputError, out_of_memory
from zopro.tasks.beside import tools_of
from zopro.text.chat import Turn, render
from zopro.text.tokenizer import cannot_load

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Mapping[str, Any]]


class Classifier:
    """A reward function as TRL calls it: the network's output.

    Args:
        path: a Hub id or a folder, with safetensors and a tokenizer.
        batch_size: answers that go through the network at once.

    Raises:
        InputError: there is no such classifier, it has not one output, or its head is not among its weights. When called:
            its chat template refuses a conversation, or a score is not finite.
    """

    checked = True  # what it returns are finite numbers, or it says so

    def __init__(
        self, path: str, dtype: torch.dtype, device: torch.device, batch_size: int = 32, trust_remote_code: bool = False
    ) -> None:
        self.path, self.batch_size, self.device = path, batch_size, device
        self.__name__ = f"model:{path}"
        try:
            config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
            outputs = config.num_labels
            self.tokenizer = AutoTokenizer.from_pretrained(
                path, trust_remote_code=trust_remote_code, padding_side="right", truncation_side="left"
            )
            model, info = AutoModelForSequenceClassification.from_pretrained(
                path, dtype=dtype, trust_remote_code=trust_remote_code, use_safetensors=True, output_loading_info=True
            )
        except Exception as error:  # files that are broken, or of another library's making, raise anything
            if out_of_memory(error):
                raise
            reason = str(cannot_load("classifier", path, error)).removeprefix("model: ")
            raise InputError(f"reward: {reason}") from error
        if outputs != 1:
            raise InputError(f"reward: a classifier must have one output, got {path!r} with num_labels={outputs}.")
        if info["missing_keys"]:
            raise InputError(
                f"reward: the files of {path!r} lack {min(info['missing_keys'])!r}: it is no trained classifier."
            )
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        pad = model.config.get_text_config().pad_token_id
        known = pad is not None and 0 <= pad < model.get_input_embeddings().weight.shape[0]
        self._pad: int | None = pad if known else None
        self.model = model.to(device).eval().requires_grad_(False)
        self.longest = _longest(model)
        self._cuts = False  # whether it was said that conversations are too long

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], completions: Sequence[Any], **columns: Any) -> list[float]:
        tools = columns.get("tools") or [None] * len(prompts)
        read = [self._read(*row) for row in zip(prompts, completions, map(tools_of, tools), strict=True)]
        lengths = [len(row["input_ids"]) for row in read]
        scores = [0.0] * len(read)
        by_length = sorted(range(len(read)), key=lengths.__getitem__, reverse=True)
        for start in range(0, len(read), self.batch_size):
            rows = by_length[start : start + self.batch_size]
            values: Tensor = self.model(**self._batch([read[row] for row in rows])).logits[:, 0].float()
            if not values.isfinite().all():
                raise InputError(f"reward: {self.path!r} gives a score that is not finite. Try dtype: float32.")
            for row, value in zip(rows, values.tolist(), strict=True):
                scores[row] = value
        return scores

    def _batch(self, read: Sequence[Any]) -> Any:
        """Conversations, padded on the right with what config.pad_token_id says.

        A decoder's score is read at the last token that is another one. Where the files name none, it is set to a token
        that ends none of the conversations.
        """
        config = self.model.config.get_text_config()
        if self._pad is None:
            ends = {row["input_ids"][-1] for row in read}
            config.pad_token_id = next(token for token in itertools.count() if token not in ends)
        batch = self.tokenizer.pad(read, return_attention_mask=True, return_tensors="pt")
        batch["input_ids"][batch["attention_mask"] == 0] = config.pad_token_id
        return batch.to(self.device)

    def _read(self, prompt: Prompt, completion: Any, tools: Sequence[Any] | None = None) -> Any:
        """A conversation with its answer, encoded; its end where all of it is too long, of a pair with the answer whole
        where that fits."""
        texts, options = self._texts(prompt, completion, tools)
        found = self.tokenizer(*texts, **options)
        if self.longest is None or len(found["input_ids"]) <= self.longest:
            return found
        if not self._cuts:
            self._cuts = True
            logger.warning(
                "reward: %r reads %d tokens: longer conversations lose their beginning", self.path, self.longest
            )
        excess = len(found["input_ids"]) - self.longest
        whole = len(texts) > 1 and len(self.tokenizer(texts[0], add_special_tokens=False)["input_ids"]) > excess
        return self.tokenizer(*texts, **options, truncation="only_first" if whole else True, max_length=self.longest)

    def _texts(
        self, prompt: Prompt, completion: Any, tools: Sequence[Any] | None
    ) -> tuple[tuple[str, ...], dict[str, bool]]:
        """What its tokenizer is given, one text or a pair."""
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else list(completion)
        if self.tokenizer.chat_template is not None:
            try:
                text = render(self.tokenizer, Turn(), [*messages, *answer], tools)
            except InputError as error:
                why = str(error).removeprefix("prompt: ")
                raise InputError(f"reward: {self.path!r} must read every row's conversation, but {why}") from error
            return (text,), {"add_special_tokens": False}
        asked, said = ("\n\n".join(str(turn.get("content", "")) for turn in turns) for turns in (messages, answer))
        if self.tokenizer.sep_token_id is None and self.tokenizer.cls_token_id is None:
            return (f"{asked}\n{said}",), {}
        return (asked, said), {}


def _longest(model: nn.Module) -> int | None:
    """Tokens that a network reads at most; RoBERTa's kin count positions from behind the pad token's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1
    return context_of(model)
