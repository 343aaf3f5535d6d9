"""An engine with an autocast draws by the policy that its log-probs are of: of any family, displaced or not."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from families import PROMPTS, family, named
from zopro.engine import Batch, Rollouts, Sampling
from zopro.engine.local.engine import LocalEngine
from zopro.zo import Displacement, Gaussian, Weights

AUTOCAST = partial(torch.autocast, "cpu", dtype=torch.bfloat16)
AT = [Displacement(0, query, 0, t, (0.05,)) for query in range(2) for t in (1.0, -1.0)]


FAMILIES = ["llama", "gpt2", "mixtral", "jamba", "qwen3_next"]


def errors(engine: LocalEngine, drawn: list[Rollouts], at: Sequence[Displacement | None]) -> float:
    """Nats a token, in the mean, between log-probs as drawn and as scored."""
    with torch.no_grad():
        scored = [engine.logprobs(Batch.of(rollout), [one])[0] for rollout, one in zip(drawn, at, strict=True)]
    pairs = zip(scored, drawn, strict=True)
    return max(float(((tokens - rollout.logprobs) * rollout.completion_mask).abs().mean()) for tokens, rollout in pairs)


def engines(name: str, member_tokens: int = 0) -> tuple[LocalEngine, LocalEngine]:
    """Under autocast, and not."""
    model = family(name)
    weights = Weights.of(list(named(model).items()), Gaussian())
    return LocalEngine(model, weights, AUTOCAST, member_tokens), LocalEngine(model, weights)


def drawing() -> Sampling:
    return Sampling(4, [2], 0, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", FAMILIES)
def test_answers_are_drawn_by_the_policy_that_is_scored(name: str) -> None:
    cast, plain = engines(name)
    found = cast.sample(PROMPTS, 2, drawing())
    assert errors(cast, found, [None]) < 0.5 * errors(plain, found, [None])
    assert not torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize(("name", "member_tokens"), [("llama", 0), *((name, 2**16) for name in FAMILIES)])
def test_displaced_policies_answer_under_it_too(name: str, member_tokens: int) -> None:
    cast, plain = engines(name, member_tokens)
    found = cast.sample(PROMPTS, 2, drawing(), AT)
    assert 1e-4 < errors(plain, found, AT) < 0.5 and errors(cast, found, AT) < 0.5, "bfloat16's, and no more"
    in_full = plain.sample(PROMPTS, 2, drawing(), AT)
    assert errors(plain, in_full, AT) < 1e-4
