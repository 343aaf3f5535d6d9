"""Log-probs whose backward pass is residual feedback: pseudo-gradients of LoRA factors from one forward pass.

`Feedback.logprobs` gives the numbers of `completion_logprobs`. It runs without an autograd graph, and while it runs it
keeps, at the positions that predict completion tokens, the rank-r activations of the adapters that write to the
residual stream and the input of every norm on the way (shapes below). What it returns is differentiable with respect to
those adapters in name only: `backward` hands each the guess of `zopro.zo.guided`. So any loss of log-probs, any trainer
and any torch optimiser can use it, and the loss's own derivative is the only one that is exact.

Four kinds, of rising cost and cosine (benchmarks/feedback_cosine.py measures both):

    none    the error signal at the end of the stream is every block's; only adapters that write to the stream are guided
    mlp     and inside a block it goes back through the token-wise part (its MLP) by a block-local vector-Jacobian
            product: all MLP adapters are guided, and those of attention see what the MLP makes of the signal
    chain   and so on from block to block, through the MLPs alone: attention is passed over
    block   and so on from block to block, attention included, on the answers and the last tokens of the prompts; all
            adapters are guided. At the rest of the prompts' tokens what each block reads is held constant, and of the
            block only its keys and values learn there. With all of the prompts swept (tail=0) it is the gradient

`chain` and `block` are backward sweeps that keep what a block reads and no graph that reaches beyond one block.

    feedback = Feedback(model)
    loss = -(feedback.logprobs(ids, mask, 32).sum(1) * advantages).mean()
    loss.backward()                                # fills .grad of feedback.parameters.values()
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from zopro.engine.feedback.blocks import BlockCalls
from zopro.engine.feedback.capture import Capture
from zopro.engine.feedback.stream import Block, Write, is_adapted, residual_stream
from zopro.engine.local.causal import evaluating
from zopro.engine.local.head import score_tokens
from zopro.engine.local.logprobs import completion_states, in_batches
from zopro.engine.local.products import fast_products
from zopro.engine.local.sweeps import sweeps_alone
from zopro.errors import InputError
from zopro.weights.live import saved_names
from zopro.zo.directions import norm_of, orthogonal_
from zopro.zo.guided import factor_gradient, local_vjp

LOCAL = ("none", "mlp", "chain", "block")
Gradients = dict[int, Tensor]  # id of a parameter -> its pseudo-gradient


class Feedback:
    """Pseudo-gradients of the LoRA adapters of one model.

    Args:
        model: a PEFT model with LoRA adapters, or the model they were injected into.
        adapter: the adapter that is trained.
        top_blocks: guide the last so many blocks only; 0 guides all.
        local: "none", "mlp", "chain" or "block", see above.
        tail: with "block", how many tokens at the prompts' ends are swept; 0: all, once for all answers to a prompt.
        avoid: name -> direction, such as the reward model's update, whose component each pseudo-gradient goes without. Of
            tensors that it lacks or has as 0 nothing is taken.

    Attributes:
        parameters: name -> parameter, in the order of the model: those that get a pseudo-gradient.
        elements_kept: elements held from the forward pass to the backward one, of the last call.
        alone: "block" sweeps each row from end to end, whatever `tail`, since prompts leave more than keys and values.

    Raises:
        InputError: the model has no residual stream, or no layer that writes to it (in the chosen blocks) has a
            trainable LoRA adapter; or its blocks pass on more than the stream, so that "block" cannot sweep them.
        ValueError: an argument out of range.
    """

    def __init__(
        self,
        model: Any,
        adapter: str = "default",
        top_blocks: int = 0,
        local: str = "none",
        tail: int = 4,
        avoid: Mapping[str, Tensor] | None = None,
    ) -> None:
        if local not in LOCAL:
            raise ValueError(f"local: must be one of {', '.join(LOCAL)}, got {local!r}")
        if top_blocks < 0:
            raise ValueError(f"top_blocks: must not be negative, got {top_blocks}")
        if tail < 0:
            raise ValueError(f"tail: must not be negative, got {tail}")
        stream = residual_stream(model)
        self.model, self.adapter, self.local, self.tail = model, adapter, local, tail
        self.parts, self.final_norm = stream.parts, stream.final_norm
        self.blocks = stream.blocks[-top_blocks:] if top_blocks else stream.blocks
        guided: dict[int, Tensor] = {}
        for block in self.blocks:
            for parameter in (p for write in block.writes for p in self._factors(write)):
                guided[id(parameter)] = parameter
            if local == "block":
                guided.update({id(p): p for p in block.module.parameters() if p.requires_grad})
            elif local != "none" and block.mlp is not None:
                guided.update({id(p): p for p in block.mlp.body.parameters() if p.requires_grad})
        plain = saved_names(model)
        self.parameters: dict[str, Tensor] = {plain[name]: p for name, p in model.named_parameters() if id(p) in guided}
        if not self.parameters:
            names = sorted({write.name.rpartition(".")[2] for block in self.blocks for write in block.writes})
            raise InputError(
                f"lora_target_modules: must name layers that write to the residual stream ({', '.join(names)}), "
                "none of which has a trainable adapter. Use all-linear, or add them."
            )
        self.elements_kept = 0
        self._avoided: Gradients = {}  # of norm 1
        self.exact = False  # keep what blocks read of the prompts as it is
        self.alone = local == "block" and sweeps_alone(self)
        for name, update in (avoid or {}).items():
            norm = norm_of(update)
            if name in self.parameters and norm > 0:
                guided_one = self.parameters[name]
                self._avoided[id(guided_one)] = update.to(guided_one.device, torch.float32) / norm

    def block_of(self, name: str) -> int:
        """Which of `blocks` the parameter of this name is in."""
        parameter = self.parameters[name]
        return next(i for i, block in enumerate(self.blocks) if any(p is parameter for p in block.module.parameters()))

    def logprobs(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        completion_length: int,
        *,
        temperature: float = 1.0,
        num_generations: int = 1,
        max_logit_elements: int | None = None,
    ) -> Tensor:
        """(B, C) fp32 log-probs as `completion_logprobs` gives them; their backward pass is residual feedback.

        Arguments and errors are those of `completion_logprobs`.
        """

        self.elements_kept = 0

        def run(ids: Tensor, mask: Tensor) -> list[Tensor]:
            forward = partial(
                self._forward, (ids, mask, completion_length), num_generations, temperature, max_logit_elements
            )
            result: Tensor = _PseudoGradient.apply(forward, *self.parameters.values())
            return [result]

        return in_batches(self.parts, input_ids, attention_mask, completion_length, run)[0]

    def _forward(
        self, batch: tuple[Tensor, Tensor, int], copies: int, temperature: float, max_elements: int | None
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor | None]]]:
        """Log-probs, and the pseudo-gradients as a function of the gradient with respect to them.

        Dropout is off in both: a block that runs again would draw other masks than the pass that was measured.
        """
        with evaluating(self.parts.model):
            return self._passed(batch, copies, temperature, max_elements)

    def _passed(
        self, batch: tuple[Tensor, Tensor, int], copies: int, temperature: float, max_elements: int | None
    ) -> tuple[Tensor, Callable[[Tensor], list[Tensor | None]]]:
        if self.local == "block":
            copies = 1 if self.alone else copies
            blocks, config = [block.module for block in self.blocks], self.parts.model.config
            calls = BlockCalls(blocks, self.final_norm, copies, config, self.exact)
            how = {"alone": True} if self.alone else {"tail": self.tail}
            states = completion_states(self.parts, *batch, copies, watch=calls, **how)
            elements, gradients = calls.elements, partial(self._swept, calls=calls, real=states.real)
        else:
            capture = Capture()
            self._watch(capture)
            states = completion_states(self.parts, *batch, copies, watch=capture)
            elements, gradients = capture.elements, partial(self._gradients, kept=capture.kept)
        rows = self.parts, states.hidden, states.targets, temperature
        scores, errors = score_tokens(*rows, errors=True, max_elements=max_elements)
        assert errors is not None
        self.elements_kept += errors.numel() + elements

        def backward(upstream: Tensor) -> list[Tensor | None]:
            weights = upstream[:, : states.real.shape[1]][states.real]
            products = fast_products(self.parts.model.dtype, errors.device)
            with products, evaluating(self.parts.model):
                found = gradients(errors * weights[:, None].float())
            for key, unit in self._avoided.items():
                if key in found:
                    found[key] = orthogonal_(found[key].float(), unit).to(found[key].dtype)
            return [found.get(id(parameter)) for parameter in self.parameters.values()]

        return states.unpacked(scores), backward

    def gradients(self, loss: Tensor) -> dict[str, Tensor]:
        """Pseudo-gradients by name of a loss of `logprobs`, without touching `.grad`; the loss can be used again."""
        found = torch.autograd.grad(loss, list(self.parameters.values()), retain_graph=True)
        return dict(zip(self.parameters, found, strict=True))

    def _factors(self, write: Write) -> list[Tensor]:
        """LoRA's B of a layer, if it has the adapter and that is trained."""
        layer: Any = write.layer
        if not is_adapted(layer) or self.adapter not in layer.lora_A:
            return []
        weight = layer.lora_B[self.adapter].weight
        return [weight] if weight.requires_grad else []

    def _watch(self, capture: Capture) -> None:
        """What is to be kept: (B, c, H) at the end of the stream and where a norm or MLP reads, (B, c, r) in adapters."""
        width, dtype = self.parts.config.hidden_size, self.parts.model.dtype
        if self.final_norm is not None:
            capture.inputs_of(self.final_norm, width, dtype)
        for block in self.blocks:
            through = self.local != "none" and block.mlp is not None
            if through and block.mlp is not None:
                capture.inputs_of(block.mlp.reads, width, dtype)
            for write in block.writes:
                if self._factors(write) and not (through and self._in_mlp(block, write)):
                    layer: Any = write.layer
                    reduced = layer.lora_A[self.adapter].weight  # (r, in)
                    capture.outputs_of(layer.lora_A[self.adapter], len(reduced), reduced.dtype)
                    if write.norm is not None:
                        capture.inputs_of(write.norm, width, dtype)

    @staticmethod
    def _in_mlp(block: Block, write: Write) -> bool:
        return block.mlp is not None and any(module is write.layer for module in block.mlp.body.modules())

    def _gradients(self, error: Tensor, kept: Mapping[tuple[int, str], Tensor]) -> Gradients:
        """Pseudo-gradients from the gradient of the loss with respect to the last hidden states, (N, H) fp32."""
        delta = error
        if self.final_norm is not None:
            delta = local_vjp(self.final_norm, kept[id(self.final_norm), "in"], error)[0].float()
        found: Gradients = {}
        for block in reversed(self.blocks):
            mlp = block.mlp if self.local != "none" else None
            before = delta  # where attention writes
            if mlp is not None:
                parameters = [p for p in mlp.body.parameters() if p.requires_grad]
                back, gradients = local_vjp(mlp, kept[id(mlp.reads), "in"], delta, parameters)
                found.update({id(p): gradient for p, gradient in zip(parameters, gradients, strict=True)})
                before = delta + back.float()
            for write in block.writes:
                if self._factors(write) and (mlp is None or not self._in_mlp(block, write)):
                    signal = delta if block.parallel else before
                    found.update(self._write_gradient(write, signal * write.scale, kept))
            if self.local == "chain":
                delta = before
        return found

    def _swept(self, error: Tensor, calls: BlockCalls, real: Tensor) -> Gradients:
        """Pseudo-gradients by running the blocks again, from the gradient as in `_gradients`; `real` is (B, C')."""
        if self.final_norm is not None:
            error = local_vjp(self.final_norm, calls.ends(real), error)[0].float()
        delta = calls.spread(error, real)
        found: Gradients = {}
        for index in reversed(range(len(self.blocks))):
            parameters = [p for p in self.blocks[index].module.parameters() if p.requires_grad]
            delta, gradients = calls.vjp(index, delta, parameters)
            for p, gradient in zip(parameters, gradients, strict=True):  # blocks may share parameters
                found[id(p)] = found[id(p)] + gradient if id(p) in found else gradient
        return found

    def _write_gradient(self, write: Write, delta: Tensor, kept: Mapping[tuple[int, str], Tensor]) -> Gradients:
        layer: Any = write.layer
        if write.norm is not None:
            delta = local_vjp(write.norm, kept[id(write.norm), "in"], delta)[0]
        weight = layer.lora_B[self.adapter].weight
        inner = kept[id(layer.lora_A[self.adapter]), "out"]
        return {id(weight): factor_gradient(delta, inner, layer.scaling[self.adapter]).to(weight.dtype)}


class _PseudoGradient(torch.autograd.Function):
    """Log-probs from `forward`, and its backward function in place of their derivative."""

    @staticmethod
    def forward(ctx: Any, forward: Callable[[], tuple[Tensor, Callable]], *parameters: Tensor) -> Tensor:
        logprobs, ctx.pseudo = forward()
        return logprobs

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.pseudo(upstream)
