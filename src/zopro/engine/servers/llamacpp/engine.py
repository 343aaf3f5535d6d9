"""The engine over llama.cpp in this process: `engine: llamacpp:FILE.gguf`, of any quantisation.

engine = LlamaCppEngine.of("model.gguf", rank=8, alpha=16.0, directions=Gaussian(), seed=0)
at = strategy.ask(step)
rollouts = engine.sample(prompts, 1, options, at)       # one for each displaced policy
engine.apply(strategy.tell([mean(reward(r)) for r in rollouts]))

theta is a few MB of fp32 tensors here; the network sees theta + t eps z as an adapter made for the call. Displacements go
one after another, since a context of llama.cpp has one set of adapters; the rows of each go together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from zopro.engine import Abilities, Batch, Rollouts, Sampling
from zopro.engine.local.sampling import Sampler
from zopro.engine.servers.llamacpp.adapter import adapter_bytes, fresh, heads_of, module_names, parts
from zopro.engine.servers.llamacpp.model import MOST_ROWS, Model
from zopro.errors import InputError
from zopro.zo import Directions, Weights
from zopro.zo.displacement import Displacement
from zopro.zo.records import StepRecord

CELLS = 2**14  # tokens of prompts and answers held at once, unless a single prompt's answers need more
LOGITS = 2**23  # elements held at once: 32 MiB

T = TypeVar("T")
Prompt = tuple[int, ...]


class LlamaCppEngine:
    """An `Engine` over a GGUF model and a LoRA adapter.

    Args:
        model: the loaded file.
        weights: the adapter's tensors by plain PEFT names (`zopro.weights.adapters.tensor_name`), fp32 on the CPU.
        alpha: LoRA's scaling numerator (scale = alpha / r).

    Raises InputError: a tensor that is not plain LoRA, of a module that the file does not have, or of another shape.
    """

    def __init__(self, model: Model, weights: Weights, alpha: float) -> None:
        self.model, self.weights, self.alpha = model, weights, alpha
        names = module_names(model.tensors, model.architecture)
        self._weights: dict[str, tuple[str, int]] = {}
        for group in weights.groups:
            for name, tensor in zip(group["param_names"], group["params"], strict=True):
                module, side = parts(name)
                weight = names.get(module)
                if weight is None:
                    raise InputError(f"engine: the adapter is for {module!r}, which {model.path.name} does not have.")
                out, wide = model.tensors[weight]
                if tensor.shape[side == "A"] != (wide if side == "A" else out):
                    raise InputError(
                        f"engine: the adapter must fit {module!r} of {model.path.name}, which is {out} x {wide}, got "
                        f"{name!r} of {' x '.join(map(str, tensor.shape))}."
                    )
                self._weights[module] = weight, heads_of(weight, model.architecture, *model.heads)

    @classmethod
    def of(
        cls,
        path: str | Path,
        rank: int,
        alpha: float,
        directions: Directions,
        *,
        targets: str = "all-linear",
        seed: int = 0,
        threads: int | None = None,
    ) -> LlamaCppEngine:
        """A file and a new adapter on the modules that `targets` names, which changes nothing yet (B = 0)."""
        model = Model(path, threads)
        return cls(model, Weights.of(new_tensors(model, rank, targets, seed).items(), directions), alpha)

    @property
    def abilities(self) -> Abilities:
        return Abilities(exact=True)

    def tensors(self) -> dict[str, Tensor]:
        """theta, by plain PEFT names: the tensors themselves."""
        return {
            name: tensor
            for group in self.weights.groups
            for name, tensor in zip(group["param_names"], group["params"], strict=True)
        }

    def adapter_file(self, at: Displacement | None = None) -> bytes:
        """The policy at a displacement as a GGUF adapter, for `llama-cli --lora`."""
        tensors = self.tensors() if at is None or at.t == 0 else self.weights.at(at)
        return adapter_bytes(tensors, self.model.architecture, self.alpha, self._weights)

    def sample(
        self, prompts: Sequence[Sequence[int]], k: int, options: Sampling, at: Sequence[Displacement | None] = (None,)
    ) -> list[Rollouts]:
        """As `Engine.sample`. Raises InputError: an option out of range, or a prompt without room for its answer."""
        sampler = Sampler(options.do_sample, options.temperature, options.top_k, options.top_p, options.min_p or 0.0)
        self._check(prompts, k, options.max_new_tokens)
        uniform = _uniform(options, len(prompts) * k, len(at))
        return self._at(at, lambda: self._generate(prompts, k, options, sampler, uniform))

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        """As `Engine.logprobs`; rows of the same prompt read it once."""
        if not temperature > 0:
            raise InputError(f"temperature: must be greater than 0, got {temperature}.")
        return self._at(at, lambda: self._score(batch, temperature))

    def apply(self, record: StepRecord) -> None:
        self.weights.apply(record)

    def _at(self, at: Sequence[Displacement | None], function: Callable[[], T]) -> list[T]:
        found = []
        for displacement in at:
            with self.model.adapter(self.adapter_file(displacement)):
                found.append(function())
        return found

    def _check(self, prompts: Sequence[Sequence[int]], k: int, new: int) -> None:
        if not prompts:
            raise InputError("prompts: must hold at least one prompt, got none.")
        for name, value in (("num_generations", k), ("max_new_tokens", new)):
            if value < 1:
                raise InputError(f"{name}: must be at least 1, got {value}.")
        if k > MOST_ROWS:
            raise InputError(f"num_generations: must be at most {MOST_ROWS} with llamacpp, got {k}.")
        for number, prompt in enumerate(prompts):
            if not len(prompt):
                raise InputError(f"prompts: prompt {number} has no token; begin it with the tokenizer's BOS.")
            if len(prompt) + new > self.model.context_length:
                raise InputError(
                    f"prompts: prompt {number} has {len(prompt)} tokens, which with max_new_tokens={new} exceeds the "
                    f"model's context of {self.model.context_length}. Shorten either."
                )

    def _generate(
        self, prompts: Sequence[Sequence[int]], k: int, options: Sampling, sampler: Sampler, uniform: Tensor
    ) -> Rollouts:
        rows, new = len(prompts) * k, options.max_new_tokens
        answers: list[list[int]] = [[] for _ in range(rows)]
        logprobs = torch.zeros(rows, new)
        stops = frozenset(options.eos_token_ids)
        for part in _parts([len(prompt) for prompt in prompts], k, new):
            row_of = [number * k + copy for number in part for copy in range(k)]
            first = self._begin([prompts[number] for number in part], [k] * len(part), new)
            hidden = first.repeat_interleave(k, 0)
            live = list(range(len(row_of)))
            for step in range(new):
                where = torch.tensor([row_of[i] for i in live])
                tokens, scores = sampler.draw(hidden, uniform[where, step])
                logprobs[where, step] = scores
                for i, token in zip(live, tokens.tolist(), strict=True):
                    answers[row_of[i]].append(token)
                live = [i for i in live if answers[row_of[i]][-1] not in stops]
                if not live or step == new - 1:
                    break
                last = [answers[row_of[i]][-1] for i in live]
                places = [len(prompts[part[i // k]]) + step for i in live]
                hidden = self.model.read(last, places, live, [True] * len(live))
        if not logprobs.isfinite().all():
            raise FloatingPointError("generate: the model's logits are not finite; its weights have diverged.")
        return _rollouts(prompts, k, answers, logprobs, options.pad_token_id)

    def _begin(self, prompts: Sequence[Sequence[int]], copies: Sequence[int], new: int) -> Tensor:
        """Read each prompt once, in so many rows that follow one another; logits (prompts, V) behind each."""
        starts = [sum(copies[:number]) for number in range(len(prompts))]
        cells = sum(len(prompt) + count * new for prompt, count in zip(prompts, copies, strict=True))
        self.model.begin(cells, sum(copies), self._outputs(sum(copies)))
        tokens = [token for prompt in prompts for token in prompt]
        places = [place for prompt in prompts for place in range(len(prompt))]
        rows = [row for row, prompt in zip(starts, prompts, strict=True) for _ in prompt]
        wanted = [place == len(prompt) - 1 for prompt in prompts for place in range(len(prompt))]
        logits = self.model.read(tokens, places, rows, wanted)
        for row, count in zip(starts, copies, strict=True):
            for other in range(row + 1, row + count):
                self.model.copy(row, other)
        return logits

    def _outputs(self, rows: int) -> int:
        """Rows of logits at once."""
        return max(1, min(rows, LOGITS // self.model.vocab_size))

    def _score(self, batch: Batch, temperature: float) -> Tensor:
        lengths = batch.completion_mask.sum(1).tolist()
        width = batch.completion_length
        groups: dict[Prompt, list[int]] = {}
        for row, (ids, mask) in enumerate(
            zip(batch.input_ids[:, :-width], batch.attention_mask[:, :-width], strict=True)
        ):
            groups.setdefault(tuple(ids[mask.bool()].tolist()), []).append(row)
        found = torch.zeros(len(lengths), width)
        pieces = [(p, rows[i : i + MOST_ROWS]) for p, rows in groups.items() for i in range(0, len(rows), MOST_ROWS)]
        for part in _parts([len(prompt) for prompt, _ in pieces], [len(rows) for _, rows in pieces], width):
            prompts, members = [pieces[n][0] for n in part], [pieces[n][1] for n in part]
            first = self._begin(prompts, [len(rows) for rows in members], width)
            order = [row for rows in members for row in rows]
            starts = [len(prompt) for prompt, rows in zip(prompts, members, strict=True) for _ in rows]
            answers = [batch.completion_ids[row, : lengths[row]].tolist() for row in order]
            heads = first.repeat_interleave(torch.tensor([len(rows) for rows in members]), 0)
            for row, answer, logits in zip(order, answers, heads, strict=True):
                if answer:
                    found[row, 0] = _log_softmax(logits[None], temperature)[0, answer[0]]
            self._score_rest(found, order, starts, answers, temperature)
        return found

    def _score_rest(
        self, found: Tensor, order: Sequence[int], starts: Sequence[int], answers: Sequence[list[int]], temperature: float
    ) -> None:
        """Log-probs of the second token and those behind it, which a row's earlier tokens lead to."""
        todo = [(i, j) for i, answer in enumerate(answers) for j in range(len(answer) - 1)]
        chunk = self._outputs(len(todo))
        for start in range(0, len(todo), chunk):
            now = todo[start : start + chunk]
            tokens, places = [answers[i][j] for i, j in now], [starts[i] + j for i, j in now]
            scores = _log_softmax(self.model.read(tokens, places, [i for i, _ in now], [True] * len(now)), temperature)
            rows, columns = torch.tensor([order[i] for i, _ in now]), torch.tensor([j + 1 for _, j in now])
            picked = torch.tensor([answers[i][j + 1] for i, j in now])
            found[rows, columns] = scores.gather(1, picked[:, None])[:, 0]


def new_tensors(model: Model, rank: int, targets: str, seed: int) -> dict[str, Tensor]:
    """A new adapter for a file's modules. Raises InputError: no module of such a name."""
    names = module_names(model.tensors, model.architecture)
    wanted = None if targets == "all-linear" else {name.strip() for name in targets.split(",") if name.strip()}
    kinds = sorted({name.rpartition(".")[2] for name in names})
    if unknown := sorted((wanted or set()) - set(kinds)):
        raise InputError(
            f"lora_target_modules: must be all-linear or names among {', '.join(kinds)}, got {', '.join(unknown)!r}."
        )
    if not names:
        raise InputError(f"engine: no module of {model.path.name} ({model.architecture}) is known that takes an adapter.")
    chosen = {name: weight for name, weight in names.items() if wanted is None or name.rpartition(".")[2] in wanted}
    for weight in chosen.values():
        heads_of(weight, model.architecture, *model.heads)
    return fresh({name: (model.tensors[w][0], model.tensors[w][1]) for name, w in chosen.items()}, rank, seed)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    return torch.log_softmax(logits / temperature, -1)


def _uniform(options: Sampling, rows: int, times: int) -> Tensor:
    """(rows, steps) fp64 in [0, 1): as the local engine draws them, so that the same seeds mean the same numbers."""
    given, steps = options.generator, options.max_new_tokens
    if isinstance(given, Sequence):
        own = [row.clone_state() if times > 1 else row for row in given]
        return torch.stack([torch.rand(steps, dtype=torch.float64, generator=row) for row in own])
    one = given.clone_state() if given is not None and times > 1 else given
    return torch.rand((rows, steps), dtype=torch.float64, generator=one)


def _parts(lengths: Sequence[int], copies: int | Sequence[int], new: int) -> Iterator[list[int]]:
    """Prompts' numbers, shortest first, so many that their rows and tokens find room at once; at least one."""
    counts = [copies] * len(lengths) if isinstance(copies, int) else copies
    part: list[int] = []
    rows = cells = 0
    for number in sorted(range(len(lengths)), key=lengths.__getitem__):
        count = counts[number]
        more = lengths[number] + count * new
        if part and (rows + count > MOST_ROWS or cells + more > CELLS):
            yield part
            part, rows, cells = [], 0, 0
        part.append(number)
        rows, cells = rows + count, cells + more
    if part:
        yield part


def _rollouts(
    prompts: Sequence[Sequence[int]], k: int, answers: Sequence[list[int]], logprobs: Tensor, pad: int
) -> Rollouts:
    wide, long = max(map(len, prompts)), max(map(len, answers))
    ids = torch.tensor([[pad] * (wide - len(prompt)) + list(prompt) for prompt in prompts])
    mask = torch.tensor([[0] * (wide - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    return Rollouts(
        prompt_ids=ids.repeat_interleave(k, dim=0),
        prompt_mask=mask.repeat_interleave(k, dim=0),
        completion_ids=torch.tensor([answer + [pad] * (long - len(answer)) for answer in answers]),
        completion_mask=torch.tensor([[1] * len(answer) + [0] * (long - len(answer)) for answer in answers]),
        logprobs=logprobs[:, :long].contiguous(),
    )
