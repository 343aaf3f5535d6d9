"""Addresses of servers, as configurations give them."""

from __future__ import annotations

from urllib.parse import urlsplit

from zopro.errors import InputError

VLLM_KEY = "VLLM_API_KEY"  # the environment variable with the servers' key, as vLLM itself has it


def check_addresses(given: str) -> None:
    """Raise InputError for what are not addresses of different servers, with commas; a key in one is not shown."""
    urls = [url.rstrip("/") for url in given.split(",")]
    for url in urls:
        try:
            parts = urlsplit(url)
            fits = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port or 1) > 0
            fits, key = fits and not (parts.query or parts.fragment), "@" in parts.netloc
        except ValueError:  # a port that is no number
            fits, key = False, "@" in url
        if key:
            raise InputError(f"engine: must be vllm:http://HOST:PORT, got one with a key. Export the key as {VLLM_KEY}.")
        if not fits:
            raise InputError(f"engine: must be vllm:http://HOST:PORT, several with commas, got {url!r}.")
    if len(set(urls)) < len(urls):
        raise InputError(f"engine: must name each server once, got {given!r}.")
