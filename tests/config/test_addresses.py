"""Addresses of serving engines, as a configuration names them."""

from __future__ import annotations

import pytest

from zopro.config.model import ModelOptions
from zopro.errors import InputError


@pytest.mark.parametrize(
    ("urls", "what"),
    [
        ("http://a:1/,http://a:1", "must name each server once"),
        ("ftp://a:1", "must be vllm:http://HOST:PORT"),
        ("http://a:port", "must be vllm:http://HOST:PORT"),
        ("a:1", "must be vllm:http://HOST:PORT"),
        ("http://a:1,", "must be vllm:http://HOST:PORT"),
        ("http://me:hidden@a:1", "got one with a key. Export the key as VLLM_API_KEY"),
    ],
)
def test_addresses_are_checked_before_anything_is_asked(urls: str, what: str) -> None:
    with pytest.raises(InputError, match=what) as refused:
        ModelOptions(model="x", engine=f"vllm:{urls}")
    assert "hidden" not in str(refused.value)


def test_a_model_must_be_named() -> None:
    with pytest.raises(InputError, match=r"model: must be set, got ''\. .* its weights are not loaded"):
        ModelOptions(engine="vllm:http://a:1")
