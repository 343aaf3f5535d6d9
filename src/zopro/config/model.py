"""Configuration keys of the base model and its adapters; a group of `zopro.config.RunConfig`."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from zopro.choices import ENGINES
from zopro.config.addresses import check_addresses
from zopro.config.fields import LONGEST, at_most, check, check_choices, not_negative, option, positive
from zopro.errors import InputError

_HUB_ID = re.compile(r"\w[\w.-]*(/[\w.-]+)?")
GGUF = ".gguf"  # the end of the name of a file with a model and its tokenizer, for llama.cpp
OWN_FLAGS = ("--host", "--port", "--api-key", "--model", "--uds")  # by which a server is found, or not
DTYPES = ("auto", "float32", "bfloat16", "float16")


@dataclass
class ModelOptions:
    """The base model and its adapters."""

    model: str = option("", "Base model: a Hub id or a local folder.", path=True)
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
        f"What runs the model: {ENGINES.about()}. llama.cpp needs no model, whose tokenizer and name "
        "are used if it is given; with vLLM its configuration and tokenizer are read.",
        ENGINES,
    )
    engine_timeout: float = option(600.0, "vllm: seconds that a server may take for the answers of one displaced policy.")
    vllm_python: str = option(
        "",
        "engine vllm: the Python that has vLLM; by default the one of the `vllm` on PATH, or zopro's own.",
        path=True,
    )
    vllm_flags: str = option("", "engine vllm: more flags of the server, as in --vllm_flags='--tensor-parallel-size 2'.")
    adapter_folder: str = option(
        "",
        "vllm: where adapters are published, a folder that the servers see by the same path; by default shared memory.",
        path=True,
    )
    device: str = option(
        "auto", "auto, cpu, cuda (the first that is seen) or mps (a Mac's GPU, which auto does not take)."
    )
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
        if self.of_servers and not self.starts_server:
            check_addresses(self.served)
        self._check_flags()
        weights = self.served or not self.model.endswith(GGUF)
        check(bool(weights), "model", "must be a Hub id or a folder", self.model, f"Set engine: llamacpp:{self.model}.")
        self.model = self.model or ("" if self.of_servers else self.served)
        remedy = "Give a Hub id or a folder" + ("; its weights are not loaded." if self.of_servers else ".")
        check(bool(self.model), "model", "must be set", self.model, remedy)
        positive(self, "engine_timeout")
        not_negative(self, "lora_r")
        at_most(self, 65_536, "lora_r")
        at_most(self, LONGEST, "engine_timeout")
        positive(self, "lora_alpha")
        one = not (self.load_in_4bit and self.load_in_8bit)
        check(one, "load_in_8bit", "must be false with load_in_4bit: true", self.load_in_8bit)
        if self.bits:
            check(not self.served, "engine", "must be transformers with load_in_4bit or load_in_8bit", self.engine)
            check(self.lora_r > 0, "lora_r", "must be greater than 0 with load_in_4bit or load_in_8bit", self.lora_r)
        targets = self.lora_target_modules
        rule = "must be all-linear, names separated by commas or a regular expression"
        check(bool(targets.strip(", ")), "lora_target_modules", rule, targets)

    def _check_flags(self) -> None:
        try:
            flags = shlex.split(self.vllm_flags)
        except ValueError as error:
            rule = "must be flags as a shell would read them"
            raise InputError(f"vllm_flags: {rule}, got {self.vllm_flags!r} ({error}).") from None
        for flag in flags:
            name = flag.partition("=")[0].replace("_", "-")
            rule = f"must leave out {name}: zopro would not find the server"
            check(name not in OWN_FLAGS, "vllm_flags", rule, self.vllm_flags)

    @property
    def bits(self) -> int:
        """Of a weight, if it is quantised as it is loaded; else 0."""
        return 4 if self.load_in_4bit else 8 if self.load_in_8bit else 0

    @property
    def served(self) -> str:
        """The file or address of an engine that is not PyTorch, or its name; empty where PyTorch runs the model."""
        return self.engine.partition(":")[2] or ("" if self.engine == "transformers" else self.engine)

    @property
    def of_servers(self) -> bool:
        """Whether servers run the model, which they are asked over HTTP."""
        return self.engine.partition(":")[0] == "vllm"

    @property
    def starts_server(self) -> bool:
        """Whether zopro starts the server itself; others know the model by a name or folder that need not exist here."""
        return self.engine == "vllm"


def check_bitsandbytes(options: ModelOptions) -> None:
    """Raise `InputError` where weights are to be quantised and what does it is not installed."""
    if options.bits and find_spec("bitsandbytes") is None:
        key = f"load_in_{options.bits}bit"
        raise InputError(f"{key}: needs bitsandbytes, which is not installed. Run: pip install bitsandbytes")


def check_there(model: str, key: str = "model") -> None:
    """Raise `InputError` for a model or GGUF file that is neither on the disk nor can be a Hub id."""
    if model.endswith(GGUF):
        if not Path(model).is_file():
            raise InputError(f"engine: must be given a GGUF file, got {model!r}, which is none. Check the path.")
    elif not Path(model).exists() and not _HUB_ID.fullmatch(model):
        raise no_such_model(model, key)


def no_such_model(model: str, key: str = "model") -> InputError:
    return InputError(f"{key}: no folder and no Hub id of that name can be read, got {model!r}. Check the path.")
