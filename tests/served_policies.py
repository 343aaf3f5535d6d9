"""What an engine that serves is held to: transformers' forward pass of the same weights, at theta and displaced."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from zopro.engine import Batch
from zopro.weights.adapters import tensor_name
from zopro.zo import Displacement, Gaussian
from zopro.zo.eps import auto_eps

PROMPTS = [[5, 9, 71, 33, 20], [13, 50, 7]]


def displacements(eps: float) -> list[Displacement | None]:
    """theta, both sides of a direction, and half of another one."""
    plus = Displacement(seed=3, query=0, step=1, t=1.0, eps=(eps,))
    return [None, plus, plus.mirrored, Displacement(seed=3, query=1, step=1, t=0.5, eps=(eps,))]


def batch() -> Batch:
    rows = [(PROMPTS[0], [30, 6, 88]), (PROMPTS[1], [47]), (PROMPTS[0], [81, 66, 24, 10, 2])]
    ids = [[0] * (5 - len(p)) + p + a + [0] * (5 - len(a)) for p, a in rows]
    mask = [[0] * (5 - len(p)) + [1] * (len(p) + len(a)) + [0] * (5 - len(a)) for p, a in rows]
    return Batch(torch.tensor(ids), torch.tensor(mask), 5)


def picked(model: Any, rows: Batch, temperature: float = 1.0) -> Tensor:
    """Log-probs of the completions' tokens, by one whole forward pass."""
    places = (rows.attention_mask.cumsum(1) - 1).clamp(min=0)
    logits = model(rows.input_ids, attention_mask=rows.attention_mask, position_ids=places).logits / temperature
    tokens = logits.log_softmax(-1)[:, :-1].gather(-1, rows.input_ids[:, 1:, None])[..., 0]
    return tokens[:, -rows.completion_length :] * rows.completion_mask


def trained(policy: Any) -> list[tuple[str, Tensor]]:
    return [(tensor_name(name), p) for name, p in policy.named_parameters() if p.requires_grad]


def displaced(policy: Any, at: Displacement | None) -> Any:
    model = copy.deepcopy(policy)
    for name, parameter in trained(model) if at is not None else ():
        assert at is not None
        z = Gaussian().tensor(name, parameter, at.direction_seed, at.step)
        parameter.data.add_(z, alpha=at.t * at.eps[0])
    return model


@torch.no_grad()
def true_logprobs(policy: Any, at: Sequence[Displacement | None], temperature: float = 1.0) -> list[Tensor]:
    """Of `batch`, at each displacement."""
    return [picked(displaced(policy, one), batch(), temperature) for one in at]


def check_slope(engine: Any, policy: Any) -> None:
    """The slope at the eps that auto chooses is autograd's."""
    rows, named = batch(), trained(policy)

    def loss_at(t: float) -> float:
        return -float(engine.logprobs(rows, [Displacement(7, 0, 0, t, (1.0,))])[0].double().sum())

    eps, noise = auto_eps(loss_at)
    gradients = torch.autograd.grad(-picked(policy, rows).sum(), [p for _, p in named])
    z = Gaussian().sample(named, seed=7, step=0)
    wanted = sum(float((g * z[name]).sum()) for g, (name, _) in zip(gradients, named, strict=True))
    found = (loss_at(eps) - loss_at(-eps)) / (2 * eps)
    print(f"eps {eps:.2g}, noise {noise:.2g}, slope {found:.4g}, autograd {wanted:.4g}")
    assert found == pytest.approx(wanted, rel=0.1, abs=3 * noise / eps) and abs(wanted) > 10 * noise / eps
