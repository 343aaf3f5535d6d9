"""llama.cpp itself, over tiny models written as GGUF files, against transformers' forward pass of the same weights."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor

from served_policies import PROMPTS, batch, check_slope, displacements, trained, true_logprobs
from tiny import TEXTS, tiny_model, tiny_tokenizer
from zopro.engine import Rollouts, Sampling
from zopro.engine.local.engine import LocalEngine
from zopro.errors import InputError
from zopro.zo import Gaussian, StepRecord, Weights

pytest.importorskip("xllamacpp", reason="needs zopro[llamacpp]")
gguf = pytest.importorskip("gguf", reason="writes the test's GGUF files")

from tiny_gguf import write_gguf  # noqa: E402
from zopro.engine.servers.llamacpp import adapter, engine, library  # noqa: E402
from zopro.engine.servers.llamacpp.engine import LlamaCppEngine, new_tensors  # noqa: E402
from zopro.engine.servers.llamacpp.model import Model  # noqa: E402

KINDS = ("llama", "qwen3")  # rows of q and k in another order than transformers', and in the same
AT = displacements(0.05)
PLUS = AT[1]
OPTIONS: dict[str, Any] = {"max_new_tokens": 6, "eos_token_ids": [2], "pad_token_id": 0}
ROUNDING = 2e-5  # nats, of fp32 sums in another order


class Both:
    """A policy in transformers with PEFT, and the same one in llama.cpp."""

    def __init__(self, kind: str, folder: Path) -> None:
        tokenizer = tiny_tokenizer()
        base = tiny_model(kind, tokenizer)
        self.tokenizer = tokenizer
        self.path = write_gguf(folder / f"{kind}.gguf", base, tokenizer, kind)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            config = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", init_lora_weights=False)
            self.policy = get_peft_model(base, config).eval()
        self.local = LocalEngine(self.policy, Weights.of(self.named(), Gaussian()))
        copies = [(name, tensor.detach().clone()) for name, tensor in self.named()]
        self.other = LlamaCppEngine(Model(self.path, threads=1), Weights.of(copies, Gaussian()), alpha=6)

    def theta(self) -> list[tuple[str, Tensor]]:
        group = self.other.weights.groups[0]
        return list(zip(group["param_names"], group["params"], strict=True))

    def named(self) -> list[tuple[str, Tensor]]:
        return trained(self.policy)


@pytest.fixture(scope="module", params=KINDS)
def both(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Both]:
    yield (made := Both(request.param, tmp_path_factory.mktemp("gguf")))
    made.other.model.close()


def test_logprobs_are_those_of_transformers_at_every_displacement(both: Both) -> None:
    found = both.other.logprobs(batch(), AT, temperature=0.7)
    wanted = true_logprobs(both.policy, AT, temperature=0.7)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, atol=ROUNDING, rtol=0)
    assert all((one - other).abs().max() > 0.05 for one, other in pairwise(wanted))


def test_slopes_at_the_chosen_distance_are_autograds(both: Both) -> None:
    check_slope(both.other, both.policy)


def test_theta_reads_to_the_same_bits_after_displacements(both: Both) -> None:
    first, plus, again = both.other.logprobs(batch(), [None, PLUS, None])
    assert torch.equal(first, again) and not torch.equal(first, plus)


def test_an_adapter_that_is_zero_is_the_model_without_one(both: Both) -> None:
    with both.policy.disable_adapter():
        wanted = true_logprobs(both.policy, [None])[0]
    new = Weights.of(new_tensors(both.other.model, 4, "all-linear", seed=0).items(), Gaussian())
    found = LlamaCppEngine(both.other.model, new, alpha=8).logprobs(batch())[0]
    torch.testing.assert_close(found, wanted, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize(
    "how", [{"do_sample": False}, {"temperature": 0.8}, {"top_k": 7, "top_p": 0.9, "min_p": 0.02}], ids=str
)
def test_the_same_seeds_draw_the_same_tokens_as_in_transformers(both: Both, how: dict[str, Any]) -> None:
    def options() -> Sampling:
        return Sampling(**OPTIONS, **how, generator=[torch.Generator().manual_seed(row) for row in range(6)])

    found, wanted = both.other.sample(PROMPTS, 3, options(), AT), both.local.sample(PROMPTS, 3, options(), AT)
    for one, other in zip(found, wanted, strict=True):
        check_same(one, other)
    assert not torch.equal(found[0].completion_ids, found[1].completion_ids)


def check_same(one: Rollouts, other: Rollouts) -> None:
    for name in ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    torch.testing.assert_close(one.logprobs, other.logprobs, atol=ROUNDING, rtol=0)


@pytest.mark.parametrize("given", ["one", "none"])
def test_random_numbers_are_common_and_come_from_where_the_local_engine_takes_them(both: Both, given: str) -> None:
    def draw(engine_: Any) -> list[Rollouts]:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(5)
            one = torch.Generator().manual_seed(1) if given == "one" else None
            return list(engine_.sample(PROMPTS, 2, Sampling(**OPTIONS, generator=one), [None, PLUS, None]))

    found, wanted = draw(both.other), draw(both.local)
    for one, other in zip(found, wanted, strict=True):
        check_same(one, other)
    check_same(found[0], found[2])


def test_what_goes_together_changes_nothing(both: Both, monkeypatch: pytest.MonkeyPatch) -> None:
    options = Sampling(**OPTIONS, do_sample=False)
    whole, scores = both.other.sample(PROMPTS, 3, options)[0], both.other.logprobs(batch())[0]
    monkeypatch.setattr(engine, "CELLS", 8)
    monkeypatch.setattr(engine, "MOST_ROWS", 1)
    alone = LlamaCppEngine(Model(both.path, threads=1), both.other.weights, alpha=6)
    check_same(alone.sample(PROMPTS, 3, options)[0], whole)
    torch.testing.assert_close(alone.logprobs(batch())[0], scores, atol=ROUNDING, rtol=0)
    alone.model.close()


def test_a_record_moves_theta_as_it_moves_the_local_engine(both: Both) -> None:
    theta = [(name, tensor.clone()) for name, tensor in both.theta()]
    record = StepRecord(
        step=2, seed=4, projected_gradients=[0.5], coefficients=[0.5], learning_rates=[0.1], eps=[1e-3],
        weight_decay=[0.01], loss=1.0, signal_to_noise=1.0, skipped=False,
    )  # fmt: skip
    moved, own = Weights.of(theta, Gaussian()), [(name, tensor.clone()) for name, tensor in theta]
    moved.apply(record)
    other = LlamaCppEngine(both.other.model, Weights.of(own, Gaussian()), alpha=6)
    other.apply(record)
    assert all(torch.equal(one, two) for (_, one), (_, two) in zip(theta, own, strict=True))
    assert not torch.equal(other.logprobs(batch())[0], both.other.logprobs(batch())[0])


def test_llama_cpp_encodes_as_the_tokenizer_does(both: Both) -> None:
    for text in (*TEXTS, "<bos>tea<eos>", "Zu spät: 3,5 Ü!\n\n  "):
        assert both.other.model.tokens(text) == both.tokenizer(text, add_special_tokens=False)["input_ids"], text


def test_the_adapter_file_is_what_llama_cpps_own_reader_reads(both: Both, tmp_path: Path) -> None:
    data = both.other.adapter_file(PLUS)
    assert data is not None
    (tmp_path / "adapter.gguf").write_bytes(data)
    reader = gguf.GGUFReader(tmp_path / "adapter.gguf")
    found = {tensor.name: tensor.data for tensor in reader.tensors}
    policy = both.other.weights.at(PLUS)
    down = policy["model.layers.1.mlp.down_proj.lora_B.weight"]
    assert torch.equal(torch.tensor(found["blk.1.ffn_down.weight.lora_b"]), down)
    assert len(found) == len(policy) and reader.fields["adapter.lora.alpha"].contents() == 6


def test_quantised_weights_answer_nearly_as_the_numbers_they_stand_for(tmp_path: Path) -> None:
    """Not more than nearly: what goes into a product is quantised, too."""
    tokenizer = tiny_tokenizer()
    base = tiny_model("llama", tokenizer)
    model = Model(write_gguf(tmp_path / "q8.gguf", base, tokenizer, "llama", "Q8_0"), threads=1)
    for name, weight in base.named_parameters():
        if weight.dim() == 2:
            type_ = gguf.GGMLQuantizationType.Q8_0
            values = gguf.quants.dequantize(gguf.quants.quantize(weight.detach().numpy(), type_), type_)
            weight.data.copy_(torch.tensor(values))
        assert weight.dtype == torch.float32, name
    new = Weights.of(new_tensors(model, 4, "down_proj, q_proj", seed=0).items(), Gaussian())
    found = LlamaCppEngine(model, new, alpha=8).logprobs(batch())[0]
    error = (found - true_logprobs(base, [None])[0]).abs().max()
    assert 1e-4 < error < 0.1
    model.close()


def test_a_split_model_takes_adapters_on_all_its_blocks(both: Both, tmp_path: Path) -> None:
    with both.policy.disable_adapter():
        base = both.policy.get_base_model()
        wanted = true_logprobs(both.policy, [None])[0]
    weights = {name.replace(".base_layer.", "."): t for name, t in base.state_dict().items() if ".lora_" not in name}
    whole = type(base)(base.config)
    whole.load_state_dict(weights)
    first = write_gguf(tmp_path / "split.gguf", whole, both.tokenizer, both.path.stem, tensors_a_file=9)
    model = Model(first, threads=1)
    assert model.tensors == both.other.model.tensors and first.name.startswith("split-00001-of-")
    new = Weights.of(new_tensors(model, 4, "all-linear", seed=0).items(), Gaussian())
    torch.testing.assert_close(LlamaCppEngine(model, new, alpha=8).logprobs(batch())[0], wanted, atol=ROUNDING, rtol=0)
    model.close()


def test_adapters_begin_as_peft_begins_them() -> None:
    made = adapter.fresh({"up": (8, 4096)}, rank=64, seed=1)
    assert made["up.lora_A.weight"].std() == pytest.approx(1 / 64 / 3**0.5, rel=0.01)
    assert not made["up.lora_B.weight"].any()


def test_what_does_not_fit_is_refused(both: Both, tmp_path: Path) -> None:
    def with_tensor(name: str, *shape: int) -> None:
        LlamaCppEngine(both.other.model, Weights.of([(name, torch.zeros(shape))], Gaussian()), alpha=8)

    (tmp_path / "no.gguf").write_bytes(b"no")
    (tmp_path / "cut.gguf").write_bytes(both.path.read_bytes()[:-64])
    (tmp_path / "odd.gguf").write_bytes(both.path.read_bytes().replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mode_"))
    for refused, what in (
        (lambda: Model(tmp_path / "none.gguf"), "must be given a GGUF file, got .*none.gguf"),
        (lambda: Model(tmp_path / "no.gguf"), "llama.cpp cannot load .*no.gguf"),
        (lambda: Model(tmp_path / "cut.gguf"), r"llama.cpp cannot load .*cut.gguf.* \(.*not within the file bounds"),
        (lambda: Model(tmp_path / "odd.gguf"), r"llama.cpp cannot load .*odd.gguf.* \(.*tokenizer.ggml.model"),
        (lambda: with_tensor("lm_head.lora_A.weight", 4, 32), "'lm_head', which .* does not have"),
        (lambda: with_tensor("model.layers.0.mlp.up_proj.lora_A.weight", 4, 31), "64 x 32, got .* 4 x 31"),
        (lambda: with_tensor("model.layers.0.mlp.up_proj.weight", 4, 32), "plain LoRA"),
        (lambda: with_tensor("model.layers.0.mlp.up_proj.lora_A.weight", 4, 32), "must have A and B of each module"),
        (lambda: new_tensors(both.other.model, 4, "up_proj, nap", seed=0), "among down_proj, .* got 'nap'"),
        (lambda: both.other.sample([[]], 1, Sampling(**OPTIONS)), "prompt 0 has no token"),
        (lambda: both.other.sample([[5] * 123], 1, Sampling(**OPTIONS)), "exceeds the model's context of 128"),
        (lambda: both.other.sample(PROMPTS, 0, Sampling(**OPTIONS)), "num_generations: must be at least 1, got 0"),
        (lambda: adapter.heads_of("blk.0.attn_q.weight", "new", 4, 2), "must leave out q_proj and k_proj"),
    ):
        with pytest.raises(InputError, match=what):
            refused()


def test_a_library_with_other_structs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    library.opened.cache_clear()
    monkeypatch.setitem(library._CONTEXT_DEFAULTS, "type_k", 7)
    with pytest.raises(InputError, match=f"must have the library of xllamacpp {library.VERSION}"):
        library.opened()
    library.opened.cache_clear()
