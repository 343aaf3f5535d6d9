"""Memory does not grow with checkpoints times parameters: what is read at once, and what a process holds at its peak."""

from __future__ import annotations

import json
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scripts import benchmark
from walks import lora_walk
from zopro.analysis.numbers.gram import gram_matrices
from zopro.analysis.reading import streaming
from zopro.analysis.reading.checkpoints import of_folder
from zopro.analysis.reading.parts import pair
from zopro.analysis.reading.streaming import Points
from zopro.weights import tensors


@pytest.mark.parametrize("lora", [True, False])
def test_no_more_is_read_at_once_than_a_piece(tmp_path, monkeypatch, lora):
    monkeypatch.setattr(streaming, "PIECE_BYTES", 4096)
    read: list[int] = []
    original = tensors.Stored._read
    monkeypatch.setattr(
        tensors.Stored, "_read", lambda self, ranges, out=None: read.append(count(ranges)) or original(self, ranges, out)
    )
    sides = []
    for seed, name in enumerate(("policy", "reward")):
        if lora:
            lora_walk(tmp_path / name, seed=seed, size=(400, 300))
        else:
            for step in range(5):
                place = tmp_path / name / str(step)
                place.mkdir(parents=True)
                save_file({"layers.0.a.weight": torch.randn(50, 1000)}, place / "model.safetensors")
        sides.append(of_folder(tmp_path / name, name))
    found = gram_matrices(pair(*sides), Points(5, 10, tuple(range(10))), coordinates=100)
    assert 10 * 4 * max(read) <= 4096  # ten checkpoints in float32
    stored = sum(stored.numel for side in sides for c in side.checkpoints for stored in c.tensors.values())
    assert sum(read) == stored, "every number is read once"
    assert {view.coordinates.shape for view in found.values()} == {(10, 100)}


def count(ranges: list[tuple[int, int]]) -> int:
    return sum(last - first for first, last in ranges)


def test_python_holds_a_few_pieces_at_its_peak(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "PIECE_BYTES", 1 << 20)
    sides = []
    for name in ("policy", "reward"):
        for step in range(20):
            place = tmp_path / name / str(step)
            place.mkdir(parents=True)
            save_file({"layers.0.a.weight": torch.randn(500, 1000)}, place / "model.safetensors")  # 2 MB, 80 MB in all
        sides.append(of_folder(tmp_path / name, name))
    pairing = pair(*sides)
    tracemalloc.start()
    try:
        gram_matrices(pairing, Points(20, 40, tuple(range(40))), coordinates=1000)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 16e6  # numpy's blocks; torch's pieces are bounded by the test above


def test_the_benchmark_runs(tmp_path, monkeypatch, capsys):
    words = ["--folder", str(tmp_path / "bench"), "--checkpoints", "6", "--parameters", "200000", "--lora"]
    monkeypatch.setattr(sys, "argv", ["analysis_memory.py", *words])
    benchmark("analysis_memory").main()
    out, err = capsys.readouterr()
    assert err == "" and not (tmp_path / "bench").exists()
    found = json.loads(out)
    assert found["peak_rss_gb"] < 1 and set(found["dimension"]) == {"factors", "product"}
    assert np.isfinite(found["ratio"])  # tiny files: their ratio means nothing
