"""Which attention kernels a GPU may take; what is asked of torch shows on a CPU too."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.backends import cuda

from tiny import tiny_model, tiny_tokenizer
from zopro.engine.local import attention, causal
from zopro.engine.local.abilities import abilities
from zopro.engine.local.attention import of_any_shape
from zopro.engine.local.causal import causal_parts
from zopro.engine.local.logprobs import completion_logprobs

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def as_it_was() -> Iterator[None]:
    yield
    assert cuda.cudnn_sdp_enabled(), "put back"


def test_passes_on_a_gpu_take_no_kernel_that_is_planned_for_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    """Decoding, log-probs, scores: all go through `Decoder.hidden`. Gradients do not."""
    model, allowed = tiny_model("llama", tiny_tokenizer()), list[bool]()
    abilities(causal_parts(model))  # whose trial has gradients
    model.model.layers[0].register_forward_hook(lambda *args: allowed.append(cuda.cudnn_sdp_enabled()))
    ids = torch.arange(12).view(2, 6)
    for device, gradients, expected in ((GPU, False, False), (GPU, True, True), (torch.device("cpu"), False, True)):
        monkeypatch.setattr(causal, "of_any_shape", lambda given, device=device: of_any_shape(device))
        with torch.set_grad_enabled(gradients):
            completion_logprobs(model, ids, torch.ones_like(ids), 3)
        assert set(allowed) == {expected}
        allowed.clear()


@torch.no_grad()
def test_what_somebody_chose_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION), of_any_shape(GPU):
        assert cuda.cudnn_sdp_enabled() and not cuda.math_sdp_enabled()
    with pytest.raises(KeyError), of_any_shape(GPU):
        assert not cuda.cudnn_sdp_enabled()
        raise KeyError
    monkeypatch.setattr(attention, "PLANNED", True)
    with of_any_shape(GPU):
        assert cuda.cudnn_sdp_enabled()
