"""The tables of docs/lab/serving.md for vLLM: what runs through servers learn, and what sharing a step is worth.

    python benchmarks/vllm_servers.py learn http://127.0.0.1:8000 --model DIR --out runs/vllm --method es
    python benchmarks/vllm_servers.py speed http://127.0.0.1:8000 --model DIR     # tokens a second, seconds an adapter
    python benchmarks/vllm_servers.py killed --model DIR --vllm PYTHON            # starts two servers, and kills one
    python benchmarks/vllm_servers.py shared                                      # two servers against one, one killed

`learn` rewards short words, as llamacpp_es.py does. `shared` asks servers that only wait: it measures the dealing.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from llamacpp_es import ASKED, THINGS, short_words  # noqa: F401 (short_words: by its name in the configuration)


def learn(urls: str, model: str, out: Path, method: str, seed: int, options: dict[str, str]) -> None:
    from zopro.config import RunConfig
    from zopro.loop import pipeline

    out.mkdir(parents=True, exist_ok=True)
    for name, things in (("train", THINGS[:32]), ("held", THINGS[32:])):
        rows = [{"prompt": ASKED[i % 4].format(thing)} for i, thing in enumerate(things)]
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    mine: dict[str, Any] = {
        "engine": f"vllm:{urls}", "model": model, "dtype": "float32", "task": "verifiable",
        "train_data": str(out / "train.jsonl"), "eval_data": str(out / "held.jsonl"),
        "reward": "python:vllm_servers:short_words", "method": method, "iterations": 1, "policy_steps": 12,
        "population": 16, "prompts_per_step": 3, "max_prompt_length": 64, "max_completion_length": 20, "eval_samples": 2,
        "eval_greedy": False, "eval_prompts": 32, "sigma": 0.04, "es_learning_rate": 0.02, "lora_r": 4,
        "lora_target_modules": "o_proj,down_proj", "seed": seed,
    }  # fmt: skip
    given = {key: json.loads(value) if re.fullmatch(r"[\d.e-]+", value) else value for key, value in options.items()}
    folder = out / f"{method}{seed}"
    began = time.perf_counter()
    found = pipeline.run(RunConfig(**{**mine, **given, "output_dir": str(folder)}), resume=folder.exists())
    print(f"{time.perf_counter() - began:.0f} s in all")
    for line in found["evaluations"]:
        names = ("iteration", "reward", "reward_low", "reward_high", "reward_gain", "reward_gain_low", "reward_gain_high")
        print(json.dumps({key: line.get(key) for key in (*names, "kl_per_answer")}))


def opened(urls: str, model: str) -> Any:
    import torch

    from zopro.config.model import ModelOptions
    from zopro.engine.local.targets import new_adapter
    from zopro.engine.opening import open_base, served

    options = ModelOptions(model=model, engine=f"vllm:{urls}", dtype="float32")
    return served(new_adapter(open_base(options, torch.device("cpu")), options, "CAUSAL_LM"))


def killed(model: str, python: str) -> None:
    """A step's answers by two servers, the second killed in the middle, beside those by the first alone."""
    import torch

    from zopro.config.model import ModelOptions
    from zopro.engine import Sampling
    from zopro.engine.local.targets import new_adapter
    from zopro.engine.opening import open_base, served
    from zopro.engine.servers.vllm.client import Server
    from zopro.zo import Displacement

    flags = "--max-loras 2 --max-model-len 512"
    options = ModelOptions(model=model, engine="vllm", vllm_python=python, vllm_flags=flags, dtype="float32")
    base, other = (open_base(options, torch.device("cpu")) for _ in range(2))
    (second,) = other.served_by.servers
    base.served_by.servers.append(second)
    engine: Any = served(new_adapter(base, options, "CAUSAL_LM"))
    first, _ = engine.parts()
    sample, done = Server.sample, list[str]()
    prompts, at = [[5 + row] * 16 for row in range(4)], [None, *(Displacement(0, n, 0, 1.0, (0.02,)) for n in range(11))]

    def sampled(server: Server, *asked: Any) -> Any:
        found = sample(server, *asked)
        done.append(server.url)
        if server is second and done.count(server.url) == 2:
            os.killpg(second.process.pid, signal.SIGKILL)
            print("the second is killed when it has answered twice")
        return found

    def answered(by: Any) -> list[Any]:
        generator = torch.Generator().manual_seed(0)
        began = time.perf_counter()
        found = by.sample(prompts, 1, Sampling(16, [], 0, generator=generator), at)
        print(f"{time.perf_counter() - began:.1f} s, answers by each: {sorted(done.count(url) for url in set(done))}")
        return list(found)

    Server.sample = sampled  # type: ignore[method-assign]
    shared = answered(engine)
    done.clear()
    alone = answered(first)
    same = sum(torch.equal(one.completion_ids, two.completion_ids) for one, two in zip(shared, alone, strict=True))
    off = max(float((one.logprobs - two.logprobs).abs().max()) for one, two in zip(shared, alone, strict=True))
    print(f"{same} of {len(at)} policies have the same answers; log-probs differ by at most {off:.1g} nats")


def speed(urls: str, model: str) -> None:
    from zopro.engine import Batch, Sampling
    from zopro.zo import Displacement

    engine = opened(urls, model)
    rows, prompt, new = 16, 48, 32
    how, prompts = Sampling(new, [], 0, do_sample=False), [[5 + row] * prompt for row in range(rows)]
    at = [Displacement(seed=0, query=0, step=0, t=t, eps=(0.02,)) for t in (1.0, -1.0)]
    found = engine.sample(prompts, 1, how, at[:1])
    began = time.perf_counter()
    engine.sample(prompts, 1, how, at)
    rate = len(at) * rows * new / (time.perf_counter() - began)
    print(f"rollouts   {rate:.0f} tokens/s (2 displacements of {rows} rows of {prompt} + {new} tokens)")
    began = time.perf_counter()
    engine.logprobs(Batch.of(found[0]), at)
    print(f"log-probs  {len(at) * rows * (prompt + new) / (time.perf_counter() - began):.0f} tokens/s, prompts counted")
    one = Batch.of(engine.sample([[5]], 1, Sampling(1, [], 0, do_sample=False))[0])
    for where, name in ((None, "theta"), (at[0], "displaced")):
        began = time.perf_counter()
        for _ in range(5):
            engine.logprobs(one, [where])
        print(f"{name:10} {(time.perf_counter() - began) / 5:.3f} s for one token, adapter written, loaded and forgotten")


class Waits:
    """A server that takes so long for a displacement, and may be gone from some time on."""

    slots = 4

    def __init__(self, name: str, seconds: float, until: float = float("inf")) -> None:
        self.url, self.seconds, self.until, self.did = name, seconds, until, 0
        self.begun = time.perf_counter()

    def greet(self) -> None:
        from zopro.engine.servers.vllm.client import Failed

        if time.perf_counter() - self.begun > self.until:
            raise Failed("gone")

    def work(self, index: int) -> int:
        time.sleep(self.seconds)
        self.greet()
        self.did += 1
        return index


def shared() -> None:
    from zopro.engine.servers.vllm.sharing import Fleet

    def took(*servers: Waits) -> str:
        began = time.perf_counter()
        found = Fleet(servers).share(32, lambda index: index, Waits.work)  # type: ignore[arg-type]
        assert found == list(range(32))
        return f"{time.perf_counter() - began:.2f} s, displacements by each: {[server.did for server in servers]}"

    print("32 displacements of 0.2 s each, 4 at once for each server")
    print("one server ", took(Waits("a", 0.2)))
    print("two servers", took(Waits("a", 0.2), Waits("b", 0.2)))
    print("two, the second dies after 0.3 s", took(Waits("a", 0.2), Waits("b", 0.2, until=0.3)))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("learn", "speed", "killed", "shared"))
    parser.add_argument("urls", nargs="?", default="http://127.0.0.1:8000")
    parser.add_argument("--model", default="", help="Hub id or folder of what the servers hold")
    parser.add_argument("--method", default="es")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vllm", default="", metavar="PYTHON", help="of the environment that has vLLM, for killed")
    parser.add_argument("--out", type=Path, default=Path("runs/vllm"))
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="other settings of learn")
    args = parser.parse_args()
    if args.what == "learn":
        options = dict(pair.split("=", 1) for pair in args.set)
        learn(args.urls, args.model, args.out, args.method, args.seed, options)
    elif args.what == "speed":
        speed(args.urls, args.model)
    elif args.what == "killed":
        killed(args.model, args.vllm)
    else:
        shared()


if __name__ == "__main__":
    main()
