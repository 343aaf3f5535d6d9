"""The tables of docs/lab/serving.md: what a run over llama.cpp learns, and what it costs beside llama.cpp alone.

    python benchmarks/llamacpp_es.py memory model.gguf                # resident memory of the same batch, three ways
    python benchmarks/llamacpp_es.py speed model.gguf --threads 2     # tokens a second, seconds for a new adapter
    python benchmarks/llamacpp_es.py learn model.gguf --out runs/es --seed 0

`learn` rewards short words: a dense rule in Python, as `reward: python:llamacpp_es:short_words`.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROWS, PROMPT, NEW = 16, 48, 32
THINGS = re.split(
    r",\s*",
    """a dog, the sea, a volcano, a bicycle, the moon, bread, a violin, winter, a spider, paper, a river, coffee, a ghost,
gold, a train, honey, a castle, rain, an apple, a robot, silk, a camel, glass, the desert, a whale, salt, a clock,
a forest, ice, a library, pepper, a kite, a bridge, tea, a lion, the wind, a pencil, cheese, a lighthouse, sand, an
owl, a drum, fire, a garden, milk, a shark, wool, a star, a ship, rice, a tiger, copper, a market, snow, a horse,
corn, a tower, lemons, a mirror, mud, a school, a bee, steam, a piano""",
)
ASKED = ("What is {}?", "Tell me about {}.", "Describe {}.", "Why do people like {}?")


def short_words(completions: list[Any], **columns: Any) -> list[float]:
    """The share of words of at most four letters, of eight words at least."""
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    words = [re.findall("[A-Za-z]+", text) for text in texts]
    return [sum(len(word) <= 4 for word in found) / max(8, len(found)) for found in words]


def peak() -> int:
    """Largest resident memory of this process so far, in MB."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) // 1000  # type: ignore[index]


def alone(file: str) -> int:
    """llama.cpp decoding the batch through its C API: no torch, no adapter."""
    path = Path(__file__).parents[1] / "src/zopro/engine/servers/llamacpp/library.py"
    spec = importlib.util.spec_from_file_location("library", path)
    assert spec is not None and spec.loader is not None
    lib = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(lib)
    library = lib.opened()
    model = library.llama_model_load_from_file(file.encode(), library.llama_model_default_params())
    params = library.llama_context_default_params()
    params.n_ctx, params.n_seq_max, params.kv_unified, params.n_batch = ROWS * (PROMPT + NEW), ROWS, True, 512
    params.n_outputs_max = params.n_outputs_max_per_seq = ROWS
    params.n_threads = params.n_threads_batch = 1
    context = library.llama_init_from_model(model, params)
    for row in range(ROWS):
        decode(lib, context, [row] * PROMPT, list(range(PROMPT)), [0] * (PROMPT - 1) + [1])
    for step in range(NEW - 1):
        decode(lib, context, list(range(ROWS)), [PROMPT + step] * ROWS, [1] * ROWS)
        library.llama_get_logits(context)
    assert "torch" not in sys.modules
    return peak()


def decode(lib: Any, context: Any, rows: list[int], places: list[int], wanted: list[int]) -> None:
    n, pointer = len(rows), ctypes.POINTER(ctypes.c_int32)
    own = (ctypes.c_int32 * n)(*rows)
    each = (pointer * n)(*(ctypes.cast(ctypes.byref(own, 4 * i), pointer) for i in range(n)))
    ids, at, ones = ((ctypes.c_int32 * n)(*values) for values in ([5] * n, places, [1] * n))
    batch = lib.Batch(n, ids, None, at, ones, each, (ctypes.c_int8 * n)(*wanted))
    assert lib.opened().llama_decode(context, batch) == 0


def imported() -> int:
    """What a run imports, and no model."""
    import zopro.loop.pipeline  # noqa: F401

    return peak()


def engine(file: str) -> int:
    """The same batch by the engine, at a displacement, with all that a run imports."""
    imported()
    made, prompts, options, at = prepared(file, 1)
    made.sample(prompts, 1, options, at)
    return peak()


def prepared(file: str, threads: int) -> tuple[Any, list[list[int]], Any, list[Any]]:
    from zopro.engine import Sampling
    from zopro.engine.servers.llamacpp.engine import LlamaCppEngine
    from zopro.zo import Displacement, Gaussian

    made = LlamaCppEngine.of(file, 8, 16.0, Gaussian(), threads=threads)
    options = Sampling(NEW, [], 0, do_sample=False)
    at = [Displacement(seed=0, query=0, step=0, t=t, eps=(0.02,)) for t in (1.0, -1.0)]
    return made, [[5] * PROMPT] * ROWS, options, at


def memory(file: str) -> None:
    for name in ("alone", "imported", "engine"):
        ask = [sys.executable, __file__, name, *([] if name == "imported" else [file])]
        print(f"{name:10} {subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()} MB")


def speed(file: str, threads: int) -> None:
    from zopro.engine import Batch

    made, prompts, options, at = prepared(file, threads)
    found = made.sample(prompts, 1, options, at[:1])
    begun = time.perf_counter()
    found = made.sample(prompts, 1, options, at)
    seconds = time.perf_counter() - begun
    print(f"rollouts   {len(at) * ROWS * NEW / seconds:.0f} tokens/s ({ROWS} rows of {PROMPT} + {NEW} tokens)")
    begun = time.perf_counter()
    made.logprobs(Batch.of(found[0]), at)
    seconds = time.perf_counter() - begun
    print(f"log-probs  {len(at) * ROWS * (PROMPT + NEW) / seconds:.0f} tokens/s, prompts counted")
    begun = time.perf_counter()
    for _ in range(10):
        data = made.adapter_file(at[0])
    print(f"adapter    {(time.perf_counter() - begun) / 10:.3f} s to make, {len(data or b'') / 1e6:.1f} MB")
    begun = time.perf_counter()
    for _ in range(10):
        with made.model.adapter(data):
            pass
    print(f"           {(time.perf_counter() - begun) / 10:.3f} s to hand over")


def learn(file: str, out: Path, seed: int, options: dict[str, str]) -> None:
    from zopro.config import RunConfig
    from zopro.loop import pipeline

    sys.path.insert(0, str(Path(__file__).parent))
    out.mkdir(parents=True, exist_ok=True)
    for name, things in (("train", THINGS[:32]), ("held", THINGS[32:])):
        rows = [{"prompt": ASKED[i % 4].format(thing)} for i, thing in enumerate(things)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine: dict[str, Any] = {
        "engine": f"llamacpp:{file}", "task": "verifiable", "train_data": str(out / "train.jsonl"),
        "eval_data": str(out / "held.jsonl"), "reward": "python:llamacpp_es:short_words", "method": "es",
        "iterations": 1, "policy_steps": 16, "population": 16, "prompts_per_step": 3, "max_completion_length": 20,
        "temperature": 0.7, "eval_samples": 2, "eval_greedy": False, "eval_prompts": 32, "sigma": 0.04,
        "es_learning_rate": 0.02, "lora_r": 4, "lora_target_modules": "o_proj,down_proj", "seed": seed,
    }  # fmt: skip
    given = {key: json.loads(value) if re.fullmatch(r"[\d.e-]+", value) else value for key, value in options.items()}
    config = RunConfig(**{**mine, **given, "output_dir": str(out / f"seed{seed}")})
    found = pipeline.run(config, resume=(out / f"seed{seed}").exists())
    for line in found["evaluations"]:
        shown = {
            key: line.get(key)
            for key in ("iteration", "reward", "reward_gain", "reward_gain_low", "reward_gain_high", "kl_per_answer")
        }
        print(json.dumps(shown))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("memory", "speed", "learn", "alone", "imported", "engine"))
    parser.add_argument("file", nargs="?", default="")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/llamacpp"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of learn")
    args = parser.parse_args()
    if args.what == "learn":
        learn(args.file, args.out, args.seed, dict(pair.split("=", 1) for pair in args.set))
    elif args.what == "speed":
        speed(args.file, args.threads)
    elif args.what == "memory":
        memory(args.file)
    else:
        print({"alone": lambda: alone(args.file), "imported": imported, "engine": lambda: engine(args.file)}[args.what]())


if __name__ == "__main__":
    main()
