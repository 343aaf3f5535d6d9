"""The computed memory of a step against the tensors that one has at once, and the table of docs/gpu.md."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import LlamaConfig, LlamaForCausalLM

from zopro.bench.fits import MODELS, Batch, Model, step_bytes
from zopro.engine import Batch as Rows
from zopro.engine import Sampling
from zopro.engine.local.engine import LocalEngine
from zopro.zo import Gaussian, Targeted, Weights
from zopro.zo.displacement import Displacement


class Held(TorchDispatchMode):
    """Bytes of the tensors that operations made and that are still there, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self._known and storage.nbytes():
                    self._known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return result

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


SMALL = Model(128, 384, 2, 4, 2, 32, 4000, tied=True)


def llama() -> Any:
    config = LlamaConfig(
        vocab_size=SMALL.vocabulary, hidden_size=SMALL.hidden, intermediate_size=SMALL.intermediate,
        num_hidden_layers=SMALL.layers, num_attention_heads=SMALL.heads, num_key_value_heads=SMALL.key_value_heads,
        head_dim=SMALL.head_dim, tie_word_embeddings=True,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(LlamaForCausalLM(config).eval(), LoraConfig(r=8, target_modules="all-linear"))
    return model.eval()


@pytest.mark.parametrize(("prompts", "copies", "prompt", "completion"), [(4, 4, 60, 16), (2, 8, 20, 24)])
def test_a_step_has_as_much_at_once(prompts: int, copies: int, prompt: int, completion: int) -> None:
    """Within a third, of what is beside the weights: sampling, both sides' log-probs and the update."""
    model = llama()
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    update = {name: torch.ones_like(p) for name, p in named}
    weights = Weights.of(named, Targeted(update, update, 4, noise=Gaussian()), "in_place")
    engine = LocalEngine(model, weights)
    ids = torch.randint(3, 4000, (prompts, prompt), generator=torch.Generator().manual_seed(0)).tolist()
    options = Sampling(completion, [-1], 0, generator=torch.Generator().manual_seed(0))
    plus = Displacement(0, 0, 0, 1.0, (1e-3,))
    engine.sample(ids[:1], 1, Sampling(2, [-1], 0))  # whatever is done once for each model
    with Held() as held, torch.no_grad():
        rollouts = engine.sample(ids, copies, options)[0]
        engine.logprobs(Rows.of(rollouts), [plus, plus.mirrored])
    found = step_bytes(SMALL, Batch(prompts, copies, prompt, completion), width=4, device="cpu")
    adapters = sum(p.nbytes for _, p in named)
    expected = found["all"] - found["weights"] - found["adapters"] + 2 * adapters  # originals and an offset
    assert expected == pytest.approx(held.peak, rel=1 / 3), (found, held.peak)


def test_weights_and_adapters() -> None:
    model = llama()
    found = step_bytes(SMALL, Batch(1, 2, 8, 8), width=4)
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    assert found["adapters"] == 10 * trained
    norms = sum(p.numel() for name, p in model.named_parameters() if "norm" in name) * 4
    assert found["weights"] == sum(p.nbytes for p in model.parameters()) - trained - norms
    halved = step_bytes(SMALL, Batch(1, 2, 8, 8), width=2, bits=4)["weights"]
    assert halved == (found["weights"] / 4 - SMALL.embeddings) * (0.5 + 4 / 64) + 2 * SMALL.embeddings


# In GB: prompts x answers x new tokens to prompts of 100, on an H100 in November 2026 (docs/gpu.md).
@pytest.mark.parametrize(
    ("name", "batch", "measured"),
    [
        ("Llama 3.2 1B", Batch(8, 4, 100, 32), 2.7),
        ("Llama 3.2 1B", Batch(32, 8, 100, 128), 6.8),
        ("Llama 3.1 8B", Batch(8, 4, 100, 32), 17.0),
    ],
)
def test_what_was_measured_before(name: str, batch: Batch, measured: float) -> None:
    assert step_bytes(MODELS[name], batch)["all"] / 1e9 == pytest.approx(measured, rel=0.15)


def test_the_table_says_what_is_computed() -> None:
    text = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text("utf-8")
    for name, model in MODELS.items():
        numbers = [
            f"{step_bytes(model, Batch(prompts, copies, 100, 128), bits=bits)['all'] / 1e9:.1f}"
            for bits in (16, 4)
            for prompts, copies in ((8, 4), (32, 8))
        ]
        assert f"| {name} | {' | '.join(numbers)} |" in text, (name, numbers)
