"""All numbers of an analysis as one plain object: what `analysis.json` holds.

metrics[NAME][VIEW]        one value per iteration, None where not defined; procrustes_disparity: one value
intervals[NAME][VIEW]      [low, high] of each value: 95 % bootstrap over tensors; not of the distance correlation
permutation[NAME][VIEW]    [low, high] of each value: 95 % if the two were unrelated; not of the disparity
chance[NAME][VIEW]         expected, low, high of each value: random directions of that dimension
off_by_one                 the same four with reward update i - 1 against policy update i, metrics between the two alone;
                           of the distance correlation without permutation
by_layer, by_module        metrics of each group alone, under [VIEW][NAME][GROUP]

The lengths of updates have metrics alone. With few tensors, or too few draws that are defined, a pair is None.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from zopro.analysis.numbers import chance
from zopro.analysis.numbers.series import BETWEEN, WITHIN, Layout, Metric, SixSums
from zopro.analysis.numbers.shape import distance_correlation, procrustes_disparity
from zopro.analysis.reading.streaming import Grams

Numbers = dict[str, Any]
DISTANCE = "update_distance_correlation"
PROCRUSTES = "procrustes_disparity"
GROUPED = (*BETWEEN, *WITHIN[:2], *WITHIN[4:])


def all_numbers(views: dict[str, Grams], layout: Layout, seed: int = 0) -> Numbers:
    """Every metric of every view, with its intervals and chance levels."""
    found: Numbers = {**_tables(), "off_by_one": _tables(), "by_layer": {}, "by_module": {}}
    for view, grams in views.items():
        for metric in (*BETWEEN, *WITHIN):
            _add_series(found, metric, view, grams, layout, 0, seed)
        for metric in BETWEEN:
            _add_series(found["off_by_one"], metric, view, grams, layout, 1, seed)
        apart = {DISTANCE: _distance, PROCRUSTES: _procrustes}
        with ThreadPoolExecutor(2) as pool:  # the one computes under the GIL, the other outside it
            jobs = [
                (tables, name, pool.submit(find, grams, layout, shift, seed))
                for shift, tables in ((0, found), (1, found["off_by_one"]))
                for name, find in apart.items()
            ]
        for tables, name, job in jobs:
            _put(tables, name, view, **job.result())
        for key in ("layer", "module"):
            found[f"by_{key}"][view] = _groups(grams, layout, key)
    found["distance_correlation_coordinates"] = {view: int(g.coordinates.shape[1]) for view, g in views.items()}
    return found


def _tables() -> Numbers:
    return {"metrics": {}, "intervals": {}, "permutation": {}, "chance": {}}


def _put(tables: Numbers, name: str, view: str, **columns: Any) -> None:
    for table, values in columns.items():
        tables[table].setdefault(name, {})[view] = plain(values)


def _add_series(tables: Numbers, metric: Metric, view: str, grams: Grams, layout: Layout, shift: int, seed: int) -> None:
    sums = metric.sums(layout, grams.gram, grams.sums, grams.counts, shift)
    total = whole(sums)
    values = metric.value(total)[0]
    columns: Numbers = {"metrics": values}
    if chance.resampled(metric):
        columns["chance"] = chance.ordered(chance.of_random_directions(metric, total, grams.dimension))
        columns["intervals"] = _pairs(chance.bootstrap(metric, sums, seed), len(values))
        columns["permutation"] = _pairs(chance.sign_flips(metric, sums, total, seed), len(values))
    _put(tables, metric.name, view, **columns)


def whole(sums: SixSums) -> SixSums:
    """Summed over parts: [1, iterations]."""
    return sums.weighted(np.ones((1, len(sums.count))))


def _pairs(tails: np.ndarray | None, length: int) -> list[list[float] | None]:
    if tails is None:
        return [None] * length
    return [None if np.isnan(pair).any() else pair.tolist() for pair in tails.T]


def _distance(grams: Grams, layout: Layout, shift: int, seed: int) -> Numbers:
    pairs = [
        (u @ grams.coordinates, v @ grams.coordinates)
        for u, v in zip(layout.policy_updates(), layout.reward_updates(shift), strict=True)
    ]
    values = [distance_correlation(a, b) for a, b in pairs]
    # Off by one has the chance level only: shuffling costs more than everything else together.
    defined = [pair for pair, value in zip(pairs, values, strict=True) if not math.isnan(value) and not shift]
    shuffled = chance.shuffled_distance_correlation(defined, seed) if defined else None
    permutation = [None if math.isnan(value) else shuffled for value in values]
    size = grams.coordinates.shape[1]
    levels = chance.distance_correlation_chance(size, seed) if not all(map(math.isnan, values)) else (math.nan,) * 3
    band = {
        name: [None if math.isnan(value) else level for value in values]
        for name, level in zip(("expected", "low", "high"), levels, strict=True)
    }
    # Resampled coordinates repeat, and repeated pairs look dependent: there is no bootstrap interval of it.
    return {"metrics": values, "permutation": permutation, "chance": band, "intervals": [None] * len(values)}


def _procrustes(grams: Grams, layout: Layout, shift: int, seed: int) -> Numbers:
    length = min(layout.policy - shift, layout.reward)
    p, r = slice(shift, shift + length), slice(layout.policy, layout.policy + length)
    policy, reward = grams.gram[:, p, p], grams.gram[:, r, r]
    value, interval, band = math.nan, None, (math.nan,) * 3
    if length > 2:  # two points of each, centred and scaled, are one and the same line
        value = float(procrustes_disparity(policy.sum(0), reward.sum(0)))
    if not math.isnan(value):
        interval = chance.procrustes_bootstrap(policy, reward, seed)
        band = chance.procrustes_chance(policy.sum(0), reward.sum(0), grams.dimension, seed)
    levels = dict(zip(("expected", "low", "high"), band, strict=True))
    return {"metrics": value, "intervals": interval, "permutation": None, "chance": levels}


def _groups(grams: Grams, layout: Layout, key: str) -> Numbers:
    members: dict[str, list[int]] = {}
    for index, part in enumerate(grams.parts):
        members.setdefault(getattr(part, key), []).append(index)
    names = sorted(members, key=_group_order)
    found: Numbers = {metric.name: {} for metric in GROUPED}
    for name in names:
        chosen = members[name]
        for metric in GROUPED:
            sums = metric.sums(layout, grams.gram[chosen], grams.sums[chosen], grams.counts[chosen])
            found[metric.name][name] = plain(metric.value(whole(sums))[0])
    found["dimension"] = {name: int(grams.counts[members[name]].sum()) for name in names}
    return found


def _group_order(name: str) -> tuple[int, int, str]:
    word = name.rpartition(" ")[2]
    return (1, int(word), "") if word.isdigit() else (0, 0, name)


def plain(value: Any) -> Any:
    """Arrays as lists, and what JSON does not have (NaN, infinity) as None."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
