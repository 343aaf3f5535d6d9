"""Members of a population in one batch answer what they answer one after another."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tiny import KINDS, tiny_model, tiny_tokenizer
from tiny_trainers import online, with_adapter
from zopro.engine import Batch, Rollouts, Sampling
from zopro.engine.local import few_rows, lengths, members, sampling
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.members import Apart, Members
from zopro.errors import InputError
from zopro.train.zopro import FZOOTrainer, ZOPrOConfig, ZOPrOTrainer
from zopro.zo import Displacement, Gaussian, LowRank, Targeted, Weights

PROMPTS = [[5, 6, 7], [8, 9, 10, 11, 12], [13]]
SIDES = [Displacement(7, query, 3, t, (0.3,)) for query in range(2) for t in (1.0, -1.0)]
AT = [*SIDES, None, Displacement(7, 5, 3, 0.0, (0.3,))]


def adapted(kind: str, targets: Any = "all-linear") -> Any:
    """A model with adapters that are not zero."""
    model = get_peft_model(tiny_model(kind, tiny_tokenizer()), LoraConfig(r=4, target_modules=targets))
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data.normal_(0, 0.2, generator=generator)
    return model


shared = cache(adapted)  # for tests that leave it as it is


def policy(model: Any, only: str = "") -> tuple[Any, Weights]:
    """The model, and its adapters' weights with `only` in their names, which are displaced."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return model, Weights.of([(name, p) for name, p in named if only in name], Gaussian())


def options(seed: int | None = 0, **given: Any) -> Sampling:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return Sampling(4, [2], 0, **{"generator": generator, **given})


def one_by_one(model: Any, weights: Weights, k: int, sampling: Sampling) -> list[Rollouts]:
    engine = LocalEngine(model, weights, member_tokens=0)
    return engine.sample(PROMPTS, k, sampling, AT)


def same(ours: list[Rollouts], theirs: list[Rollouts]) -> None:
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.answers() == other.answers()
        for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
            assert torch.equal(getattr(mine, name), getattr(other, name)), name
        assert torch.allclose(mine.logprobs, other.logprobs, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "sampling"),
    [*((kind, {}) for kind in KINDS), ("llama", {"do_sample": False}), ("gemma3", {"temperature": 0.7, "top_k": 20})],
    ids=str,
)
def test_they_answer_as_one_after_another(kind: str, sampling: dict[str, Any]) -> None:
    model, weights = policy(shared(kind))
    before = [tensor.clone() for _, tensor, _ in weights.entries]
    expected = one_by_one(model, weights, 2, options(**sampling))
    found = LocalEngine(model, weights).sample(PROMPTS, 2, options(**sampling), AT)
    same(found, expected)
    assert len({tuple(map(tuple, rollouts.answers())) for rollouts in found}) > 4, "displacements must show"
    assert found[-1].answers() == found[-2].answers(), "None and t = 0 are theta"
    assert all(torch.equal(a, b) for a, (_, b, _) in zip(before, weights.entries, strict=True))


@pytest.mark.parametrize("only", ["lora_A", "lora_B", "layers.1"])
def test_what_is_not_displaced_is_shared(only: str) -> None:
    model, weights = policy(shared("llama"), only)
    same(LocalEngine(model, weights).sample(PROMPTS, 1, options(), AT), one_by_one(model, weights, 1, options()))


def test_the_number_at_a_time_changes_nothing() -> None:
    model, weights = policy(shared("llama"))
    expected = one_by_one(model, weights, 1, options())
    for tokens in (1, 2 * 3 * 9):  # one, two
        engine = LocalEngine(model, weights, member_tokens=tokens)
        same(engine.sample(PROMPTS, 1, options(), AT), expected)


def test_generators_of_rows_and_the_global_state_are_the_same_for_all() -> None:
    model, weights = policy(shared("llama"))
    rows = [torch.Generator().manual_seed(row) for row in range(6)]
    same(
        LocalEngine(model, weights).sample(PROMPTS, 2, options(generator=rows), AT),
        one_by_one(model, weights, 2, options(generator=rows)),
    )
    torch.manual_seed(3)
    expected = one_by_one(model, weights, 2, options(None))
    after = torch.get_rng_state()
    for engine in (LocalEngine(model, weights), LocalEngine(model, weights, member_tokens=108)):  # all, two at a time
        torch.manual_seed(3)
        same(engine.sample(PROMPTS, 2, options(None), AT), expected)
        assert torch.equal(torch.get_rng_state(), after)


def test_what_cannot_go_together_goes_one_after_another(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    model, weights = policy(adapted("llama", ["q_proj", "embed_tokens"]))
    engine = LocalEngine(model, weights)
    assert engine.abilities.at_once > 1
    torch.manual_seed(3)
    expected = one_by_one(model, weights, 1, options(None))
    torch.manual_seed(3)
    same(engine.sample(PROMPTS, 1, options(None), AT), expected)  # begun together
    same(engine.sample(PROMPTS, 1, options(), AT), one_by_one(model, weights, 1, options()))
    assert [record.getMessage() for record in caplog.records] == [
        "members of a population answer one after another: a displaced tensor is read by __get__"
    ]
    assert engine.abilities.at_once == 1


NOISES = {"gaussian": Gaussian(), "rank 1": LowRank(1), "rank 4": LowRank(4), "targeted": Targeted({}, {}, 9)}


@pytest.mark.parametrize(
    ("kind", "noise"), [("llama", "gaussian"), ("llama", "rank 4"), ("llama", "targeted"), ("qwen3", "rank 1")]
)
def test_full_parameters(kind: str, noise: str) -> None:
    model = tiny_model(kind, tiny_tokenizer(), tie_word_embeddings=kind == "qwen3", attention_bias=kind == "llama")
    weights = Weights.of(model.named_parameters(), NOISES[noise])
    at = [dataclasses.replace(side, eps=(0.02,)) if side else None for side in AT]
    engines = [LocalEngine(model, weights), LocalEngine(model, weights, member_tokens=0)]
    together, apart = (engine.sample(PROMPTS, 2, options(), at) for engine in engines)
    same(together, apart)
    assert engines[0].member_tokens and len({str(rollouts.answers()) for rollouts in together}) > 4


def test_logits_by_pieces_and_products_by_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama", tiny_tokenizer())
    weights = Weights.of(model.named_parameters(), LowRank(1))
    expected = one_by_one(model, weights, 1, options())
    monkeypatch.setattr(few_rows, "LARGE", 64)
    monkeypatch.setattr(sampling, "limits", lambda device: SimpleNamespace(elements=5 * 300))  # 5 rows at a time
    engine = LocalEngine(model, weights)
    same(engine.sample(PROMPTS, 1, options(), AT), expected)
    assert engine.member_tokens


def test_directions_as_large_as_large_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(members, "WIDEST", 31)
    model = tiny_model("llama", tiny_tokenizer())
    expected = "is as large as the matrix, which low_rank's is not"
    with pytest.raises(Apart, match=expected), Members(Weights.of(model.named_parameters(), Gaussian()), AT) as mode:
        mode.choose(torch.zeros(1, dtype=torch.long))
        model(torch.tensor([[1, 2]]))


def test_matrices_are_made_once_for_all_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    model, weights = policy(shared("llama"), "lora_B")
    drawn: list[str] = []
    tensor = Gaussian.tensor

    def counted(self: Gaussian, name: str, *args: Any) -> torch.Tensor:
        drawn.append(name)
        return tensor(self, name, *args)

    monkeypatch.setattr(Gaussian, "tensor", counted)
    LocalEngine(model, weights).sample(PROMPTS, 1, options(), SIDES)
    assert len(drawn) == 2 * len(weights.entries), "both sides read the same z"


def answered(model: Any) -> Batch:
    """Rows of unequal prompts and answers, out of order."""
    rollouts = LocalEngine(model).sample(PROMPTS, 3, Sampling(9, list(range(0, 300, 5)), 0, generator=seeded()))[0]
    return Batch.of(rollouts).rows(torch.tensor([4, 0, 8, 1, 5, 2, 6, 3, 7]))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(1)


def passes(model: Any) -> list[int]:
    rows: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    return rows


@pytest.mark.parametrize("kind", ["llama", "gemma3", "gpt2", "full"])
def test_log_probs_at_all_displacements_are_those_one_after_another(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with rows in groups of like lengths, and with some displacements at a time."""
    if kind == "full":
        model = tiny_model("qwen3", tiny_tokenizer(), tie_word_embeddings=False)
        weights = Weights.of(model.named_parameters(), LowRank(1))
        at = [dataclasses.replace(side, eps=(0.02,)) if side else None for side in AT]
    else:
        (model, weights), at = policy(adapted(kind)), AT
    batch, engine = answered(model), LocalEngine(model, weights)
    with torch.no_grad():
        expected = engine.logprobs(batch, at, 0.7)
        seen = passes(model)
        for tokens, cost, least in ((10**6, None, 2), (10**6, 4, 3), (4 * batch.input_ids.numel(), None, 4)):
            engine.logprob_tokens = tokens
            monkeypatch.setitem(lengths.PASS, "cpu", cost)
            seen.clear()
            for ours, theirs in zip(engine.logprobs(batch, at, 0.7), expected, strict=True):
                torch.testing.assert_close(ours, theirs, atol=1e-5 if kind != "full" else 5e-5, rtol=0)
            assert least <= len(seen) < 2 * len(at), seen
            assert engine.logprob_tokens == tokens, "they went together"
    assert len({str(tokens) for tokens in expected}) == len(AT) - 1, "displacements show; None and t = 0 are theta"


def test_log_probs_that_cannot_be_taken_together(caplog: pytest.LogCaptureFixture) -> None:
    model, weights = policy(adapted("llama", ["q_proj", "embed_tokens"]))
    batch, engine = answered(model), LocalEngine(model, weights)
    with torch.no_grad():
        expected = engine.logprobs(batch, AT)
        engine.logprob_tokens = 10**6
        assert all(map(torch.equal, engine.logprobs(batch, AT), expected))
    (line,) = [record.getMessage() for record in caplog.records]
    assert line == "log-probs at displacements are taken one after another: a displaced tensor is read by __get__"
    assert engine.logprob_tokens == 0


def test_dropout_draws_the_same_masks_at_all_displacements(caplog: pytest.LogCaptureFixture) -> None:
    model, weights = policy(adapted("gpt2"))
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    batch, engine = answered(model), LocalEngine(model.train(), weights)
    with torch.no_grad():
        before = torch.get_rng_state()
        expected, after = engine.logprobs(batch, AT), torch.get_rng_state()
        torch.set_rng_state(before)
        engine.logprob_tokens = 10**6
        assert all(map(torch.equal, engine.logprobs(batch, AT), expected))
    assert torch.equal(torch.get_rng_state(), after) and "dropout" in caplog.text


def test_nothing_to_answer_is_refused() -> None:
    model, weights = policy(shared("llama"))
    with pytest.raises(InputError, match="prompts: must hold at least one prompt"):
        LocalEngine(model, weights).sample([], 2, options(), AT)


@pytest.mark.parametrize("method", ["zopro", "fzoo"])
def test_a_step_takes_all_its_losses_in_one_pass(method: str, tmp_path: Path) -> None:
    """The same records up to rounding; the first step looks which tensors the loss reads, one pass at a time."""
    trainer_cls, sides = (ZOPrOTrainer, 2) if method == "zopro" else (FZOOTrainer, 1)
    records, rows = {}, {}
    for evaluation in ("sequential", "batched"):
        options = {"queries": 3, "sides": sides, "eps": 0.01, "max_steps": 2, "beta": 0.1, "learning_rate": 1e-3}
        model = with_adapter()
        trainer = online(trainer_cls, ZOPrOConfig, tmp_path, {"model": model, "evaluation": evaluation, **options})
        seen, records[evaluation] = passes(model), list[Any]()
        trainer.create_optimizer()
        trainer.spsa.before_apply = records[evaluation].append
        trainer.spsa.measure_noise = False
        trainer.train()
        rows[evaluation] = seen
    for one, other in zip(*records.values(), strict=True):
        assert one.projected_gradients == pytest.approx(other.projected_gradients, rel=1e-2, abs=1e-4)
    assert any(one.projected_gradients != other.projected_gradients for one, other in zip(*records.values(), strict=True))
    displaced = 3 * sides + (sides == 1)
    assert max(rows["sequential"]) == 32 and max(rows["batched"]) in (32 * displaced, 32 * (displaced - 1))
