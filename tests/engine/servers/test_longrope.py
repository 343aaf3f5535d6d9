"""A LongRoPE file in llama.cpp: a row reads the same however many are held at once, and as transformers reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from served_policies import picked
from served_runs import model_and_rows, settings
from tiny import tiny_model, tiny_tokenizer
from zopro.engine import Batch, Sampling
from zopro.errors import InputError
from zopro.loop import pipeline
from zopro.zo import Gaussian, Weights

pytest.importorskip("xllamacpp", reason="needs zopro[llamacpp]")
pytest.importorskip("gguf", reason="writes the test's GGUF files")

from tiny_gguf import write_gguf
from zopro.engine.servers.llamacpp.engine import LlamaCppEngine, new_tensors
from zopro.engine.servers.llamacpp.model import Model

ORIGINAL = 256  # tokens of the original context, of 2048
OPTIONS: dict[str, Any] = {"max_new_tokens": 40, "eos_token_ids": [], "pad_token_id": 0, "do_sample": False}


class Long:
    """The engine over such a file, and the model in transformers, which has the short factors."""

    def __init__(self, folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        self.network = tiny_model("llama", tokenizer, max_position_embeddings=2048)
        self.path = write_gguf(folder / "long.gguf", self.network, tokenizer, "llama", long_rope=ORIGINAL)
        model = Model(self.path, threads=1)
        weights = Weights.of(new_tensors(model, 2, "all-linear", 0).items(), Gaussian())
        self.engine = LlamaCppEngine(model, weights, alpha=4)


@pytest.fixture(scope="module")
def long(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Long]:
    yield (made := Long(tmp_path_factory.mktemp("gguf")))
    made.engine.model.close()


def rows(count: int, width: int = 24, answer: int = 12) -> Batch:
    """The first row is the same whatever the count."""
    ids = torch.randint(3, 260, (count, width), generator=torch.Generator().manual_seed(1))
    return Batch(ids, torch.ones_like(ids), answer)


def test_log_probs_do_not_depend_on_how_many_rows_are_held_at_once(long: Long) -> None:
    with torch.no_grad():
        wanted = picked(long.network, rows(30))
    before, together, after = (long.engine.logprobs(rows(count))[0] for count in (1, 30, 1))
    torch.testing.assert_close(together, wanted, atol=2e-5, rtol=0)
    assert torch.equal(before, after)
    torch.testing.assert_close(before, together[:1], atol=2e-5, rtol=0)


def test_answers_do_not_either_and_those_to_one_prompt_are_parted_too(long: Long) -> None:
    prompts = rows(8).input_ids.tolist()
    (many,) = long.engine.sample(prompts, 9, Sampling(**OPTIONS))  # each prompt's need 24 + 9 x 40 tokens
    (one,) = long.engine.sample(prompts[:1], 1, Sampling(**OPTIONS))
    assert torch.equal(many.completion_ids[:9], one.completion_ids.expand(9, -1))
    with torch.no_grad():
        scores = picked(long.network, Batch.of(many))
    torch.testing.assert_close(many.logprobs, scores, atol=2e-5, rtol=0)


def test_rows_of_different_lengths_fit_where_each_does(long: Long) -> None:
    ids = torch.randint(3, 260, (2, 400), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(ids)
    mask[0, 220:], mask[1, :180] = 0, 0  # 200 and 20 tokens; 20 and 200 tokens
    found = long.engine.logprobs(Batch(ids, mask, 200))[0]
    with torch.no_grad():
        torch.testing.assert_close(found, picked(long.network, Batch(ids, mask, 200)), atol=2e-5, rtol=0)


def test_what_is_longer_than_the_original_context_is_refused_in_one_line(long: Long) -> None:
    rule = (
        r"prompts: with their answers must fit in 256 tokens, the original context of long\.gguf.*LongRoPE\), got 26\d\."
    )
    with pytest.raises(InputError, match=rule):
        long.engine.sample([[5] * 220], 1, Sampling(**OPTIONS))
    with pytest.raises(InputError, match=rule):
        long.engine.logprobs(rows(1, 264))


def test_a_run_is_refused_before_it_begins(tmp_path: Path) -> None:
    model, tokenizer = model_and_rows(tmp_path)
    model.config.max_position_embeddings = 2048
    path = write_gguf(tmp_path / "long.gguf", model, tokenizer, "llama", long_rope=ORIGINAL)
    config = settings(
        tmp_path,
        tmp_path / "run",
        engine=f"llamacpp:{path}",
        max_prompt_length=200,
        max_completion_length=100,
        eval_prompts=4,
    )
    with pytest.raises(
        InputError, match=r"model's context of 256 tokens \(its original one, .*LongRoPE\), got 200 \+ 100"
    ):
        pipeline.run(config, quiet=True)
    assert not (tmp_path / "run").exists()
