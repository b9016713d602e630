"""From the network's grid home to the scan's, slab by slab: no array of (classes x whole scan)
ever exists."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.resample import AxisMap, axis_maps, linear_weights

Float32 = NDArray[np.float32]
# Interpolated logits held at one time, in numbers.
_AT_ONCE = 2**24


def bring_home(logits: Float32, source: Grid, onto: Grid) -> tuple[NDArray[Any], Float32]:
    """The winning class and its probability, both (X, Y, Z) on the scan's grid.

    ``logits`` (classes, x, y, z) on the grid ``source`` are interpolated linearly, then the largest
    wins, ties going to the lower class. Outside the source's field of view class 0 stands, with
    probability 1. The grids' axes must be parallel, as those of `preprocess` and its scan are.
    """
    maps = axis_maps(source, onto)
    if maps is None:
        raise ValueError("the grids' axes are not parallel")
    turned = logits.transpose(0, *(1 + m.source for m in maps))
    winner = np.zeros(onto.shape, dtype=np.uint8 if len(logits) <= 256 else np.uint16)
    probability = np.ones(onto.shape, dtype=np.float32)
    ranges = [_range(m, n) for m, n in zip(maps, turned.shape[1:], strict=True)]
    if any(r.start >= r.stop for r in ranges):
        return winner, probability
    weights = [linear_weights(m.positions[r], n) for m, r, n in zip(maps, ranges, turned.shape[1:], strict=True)]
    per_slice = len(logits) * max(len(weights[1]), turned.shape[2]) * max(len(weights[2]), turned.shape[3])
    thick = max(1, _AT_ONCE // per_slice)
    for first in range(0, len(weights[0]), thick):
        rows = weights[0][first : first + thick]
        slab = _slab(turned, rows, weights[1], weights[2])
        where = (slice(ranges[0].start + first, ranges[0].start + first + len(rows)), ranges[1], ranges[2])
        winner[where], probability[where] = _decide(slab)
    return winner, probability


def _range(m: AxisMap, size: int) -> slice:
    inside = np.flatnonzero(m.inside(size))
    return slice(int(inside[0]), int(inside[-1]) + 1) if len(inside) else slice(0, 0)


def _slab(logits: Float32, x: Float32, y: Float32, z: Float32) -> Float32:
    """Interpolate a slab (classes, len(x), len(y), len(z)) out of logits (classes, i, j, k)."""
    used = np.flatnonzero(x.any(axis=0))
    box = logits[:, used[0] : used[-1] + 1]
    out = np.tensordot(x[:, used[0] : used[-1] + 1], box, axes=(1, 1))  # (X, classes, j, k)
    out = np.matmul(y, out)
    out = np.matmul(out, z.T)
    return np.moveaxis(out, 0, 1)


def _decide(slab: Float32) -> tuple[NDArray[np.int64], Float32]:
    """A running maximum over classes, and the winner's softmax probability."""
    best = slab[0].copy()
    winner = np.zeros(best.shape, dtype=np.int64)
    for number in range(1, len(slab)):
        wins = slab[number] > best
        winner[wins] = number
        np.copyto(best, slab[number], where=wins)
    total = np.zeros_like(best)
    for one in slab:
        total += np.exp(one - best)
    return winner, 1 / total
