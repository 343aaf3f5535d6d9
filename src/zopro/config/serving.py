"""What a run must be whose model is run by an engine of its own (`llamacpp:FILE.gguf`, `vllm`), not by PyTorch."""

from __future__ import annotations

from typing import Any

from zopro.choices import METHOD_OF_START, METHODS
from zopro.config.fields import check


def check_served(config: Any) -> None:
    """Refuse what needs the network in PyTorch: gradients, a trained reward model, all parameters."""
    engine = config.engine.partition(":")[0]
    forward = ", ".join(name for name in METHODS if METHODS[name].zeroth_order)
    method = METHODS[config.method]
    check(method.zeroth_order, "method", f"must be one of {forward} with engine {engine}", config.method)
    rule = f"must be rewards that this run does not train, with engine {engine}"
    check(not config.trains_reward, "reward", rule, config.reward, "Take a function, or model:PATH.")
    rule = f"must be 0 with engine {engine}, since fine-tuning needs gradients"
    check(config.sft_steps == 0, "sft_steps", rule, config.sft_steps)
    rule = f"must be greater than 0 with engine {engine}, which is handed an adapter"
    check(config.lora_r > 0, "lora_r", rule, config.lora_r)
    rule = f"must be sequential with engine {engine}"
    check(config.evaluation == "sequential", "evaluation", rule, config.evaluation)
    starts = ["sft", *(start for start, made in METHOD_OF_START.items() if METHODS[made].zeroth_order)]
    rule = f"must be one of {', '.join(starts)} with engine {engine}, since the first iteration has no gradients"
    check(method.self_starting or config.warm_start in starts, "warm_start", rule, config.warm_start)
    rule = "must be 1 with engine vllm, whose servers give log-probs of given tokens at 1 alone"
    check(not config.of_servers or config.temperature == 1, "temperature", rule, config.temperature)
