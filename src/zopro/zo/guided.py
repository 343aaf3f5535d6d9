"""Guided directions: where the loss falls, guessed from a forward pass alone, without a backward pass.

In a residual network every block adds to one stream, so the loss's gradient with respect to what a layer writes is
approximately the gradient with respect to the end of the stream,

    d L / d stream_l  ~  delta = d L / d stream_L,      d L / d W_l  ~  sum_t delta_t a_t^T,

for a linear layer W_l with inputs a_t that writes to it. delta has a closed form: the loss sum_t w_t log p(y_t) has the
gradient w_t (onehot(y_t) - softmax) with respect to the logits, and from there it takes the transposed output matrix and
the final norm's vector-Jacobian product. It is direct feedback alignment (Nokland 2016) with the identity in place of a
random matrix. With LoRA, W = W_0 + s B A, only the rank-r activations A a_t need keeping: d L / d B ~ s sum_t delta_t
(A a_t)^T. A norm between a layer and the stream has its own vector-Jacobian product taken.

This module forms the guess from tensors; `zopro.engine.feedback` gets those tensors from a language model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from zopro.zo.directions import Directions, Gaussian

LOCAL_ROWS = {"cpu": 512, "cuda": 1024}  # in a local graph at once, which bounds its memory; few would starve a GPU


def local_rows(device: torch.device) -> int:
    """Rows (tokens) that go into one local graph on this device."""
    return LOCAL_ROWS.get(device.type, LOCAL_ROWS["cuda"])


def local_vjp(
    function: Callable[[Tensor], Tensor], x: Tensor, cotangent: Tensor, parameters: Sequence[Tensor] = ()
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Vector-Jacobian products of one row-wise function, such as a single norm, by a graph that lives here only.

    Args:
        function: (n, H) -> (n, H).
        x: (n, H), where it is differentiated.
        cotangent: (n, H), the gradient of the loss with respect to function(x).
        parameters: tensors inside `function` that require grad.

    Returns:
        The gradient with respect to x, (n, H) in the dtype of x, and those with respect to `parameters`.
    """
    back, totals = torch.empty_like(x), [torch.zeros_like(parameter) for parameter in parameters]
    for rows, cotangents, target in zip(*(t.split(local_rows(x.device)) for t in (x, cotangent, back)), strict=True):
        with torch.enable_grad():
            leaf = rows.detach().requires_grad_()
            y = function(leaf)
            gradients = torch.autograd.grad(y, [leaf, *parameters], cotangents.to(y.dtype), allow_unused=True)
        target.copy_(gradients[0])
        add_found(totals, gradients[1:])
    return back, tuple(totals)


def add_found(totals: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Add gradients to totals in place; None is that of a tensor which a graph did not reach."""
    for total, gradient in zip(totals, gradients, strict=True):
        if gradient is not None:
            total.add_(gradient)


def factor_gradient(delta: Tensor, inner: Tensor, scaling: float) -> Tensor:
    """Gradient of LoRA's B for y_t = s B u_t, u_t = A a_t: s sum_t delta_t u_t^T (Hu et al. 2022).

    Args:
        delta: (n, out), the gradient of the loss with respect to y.
        inner: (n, r), the rank-r activations u.
        scaling: s.

    Returns:
        (out, r) fp32.

    >>> factor_gradient(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0]]), 2.0).tolist()
    [[6.0], [12.0]]
    """
    return scaling * (delta.float().T @ inner.float())


class ResidualFeedback(Directions):
    """z = guide * g + previous * mu + noise * n: a pseudo-gradient, alone or mixed with another direction.

    g is the pseudo-gradient of the current step, of root mean square 1 over the tensors it has; `base` (by default
    Gaussian) draws the rest for every tensor and is what the tensors without a pseudo-gradient get. With `Targeted` as
    the base, the mixture is z = a g + b mu + c n_perp: the paper's direction with a guess of the slope added.

    The pseudo-gradient is handed over before each step by `update`. SPSA then measures the slope along z: a guess that
    does not go downhill costs a step, never the run. A step can be replayed only with the pseudo-gradient it had.

    Args:
        guide: weight a of the pseudo-gradient.
        mixed: weight of `base`; 0 leaves tensors without a pseudo-gradient unmoved.
        base: the direction mixed in.

    Raises:
        ValueError: a weight is negative, or both are 0.

    >>> directions = ResidualFeedback()
    >>> directions.update({"w": torch.tensor([3.0, 4.0])}, step=0)
    >>> directions.sample([("w", torch.zeros(2))], seed=0, step=0)
    {'w': tensor([0.8485, 1.1314])}
    """

    pure = False  # `update` may come again within a step

    def __init__(self, guide: float = 1.0, mixed: float = 0.0, base: Directions | None = None) -> None:
        if not (guide >= 0 and mixed >= 0 and guide + mixed > 0):
            raise ValueError(f"guide: weights must not be negative and not both 0, got {guide} and mixed={mixed}")
        self.guide = guide
        self.mixed = mixed
        self.base = base or Gaussian()
        self.step = -1
        self._gradients: dict[str, Tensor] = {}
        self._scale = 0.0

    def update(self, gradients: Mapping[str, Tensor], step: int) -> None:
        """Set the pseudo-gradient of `step`. Raises ValueError if it is not finite."""
        self._gradients = {name: gradient.detach().float() for name, gradient in gradients.items()}
        square = sum(float(gradient.square().sum()) for gradient in self._gradients.values())
        if not math.isfinite(square):
            raise ValueError("gradients: must be finite, got NaN or infinity")
        elements = sum(gradient.numel() for gradient in self._gradients.values())
        self._scale = math.sqrt(elements / square) if square > 0 else 0.0
        self.step = step

    def check(self, named_params: Iterable[tuple[str, Tensor]]) -> None:
        self.base.check(named_params)

    def tensor(self, name: str, like: Tensor, seed: int, step: int) -> Tensor:
        """z for one parameter. Raises RuntimeError if `update` was not called for this step."""
        if step != self.step:
            raise RuntimeError(f"update: must be called for step {step} before its direction is asked for")
        if self.mixed > 0:
            z = self.base.tensor(name, like, seed, step).mul_(self.mixed)
        else:
            z = torch.zeros(like.shape, dtype=torch.float32, device=like.device)
        gradient = self._gradients.get(name)
        return z if gradient is None else z.add_(gradient.to(like.device), alpha=self.guide * self._scale)
