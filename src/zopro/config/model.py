"""Configuration keys of the base model and its adapters; a group of `zopro.config.RunConfig`."""

from __future__ import annotations

from dataclasses import dataclass

from zopro.choices import ENGINES
from zopro.config.fields import at_most, check, check_choices, not_negative, option, positive

GGUF = ".gguf"  # the end of the name of a file with a model and its tokenizer, for llama.cpp
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelOptions:
    """The base model and its adapters."""

    model: str = option("", "Base model: a Hub id or a local folder.")
    dtype: str = option(
        "auto",
        "auto, float32, bfloat16 or float16 (for GPUs without bfloat16, such as a T4; adapters stay float32). auto: "
        "bfloat16 where the hardware multiplies it, else float32.",
        DTYPES,
    )
    load_in_4bit: bool = option(False, "Quantise the model's weights to 4 bits (NF4) by bitsandbytes as it is loaded.")
    load_in_8bit: bool = option(False, "Quantise them to 8 bits.")
    engine: str = option(
        "transformers",
        f"What runs the model: {ENGINES.about()}. An engine of its own needs no model, whose tokenizer and name are used "
        "if it is given.",
        ENGINES,
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:N or mps (a Mac's GPU, which auto does not take).")
    trust_remote_code: bool = option(False, "Run Python code that comes with the model. Only for sources you trust.")
    lora_r: int = option(8, "Rank of the LoRA adapters; 0 trains all parameters of the policy instead.")
    lora_alpha: int = option(16, "LoRA scaling numerator (scale = lora_alpha / lora_r).")
    lora_freeze_a: bool = option(
        False,
        "Keep the A of each adapter as it was drawn and train B alone: half the directions, and displacements whose "
        "effect is linear. For es, whose members then share A.",
    )
    lora_target_modules: str = option(
        "all-linear", "PEFT target modules: all-linear, names with commas, or a regular expression."
    )

    def __post_init__(self) -> None:
        check_choices(self, ModelOptions)
        file = self.served.endswith(GGUF) or not self.engine.startswith("llamacpp:")
        check(file, "engine", f"must be llamacpp:FILE{GGUF}", self.engine, "A link of such a name to the file will do.")
        weights = self.served or not self.model.endswith(GGUF)
        check(bool(weights), "model", "must be a Hub id or a folder", self.model, f"Set engine: llamacpp:{self.model}.")
        self.model = self.model or self.served
        check(bool(self.model), "model", "must be set", self.model, "Give a Hub id or a folder.")
        not_negative(self, "lora_r")
        at_most(self, 65_536, "lora_r")
        positive(self, "lora_alpha")
        one = not (self.load_in_4bit and self.load_in_8bit)
        check(one, "load_in_8bit", "must be false with load_in_4bit: true", self.load_in_8bit)
        if self.bits:
            check(not self.served, "engine", "must be transformers with load_in_4bit or load_in_8bit", self.engine)
            check(self.lora_r > 0, "lora_r", "must be greater than 0 with load_in_4bit or load_in_8bit", self.lora_r)
        targets = self.lora_target_modules
        rule = "must be all-linear, names separated by commas or a regular expression"
        check(bool(targets.strip(", ")), "lora_target_modules", rule, targets)

    @property
    def bits(self) -> int:
        """Of a weight, if it is quantised as it is loaded; else 0."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 0

    @property
    def served(self) -> str:
        """The file or address of an engine that is not PyTorch; empty where PyTorch runs the model."""
        return self.engine.partition(":")[2]
