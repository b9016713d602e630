"""From the network's grid home to the scan's, slab by slab: no array of (classes x whole scan)
ever exists."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.resample import AxisMap, axis_maps
from medseg.core.resample import nearest as nearest_voxel
from medseg.infer.engine import Head
from medseg.infer.window import Box, Slab

Float32 = NDArray[np.float32]
# Logits treated at one time by each thread, in numbers.
_AT_ONCE = 2**20
# Where more of the voxels than this lie between different winners, all are interpolated: row by row
# that is cheaper than gathering the neighbours of each.
_MOSTLY = 0.1


@dataclass(frozen=True)
class Decision:
    """How logits become classes: the largest wins, ties going to the lower class; or, for
    ``regions``, each logit above zero paints its class, later ones over earlier ones, on background.
    Probabilities are those of the logits divided by ``temperature``.

    ``head``, where given, makes logits of features first: these are averaged and interpolated in
    their place, which comes to the same.
    """

    classes: int
    regions: tuple[int, ...] | None = None
    temperature: float = 1.0
    head: Head | None = None

    def logits(self, values: Float32) -> Float32:
        """Logits (outputs, ...) of what a slab holds (outputs or features, ...)."""
        return values if self.head is None else self.head.apply(values)

    def winner(self, logits: Float32) -> NDArray[Any]:
        """The class (...) of logits (outputs, ...)."""
        winner = np.zeros(logits.shape[1:], dtype=self.dtype)
        if self.regions is not None:
            for one, painted in zip(logits, self.regions, strict=True):
                winner[one > 0] = painted
            return winner
        # Counted backwards, so that the lowest of equals wins; masks and copies would cost thrice as much.
        best, count = logits.max(axis=0), self.dtype.type(len(logits))
        for number, one in enumerate(logits):
            np.maximum(winner, (one == best) * self.dtype.type(count - number), out=winner)
        return np.subtract(count, winner, out=winner)

    def probabilities(self, logits: Float32) -> Float32:
        """The probability (classes, ...) of each class. Of regions, each has what those painted over
        it leave."""
        scale = np.float32(1 / self.temperature)
        if self.regions is None:
            shares: Float32 = logits - logits.max(axis=0)
            shares *= scale
            np.exp(shares, out=shares)
            shares /= shares.sum(axis=0)
            return shares
        shares = np.zeros((self.classes, *logits.shape[1:]), dtype=np.float32)
        left = np.ones(logits.shape[1:], dtype=np.float32)
        for one, painted in zip(reversed(logits), reversed(self.regions), strict=True):
            share = 0.5 + 0.5 * np.tanh(0.5 * scale * one)
            shares[painted] += left * share
            left *= 1 - share
        shares[0] = left
        return shares

    def suspected(self, logits: Float32, least: float) -> NDArray[np.bool_]:
        """Where (...) the odds of any structure, against the background, are above those of a
        probability of ``least``: so they are wherever it has that probability, and to see it takes no
        exponentials."""
        odds = logits.max(axis=0) if self.regions is not None else logits[1:].max(axis=0) - logits[0]
        found: NDArray[np.bool_] = odds > self.temperature * math.log(least / (1 - least))
        return found

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of classes, and of `mixed`."""
        return np.dtype(np.uint8 if self.classes < 255 else np.uint16)

    @property
    def mixed(self) -> int:
        """A number that is no class."""
        return int(np.iinfo(self.dtype).max)


@dataclass
class Tally:
    """Sums over the network's grid, for each class (classes,): of its probability everywhere, of its
    probability where it won, and how many voxels it won, each of ``voxel_volume`` mm3."""

    probability: NDArray[np.float64]
    inside: NDArray[np.float64]
    won: NDArray[np.int64]
    voxel_volume: float = 1.0

    @classmethod
    def empty(cls, classes: int, voxel_volume: float) -> Tally:
        """Nothing counted yet."""
        return cls(np.zeros(classes), np.zeros(classes), np.zeros(classes, dtype=np.int64), voxel_volume)

    def add(self, other: Tally) -> None:
        """Count another part of the grid."""
        self.probability += other.probability
        self.inside += other.inside
        self.won += other.won


@dataclass(frozen=True)
class Home:
    """What came home: the winning class (X, Y, Z) of each voxel of the scan; its probability, where
    that was asked for; and the tally."""

    winner: NDArray[Any]
    probability: Float32 | None
    tally: Tally


# Takes the probability (classes, ...) of every class in a box of the scan's grid.
Keep = Callable[[Box, Float32], None]


def bring_home(
    slabs: Iterable[Slab],
    source: Grid,
    onto: Grid,
    decision: Decision,
    *,
    nearest: tuple[int, ...] = (),
    probability: bool = False,
    keep: Keep | None = None,
    threads: int = 1,
) -> Home:
    """The class of every voxel of the scan's grid ``onto``, from slabs of the grid ``source``.

    Logits are interpolated linearly (but along the source's axes ``nearest``, where the nearest
    voxel's count), then the class is decided. Outside the source's field of view, and next to voxels
    that no tile covered, class 0 stands with probability 1. The grids' axes must be parallel, as
    those of `preprocess` and its scan are. With ``probability`` that of each winner is given too;
    ``keep`` is handed those of all classes, box by box and from several threads.

    Only voxels between different winners are interpolated. Where all neighbours of a point have the
    same class, so has the point: what a class needs to win are linear inequalities, and those that
    hold for several logits hold for every mean of them. The probability of such a voxel is
    interpolated from its neighbours' instead.
    """
    maps = axis_maps(source, onto)
    if maps is None:
        raise ValueError("the grids' axes are not parallel")
    order = [m.source for m in maps]
    back = [order.index(axis) for axis in range(3)]
    axes = [_Axis.of(maps[back[a]], source.shape[a], nearest=a in nearest) for a in range(3)]
    winner = np.zeros(onto.shape, dtype=decision.dtype, order="F")
    likely = np.ones(onto.shape, dtype=np.float32, order="F") if probability else None
    tally = Tally.empty(decision.classes, source.voxel_volume)
    # Everything is computed along the source's axes, and turned as it is put down.
    out = _Out(winner.transpose(back), None if likely is None else likely.transpose(back), _turning(keep, order))
    with ThreadPoolExecutor(threads) as pool:
        for slab in slabs:
            settled = _Settled(slab, axes, source.shape, decision, out)
            for counted in pool.map(settled.decide, settled.planes()):
                tally.add(counted)
            settled.agree()
            for _ in pool.map(settled.land, settled.rows()):
                pass
            del slab, settled  # before the next one is computed
    return Home(winner, likely, tally)


def _turning(keep: Keep | None, order: list[int]) -> Keep | None:
    if keep is None:
        return None

    def turned(box: Box, shares: Float32) -> None:
        keep((box[order[0]], box[order[1]], box[order[2]]), shares.transpose(0, *(1 + a for a in order)))

    return turned


@dataclass(frozen=True)
class _Axis:
    """One axis of the scan along one of the source: for each of its voxels from ``first`` on, the
    source's voxel below (n,) and the share (n,) of the next one, None where voxels lie on voxels."""

    first: int
    low: NDArray[np.intp]
    share: Float32 | None

    @classmethod
    def of(cls, m: AxisMap, size: int, *, nearest: bool) -> _Axis:
        inside = np.flatnonzero(m.inside(size))
        at = np.clip(m.positions[inside], 0, size - 1)
        first = int(inside[0]) if len(inside) else 0
        if nearest or m.on_voxels or size == 1:
            return cls(first, nearest_voxel(at, size), None)
        low = np.minimum(np.floor(at), size - 2).astype(np.intp)
        return cls(first, low, (at - low).astype(np.float32))

    def within(self, box: slice, size: int) -> slice:
        """The voxels of the scan, counted from ``first``, that a box of the source settles: its last
        plane belongs to the next one, unless it is the source's last."""
        last = box.stop if self.share is None and box.stop == size else box.stop - 1
        own = np.flatnonzero((self.low >= box.start) & (self.low < last))
        return slice(int(own[0]), int(own[-1]) + 1) if len(own) else slice(0, 0)


@dataclass(frozen=True)
class _Out:
    """Where results go, with axes in the order of the source's."""

    winner: NDArray[Any]
    probability: Float32 | None
    keep: Keep | None


@dataclass
class _Settled:
    """One slab on its way home."""

    slab: Slab
    axes: list[_Axis]
    sizes: tuple[int, int, int]
    decision: Decision
    out: _Out
    winner: NDArray[Any] = field(init=False)
    likely: Float32 = field(init=False)

    def __post_init__(self) -> None:
        shape = self.slab.values.shape[1:]
        self.winner = np.empty(shape, dtype=self.decision.dtype)
        self.likely = np.empty(shape if self.out.probability is not None else (0, 0, 0), dtype=np.float32)
        self._own = [a.within(b, n) for a, b, n in zip(self.axes, self.slab.box, self.sizes, strict=True)]

    def planes(self) -> list[slice]:
        """Parts of the slab's first axis, for `decide`."""
        length, y, z = self.slab.values.shape[1:]
        return planes_at_once(length, y * z * self._numbers)

    def rows(self) -> list[slice]:
        """Parts of the scan's voxels along the slab's first axis, for `land`."""
        x, y, z = (o.stop - o.start for o in self._own)
        return [
            slice(p.start + self._own[0].start, p.stop + self._own[0].start)
            for p in planes_at_once(x, y * z * self._numbers)
        ]

    @property
    def _numbers(self) -> int:
        return max(len(self.slab.values), self.decision.classes)

    def decide(self, planes: slice) -> Tally:
        """Decide the voxels of some planes of the slab, and count those that no other slab counts."""
        logits = self.decision.logits(self.slab.values[:, planes])
        winner = self.decision.winner(logits)
        shares = self.decision.probabilities(logits)
        likely = _of(winner, shares)
        if self.slab.covered is not None:
            bare = ~self.slab.covered[planes]
            winner[bare], likely[bare], shares[:, bare] = 0, 1, 0
        self.winner[planes] = winner
        if self.likely.size:
            self.likely[planes] = likely
        own = [slice(0, b.stop - b.start - (b.stop < n)) for b, n in zip(self.slab.box, self.sizes, strict=True)]
        where = (slice(0, max(0, own[0].stop - planes.start)), own[1], own[2])
        flat, count = winner[where].ravel(), self.decision.classes
        return Tally(
            shares[(slice(None), *where)].sum(axis=(1, 2, 3), dtype=np.float64),
            np.asarray(np.bincount(flat, weights=likely[where].ravel(), minlength=count), dtype=np.float64),
            np.bincount(flat, minlength=count),
        )

    def agree(self) -> None:
        """Make of the winners at voxels those between voxels, or `mixed`."""
        covered = self.slab.covered
        for axis, one in enumerate(self.axes):
            if one.share is None:
                continue
            low, high = (_along(axis, slice(None, -1)), _along(axis, slice(1, None)))
            self.winner = np.where(self.winner[low] == self.winner[high], self.winner[low], self.decision.mixed).astype(
                self.decision.dtype
            )
            if covered is not None:
                covered = covered[low] & covered[high]
        if covered is not None:
            self.winner[~covered] = 0
        self._covered = covered

    def land(self, rows: slice) -> None:
        """Settle the scan's voxels of some rows."""
        own = [rows, self._own[1], self._own[2]]
        at = [a.low[o] - b.start for a, o, b in zip(self.axes, own, self.slab.box, strict=True)]
        shares = [None if a.share is None else a.share[o] for a, o in zip(self.axes, own, strict=True)]
        winner = _pick(self.winner, at)
        mixed = winner == self.decision.mixed
        where = tuple(slice(a.first + o.start, a.first + o.stop) for a, o in zip(self.axes, own, strict=True))
        likely = None if self.out.probability is None else _interpolate(self.likely[None], at, shares)[0]
        count = np.count_nonzero(mixed)
        if self.out.keep is not None or count > _MOSTLY * mixed.size:
            logits = self.decision.logits(_interpolate(self.slab.values, at, shares))
            np.copyto(winner, self.decision.winner(logits), where=mixed)
            if self.out.keep is not None or likely is not None:
                every = self.decision.probabilities(logits)
                if likely is not None:
                    np.copyto(likely, _of(winner, every), where=mixed)
                if self.out.keep is not None:
                    self.out.keep((where[0], where[1], where[2]), self._blanked(every, at))
        elif count:
            points = np.nonzero(mixed)
            places = [a[p] for a, p in zip(at, points, strict=True)]
            weights = [None if s is None else s[p] for s, p in zip(shares, points, strict=True)]
            logits = self.decision.logits(_gather(self.slab.values, places, weights))
            winner[points] = self.decision.winner(logits)
            if likely is not None:
                likely[points] = _of(winner[points], self.decision.probabilities(logits))
        self.out.winner[where] = winner
        if likely is not None and self.out.probability is not None:
            self.out.probability[where] = likely

    def _blanked(self, shares: Float32, at: list[NDArray[np.intp]]) -> Float32:
        if self._covered is not None:
            bare = ~_pick(self._covered, at)
            shares[:, bare] = 0
            shares[0, bare] = 1
        return shares


def _of(winner: NDArray[Any], shares: Float32) -> Float32:
    """Of shares (classes, ...) the winner's (...)."""
    picked: Float32 = np.take_along_axis(shares, winner[None].astype(np.intp), axis=0)[0]
    return picked


def planes_at_once(length: int, numbers: int) -> list[slice]:
    """Parts of an axis, to be treated one at a time, whose planes hold so many ``numbers`` each."""
    step = max(1, _AT_ONCE // max(1, numbers))
    return [slice(first, min(first + step, length)) for first in range(0, length, step)]


def _along(axis: int, part: slice) -> tuple[slice, ...]:
    return (slice(None),) * axis + (part,)


def _pick(values: NDArray[Any], at: list[NDArray[np.intp]]) -> NDArray[Any]:
    """The values (x, y, z) at every combination of three lists of indices."""
    for axis, one in enumerate(at):
        values = _take(values, one, axis)
    return values


def _take(values: NDArray[Any], at: NDArray[np.intp], axis: int) -> NDArray[Any]:
    """A copy of the values at some indices of an axis; a view where they follow each other."""
    if len(at) and at[-1] - at[0] == len(at) - 1 and (np.diff(at) == 1).all():
        return values[_along(axis, slice(int(at[0]), int(at[-1]) + 1))]
    return np.take(values, at, axis=axis)


def _mean(low: Float32, high: Float32, share: Float32) -> Float32:
    """Between two arrays, which are spent. Rounded alike for every class, and growing with both, so
    that the larger of two classes at all neighbours stays the larger."""
    low *= 1 - share
    high *= share
    low += high
    return low


def _interpolate(values: Float32, at: list[NDArray[np.intp]], shares: list[Float32 | None]) -> Float32:
    """Values (n, x, y, z) at every combination of three lists of positions."""
    for axis, (low, share) in enumerate(zip(at, shares, strict=True), start=1):
        if share is None:
            values = _take(values, low, axis)
        else:
            picked = np.take(values, low, axis=axis)
            values = _mean(picked, np.take(values, low + 1, axis=axis), share.reshape([-1] + [1] * (3 - axis)))
    return values


def _gather(values: Float32, places: list[NDArray[np.intp]], shares: list[Float32 | None]) -> Float32:
    """Values (n, points) of (n, x, y, z) at single positions: the same sums as `_interpolate`'s."""
    _, _, y, z = values.shape
    flat = values.reshape(len(values), -1)
    steps = [(step, share) for step, share in zip((y * z, z, 1), shares, strict=True) if share is not None]
    take = partial(np.take, flat, axis=1)

    def between(base: NDArray[np.intp], axes: int) -> Float32:
        if axes == 0:
            return take(base)
        step, share = steps[axes - 1]
        return _mean(between(base, axes - 1), between(base + step, axes - 1), share)

    return between((places[0] * y + places[1]) * z + places[2], len(steps))
