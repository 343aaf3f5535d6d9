"""Decoding from a cache of fixed size against transformers' own `generate` and the plain loop, captured on a GPU.

make test-gpu          # the same tests on CUDA, from graphs
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from families import family_model
from taped import Taped
from tiny import KINDS, tiny_model, tiny_tokenizer
from zopro.engine import Sampling
from zopro.engine.gpu import decoding, memory
from zopro.engine.gpu.trial import NoHostReads
from zopro.engine.local.abilities import abilities
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.engine import LocalEngine
from zopro.engine.local.members import Members
from zopro.engine.local.rollouts import Rollouts, generate
from zopro.zo import Gaussian
from zopro.zo.displacement import Displacement
from zopro.zo.records import StepRecord
from zopro.zo.weights import Weights

PROMPTS = [[1, 40, 41], [1, 50, 60, 70, 80, 90, 100, 110, 120, 130, 140], [1, 7], [1, 9, 200, 201, 9, 200, 201]]
STOPS = list(range(0, 300, 7))  # a seventh of the vocabulary: rows end early, at different steps
OF_KIND: dict[str, dict[str, Any]] = {"mistral": {"sliding_window": 6}}
FAMILIES = (*KINDS, "mistral", "gemma2")  # gemma2: soft caps of attention and logits
SAMPLED = [{}, {"temperature": 0.7, "top_k": 20}, {"top_p": 0.8, "min_p": 0.02}]
DRAWN = [*(("llama", how) for how in SAMPLED), ("gemma2", {})]  # a token is drawn alike whatever else the kind is


def model_of(kind: str, device: str) -> Any:
    if kind == "gemma2":
        caps = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "attn_implementation": "eager"}
        return family_model(kind, vocab_size=300, **caps).to(device)
    return tiny_model(kind, tiny_tokenizer(), seed=1, **OF_KIND.get(kind, {})).to(device)


def adapted(model: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        return get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)).eval()


ON_GPU = pytest.param("cuda", marks=pytest.mark.cuda)
WHERE = [*((kind, "replayed") for kind in FAMILIES), ("llama", "uncaptured"), ("gemma3", "uncaptured")]
WHERE += [pytest.param(kind, "cuda", marks=pytest.mark.cuda) for kind in FAMILIES]


@pytest.fixture(params=["replayed", ON_GPU])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Fixed decoding there, with so small buckets and so frequent looks that tiny batches pass through several."""
    name = "cuda" if request.param == "cuda" else "cpu"
    if request.param == "replayed":
        monkeypatch.setattr(decoding, "Uncaptured", Taped)
    monkeypatch.setattr(decoding, "DEVICES", {name})
    monkeypatch.setattr(decoding, "LOOK", 3)
    monkeypatch.setattr(memory, "LEAST_COLUMNS", 8)
    return name


@pytest.fixture
def buckets(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(columns, rows, seen) of the steps that run from now on."""
    seen: list[tuple[int, int, int]] = []
    for runner in {decoding.Graphs, decoding.Uncaptured}:
        run = runner.run

        def counted(self: Any, key: Any, *args: Any, run: Any = run) -> None:
            seen.extend([] if key == "trial" else [key[-3:]])
            run(self, key, *args)

        monkeypatch.setattr(runner, "run", counted)
    return seen


def plainly(*args: Any, **options: Any) -> Rollouts:
    """`generate` by the plain loop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoding, "DEVICES", set())
        return generate(*args, **options)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def assert_same(found: Rollouts, expected: Rollouts) -> None:
    for name, value in vars(expected).items():
        if name == "logprobs":
            torch.testing.assert_close(found.logprobs, value, atol=1e-5, rtol=0)
        else:
            assert torch.equal(getattr(found, name), value), name


def rows_of(rollouts: Rollouts) -> list[list[int]]:
    lengths = rollouts.completion_mask.sum(1).tolist()
    return [row[:n] for row, n in zip(rollouts.completion_ids.tolist(), lengths, strict=True)]


def theirs(model: Any, length: int, stops: list[int]) -> list[list[int]]:
    """Completions of transformers' own generate, cut after a stop."""
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (width - len(p)) + p for p in PROMPTS], device=model.device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS], device=model.device)
    options = {"max_new_tokens": length, "eos_token_id": stops, "pad_token_id": 0, "do_sample": False}
    rows = model.generate(input_ids=ids, attention_mask=mask, **options)[:, width:].tolist()
    return [row[: next((i + 1 for i, token in enumerate(row) if token in stops), length)] for row in rows]


@pytest.mark.parametrize(("kind", "device"), WHERE, indirect=["device"])
def test_greedy_equals_transformers_generate(kind: str, device: str, buckets: list[Any]) -> None:
    """Left padding, early stops, and more tokens than any window and the smallest bucket hold."""
    model = model_of(kind, device)
    options = {"max_new_tokens": 20, "pad_token_id": 0, "do_sample": False}
    first = rows_of(generate(model, PROMPTS, eos_token_ids=[-1], **options))
    assert first == theirs(model, 20, [-1])
    assert len({seen for _, _, seen in buckets}) > 1
    stops = [first[0][4], first[1][9], first[2][15]]
    assert rows_of(generate(model, PROMPTS, eos_token_ids=stops, **options)) == theirs(model, 20, stops)
    assert {rows for _, rows, _ in buckets} > {4}, "rows that end leave"


@pytest.mark.parametrize(("kind", "how"), [*DRAWN, ("gemma3", {})], ids=str)
def test_samples_what_the_plain_loop_samples(kind: str, how: dict[str, Any], device: str, buckets: list[Any]) -> None:
    model = adapted(model_of(kind, device))
    options = {"num_generations": 5, "max_new_tokens": 16, "eos_token_ids": STOPS, "pad_token_id": 0, **how}
    found = generate(model, PROMPTS, generator=seeded(), **options)
    assert len({rows for _, rows, _ in buckets}) > 1
    assert_same(found, plainly(model, PROMPTS, generator=seeded(), **options))
    if not how and kind != "gemma2":
        smaller = generate(model, PROMPTS[:2], generator=seeded(1), **options)  # in the memory of the larger batch
        assert_same(smaller, plainly(model, PROMPTS[:2], generator=seeded(1), **options))
        apart = generate(model, PROMPTS, generator=seeded(), max_batch_tokens=1, **options)
        assert rows_of(apart) == rows_of(found)


def test_a_token_of_each_and_one_token_alone(device: str) -> None:
    model = model_of("llama", device)
    for length, stops in ((1, [-1]), (8, range(300))):  # every row ends at once
        options = {"max_new_tokens": length, "eos_token_ids": stops, "pad_token_id": 0, "generator": seeded()}
        assert_same(generate(model, PROMPTS, **options), plainly(model, PROMPTS, **{**options, "generator": seeded()}))


def test_adapters_that_change_in_place_are_read_anew(device: str) -> None:
    """Displacements, both sides, steps between them, another adapter, and none: as the plain loop."""
    model = adapted(model_of("llama", device))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    engine = LocalEngine(model, Weights.of(named, Gaussian(), "in_place"))
    fixed, plain = [], []
    for step in range(2):
        at = [None, *(Displacement(0, query, step, t, (0.1,)) for query in range(2) for t in (1.0, -1.0))]
        options = Sampling(8, STOPS, 0, generator=seeded(step))
        fixed += engine.sample(PROMPTS, 2, options, at)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoding, "DEVICES", set())
            plain += engine.sample(PROMPTS, 2, Sampling(8, STOPS, 0, generator=seeded(step)), at)
        engine.apply(record(step))
    for found, expected in zip(fixed, plain, strict=True):
        assert_same(found, expected)
    assert len({str(rows_of(found)) for found in fixed}) > 7
    options = {"max_new_tokens": 12, "eos_token_ids": [-1], "pad_token_id": 0, "do_sample": False}  # the same buckets
    with model.disable_adapter():
        assert_same(generate(model, PROMPTS, **options), plainly(model, PROMPTS, **options))
    model.add_adapter("other", LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    model.set_adapter("other")
    assert_same(generate(model, PROMPTS, **options), plainly(model, PROMPTS, **options))


def test_members_go_together_from_the_same_graphs(device: str, buckets: list[Any]) -> None:
    """Prompts of several lengths, two populations: the second's matrices come to where the first's were."""
    model = adapted(model_of("gemma3", device))
    weights = Weights.of([(name, p) for name, p in model.named_parameters() if p.requires_grad], Gaussian(), "in_place")
    options = {"num_generations": 2, "max_new_tokens": 8, "pad_token_id": 0}
    answers, held = set(), []
    for step, stops in enumerate((STOPS, [-1], [-1])):
        at = [None, *(Displacement(0, query, step, t, (0.2,)) for query in range(2) for t in (1.0, -1.0))]
        given = [{"eos_token_ids": stops, "generator": seeded(step), "members": Members(weights, at)} for _ in range(2)]
        found = generate(model, PROMPTS, **options, **given[0])
        assert_same(found, plainly(model, PROMPTS, **options, **given[1]))
        answers.add(str(rows_of(found)))
        held.append(len(decoding._known[model.get_base_model()].graphs._graphs))
    assert len(answers) == 3 and {rows for _, rows, _ in buckets} == {5 * 4 * 2}
    assert held[0] < held[1] == held[2], "other stops, then other matrices"


def record(step: int) -> StepRecord:
    return StepRecord(
        step=step, seed=0, projected_gradients=[1.0], coefficients=[1.0], learning_rates=[0.05], eps=[1.0],
        weight_decay=[0.0], loss=0.0, signal_to_noise=1.0, skipped=False,
    )  # fmt: skip


def test_bare_passes_are_those_of_decoding(device: str, buckets: list[Any]) -> None:
    """What a benchmark compares a step with; both from graphs."""
    model = model_of("llama", device)
    generate(model, PROMPTS[:1], num_generations=3, max_new_tokens=15, eos_token_ids=[-1], pad_token_id=0)
    decoded, ids = buckets.copy(), torch.tensor(PROMPTS[:1], device=device)
    buckets.clear()
    parts = causal_parts(model)
    with torch.no_grad(), decoding.fixed_decoding(parts, abilities(parts)) as fixed:
        assert fixed is not None
        fixed.passes(parts, ids, torch.ones_like(ids), 3, 15)
    assert buckets == decoded


def test_numbers_of_a_broken_batch_do_not_stay(device: str) -> None:
    model = model_of("llama", device)
    options = {"max_new_tokens": 6, "eos_token_ids": STOPS, "pad_token_id": 0, "do_sample": False}
    expected = generate(model, PROMPTS, **options)
    weight = model.model.layers[0].self_attn.v_proj.weight
    kept = weight.detach().clone()
    with torch.no_grad():
        weight.fill_(torch.nan)
        with pytest.raises(FloatingPointError):
            generate(model, PROMPTS, **options)
        weight.copy_(kept)
    assert_same(generate(model, PROMPTS, **options), expected)


def test_memory_made_in_inference_mode_serves_outside_of_it(device: str) -> None:
    model = model_of("llama", device)
    options = {"max_new_tokens": 8, "eos_token_ids": [-1], "pad_token_id": 0, "do_sample": False}
    generate(model, PROMPTS[:1], **options)
    with torch.inference_mode():
        inside = generate(model, PROMPTS, num_generations=2, **options)
    assert_same(generate(model, PROMPTS, num_generations=2, **options), inside)


@pytest.mark.parametrize(("kind", "how"), [*DRAWN, ("gemma3", {"do_sample": False})], ids=str)
def test_a_step_waits_for_no_host(kind: str, how: dict[str, Any], device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole step, drawing and stop test too. That the check can fail, the next test shows."""
    step, steps = decoding.decoding_step, []

    def watched(*args: Any) -> None:
        steps.append(args)
        with NoHostReads():
            step(*args)

    monkeypatch.setattr(decoding, "decoding_step", watched)
    model = adapted(model_of(kind, device))
    generate(model, PROMPTS, max_new_tokens=5, eos_token_ids=STOPS, pad_token_id=0, generator=seeded(), **how)
    assert steps


def test_nothing_is_captured_while_tensors_are_made_for_one_pass(
    device: str, buckets: list[Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A virtual displacement: a graph would go on reading what it made."""
    monkeypatch.setattr(decoding, "_said", set())
    model = adapted(model_of("llama", device))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    at = [Displacement(0, 0, 0, t, (0.1,)) for t in (1.0, -1.0)]
    found = {}
    for kind in ("virtual", "in_place"):
        engine = LocalEngine(model, Weights.of(named, Gaussian(), kind), member_tokens=0)
        found[kind] = engine.sample(PROMPTS, 2, Sampling(6, STOPS, 0, generator=seeded()), at)
        assert bool(buckets) == (kind == "in_place")
    assert [rows_of(one) for one in found["virtual"]] == [rows_of(one) for one in found["in_place"]]
    (line,) = [entry.message for entry in caplog.records if entry.name == decoding.__name__]
    assert "made for one pass" in line


def test_hooks_are_called(device: str, buckets: list[Any]) -> None:
    model, calls = model_of("llama", device), []
    hook = model.model.layers[0].register_forward_hook(lambda *args: calls.append(1))
    options = {"max_new_tokens": 6, "eos_token_ids": [-1], "pad_token_id": 0, "do_sample": False}
    expected = generate(model, PROMPTS, **options)
    assert len(calls) > 6 and not buckets
    hook.remove()
    assert_same(generate(model, PROMPTS, **options), expected)
    assert buckets


@pytest.mark.parametrize(
    ("kind", "options", "reason"),
    [
        ("qwen3_next", {}, "its cache has a"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}, "waits for the host"),
    ],
)
def test_what_cannot_be_captured_is_said_once(
    kind: str, options: Any, reason: str, device: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decoding, "_said", set())
    model = family_model(kind, **options).to(device)
    arguments = {"max_new_tokens": 4, "eos_token_ids": [-1], "pad_token_id": 0, "do_sample": False}
    prompts = [[5, 9, 71], [13, 50, 7, 28]]
    with caplog.at_level(logging.WARNING, logger=decoding.__name__):
        found = [generate(model, prompts, **arguments) for _ in range(2)]
    (line,) = [entry.message for entry in caplog.records if entry.name == decoding.__name__]
    assert line.startswith(f"model: {kind} decodes without CUDA graphs, since ") and reason in line
    assert_same(found[0], plainly(model, prompts, **arguments))
