"""Things that are counted: what a network finds in each tile becomes one thing, on the scan's own grid.

Boxes are (low corner, high corner) in voxels of the network's grid, where voxel i reaches from i to i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.instances import InstanceMap, described
from medseg.core.resample import AxisMap, axis_maps, linear_weights
from medseg.infer.engine import Found
from medseg.infer.window import Tile

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Box = Float64

# Two tiles see the same thing where, in what both of them see, its boxes overlap so much (intersection over
# union), or where one that is cut off lies within the other with so much of it.
_SAME, _INSIDE = 0.4, 0.7
# What two tiles have in common tells nothing where it is thinner than this share of a tile.
_COMMON = 1 / 8
# A box this near to its tile's border, as a share of the tile, may go on beyond; it counts for so much less.
_BORDER, _CUT = 1 / 12, 0.5
# A tile that holds this share of a thing should have found it.
_SEES = 0.5
# Below this score a thing is none; a voxel is its own from this probability on.
_LEAST_SCORE, _OWN = 0.1, 0.5
# With so much of it within likelier things a thing is one of them once more.
_AGAIN = 0.5
# The weight of a tile's outermost voxels in what is averaged over tiles; in its middle it is 1.
_FAINT = 1e-3


@dataclass(frozen=True, eq=False)
class Finds:
    """All that was found in all tiles, N things: ``boxes`` (N, 2, 3), the ``tiles`` (N, 2, 3) in which they were
    found, the number of each one's ``view`` (N,) (of a tile by a member), ``scores`` (N,), ``classes`` (N,), and
    masks, each (x, y, z) over its box; and all ``views`` (V, 2, 3), tiles without finds among them."""

    boxes: Float64
    tiles: Float64
    view: NDArray[np.int64]
    scores: Float64
    classes: NDArray[np.int64]
    masks: Sequence[Float32]
    views: Float64


@dataclass(frozen=True, eq=False)
class Thing:
    """Finds that are one thing: their numbers, its ``box`` (2, 3), class and score."""

    finds: NDArray[np.int64]
    box: Box
    number: int
    score: float


class Gathered:
    """Collects what the tiles of a grid of ``shape`` voxels hold. ``flat`` is a 2D network's slice axis."""

    def __init__(self, shape: tuple[int, int, int], flat: int | None = None) -> None:
        self._shape, self._flat = shape, flat
        # By corner: tiles on the border of two bands run twice.
        self._tiles: dict[tuple[int, int, int], tuple[Tile, Sequence[Found]]] = {}

    def take(self, tile: Tile, found: Sequence[Found]) -> None:
        """What each member of the model found in a tile."""
        self._tiles[tile.corner] = tile, found

    def finds(self) -> Finds:
        """All of it, in voxels of the grid."""
        boxes, tiles, view, scores, classes = [], [], [], [], []
        masks: list[Float32] = []
        views: list[Float64] = []
        for tile, members in self._tiles.values():
            region = np.array([[s.start for s in tile.box], [s.stop for s in tile.box]], dtype=np.float64)
            for one in members:
                boxes.append(one.boxes + np.array(tile.corner))
                tiles.append(np.broadcast_to(region, one.boxes.shape))
                view.append(np.full(len(one.scores), len(views)))
                scores.append(one.scores)
                classes.append(one.classes)
                masks += list(one.masks)
                views.append(region)
        return Finds(
            np.concatenate(boxes) if boxes else np.zeros((0, 2, 3)),
            np.concatenate(tiles) if tiles else np.zeros((0, 2, 3)),
            np.concatenate(view).astype(np.int64) if view else np.zeros(0, dtype=np.int64),
            np.concatenate(scores).astype(np.float64) if scores else np.zeros(0),
            np.concatenate(classes).astype(np.int64) if classes else np.zeros(0, dtype=np.int64),
            masks,
            np.stack(views) if views else np.zeros((0, 2, 3)),
        )

    def home(self, source: Grid, onto: Grid, numbers: Sequence[int]) -> InstanceMap:
        """The things on the scan's grid ``onto``, the likeliest first; ``source`` is the network's grid, and
        ``numbers`` are the labels of the classes from 1 on."""
        finds = self.finds()
        return brought_home(finds, merged(finds, self._shape, self._flat), source, onto, numbers)


def merged(finds: Finds, shape: tuple[int, int, int], flat: int | None = None) -> list[Thing]:
    """The things that were found, by the weighted clustering of boxes (Jaeger et al., 2020), the likeliest first.

    Two finds of one class are one thing where they overlap in what both tiles see: so a thing that one tile
    holds whole and another in part is one, and so are the parts of a thing that no tile holds whole, each
    joined to the next. From the likeliest find on, those like it are gathered, and, through finds that their
    tile's border cuts off, those like these. The score is the mean of the finds', less the further a tile's
    border cuts one off, and tiles that should have found it and did not count as 0. A 2D network's finds are
    one thing where they lie in neighbouring slices.
    """
    cut = _cut(finds, shape, flat)
    cut_off = np.asarray(cut.any(axis=(1, 2)))
    weights = np.where(cut_off, _CUT, 1.0)
    free = np.ones(len(finds.scores), dtype=bool)
    things = []
    for seed in np.argsort(-finds.scores * weights, kind="stable"):
        if not free[seed]:
            continue
        own, following = [int(seed)], [int(seed)]
        free[seed] = False
        while following:
            like = np.flatnonzero(free & _like(following.pop(), finds, cut_off, flat))
            free[like] = False
            own += like.tolist()
            following += like[cut_off[like] | (flat is not None)].tolist()
        things.append(_thing(np.array(own), finds, cut, weights, flat))
    kept = [one for one in things if one.score >= _LEAST_SCORE]
    return sorted(kept, key=lambda one: -one.score)


def _cut(finds: Finds, shape: tuple[int, int, int], flat: int | None) -> NDArray[np.bool_]:
    """Which faces (N, 2, 3) of the boxes lie at a border of their tile beyond which the image goes on."""
    low, high = finds.tiles[:, 0], finds.tiles[:, 1]
    reach = _BORDER * (high - low)
    cut = np.stack([(finds.boxes[:, 0] < low + reach) & (low > 0),
                    (finds.boxes[:, 1] > high - reach) & (high < np.array(shape))], axis=1)  # fmt: skip
    if flat is not None:
        cut[:, :, flat] = False
    return cut


def _like(one: int, finds: Finds, cut_off: NDArray[np.bool_], flat: int | None) -> NDArray[np.bool_]:
    """Which finds (N,) are of the same thing as one of them."""
    low = np.maximum(finds.tiles[:, 0], finds.tiles[one, 0])
    high = np.minimum(finds.tiles[:, 1], finds.tiles[one, 1])
    axes = [a for a in range(3) if a != flat]
    thick = high - low >= _COMMON * (finds.tiles[one, 1] - finds.tiles[one, 0])
    near = thick[:, axes].all(axis=1) & (finds.classes == finds.classes[one])
    if flat is not None:
        near &= np.abs(finds.boxes[:, 0, flat] - finds.boxes[one, 0, flat]) <= 1
    low, high, boxes = low[:, axes], high[:, axes], finds.boxes[:, :, axes]
    mine = _volume(np.maximum(low, boxes[one, 0]), np.minimum(high, boxes[one, 1]))
    others = _volume(np.maximum(low, boxes[:, 0]), np.minimum(high, boxes[:, 1]))
    both = _volume(np.maximum(low, np.maximum(boxes[:, 0], boxes[one, 0])),
                   np.minimum(high, np.minimum(boxes[:, 1], boxes[one, 1])))  # fmt: skip
    same = both >= _SAME * np.maximum(mine + others - both, np.finfo(float).tiny)
    inside = cut_off & (both >= _INSIDE * _volume(boxes[:, 0], boxes[:, 1]))
    if flat is not None:  # things begin and end in smaller slices
        inside |= (finds.view != finds.view[one]) & (both >= _INSIDE * np.minimum(mine, others))
    like: NDArray[np.bool_] = near & (same | inside)
    return like


def _volume(low: Float64, high: Float64) -> Float64:
    volume: Float64 = np.maximum(high - low, 0).prod(axis=-1)
    return volume


def _thing(own: NDArray[np.int64], finds: Finds, cut: NDArray[np.bool_], weights: Float64, flat: int | None) -> Thing:
    """Each face of the box is the mean of those that no border cuts off; else the outermost."""
    own = np.sort(own)
    boxes, weight = finds.boxes[own], finds.scores[own] * weights[own]
    seen = np.where(cut[own], 0.0, weight[:, None, None])
    box = (boxes * seen).sum(axis=0) / np.maximum(seen.sum(axis=0), np.finfo(float).tiny)
    outermost = np.stack([boxes[:, 0].min(axis=0), boxes[:, 1].max(axis=0)])
    box = np.where(seen.sum(axis=0) > 0, box, outermost)
    if flat is not None:
        box[:, flat] = outermost[:, flat]
    missing = max(0, _views_of(box, finds.views, flat) - len(set(finds.view[own].tolist())))
    total = weights[own].sum()
    score = weight.sum() / (total + missing * total / len(own))
    return Thing(own, box, int(finds.classes[own[0]]), float(score))


def _views_of(box: Box, views: Float64, flat: int | None) -> int:
    """How many views hold so much of a box that they should have found it."""
    low, high = np.maximum(views[:, 0], box[0]), np.minimum(views[:, 1], box[1])
    shares = np.maximum(high - low, 0) / (box[1] - box[0])
    if flat is not None:
        shares[:, flat] = shares[:, flat] > 0
    return int((shares.prod(axis=1) >= _SEES).sum())


def brought_home(
    finds: Finds, things: Sequence[Thing], source: Grid, onto: Grid, numbers: Sequence[int]
) -> InstanceMap:
    """Things on the scan's grid ``onto``. A voxel belongs to the thing whose mask, interpolated linearly at the
    voxel's middle and averaged over tiles, is most probable there, and half at the least. A thing most of whose
    voxels are likelier things' is the same once more, whatever its class, and is left out, as is one without a
    voxel. The grids' axes must be parallel."""
    maps = axis_maps(source, onto)
    if maps is None:
        raise ValueError("the grids' axes are not parallel")
    order = [m.source for m in maps]
    back = [order.index(axis) for axis in range(3)]
    along = [maps[b] for b in back]
    values = np.zeros(onto.shape, dtype=np.uint16 if len(things) < 2**16 else np.uint32, order="F")
    # In 255ths: with one number a voxel more, a large scan's memory would double.
    most = np.zeros(onto.shape, dtype=np.uint8, order="F")
    turned, best = values.transpose(back), most.transpose(back)
    for number, thing in enumerate(things, start=1):
        reach = np.stack([finds.boxes[thing.finds, 0].min(axis=0), finds.boxes[thing.finds, 1].max(axis=0)])
        where = [
            _reached(m, size, low, high) for m, size, (low, high) in zip(along, source.shape, reach.T, strict=True)
        ]
        if any(len(w) == 0 for w in where):
            continue
        at = [np.clip(m.positions[w], 0, n - 1) + 0.5 for m, w, n in zip(along, where, source.shape, strict=True)]
        likely = _mask(thing, finds, at)
        box = tuple(slice(int(w[0]), int(w[-1]) + 1) for w in where)
        said = np.rint(255 * likely).astype(np.uint8)
        own = likely >= _OWN
        size = int(np.count_nonzero(own))
        if int(np.count_nonzero(turned[box][own])) >= _AGAIN * max(1, size):
            continue
        wins = own & (said > best[box])
        turned[box][wins] = number
        best[box][wins] = said[wins]
    label_of = {n: numbers[thing.number - 1] for n, thing in enumerate(things, start=1)}
    return described(values, onto, label_of, {n: thing.score for n, thing in enumerate(things, start=1)})


def _reached(m: AxisMap, size: int, low: float, high: float) -> NDArray[np.intp]:
    """The voxels of the scan along one axis whose middles lie within a box, and within the network's grid."""
    return np.flatnonzero(m.inside(size) & (m.positions + 0.5 >= low) & (m.positions + 0.5 <= high))


def _mask(thing: Thing, finds: Finds, at: Sequence[Float64]) -> Float32:
    """The probability of a thing (x, y, z) at every combination of three lists of positions, voxel i reaching
    from i to i + 1: the mean over the views that see a position, the more in its middle the more weight; of
    several finds in one view the largest."""
    shape = [len(a) for a in at]
    total, weight = np.zeros(shape, dtype=np.float32), np.zeros(shape, dtype=np.float32)
    for view in np.unique(finds.view[thing.finds]):
        own = thing.finds[finds.view[thing.finds] == view]
        low, high = finds.views[view]
        seen = [_span(a, lo, hi) for a, lo, hi in zip(at, low, high, strict=True)]
        if any(s.start >= s.stop for s in seen):
            continue
        inner = [a[s] for a, s in zip(at, seen, strict=True)]
        likely = np.zeros([len(a) for a in inner], dtype=np.float32)
        for one in own:
            span = [_span(a, lo, hi) for a, lo, hi in zip(inner, *finds.boxes[one], strict=True)]
            if all(s.start < s.stop for s in span):
                part = likely[tuple(span)]
                points = [a[s] for a, s in zip(inner, span, strict=True)]
                np.maximum(part, _pasted(finds.masks[one], finds.boxes[one], points), out=part)
        score = np.float32(finds.scores[own].max())
        x, y, z = (_central(a, lo, hi) for a, lo, hi in zip(inner, low, high, strict=True))
        share = score * x[:, None, None] * y[:, None] * z
        total[tuple(seen)] += share * likely
        weight[tuple(seen)] += share
    mean: Float32 = np.divide(total, np.maximum(weight, np.float32(1e-30)), dtype=np.float32)
    return mean


def _span(at: Float64, low: float, high: float) -> slice:
    """Which of the positions, whichever way they run, lie within bounds: they follow each other."""
    hit = np.flatnonzero((at >= low) & (at <= high))
    return slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0)


def _central(at: Float64, low: float, high: float) -> Float32:
    """The weight of positions along one axis of a tile: 1 in its middle, falling off to next to nothing."""
    share = np.minimum(at - low, high - at) / ((high - low) / 2)
    return np.maximum(share, _FAINT).astype(np.float32)


def _pasted(mask: Float32, box: Box, at: Sequence[Float64]) -> Float32:
    """A mask (bins, ...) of a box (2, 3) at every combination of three lists of positions within it."""
    values = mask
    for axis, (a, low, high) in enumerate(zip(at, box[0], box[1], strict=True)):
        weights = linear_weights((a - low) / (high - low) * mask.shape[axis] - 0.5, mask.shape[axis])
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return values


def kept(found: InstanceMap, numbers: Sequence[int], smallest_mm3: float) -> InstanceMap:
    """The instances of these labels that are not smaller, as numbered before."""
    rows = [
        one for one in found.instances
        if one.label in numbers and 1000 * one.volume_ml >= smallest_mm3 * (1 - 1e-9)
    ]  # fmt: skip
    if len(rows) == len(found.instances):
        return found
    table = np.zeros(int(max(one.number for one in found.instances)) + 1, dtype=found.values.dtype)
    for one in rows:
        table[one.number] = one.number
    return InstanceMap(table[found.values], found.grid, tuple(rows))
