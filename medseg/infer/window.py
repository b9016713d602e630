"""A volume larger than the patch, tile by tile, in an order that lets go of what is finished."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product

import numpy as np
from numpy.typing import NDArray

from medseg.infer.engine import Array, Engine, Found
from medseg.plan.cost import OVERLAP, tile_count
from medseg.plan.plan import Configuration

Float32 = NDArray[np.float32]
Box = tuple[slice, slice, slice]
Corner = tuple[int, int, int]
# Is told how many tiles more are done with.
Tell = Callable[[int], None]
# Of `OVERLAP`, where quickness counts for more. With a quarter Task04 in small tiles loses 0.003 Dice,
# phantoms up to 0.05 (benchmarks/predict/README.md).
QUICK_OVERLAP = 0.25
# Finished slices go home this many at a time or more: one by one they would cost more than they hold.
_THIN = 8


@dataclass(frozen=True)
class Slab:
    """Finished logits: ``values`` (outputs, x, y, z) of a box of the network's grid. Boxes that follow
    each other share the voxels of one plane, so that what lies between two voxels always lies within
    a box. ``covered`` (x, y, z) is False where no tile was run, None where all is covered."""

    box: Box
    values: Float32
    covered: NDArray[np.bool_] | None


@dataclass(frozen=True)
class Tile:
    """One tile: its first voxel, which may lie before the image, and what of it lies within."""

    corner: Corner
    box: Box


@dataclass(frozen=True)
class Tiling:
    """Where tiles lie on a grid of ``shape`` voxels: ``starts`` on each axis, below zero where the
    grid is shorter than the ``patch``. They run from one end of ``axis`` to the other. ``bands``
    are the parts of ``across``, another axis, that are worked through one after the other; where
    there are several, tiles on their borders run for both."""

    shape: tuple[int, int, int]
    patch: tuple[int, int, int]
    starts: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
    axis: int
    across: int
    bands: tuple[tuple[int, int], ...]

    @property
    def count(self) -> int:
        """How many tiles there are in all, without laying them out."""
        along = math.prod(len(self.starts[a]) for a in range(3) if a != self.across)
        return along * sum(len(_touching(self, band)) for band in self.bands)

    @property
    def tiles(self) -> list[Tile]:
        """All that run, unless some are skipped; those on the borders of bands as often as they do."""
        return [tile for band in self.bands for tile in _band_tiles(self, band)]

    @property
    def held(self) -> int:
        """Voxels of the network's grid whose logits are held at one time, at most."""
        axis, other = self.axis, 3 - self.axis - self.across
        parts = _edges(self.starts[axis], self.shape[axis])
        longest = 0
        for number, (_, stop) in enumerate(parts):
            last = max(s for s in self.starts[axis] if s < stop)
            alive = [p for p in parts[number:] if p[0] < last + self.patch[axis]]
            longest = max(longest, sum(b - a + 1 for a, b in alive))
        widest = max(min(stop + 1, self.shape[self.across]) - start for start, stop in self.bands)
        return longest * widest * self.shape[other]


def tile_starts(size: int, patch: int, overlap: float = OVERLAP, *, loose: bool = False) -> list[int]:
    """First voxels of the fewest tiles that cover an axis with at least ``overlap``, evenly laid. A
    tile longer than the axis lies around it. Where they are ``loose``, as in nnU-Net, rounding may take
    a voxel of the overlap of odd patches."""
    if size <= patch:
        return [-((patch - size) // 2)]
    count = tile_count(size, patch, overlap, loose=loose)
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


def lay(
    shape: tuple[int, int, int], configuration: Configuration, overlap: float = OVERLAP, most: float = np.inf
) -> Tiling:
    """Tiles over a grid, in an order that holds the fewest voxels at one time, and in as many bands
    as it takes to hold no more than ``most`` of them, if it can be done.

    Slices of a 2D network are worked through across their plane.
    """
    patch = configuration.patch.value
    loose = configuration.grid == "shape"
    x, y, z = (tuple(tile_starts(n, p, overlap, loose=loose)) for n, p in zip(shape, patch, strict=True))
    flat = configuration.slice_axis
    orders = [(flat, a) for a in range(3) if a != flat] if flat is not None else list(product(range(3), range(3)))
    whole = [Tiling(shape, patch, (x, y, z), a, b, ((0, shape[b]),)) for a, b in orders if a != b]
    # Among equals the last axis but one is cut: rows along the last one lie together in memory.
    best = min(whole, key=lambda t: (t.held, t.across == 2))
    if best.held <= most:
        return best
    # The axis stays: along another, tiles would be added up in another order, and sums be rounded otherwise.
    same = [t for t in whole if t.axis == best.axis]
    choices = [_banded(t, count) for t in same for count in range(2, len(t.starts[t.across]) + 1)]
    fitting = [t for t in choices if t.held <= most]
    if fitting:
        return min(fitting, key=lambda t: (t.count, t.held))
    return min([best, *choices], key=lambda t: t.held)


def _banded(whole: Tiling, count: int) -> Tiling:
    """The same tiles, worked through in ``count`` bands of nearly equal width that begin where a
    tile does, so that few tiles run twice."""
    starts, size = whole.starts[whole.across], whole.shape[whole.across]
    inner = {min(starts[1:], key=lambda s: abs(s - size * i / count)) for i in range(1, count)}
    edges = sorted({0, *inner, size})
    return Tiling(
        whole.shape,
        whole.patch,
        whole.starts,
        whole.axis,
        whole.across,
        tuple(pairwise(edges)),
    )


def gaussian(patch: tuple[int, ...], *, lopsided: bool = False) -> Float32:
    """Weight of each voxel of a tile: 1 in the middle, falling off with a deviation of an eighth of
    the length (as in nnU-Net), never below 1e-3, so that no voxel is without weight.

    ``lopsided`` weights are nnU-Net's to the voxel: their middle is that of the upper half of an even
    length, and they fall to 6e-9, its least number. On small patches that moves borders.
    """
    least = 6e-9 if lopsided else 1e-3
    weight = np.ones(patch, dtype=np.float64)
    for axis, n in enumerate(patch):
        line = (
            np.exp(-0.5 * ((np.arange(n) - (n // 2 if lopsided else (n - 1) / 2)) / (n / 8)) ** 2)
            if n > 1
            else np.ones(1)
        )
        weight = weight * line.reshape([-1 if a == axis else 1 for a in range(len(patch))])
    return np.maximum(weight, least).astype(np.float32)


def sweep(
    engine: Engine,
    image: Float32,
    tiling: Tiling,
    *,
    wanted: Callable[[Box], bool] | None = None,
    tell: Tell = lambda count: None,
    lopsided: bool = False,
    take: Callable[[Tile, list[Found]], None] | None = None,
) -> Iterator[Slab]:
    """Logits of an image (C, X, Y, Z) on the network's grid, weighted by `gaussian` and averaged over
    overlapping tiles, slab after slab as they are finished.

    What lies beyond the image is zero. Tiles whose box, clipped to the image, is not ``wanted`` are
    not run. ``tell`` is told how many tiles more are done with. A slab's values are the caller's. Of a
    model that counts things, ``take`` is given what its members found in each tile.
    """
    weight = engine.array(gaussian(tiling.patch, lopsided=lopsided))
    for band in tiling.bands:
        parts = _Parts(engine, tiling, band)
        for number, tiles in enumerate(parts.groups(_band_tiles(tiling, band))):
            chosen = [tile for tile in tiles if wanted is None or wanted(tile.box)]
            tell(len(tiles) - len(chosen))
            for tile, logits in run_tiles(engine, image, tiling.patch, chosen, tell, take):
                parts.add(logits, weight, tile)
                del logits  # not while the slab goes home
            yield parts.finish(number)


def run_tiles(
    engine: Engine,
    image: Float32,
    patch: tuple[int, int, int],
    tiles: Sequence[Tile],
    tell: Tell,
    take: Callable[[Tile, list[Found]], None] | None = None,
) -> Iterator[tuple[Tile, Array]]:
    """Tiles of an image (C, X, Y, Z), each with its logits (outputs, *patch); what was found in it is given to
    ``take``. What lies beyond the image is zero."""
    size = max(1, engine.at_once // int(np.prod(patch)))
    for first in range(0, len(tiles), size):
        batch = tiles[first : first + size]
        logits = engine.run(np.stack([_cut(image, tile.corner, patch) for tile in batch]))
        if take:
            for tile, found in zip(batch, engine.found, strict=True):
                take(tile, found)
        yield from zip(batch, logits, strict=True)
        del logits
        tell(len(batch))


class _Parts:
    """Sums of a band, in parts along the tiling's axis that come and go with the tiles. Each part but
    the first has room before it for the last plane of the one before."""

    def __init__(self, engine: Engine, tiling: Tiling, band: tuple[int, int]) -> None:
        self._engine, self._tiling = engine, tiling
        self._edges = _edges(tiling.starts[tiling.axis], tiling.shape[tiling.axis])
        self._sums: dict[int, tuple[Array, Array]] = {}
        self._carried: tuple[Float32, NDArray[np.bool_]] | None = None
        # One voxel more than the band, so that nothing between two bands is left out.
        self._band = slice(band[0], min(band[1] + 1, tiling.shape[tiling.across]))

    def add(self, logits: Array, weight: Array, tile: Tile) -> None:
        """Add a tile's logits (outputs, *patch)."""
        corner, box = tile.corner, tile.box
        axis, across = self._tiling.axis, self._tiling.across
        for number in range(len(self._edges)):
            where = list(box)
            where[axis] = _common(slice(*self._edges[number]), box[axis])
            where[across] = _common(self._band, box[across])
            if any(w.start >= w.stop for w in where):
                continue
            inside = tuple(slice(w.start - c, w.stop - c) for w, c in zip(where, corner, strict=True))
            where[axis] = _shifted(where[axis], self._first(number))
            where[across] = _shifted(where[across], self._band.start)
            sums, norm = self._part(number)
            _accumulate(sums[(slice(None), *where)], logits[(slice(None), *inside)], weight[inside])
            norm[tuple(where)] += weight[inside]

    def _first(self, number: int) -> int:
        """The first plane of a part, that of the one before included."""
        return self._edges[number][0] - (number > 0)

    def _part(self, number: int) -> tuple[Array, Array]:
        if number not in self._sums:
            shape = list(self._tiling.shape)
            shape[self._tiling.axis] = self._edges[number][1] - self._first(number)
            shape[self._tiling.across] = self._band.stop - self._band.start
            self._sums[number] = self._engine.zeros((self._engine.outputs, *shape)), self._engine.zeros(tuple(shape))
        return self._sums[number]

    def groups(self, tiles: list[Tile]) -> list[list[Tile]]:
        """The tiles that begin in each part: once they have run, no other touches it."""
        axis = self._tiling.axis
        return [[tile for tile in tiles if a <= tile.box[axis].start < b] for a, b in self._edges]

    def finish(self, number: int) -> Slab:
        """Part ``number``, which comes after the one before it, and is let go of."""
        axis = self._tiling.axis
        sums, norm = self._part(number)
        del self._sums[number]
        sums /= norm + (norm == 0)
        values, covered = self._engine.numpy(sums), self._engine.numpy(norm) > 0
        edge = [slice(None)] * 3
        if self._carried is not None:
            edge[axis] = slice(0, 1)
            values[(slice(None), *edge)], covered[tuple(edge)] = self._carried
        edge[axis] = slice(-1, None)
        self._carried = values[(slice(None), *edge)].copy(), covered[tuple(edge)].copy()
        box = [slice(0, n) for n in self._tiling.shape]
        box[axis], box[self._tiling.across] = slice(self._first(number), self._edges[number][1]), self._band
        return Slab((box[0], box[1], box[2]), values, None if covered.all() else covered)


def _accumulate(total: Array, values: Array, weight: Array) -> None:
    """Add ``values`` (outputs, x, y, z) times ``weight`` (x, y, z) in place, with no array of all products."""
    if not isinstance(total, np.ndarray):
        total.addcmul_(values, weight)
        return
    for one, value in zip(total, values, strict=True):
        one += value * weight


def _common(one: slice, other: slice) -> slice:
    return slice(max(one.start, other.start), min(one.stop, other.stop))


def _shifted(one: slice, by: int) -> slice:
    return slice(one.start - by, one.stop - by)


def _edges(starts: tuple[int, ...], size: int) -> list[tuple[int, int]]:
    """Parts of an axis, each from one tile's start to that of another."""
    edges = [0]
    for start in starts[1:]:
        if start - edges[-1] >= _THIN and size - start >= _THIN:
            edges.append(start)
    return list(zip(edges, [*edges[1:], size], strict=True))


def _band_tiles(tiling: Tiling, band: tuple[int, int]) -> list[Tile]:
    """All tiles that touch a band and the voxel after it, along the axis."""
    starts = [list(s) for s in tiling.starts]
    starts[tiling.across] = _touching(tiling, band)
    corners = sorted(product(starts[0], starts[1], starts[2]), key=lambda c: (c[tiling.axis], c))
    return [Tile(corner, _clipped(corner, tiling)) for corner in corners]


def _touching(tiling: Tiling, band: tuple[int, int]) -> list[int]:
    """First voxels, along ``across``, of the tiles that touch a band and the voxel after it."""
    stop, patch = min(band[1] + 1, tiling.shape[tiling.across]), tiling.patch[tiling.across]
    return [s for s in tiling.starts[tiling.across] if s < stop and s + patch > band[0]]


def _clipped(corner: Corner, tiling: Tiling) -> Box:
    x, y, z = (slice(max(0, c), min(n, c + p)) for c, p, n in zip(corner, tiling.patch, tiling.shape, strict=True))
    return x, y, z


def _cut(image: Float32, corner: Corner, patch: tuple[int, int, int]) -> Float32:
    """A tile (C, *patch), zero beyond the image."""
    pairs = [(c, c + p, n) for c, p, n in zip(corner, patch, image.shape[1:], strict=True)]
    tile = image[(slice(None), *(slice(max(0, a), min(n, b)) for a, b, n in pairs))]
    around = [(max(0, -a), max(0, b - n)) for a, b, n in pairs]
    return np.pad(tile, [(0, 0), *around]) if any(a or b for a, b in around) else tile
