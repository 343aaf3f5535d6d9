"""Decoding for a GPU: a cache of fixed size, and the whole step on the device, replayed as a CUDA graph.

An eager loop waits for kernel launches and for the host: 35 ms a token for 1.2 billion parameters on an H100, where
reading the weights takes 0.8 ms. Here `step` has no host read, so that `graphs` can capture it once for a bucket of
(rows, length) and replay it. Without a GPU the same function runs uncaptured, or is replayed from a tape of its
operations (`tests/taped.py`), which is how tests hold it equal to the plain loop.
"""
