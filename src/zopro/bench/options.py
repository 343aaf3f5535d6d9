"""What is measured, as plain data: the options of `zopro bench step`, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass

from zopro.choices import DIRECTIONS
from zopro.config.fields import check, not_negative, one_of, representable
from zopro.config.model import DTYPES, ModelOptions, check_bitsandbytes, check_there
from zopro.config.step import StepOptions
from zopro.errors import InputError

# hidden, intermediate, layers, heads, key-value heads: as Llama 3 models of these sizes, 0.1b as SmolLM, tiny for tests.
SIZES = {
    "tiny": (64, 128, 2, 4, 2),
    "0.1b": (576, 1536, 30, 9, 3),
    "1b": (2048, 8192, 16, 32, 8),
    "3b": (3072, 8192, 28, 24, 8),
    "8b": (4096, 14336, 32, 32, 8),
}
LEAST_VOCABULARY = 32  # of a random-weight model: the words of its prompts, padding and EOS are 15


@dataclass(frozen=True)
class Work:
    """One policy step. Lengths in tokens; every completion has exactly `completion_length` of them (no EOS ends one)."""

    model: str = ""  # folder or Hub id; empty: random weights of `size`
    size: str = "1b"
    vocab_size: int = 128256  # of a random-weight model
    prompts: int = 8
    num_generations: int = 4
    prompt_length: int = 100
    completion_length: int = 32
    lora_r: int = 8  # on all linear layers; 0: every parameter is trained
    dtype: str = "auto"
    load_in_4bit: bool = False  # by bitsandbytes, as a run's
    load_in_8bit: bool = False
    device: str = "auto"
    threads: int = 0  # 0: torch's own choice
    beta: float = 0.05  # of full-parameter training: 0, as its reference would be a second model
    sides: int = StepOptions.sides
    evaluation: str = StepOptions.evaluation
    queries: int = StepOptions.queries
    directions: str = "targeted"
    steps: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        least = {"prompts": 1, "num_generations": 2, "prompt_length": 4, "completion_length": 1, "steps": 1}
        least["vocab_size"] = LEAST_VOCABULARY
        for name, low in least.items():
            if getattr(self, name) < low:
                raise InputError(f"{name}: must be at least {low}, got {getattr(self, name)}.")
        not_negative(self, "lora_r", "threads", "beta", "seed")
        processors = os.cpu_count() or 1  # more threads wait for one another, thousands for hours
        check(self.threads <= processors, "threads", f"must be at most {processors}, the processors here", self.threads)
        check(self.seed < 2**32, "seed", "must be less than 2^32", self.seed)
        representable(self, "seed")
        allowed = {
            "size": tuple(SIZES),
            "dtype": DTYPES,
            "directions": ("targeted", *(choice.name for choice in DIRECTIONS.values() if not choice.of_update)),
        }
        for name, values in allowed.items():
            one_of(self, name, values)
        StepOptions(sides=self.sides, evaluation=self.evaluation, queries=self.queries)  # checks them
        if self.evaluation != "sequential" and self.lora_r == 0:
            raise InputError(f"evaluation: must be sequential with lora_r: 0, got {self.evaluation!r}.")
        if self.model:
            check_there(self.model)
        check_bitsandbytes(self.model_options())
        if self.lora_r == 0 and self.beta:
            raise InputError("beta: must be 0 with lora_r=0 (a second model would be the reference), got a positive one.")

    def model_options(self) -> ModelOptions:
        """Of a run with this model and these adapters."""
        return ModelOptions(
            model=self.model or self.size,
            dtype=self.dtype,
            load_in_4bit=self.load_in_4bit,
            load_in_8bit=self.load_in_8bit,
            lora_r=self.lora_r,
        )
