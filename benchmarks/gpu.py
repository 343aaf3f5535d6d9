"""What docs/lab/gpu.md says is not measured, in one process and under 8 minutes; each result is printed as it comes.

    python benchmarks/gpu.py                      # on a machine with a GPU: everything, the most important first
    python benchmarks/gpu.py --only decoding      # names that have this word
    python benchmarks/gpu.py --list
    python benchmarks/gpu.py --smoke              # tiny sizes on any device: whether the script itself runs

A line of JSON a result. What the time left is not enough for is named and left out (--seconds).
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

START = time.monotonic()

from zopro.system.imports import importing  # noqa: E402

with importing():
    import torch
    import transformers

    from zopro.bench import fits, kinds
    from zopro.bench.work import SIZES, Setting, Work, build
    from zopro.engine.batch import Batch, Rollouts, Sampling
    from zopro.engine.gpu import decoding
    from zopro.engine.local import attention, head, lengths, lora
    from zopro.engine.local.causal import causal_parts
    from zopro.engine.local.engine import LocalEngine
    from zopro.engine.local.rollouts import generate
    from zopro.zo import Gaussian, StepRecord, Targeted
    from zopro.zo import drawn as drawn_once
    from zopro.zo.displacement import Displacement
    from zopro.zo.weights import Weights

SMALL = {"prompts": 8, "num_generations": 4, "completion_length": 32, "steps": 3}
LARGE = {"prompts": 32, "num_generations": 8, "completion_length": 128, "steps": 2}
SMOLLM = {"size": "0.1b", "vocab_size": 49152, "prompts": 16, "num_generations": 4, "completion_length": 64, "steps": 5}
TINY = {"size": "tiny", "vocab_size": 512, "prompts": 2, "num_generations": 2, "completion_length": 6, "steps": 1}


@dataclass(frozen=True)
class Entry:
    name: str
    guess: float  # seconds
    run: Callable[[Work], dict[str, Any]]
    work: Work


def wait() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def plain_loop() -> Iterator[None]:
    os.environ[decoding.OFF] = "0"
    try:
        yield
    finally:
        del os.environ[decoding.OFF]


def drawn(setting: Setting, tokens: int, stops: list[int]) -> Rollouts:
    return generate(
        setting.policy,
        setting.prompt_ids,
        num_generations=setting.work.num_generations,
        max_new_tokens=tokens,
        eos_token_ids=stops,
        pad_token_id=setting.tokenizer.pad_token_id,
        generator=torch.Generator().manual_seed(0),
    )


def graphs_held() -> int:
    """0 where nothing was captured."""
    return sum(len(fixed.graphs._graphs) for fixed in decoding._known.values())


def equality(work: Work) -> dict[str, Any]:
    """Captured decoding against the plain loop: the same uniform numbers, rows that end early, float32."""
    setting = build(work, classifier=False)
    stops = list(range(0, work.vocab_size, 9))
    found = [drawn(setting, 48, stops) for _ in range(2)]  # the second from graphs that are there
    with plain_loop():
        expected = drawn(setting, 48, stops)
    length = expected.completion_ids.shape[1]
    return {
        "tokens_equal": all(torch.equal(one.completion_ids, expected.completion_ids) for one in found),
        "largest_logprob_error": max(
            [float((one.logprobs - expected.logprobs).abs().max()) for one in found if one.logprobs.shape[1] == length],
            default=float("inf"),
        ),
        "graphs": graphs_held(),
    }


def decoding_speed(work: Work) -> dict[str, Any]:
    """Milliseconds of a token after the first, of all rows; what captures cost; the plain loop beside it."""
    setting = build(work, classifier=False)

    def seconds(tokens: int) -> float:
        start = wait()
        drawn(setting, tokens, [-1])
        return wait() - start

    def per_token() -> float:
        one = min(seconds(1) for _ in range(3))
        return (min(seconds(work.completion_length) for _ in range(3)) - one) / (work.completion_length - 1) * 1e3

    first = seconds(work.completion_length)
    captured = per_token()
    again = seconds(work.completion_length)
    graphs = graphs_held()
    with plain_loop():
        seconds(2)
        plain = per_token()
    return {
        "rows": len(setting.prompt_ids) * work.num_generations,
        "captured_ms": captured,
        "plain_ms": plain,
        "captures_s": first - again,
        "graphs": graphs,
    }


def population(work: Work) -> dict[str, Any]:
    """Seconds of the answers of 8 displaced policies: together and one by one, from graphs and by the plain loop."""
    setting = build(work, classifier=False)
    named = [(name, tensor) for name, tensor in setting.policy.named_parameters() if tensor.requires_grad]
    weights = Weights.of(named, Gaussian())
    at = [Displacement(0, query, 0, t, (1e-3,)) for query in range(4) for t in (1.0, -1.0)]
    options = Sampling(work.completion_length, [-1], setting.tokenizer.pad_token_id)

    def seconds(together: bool) -> float:
        engine = LocalEngine(setting.policy, weights, member_tokens=2**20 if together else 0)
        best = float("inf")
        for _ in range(3):  # the first captures
            start = wait()
            engine.sample(setting.prompt_ids, work.num_generations, options, at)
            best = min(best, wait() - start)
        return best

    result = {"members": len(at), "together_s": seconds(True), "one_by_one_s": seconds(False)}
    with plain_loop():
        result |= {"plain_together_s": seconds(True), "plain_one_by_one_s": seconds(False)}
    return result


@torch.no_grad()
def tiles(work: Work) -> dict[str, Any]:
    """Seconds of the log-probs of many tokens by the tile's size, and by torch's linear_cross_entropy where it is."""
    setting = build(work, classifier=False)
    parts = causal_parts(setting.policy)
    rows = work.prompts * work.num_generations * work.completion_length
    weight = parts.head.weight
    hidden = torch.randn(rows, weight.shape[1], device=weight.device, dtype=weight.dtype)
    picked = torch.randint(len(weight), (rows,), device=weight.device)
    result: dict[str, Any] = {"tokens": rows}

    def timed(work_of: Callable[[], object]) -> float:
        work_of()
        start = wait()
        work_of()
        return wait() - start

    kind, before = weight.device.type, head.limits(weight.device)
    try:
        for height, power in ((512, 21), (1024, 23), (2048, 25), (4096, 26), (4096, 27)):
            head.LIMITS[kind] = replace(before, tile_rows=height, tile_elements=2**power, elements=2**power)
            result[f"{height} rows, 2^{power}"] = timed(lambda: head.score_tokens(parts, hidden, picked, 1.0))
    finally:
        head.LIMITS[kind] = before
    other = getattr(torch.nn.functional, "linear_cross_entropy", None)
    if other is not None:
        try:
            result["linear_cross_entropy"] = timed(lambda: other(hidden, weight, picked, reduction="none"))
            ours, _ = head.score_tokens(parts, hidden, picked, 1.0)
            result["its_largest_difference"] = float((ours + other(hidden, weight, picked, reduction="none")).abs().max())
        except Exception as error:
            result["linear_cross_entropy"] = repr(error)[:200]
    return result


@torch.no_grad()
def lengths_of_rows(work: Work) -> dict[str, Any]:
    """Seconds of log-probs of answers that end early, by groups of like lengths and all together; their difference."""
    setting = build(work, classifier=False)
    rollouts = drawn(setting, work.completion_length, [-1])
    share = torch.rand(len(rollouts.completion_ids), generator=torch.Generator().manual_seed(0)).square()
    ends = (share * work.completion_length).long().clamp(min=1).to(rollouts.completion_ids.device)
    rollouts.completion_mask = (torch.arange(rollouts.completion_ids.shape[1], device=ends.device) < ends[:, None]).long()
    engine, batch = LocalEngine(setting.policy), Batch.of(rollouts)
    kind, result, found = ends.device.type, {"rows": len(ends), "mean_length": float(ends.float().mean())}, []
    before = lengths.PASS.get(kind)
    try:
        for cost in (None, 512, 1024, 2048, 4096):
            lengths.PASS.pop(kind, None)
            if cost is not None:
                lengths.PASS[kind] = cost
            engine.logprobs(batch)
            start = wait()
            found.append(engine.logprobs(batch)[0])
            result["all_together" if cost is None else f"a_pass_costs_{cost}"] = wait() - start
    finally:
        lengths.PASS.pop(kind, None)
        if before is not None:
            lengths.PASS[kind] = before
    return {**result, "largest_difference": max(float((one - found[0]).abs().max()) for one in found[1:])}


@torch.no_grad()
def attention_kernels(work: Work) -> dict[str, Any]:
    """Seconds of log-probs at lengths not seen before, of the same again, and of sampling from graphs: by kernels that
    take any shape, and by those that torch prefers.
    """
    setting = build(work, classifier=False)
    batch = Batch.of(drawn(setting, work.completion_length, [-1]))
    engine, result, before = LocalEngine(setting.policy), dict[str, Any](), attention.PLANNED

    def seconds(do: Callable[[], object]) -> float:
        start = wait()
        do()
        return wait() - start

    try:
        for name, planned in (("any_shape", False), ("preferred", True)):
            attention.PLANNED = planned
            decoding._known.clear()  # graphs hold the kernels of their capture
            engine.logprobs(batch)
            new, again = [], []
            for cut in range(1, min(5, work.completion_length)):
                shorter = Batch(batch.input_ids[:, :-cut], batch.attention_mask[:, :-cut], batch.completion_length - cut)
                new.append(seconds(lambda shorter=shorter: engine.logprobs(shorter)))
                again.append(seconds(lambda shorter=shorter: engine.logprobs(shorter)))
            result |= {f"{name}_new_s": sum(new) / len(new), f"{name}_again_s": sum(again) / len(again)}
            result[f"{name}_captures_s"] = seconds(lambda: drawn(setting, work.completion_length, [-1]))
            result[f"{name}_sampling_s"] = min(
                seconds(lambda: drawn(setting, work.completion_length, [-1])) for _ in range(3)
            )
    finally:
        attention.PLANNED = before
    return result


@torch.no_grad()
def adapter_products(work: Work) -> dict[str, Any]:
    """Seconds of log-probs, and milliseconds of a token sampled from graphs, with adapters by PEFT's steps, added in
    place, in one product, and as the engine chooses.
    """
    setting = build(work, classifier=False)
    batch = Batch.of(drawn(setting, work.completion_length, [-1]))
    engine, result, chosen = LocalEngine(setting.policy), dict[str, Any](), lora._way
    ways: dict[str, Any] = {"peft": None, "added": lora._Added}
    ways |= {"one_product": lora._InOneProduct} if setting.policy.dtype == torch.bfloat16 else {}

    def seconds(do: Callable[[], object]) -> float:
        do()
        start = wait()
        do()
        return wait() - start

    try:
        for name in (*ways, "chosen"):
            lora._way = chosen if name == "chosen" else lambda *given, way=ways[name]: way
            decoding._known.clear()  # graphs hold the way of their capture
            result[f"{name}_logprobs_s"] = seconds(lambda: engine.logprobs(batch))
            one, all_of_them = (seconds(lambda n=n: drawn(setting, n, [-1])) for n in (1, work.completion_length))
            result[f"{name}_token_ms"] = (all_of_them - one) / (work.completion_length - 1) * 1e3
    finally:
        lora._way = chosen
    return result


@torch.no_grad()
def displacing(work: Work) -> dict[str, Any]:
    """Seconds of both displacements and of the update, in few kernels and tensor by tensor, of adapters of this size."""
    hidden, intermediate, layers, heads, key_values = SIZES[work.size]
    keys = hidden // heads * key_values
    shapes = [(hidden, hidden), (hidden, keys), (hidden, keys), (hidden, hidden), *[(hidden, intermediate)] * 2]
    shapes.append((intermediate, hidden))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    named = [
        (f"{layer}.{place}.{side}", torch.zeros(shape, device=device))
        for layer in range(layers)
        for place, (inputs, outputs) in enumerate(shapes)
        for side, shape in (("A", (8, inputs)), ("B", (outputs, 8)))
    ]
    update = {name: torch.randn(tensor.shape) for name, tensor in named}
    result: dict[str, Any] = {"tensors": len(named), "numbers": sum(tensor.numel() for _, tensor in named)}
    found = {}
    for way, fuses in (("fused", drawn_once.fuses), ("one_by_one", lambda tensors: False)):
        before, drawn_once.fuses = drawn_once.fuses, fuses
        try:
            own = [(name, tensor.clone()) for name, tensor in named]
            weights = Weights.of(own, Targeted(update, update, 10), "in_place")
            for step in range(3):  # the first makes what the others keep
                plus, start = Displacement(0, 0, step, 1.0, (1e-3,)), wait()
                for side in (plus, plus.mirrored):
                    with weights.reading().at(weights.offset(side)):
                        pass
                weights.apply(
                    StepRecord(
                        step=step, seed=0, projected_gradients=[1.0], coefficients=[1.0], learning_rates=[0.1],
                        eps=[1e-3], weight_decay=[0.0], loss=0.0, signal_to_noise=1.0, skipped=False,
                    )
                )  # fmt: skip
                result[f"{way}_s"] = wait() - start
        finally:
            drawn_once.fuses = before
        found[way] = torch.cat([tensor.flatten() for _, tensor in own])
    result["largest_difference"] = float((found["fused"] - found["one_by_one"]).abs().max() / found["fused"].abs().max())
    return result


def quantised(work: Work) -> dict[str, Any]:
    """Decoding and log-probs over weights of 4 bits, where bitsandbytes is installed."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"left_out": "bitsandbytes is not installed"}
    setting = build(replace(work, load_in_4bit=True), classifier=False)
    result: dict[str, Any] = {}
    start = wait()
    rollouts = drawn(setting, work.completion_length, [-1])
    result["first_sampling_s"] = wait() - start
    start = wait()
    rollouts = drawn(setting, work.completion_length, [-1])
    result["sampling_s"] = wait() - start
    result["graphs"] = graphs_held()
    with torch.no_grad():
        LocalEngine(setting.policy).logprobs(Batch.of(rollouts))
        start = wait()
        tokens = LocalEngine(setting.policy).logprobs(Batch.of(rollouts))[0]
        result["logprobs_s"] = wait() - start
    result["finite"] = bool(tokens.isfinite().all())
    result["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9 if torch.cuda.is_available() else None
    return result


def measured(kind: str) -> Callable[[Work], dict[str, Any]]:
    return lambda work: kinds.measure(kind, work)


def memory(work: Work) -> dict[str, Any]:
    """Peak of a step and of generating the same batch."""
    peaks = {}
    for kind in ("step-memory", "inference-memory"):
        peaks[kind] = kinds.measure(kind, work)["peak_mb"]
        collect()
    model, bits = fits.MODELS.get(f"Llama 3.2 {work.size.upper()}"), {}
    if model is not None:
        size = fits.Batch(work.prompts, work.num_generations, work.prompt_length, work.completion_length)
        bits = {"computed_mb": fits.step_bytes(model, size)["all"] / 1e6}
    return {**peaks, **bits, "ratio": peaks["step-memory"] / peaks["inference-memory"]}


def entries() -> list[Entry]:
    plain = Work(size="tiny", vocab_size=512, dtype="float32", prompts=8, num_generations=4)
    return [
        Entry("equality", 10, equality, plain),
        Entry("decoding 1b", 20, decoding_speed, Work(size="1b", **{**SMALL, "completion_length": 64})),
        Entry("step 1b large", 30, measured("step"), Work(size="1b", **LARGE)),
        Entry("decoding 8b", 40, decoding_speed, Work(size="8b", **{**SMALL, "completion_length": 64})),
        Entry("step 8b small", 35, measured("step"), Work(size="8b", **SMALL)),
        Entry("step 1b small", 15, measured("step"), Work(size="1b", **SMALL)),
        Entry("tiles 1b large", 10, tiles, Work(size="1b", **LARGE)),
        Entry("step 0.1b as SmolLM2", 20, measured("step"), Work(**SMOLLM)),
        Entry("perturb and update 8b", 5, displacing, Work(size="8b")),
        Entry("lengths 1b large", 20, lengths_of_rows, Work(size="1b", **LARGE)),
        Entry("attention 1b", 15, attention_kernels, Work(size="1b", **{**SMALL, "completion_length": 64})),
        Entry("adapters 1b large", 20, adapter_products, Work(size="1b", **LARGE)),
        Entry("queries 1b sequential", 15, measured("step"), Work(size="1b", queries=4, **SMALL)),
        Entry("queries 1b batched", 15, measured("step"), Work(size="1b", queries=4, evaluation="batched", **SMALL)),
        Entry("step 1b float16", 15, measured("step"), Work(size="1b", dtype="float16", **SMALL)),
        Entry("memory 1b large", 25, memory, Work(size="1b", **LARGE)),
        Entry("population 1b", 40, population, Work(size="1b", **{**SMALL, "num_generations": 2})),
        Entry("peer 1b large", 35, measured("peer"), Work(size="1b", **{**LARGE, "steps": 1})),
        Entry("peer-cb 1b large", 40, measured("peer-cb"), Work(size="1b", **{**LARGE, "steps": 1})),
        Entry("peer 8b small", 35, measured("peer"), Work(size="8b", **{**SMALL, "steps": 1})),
        Entry("4-bit 1b small", 30, quantised, Work(size="1b", **SMALL)),
        Entry("together 1b small", 15, measured("step"), Work(size="1b", evaluation="together", **SMALL)),
    ]


def small(work: Work) -> Work:
    """Of tiny size, and on a CPU in float32; otherwise as it is."""
    kept = {} if torch.cuda.is_available() else {"dtype": "float32"}
    return replace(work, **TINY, **kept)


def collect() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def show(name: str, result: dict[str, Any]) -> None:
    short = {key: round(value, 4) if isinstance(value, float) else value for key, value in result.items()}
    print(json.dumps({"name": name, **short, "at_s": round(time.monotonic() - START, 1)}), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=450.0, help="after which nothing more begins (default: 450)")
    args = parser.parse_args()
    chosen = [entry for entry in entries() if not args.only or any(word in entry.name for word in args.only)]
    if args.list:
        print("\n".join(f"{entry.name}: about {entry.guess:.0f} s, {entry.work}" for entry in chosen))
        return
    if args.smoke:
        decoding.DEVICES.add("cpu")
        chosen = [replace(entry, guess=1, work=small(entry.work)) for entry in chosen if "cb" not in entry.name]
    elif not torch.cuda.is_available():
        raise SystemExit("benchmarks/gpu.py: needs a GPU that torch finds; --smoke tries the script without one.")
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    show("machine", {"device": where, **versions, "cudnn": torch.backends.cudnn.version()})
    for entry in chosen:
        if time.monotonic() - START + entry.guess > args.seconds:
            show(entry.name, {"left_out": f"{entry.guess:.0f} s would not fit into {args.seconds:.0f}"})
            continue
        try:
            collect()
            show(entry.name, entry.run(entry.work))
        except Exception as error:  # the next one may fit
            show(entry.name, {"error": repr(error)[:500]})


if __name__ == "__main__":
    main()
