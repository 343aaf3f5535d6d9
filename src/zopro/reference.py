"""The paper's algorithm on one page: plain tensors, its symbols, readable from top to bottom.

ZOPrO: Galatolo, Dai, Winkle, Beloucif, Findings of ACL 2025 (arXiv 2503.03460). [Names in brackets] are those of the
published code, vis_zopro/zopro.py; docs/method.md has the equations, under "The zeroth-order step" and "The direction".
Tests hold `zopro.SPSA`, `zopro.Targeted` and a run's choice of mu and v equal to this page.

    theta      the policy's tensors
    mu, v      what the iteration before added to the policy's, and to the reward model's tensors; v^ = v / |v|
    d          the share of mu in a step's direction
    n, n_perp  Gaussian noise, and its part orthogonal to v, as long as mu
    z          the direction
    eps, g     the distance of the two evaluations, and the slope of the loss along z that they show
    eta        the learning rate
    P, F, s    members of a population, their rewards as weights, their side of a direction (`evolution`, not the paper's)

    python -m zopro.reference          # a toy: the norm of each symbol in every iteration, and what it reaches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

Tensors = dict[str, Tensor]  # name -> tensor: a policy, a reward model, an update of theirs, a direction
ROUNDING = 1e-6  # root mean square under which nothing but rounding is left of n


def previous_updates(policies: list[Tensors], rewards: list[Tensors], i: int) -> tuple[Tensors, Tensors]:
    """mu and v of iteration i > 0, the differences that iteration i - 1 made [previous_update, reward_delta].

    Iteration i starts from policies[i] and is scored by rewards[i]: policies[0] is the SFT policy, rewards[0] the first
    reward model, and rewards[i] was refined on what policies[i] answered.
    """
    mu = {name: policies[i][name] - policies[i - 1][name] for name in policies[i]}
    return mu, {name: rewards[i][name] - rewards[i - 1][name] for name in rewards[i] if name in mu}  # a head has no mu


def share(t: int, steps: int) -> float:
    """d at step t: falls linearly from 1 - 1e-3 (1 would add no noise) to 0 at the last step.

    The published schedule [PrevDecayScheduler] takes 1 / steps off each time, and so ends below 0.

    >>> [round(share(t, 5), 3) for t in range(5)]
    [0.999, 0.749, 0.499, 0.25, 0.0]
    """
    return (1 - 1e-3) * (1 - t / max(1, steps - 1))


def orthogonal(n: Tensor, v: Tensor) -> Tensor:
    """n - <v^, n> v^; all of n where v is 0, by which the published code divides.

    >>> orthogonal(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 3.0])).tolist()
    [1.0, 0.0]
    """
    if not v.any():
        return n
    v_hat = v / v.abs().max()  # first: the squares of very small or large entries leave a number's range
    v_hat = v_hat / v_hat.norm()
    for _ in range(2):  # the second time takes off what the first one left by rounding
        n = n - (v_hat * n).sum() * v_hat
    return n if n.numel() > 1 and rms(n) > ROUNDING else torch.zeros_like(n)  # parallel: there is no orthogonal part


def rms(x: Tensor) -> float:
    """Root mean square of the entries: |x| / sqrt(number of entries)."""
    return float(x.norm()) / math.sqrt(x.numel())


def direction(n: Tensors, mu: Tensors, v: Tensors, d: float, normalize: bool = False) -> tuple[Tensors, Tensors]:
    """n_perp, and z = d mu + sqrt(1 - d^2) n_perp, of each tensor on its own [zo_perturb_params].

    A tensor whose mu is 0 would never move. It takes n_perp alone, at the mean size of the other tensors' entries; as it
    is drawn if there are no others. `normalize` (not the paper's) divides z by the size of mu's entries, of all tensors
    together. Without it a step is proportional to |mu|^2.
    """
    moved = {name: mu[name] for name in n if name in mu and mu[name].any()}
    size = sum(map(rms, moved.values())) / len(moved) if moved else None
    scale = 1 / rms(torch.cat([x.flatten() for x in moved.values()])) if normalize and moved else 1.0
    n_perp, z = {}, {}
    for name, noise in n.items():
        n_perp[name] = orthogonal(noise, v.get(name, torch.zeros_like(noise)))
        wanted = rms(moved[name]) if name in moved else size
        if wanted is not None and n_perp[name].any():
            n_perp[name] = n_perp[name] * (wanted / rms(n_perp[name]))  # now |n_perp| = |mu|
        z[name] = scale * (d * moved[name] + math.sqrt(1 - d**2) * n_perp[name] if name in moved else n_perp[name])
    return n_perp, z


def spsa(
    theta: Tensors, loss: Callable[[Tensors], float], z: Tensors, eps: float, eta: float, decay: float = 0.0
) -> tuple[float, Tensors]:
    """g, and theta after the step [zo_step]. The loss is evaluated twice, on the same samples."""
    plus = loss({name: w + eps * z[name] for name, w in theta.items()})
    minus = loss({name: w - eps * z[name] for name, w in theta.items()})
    g = (plus - minus) / (2 * eps)
    decays = {name: decay if w.dim() > 1 else 0.0 for name, w in theta.items()}  # of matrices, not of biases and norms
    return g, {name: w - eta * (g * z[name] + decays[name] * w) for name, w in theta.items()}


def evolution(
    theta: Tensors, reward: Callable[[Tensors], float], directions: list[Tensors], sigma: float, eta: float
) -> tuple[list[float], Tensors]:
    """F, and theta after one step of an evolution strategy: theta + eta / (P sigma) sum_m F_m s_m z_m.

    Not the paper's: Salimans et al. 2017 (arXiv 1703.03864), Qiu et al. 2025 (2509.24372). Each of the P / 2 directions
    displaces two members, s_m = +-1; F_m are z-scores of their rewards, and no step is taken where these are equal.
    """
    members = [(sign, z) for z in directions for sign in (1, -1)]
    rewards = [reward({name: w + sign * sigma * z[name] for name, w in theta.items()}) for sign, z in members]
    mean = sum(rewards) / len(rewards)
    deviation = math.sqrt(sum((r - mean) ** 2 for r in rewards) / len(rewards))
    F = [(r - mean) / deviation if deviation else 0.0 for r in rewards]
    moved = {name: sum(f * s * z[name] for f, (s, z) in zip(F, members, strict=True)) for name in theta}
    return F, {name: w + eta / (len(members) * sigma) * moved[name] for name, w in theta.items()}


def norm(tensors: Tensors) -> float:
    return math.sqrt(sum(float(x.norm()) ** 2 for x in tensors.values()))


def toy(iterations: int = 5, steps: int = 60, eps: float = 1e-3, eta: float = 0.3) -> Iterator[dict[str, float]]:
    """The loop on a policy that picks one of 8 answers to a prompt of 6 numbers x, by softmax(W x + b).

    The loss is RLOO's in expectation: minus the mean reward of the answers. A reward model is a W and a b too; the first
    one is the judge's with errors, of which each refinement takes a third away. Yields for every iteration the norms of
    the symbols (means over its steps) and the mean reward that the judge gives to the policy after it.
    """
    random = torch.Generator().manual_seed(0)

    def drawn() -> Tensors:
        return {"W": torch.randn(8, 6, generator=random), "b": torch.randn(8, generator=random)}

    def loss(theta: Tensors, reward: Tensors, x: Tensor) -> Tensor:
        answers, scores = (x @ model["W"].T + model["b"] for model in (theta, reward))  # (prompts, 8) each
        return -(answers.softmax(1) * scores).sum(1).mean()

    judge, errors, held_out = drawn(), drawn(), torch.randn(256, 6, generator=random)
    policies = [{name: torch.zeros_like(w) for name, w in judge.items()}]
    rewards = [{name: judge[name] + errors[name] for name in judge}]
    for i in range(iterations):
        theta, reward, seen = policies[i], rewards[i], []
        mu, v = previous_updates(policies, rewards, i) if i else ({}, {})
        for t in range(steps if i else 3):
            batch = torch.randn(16, 6, generator=random)
            if i:
                n, d = drawn(), share(t, steps)
                n_perp, z = direction(n, mu, v, d)
                g, theta = spsa(theta, lambda at, r=reward, x=batch: float(loss(at, r, x)), z, eps, eta)  # type: ignore[misc]
                seen.append({"d": d, "n": norm(n), "n_perp": norm(n_perp), "z": norm(z), "g": abs(g)})
            else:  # nothing came before: first-order steps, as in the paper
                slopes = torch.func.grad(loss)(theta, reward, batch)
                theta = {name: w - slopes[name] for name, w in theta.items()}
        means = {key: sum(line[key] for line in seen) / len(seen) for key in (seen[0] if seen else ())}
        policies.append(theta)
        rewards.append({name: w + (judge[name] - w) / 3 for name, w in reward.items()})
        gained = -float(loss(theta, judge, held_out))
        yield {"mu": norm(mu), "v": norm(v), **means, "eps": eps, "eta": eta, "theta": norm(theta), "reward": gained}


if __name__ == "__main__":
    for i, line in enumerate(toy()):
        print(f"iteration {i}: " + ", ".join(f"{name} {value:.3g}" for name, value in line.items()))
