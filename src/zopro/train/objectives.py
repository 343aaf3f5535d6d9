"""What a policy is optimised for: advantages, surrogates and divergences as pure functions of tensors.

Every function takes values a row (a sampled completion) or a token and returns tensors; none knows a model, a trainer
or how its gradient is estimated, so first-order and zeroth-order methods share them. The rows of one prompt are
consecutive: rows i K to (i + 1) K - 1 are the K completions of prompt i.

    python -c "import torch, zopro.train.objectives as o; print(o.rloo_advantages(torch.tensor([1.0, 3.0]), 2))"
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

__all__ = [
    "best_and_worst",
    "clipped_surrogate",
    "group_normalised_advantages",
    "kl_estimates",
    "log_ratio_surrogate",
    "online_dpo_loss",
    "rloo_advantages",
]

STD_OFFSET = 1e-4  # added to a group's standard deviation, as TRL's GRPOTrainer does


def rloo_advantages(rewards: Tensor, num_generations: int) -> Tensor:
    """Leave-one-out advantages, A_k = r_k - sum_{j != k} r_j / (K - 1) (Kool et al. 2019; Ahmadian et al. 2024).

    Args:
        rewards: (B,), the score less beta times the divergence. NaN marks a completion that could not be scored: it
            leaves the baselines of the others alone and has advantage 0, as has one whose siblings are all NaN.
        num_generations: K, at least 2.

    Returns:
        (B,) advantages. They sum to 0 over a group without NaN.

    Raises:
        ValueError: K is less than 2 or does not divide B.

    >>> rloo_advantages(torch.tensor([1.0, 3.0, 0.0, 0.0]), 2)
    tensor([-2.,  2.,  0.,  0.])
    """
    grouped = _grouped(rewards, num_generations)
    others = grouped.isfinite().sum(1, keepdim=True) - 1
    baselines = (grouped.nansum(1, keepdim=True) - grouped) / others
    return (grouped - baselines).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0).flatten()


def group_normalised_advantages(rewards: Tensor, num_generations: int, scale: bool = True) -> Tensor:
    """GRPO's advantages, A_k = (r_k - mean(r)) / (std(r) + 1e-4) over a prompt's K rewards (Shao et al. 2024).

    Args:
        rewards: (B,); NaN as in `rloo_advantages`.
        num_generations: K, at least 2.
        scale: divide by the (unbiased) standard deviation; False only centres (Liu et al. 2025).

    Returns:
        (B,) advantages.

    Raises:
        ValueError: K is less than 2 or does not divide B.

    >>> group_normalised_advantages(torch.tensor([1.0, 3.0, 0.0, 0.0]), 2, scale=False)
    tensor([-1.,  1.,  0.,  0.])
    """
    grouped = _grouped(rewards, num_generations)
    centred = grouped - grouped.nanmean(1, keepdim=True)
    if scale:
        count = grouped.isfinite().sum(1, keepdim=True)
        deviation = (centred.square().nansum(1, keepdim=True) / (count - 1)).sqrt().nan_to_num(nan=0.0)
        centred = centred / (deviation + STD_OFFSET)
    return centred.nan_to_num(nan=0.0).flatten()


def clipped_surrogate(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, epsilon_low: float = 0.2, epsilon_high: float = 0.2
) -> Tensor:
    """PPO's clipped surrogate with one ratio a sequence, as RLOO uses it (Schulman et al. 2017; Ahmadian et al. 2024).

        rho = exp(log pi(y|x) - log pi_old(y|x)),   L = -mean(min(rho A, clip(rho, 1 - e_low, 1 + e_high) A)).

    On-policy rho = 1, so L = -mean(A) and dL / d log pi(y_k|x) = -A_k / B: known without an evaluation.

    Args:
        logprobs, old_logprobs: (B,), sums over a completion's tokens, in nats.
        advantages: (B,).

    Returns:
        The scalar loss, differentiable in `logprobs`.

    >>> old, advantages = torch.tensor([-2.0, -3.0]), torch.tensor([1.0, -3.0])
    >>> clipped_surrogate(old, old, advantages)  # on-policy: minus the mean advantage
    tensor(1.)
    """
    ratio = (logprobs - old_logprobs).exp()
    clipped = ratio.clamp(1 - epsilon_low, 1 + epsilon_high)
    return -torch.min(ratio * advantages, clipped * advantages).mean()


def log_ratio_surrogate(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """REINFORCE's surrogate around the policy that drew the completions: L = -mean(A (log pi(y|x) - log pi_old(y|x))).

    On-policy its gradient is the clipped surrogate's. To finite differences it is the better one: a ratio is exponential
    and clipped where a log-probability has moved by 0.18 nats, which rounding to bfloat16 alone can do; a log-ratio goes
    on. L = 0 on-policy. Arguments as `clipped_surrogate`; the sum is taken in fp64.

    >>> old = torch.tensor([-2.0, -3.0])
    >>> float(log_ratio_surrogate(old + 0.5, old, torch.tensor([1.0, 3.0])))
    -1.0
    """
    return -((logprobs.double() - old_logprobs) * advantages).mean()


def best_and_worst(rewards: Tensor, num_generations: int) -> tuple[Tensor, Tensor]:
    """Rows (B / K,) int64 with the highest and the lowest reward of each prompt; of equal ones the first and the last.

    A reward of NaN, of an answer that has none, is neither.

    Raises:
        ValueError: K is less than 2 or does not divide B.

    >>> best_and_worst(torch.tensor([1.0, 3.0, 2.0, 2.0]), 2)
    (tensor([1, 2]), tensor([0, 3]))
    """
    grouped = _grouped(rewards, num_generations)
    first = torch.arange(len(grouped), device=rewards.device) * num_generations
    worst = num_generations - 1 - grouped.nan_to_num(nan=torch.inf).flip(1).argmin(1)
    return first + grouped.nan_to_num(nan=-torch.inf).argmax(1), first + worst


def online_dpo_loss(
    logprobs: Tensor, reference_logprobs: Tensor, rewards: Tensor, num_generations: int, beta: float
) -> Tensor:
    """Online DPO: the best against the worst of K completions (Guo et al. 2024; loss: Rafailov et al. 2023).

        L = -mean(log sigmoid(beta [(log pi - log pi_ref)(y_best) - (log pi - log pi_ref)(y_worst)])).

    A prompt whose K rewards are all equal, or with fewer than two, says nothing and counts as 0 in the mean.

    Args:
        logprobs, reference_logprobs: (B,), sums over a completion's tokens, in nats.
        rewards: (B,), scores without a divergence term: the reference is in the loss. NaN where there is none.
        num_generations: K, at least 2.
        beta: weight of the log-ratios.

    Returns:
        The scalar loss, differentiable in `logprobs`.

    Raises:
        ValueError: K is less than 2 or does not divide B.

    >>> reference, rewards = torch.zeros(4), torch.tensor([0.0, 1.0, 2.0, 2.0])
    >>> loss = online_dpo_loss(torch.zeros(4), reference, rewards, num_generations=2, beta=0.1)
    >>> round(float(loss), 4)  # log 2 for the first prompt, nothing for the second
    0.3466
    """
    best, worst = best_and_worst(rewards, num_generations)
    ratios = logprobs - reference_logprobs
    losses = -logsigmoid(beta * (ratios[best] - ratios[worst]))
    return torch.where(rewards[best] > rewards[worst], losses, torch.zeros_like(losses)).mean()


def kl_estimates(logprobs: Tensor, reference_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Estimates of KL(pi || pi_ref) from log-probs of tokens (or sequences) that pi drew (Schulman 2020).

    With r = pi_ref / pi: "k1" is -log r, unbiased and of either sign; "k2" is (log r)^2 / 2, biased, never negative;
    "k3" is r - 1 - log r, unbiased and never negative (GRPO's).

    Args:
        logprobs, reference_logprobs: any equal shapes, in nats.

    Returns:
        Estimates of that shape.

    Raises:
        ValueError: an unknown kind.

    >>> kl_estimates(torch.tensor([-1.0, -1.0]), torch.tensor([-1.5, -0.5]))
    tensor([ 0.5000, -0.5000])
    """
    log_r = reference_logprobs - logprobs
    if kind == "k1":
        return -log_r
    if kind == "k2":
        return log_r.square() / 2
    if kind == "k3":
        return log_r.exp() - 1 - log_r
    raise ValueError(f"kind: must be k1, k2 or k3, got {kind!r}")


def _grouped(rewards: Tensor, num_generations: int) -> Tensor:
    if num_generations < 2 or rewards.numel() % num_generations:
        raise ValueError(f"num_generations: must be at least 2 and divide {rewards.numel()} rows, got {num_generations}")
    return rewards.view(-1, num_generations)
