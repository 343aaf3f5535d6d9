"""The engine over llama.cpp in this process: `engine: llamacpp:FILE.gguf`, of any quantisation.

engine = LlamaCppEngine.of("model.gguf", rank=8, alpha=16.0, directions=Gaussian(), seed=0)
at = strategy.ask(step)
rollouts = engine.sample(prompts, 1, options, at)       # one for each displaced policy
engine.apply(strategy.tell([mean(reward(r)) for r in rollouts]))

theta is a few MB of fp32 tensors here; the network sees theta + t eps z as an adapter made for the call. Displacements go
one after another, since a context of llama.cpp has one set of adapters; the rows of each go together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from zopro.engine import Abilities, Batch, Rollouts, Sampling
from zopro.engine.batch import again, check_prompts, uniform_numbers
from zopro.engine.local.sampling import Sampler
from zopro.engine.servers.adapters import named
from zopro.engine.servers.llamacpp.adapter import adapter_bytes, fresh, heads_of, module_names, parts
from zopro.engine.servers.llamacpp.model import MOST_ROWS, Model
from zopro.engine.servers.rows import Asked, rollouts_of, unpadded
from zopro.errors import InputError
from zopro.zo import Directions, Weights
from zopro.zo.displacement import Displacement
from zopro.zo.records import StepRecord

CELLS = 2**14  # tokens of prompts and answers held at once, unless a single prompt's answers need more
LOGITS = 2**23  # elements held at once: 32 MiB
FEW = 16  # rows of them that are copied on the way to log-probs

T = TypeVar("T")


class LlamaCppEngine:
    """An `Engine` over a GGUF model and a LoRA adapter.

    Args:
        model: the loaded file.
        weights: the adapter's tensors by plain PEFT names (`zopro.weights.adapters.tensor_name`), fp32 on the CPU.
        alpha: LoRA's scaling numerator (scale = alpha / r).

    Raises InputError: a tensor that is not plain LoRA, of a module that the file does not have, or of another shape.
    """

    def __init__(self, model: Model, weights: Weights, alpha: float) -> None:
        self.model, self.alpha = model, alpha
        self._tensors: dict[str, Tensor] = {}
        self.hold(weights)

    def hold(self, weights: Weights) -> None:
        """theta and its directions: all of the policy's tensors at first, and later those or a part of them."""
        model, names = self.model, module_names(self.model.tensors, self.model.architecture)
        self._places: dict[str, tuple[str, int]] = {}
        for name, tensor in named(weights):
            module, side = parts(name)
            if module not in names:
                raise InputError(f"engine: the adapter is for {module!r}, which {model.path.name} does not have.")
            weight = names[module]
            out, wide = model.tensors[weight]
            if tensor.shape[side == "A"] != (wide if side == "A" else out):
                raise InputError(
                    f"engine: the adapter must fit {module!r} of {model.path.name}, which is {out} x {wide}, got "
                    f"{name!r} of {' x '.join(map(str, tensor.shape))}."
                )
            self._places[module] = weight, heads_of(weight, model.architecture, *model.heads)
        self.weights = weights
        self._tensors |= dict(named(weights))
        half = next((m for m in self._places if not {f"{m}.lora_{s}.weight" for s in "AB"} <= self._tensors.keys()), None)
        if half is not None:
            raise InputError(f"engine: the adapter must have A and B of each module, got one of {half!r}.")

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

    def adapter_file(self, at: Displacement | None = None) -> bytes | None:
        """The policy at a displacement as a GGUF adapter, for `llama-cli --lora`; None: the model without one."""
        tensors = self._tensors if at is None or at.t == 0 else {**self._tensors, **self.weights.at(at)}
        return adapter_bytes(tensors, self.model.architecture, self.alpha, self._places) if tensors else None

    def sample(
        self, prompts: Sequence[Sequence[int]], k: int, options: Sampling, at: Sequence[Displacement | None] = (None,)
    ) -> list[Rollouts]:
        """As `Engine.sample`. Raises InputError: an option out of range, or a prompt without room for its answer."""
        sampler = Sampler(options.do_sample, options.temperature, options.top_k, options.top_p, options.min_p or 0.0)
        self.model.check_room(max(map(len, prompts), default=0) + options.max_new_tokens)
        check_prompts(prompts, k, options.max_new_tokens, self.model.context_length)
        generator = options.generator if len(at) == 1 else again(options.generator)
        uniform = uniform_numbers(generator, len(prompts) * k, options.max_new_tokens, torch.device("cpu"))
        return self._at(at, lambda: self._generate(prompts, k, options, sampler, uniform))

    def logprobs(
        self, batch: Batch, at: Sequence[Displacement | None] = (None,), temperature: float = 1.0
    ) -> list[Tensor]:
        """As `Engine.logprobs`; rows of the same prompt read it once. Raises InputError: a row that is too long."""
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

    def _generate(
        self, prompts: Sequence[Sequence[int]], k: int, options: Sampling, sampler: Sampler, uniform: Tensor
    ) -> Rollouts:
        answers: list[list[int]] = [[] for _ in range(len(prompts) * k)]
        logprobs = torch.zeros(len(answers), options.max_new_tokens)
        stops = frozenset(options.eos_token_ids)
        asked = [Asked(prompt, list(range(n * k, n * k + k))) for n, prompt in enumerate(prompts)]
        room = [options.max_new_tokens] * len(answers)
        for part in self._parts(asked, room):
            logits = self._begin(part, room, 1)
            order = [(row, len(one.prompt)) for one in part for row in one.rows]
            live = list(range(len(order)))
            for step in range(options.max_new_tokens):
                where = torch.tensor([order[i][0] for i in live])
                tokens, scores = sampler.draw(logits, uniform[where, step])
                logprobs[where, step] = scores
                for row, token in zip(where.tolist(), tokens.tolist(), strict=True):
                    answers[row].append(token)
                live = [i for i in live if answers[order[i][0]][-1] not in stops]
                if not live or step == options.max_new_tokens - 1:
                    break
                last = [answers[order[i][0]][-1] for i in live]
                logits = self.model.read(last, [order[i][1] + step for i in live], live, [True] * len(live))
        if not logprobs.isfinite().all():
            raise FloatingPointError("generate: the model's logits are not finite; its weights have diverged.")
        return rollouts_of(prompts, k, answers, logprobs, options.pad_token_id)

    def _score(self, batch: Batch, temperature: float) -> Tensor:
        width = batch.completion_length
        answers = unpadded(batch.completion_ids, batch.completion_mask)
        groups: dict[tuple[int, ...], list[int]] = {}
        for row, prompt in enumerate(unpadded(batch.prompt_ids, batch.attention_mask[:, :-width])):
            groups.setdefault(tuple(prompt), []).append(row)
        found = torch.zeros(len(answers), width)

        def score(logits: Tensor, places: list[tuple[int, int]]) -> None:
            """Of the tokens at (row, column)."""
            rows, columns = torch.tensor(places).T
            picked = torch.tensor([answers[row][column] for row, column in places])[:, None]
            pairs = zip(logits.split(FEW), picked.split(FEW), strict=True)
            found[rows, columns] = torch.cat(
                [(few / temperature).log_softmax(-1).gather(1, ids)[:, 0] for few, ids in pairs]
            )

        asked = [Asked(prompt, [row for row in rows if answers[row]]) for prompt, rows in groups.items()]
        room = [width] * len(answers) if self.model.most_cells is None else [len(answer) for answer in answers]
        for part in self._parts([one for one in asked if one.rows], room):
            order = [(row, len(one.prompt)) for one in part for row in one.rows]
            score(self._begin(part, room, width), [(row, 0) for row, _ in order])
            todo = [(i, column) for i, (row, _) in enumerate(order) for column in range(1, len(answers[row]))]
            for now in (todo[start : start + self._most] for start in range(0, len(todo), self._most)):
                tokens = [answers[order[i][0]][column - 1] for i, column in now]
                places = [order[i][1] + column - 1 for i, column in now]
                logits = self.model.read(tokens, places, [i for i, _ in now], [True] * len(now))
                score(logits, [(order[i][0], column) for i, column in now])
        return found

    @property
    def _most(self) -> int:
        """Rows at once, each of which may want its logits."""
        return max(1, min(MOST_ROWS, LOGITS // self.model.vocab_size))

    def _parts(self, asked: Sequence[Asked], new: Sequence[int]) -> Iterator[list[Asked]]:
        """What finds room at once, shortest prompts first; at least one row. new: tokens that may follow, of each row."""
        most, room = self._most, min(CELLS, self.model.most_cells or CELLS)
        pieces = [piece for one in asked for piece in self._pieces(one, new)]
        part: list[Asked] = []
        for piece in sorted(pieces, key=lambda piece: len(piece.prompt)):
            more = [*part, piece]
            full = sum(len(one.rows) for one in more) > most or sum(one.cells(new) for one in more) > room
            if part and full:
                yield part
                more = [piece]
            part = more
        if part:
            yield part

    def _pieces(self, one: Asked, new: Sequence[int]) -> Iterator[Asked]:
        """The rows of a prompt, as many at once as may be."""
        most, room = self._most, self.model.most_cells or math.inf
        rows: list[int] = []
        for row in one.rows:
            if rows and (len(rows) == most or Asked(one.prompt, [*rows, row]).cells(new) > room):
                yield Asked(one.prompt, rows)
                rows = []
            rows.append(row)
        yield Asked(one.prompt, rows)

    def _begin(self, part: Sequence[Asked], new: Sequence[int], wanted: int) -> Tensor:
        """Read each prompt once for its rows, which follow one another; logits (rows, V) behind it, new.

        Args:
            new: tokens that will follow, of each row. wanted: how many of them in one go.
        """
        counts = [len(one.rows) for one in part]
        firsts = [sum(counts[:number]) for number in range(len(part))]
        outputs = max(sum(counts), min(self._most, sum(counts) * wanted))
        self.model.begin(sum(one.cells(new) for one in part), sum(counts), outputs)
        each = [
            (first, place, one.prompt)
            for first, one in zip(firsts, part, strict=True)
            for place in range(len(one.prompt))
        ]
        logits = self.model.read(
            [prompt[place] for _, place, prompt in each],
            [place for _, place, _ in each],
            [first for first, _, _ in each],
            [place == len(prompt) - 1 for _, place, prompt in each],
        )
        for first, count in zip(firsts, counts, strict=True):
            for other in range(first + 1, first + count):
                self.model.copy(first, other)
        return logits.repeat_interleave(torch.tensor(counts), 0)


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
