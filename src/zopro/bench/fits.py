"""How much memory a step takes, computed from a model's sizes: weights, adapters, the cache of keys and values, logits.

    python -c "from zopro.bench.fits import *; print(step_bytes(MODELS['Llama 3.1 8B'], Batch(8, 4, 100, 128)))"

Computed, not measured: allocators, CUDA's own memory and graphs come on top. A test holds it against the tensors that a
step of a small model has at once.
"""

from __future__ import annotations

from dataclasses import dataclass

from zopro.engine.local.head import LIMITS

FLOAT32 = 4
OF_ADAPTERS = 10  # theta, its reference, originals, offset, z, mu (twice), v (twice), and the reward model's own
NF4 = 0.5 + FLOAT32 / 64  # bytes of a weight: 4 bits, and a float32 for each 64 of them
COLUMNS = 64  # to which lengths are rounded up
BATCH_TOKENS = 2**16  # answered at once


@dataclass(frozen=True)
class Model:
    """A Llama-like model's sizes."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool = False  # input and output embeddings

    @property
    def linear(self) -> list[tuple[int, int]]:
        """Inputs and outputs of one layer's matrices."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        attention = [(self.hidden, queries), (self.hidden, keys), (self.hidden, keys), (queries, self.hidden)]
        return [*attention, *[(self.hidden, self.intermediate)] * 2, (self.intermediate, self.hidden)]

    @property
    def embeddings(self) -> int:
        """Numbers in input and output matrix."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)


MODELS = {
    "SmolLM2 135M": Model(576, 1536, 30, 9, 3, 64, 49152, tied=True),
    "Llama 3.2 1B": Model(2048, 8192, 16, 32, 8, 64, 128256, tied=True),
    "Llama 3.2 3B": Model(3072, 8192, 28, 24, 8, 128, 128256, tied=True),
    "Llama 3.1 8B": Model(4096, 14336, 32, 32, 8, 128, 128256),
    "Qwen3 14B": Model(5120, 17408, 40, 40, 8, 128, 151936),
    "Qwen3 32B": Model(5120, 25600, 64, 64, 8, 128, 151936),
    "Llama 3.1 70B": Model(8192, 28672, 80, 64, 8, 128, 128256),
}


@dataclass(frozen=True)
class Batch:
    """Lengths in tokens."""

    prompts: int
    num_generations: int
    prompt_length: int
    completion_length: int


def step_bytes(
    model: Model, batch: Batch, width: int = 2, bits: int = 16, lora_r: int = 8, device: str = "cuda"
) -> dict[str, int]:
    """Bytes of each part at a step's peak, by name, and their sum as "all".

    Args:
        model, batch: sizes.
        width: bytes of a number that is computed with.
        bits: 4: the layers' matrices are stored so (NF4); else all weights are `width` wide.
        lora_r: rank of adapters on all linear layers, in float32.
        device: its kind, which says how many logits are held at once.
    """
    matrices = model.layers * sum(inputs * outputs for inputs, outputs in model.linear)
    weights = matrices * (NF4 if bits == 4 else width) + model.embeddings * width
    adapters = model.layers * sum(lora_r * (inputs + outputs) for inputs, outputs in model.linear) * FLOAT32 * OF_ADAPTERS
    rows, length = batch.prompts * batch.num_generations, batch.prompt_length + batch.completion_length
    cell = 2 * model.key_value_heads * model.head_dim * width  # of one layer
    at_once = min(rows, max(batch.num_generations, BATCH_TOKENS // length))
    columns = -(-length // COLUMNS) * COLUMNS
    cache = at_once * columns * model.layers * cell
    limit, vocabulary = LIMITS.get(device, LIMITS["cpu"]), model.vocabulary
    drawn, scored = (
        min(rows * vocabulary, limit.elements),
        min(rows * batch.completion_length * vocabulary, limit.tile_elements),
    )
    logits = max(drawn, scored) * (FLOAT32 + (width if width < FLOAT32 else 0))
    # A layer of the log-probs' pass: the streams, what its widest matrices give, an input cast for the adapter, one
    # layer's keys and values for each answer; and the keys and values of all prompts.
    tokens = rows * batch.completion_length
    widest = max(model.intermediate, model.heads * model.head_dim)
    layer = tokens * (4 * model.hidden * width + 3 * widest * width + widest * FLOAT32) + 2 * rows * length * cell
    scoring = layer + batch.prompts * batch.prompt_length * model.layers * cell
    parts = {
        "weights": int(weights),
        "adapters": int(adapters),
        "keys and values": cache,
        "logits": logits,
        "log-probs": scoring,
    }
    # Keys and values of decoding are given back before log-probs where memory is scarce.
    return {**parts, "all": int(weights) + int(adapters) + logits + max(cache, scoring)}
