"""A decoding step on a device that is made up ("meta"), which shows what would pass between host and device."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from families import family_model
from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine.gpu.memory import Memory, Shape
from zopro.engine.gpu.step import Drawing, decoding_step
from zopro.engine.gpu.trial import HostRead, NoHostReads
from zopro.engine.local import causal
from zopro.engine.local.growing import growing_cache
from zopro.engine.local.sampling import Sampler

TRUNCATED = Sampler(True, 0.9, None, 0.8, 0.01)
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}


def parts_of(kind: str) -> causal.CausalParts:
    """On the device that is the default, without the check of values."""
    model: Any = family_model(kind, **CAPS) if kind == "gemma2" else tiny_model(kind, tiny_tokenizer())
    get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).eval()
    head, config = model.get_output_embeddings(), model.config
    return causal.CausalParts(model, causal._backbone(model), head, 1.0, causal._softcap(config))


def behind_prompts(parts: causal.CausalParts, prompts: int, width: int, shape: Shape) -> Memory:
    config, cache = parts.config, growing_cache(parts.config)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    for number in range(config.num_hidden_layers):
        cache.update(*torch.ones(2, prompts, heads, width, dim, device="meta"), number)
    memory = Memory(cache, shape, torch.device("meta"))
    mask, uniform = (torch.ones(n, m, device="meta") for n, m in ((prompts, width), (shape.rows, shape.steps)))
    memory.begin(cache, mask, shape.rows // prompts, uniform, shape, pad=0)
    return memory


@pytest.mark.parametrize("kind", [*KINDS, "mistral", "gemma2"])
def test_nothing_passes_between_host_and_device(kind: str) -> None:
    shape = Shape(4, 64, 9)
    with torch.device("meta"), torch.no_grad():
        parts = parts_of(kind)
        memory, stops = behind_prompts(parts, 2, 5, shape), torch.tensor([2, 3], device="meta")
        for sampler in (Sampler(True, 1.0, None, 1.0, 0.0), Sampler(False, 1.0, None, 1.0, 0.0), TRUNCATED):
            state = memory.state(3, 64, 32)
            with NoHostReads():
                decoding_step(parts, state, Drawing(sampler, (2, 3), 0), stops)
            assert state.token.device.type == "meta"


@pytest.mark.parametrize(
    ("move", "said"),
    [
        (lambda x: torch.tensor(2.0).to(x.device), "_to_copy moves values"),
        (lambda x: x[x > 0], "index.Tensor waits"),
        (lambda x: x.nonzero(), "nonzero waits"),
    ],
)
def test_what_would_wait_is_found(move: Any, said: str) -> None:
    with NoHostReads():
        x = torch.ones(3, device="meta")
        assert (x * torch.tensor(2.0)).device == x[torch.zeros(2, dtype=torch.long, device="meta")].device == x.device
        with pytest.raises(HostRead, match=said):
            move(x)
