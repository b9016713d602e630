"""The one spatial operation: values on one grid, read off on another.

Reorienting, cropping, padding and changing the spacing are each "choose a grid"; undoing one is
the same call with the old grid.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray

from medseg.core.grid import Grid
from medseg.core.volume import LabelMap, Volume

Float64 = NDArray[np.float64]
Float32 = NDArray[np.float32]

# Positions this close to a voxel's centre (in voxels) are that voxel: below it, interpolation
# would only smear rounding errors of the affine.
_ON_VOXEL = 1e-3
# Rows of a banded matrix that are applied at one time, and what in it is too small for float32 to tell.
_ROWS = 32
_NOTHING = 1e-8
# Of two slices equally near the further one is taken, whatever the last bit of its position.
_TIE = 1e-9
# Edge values that stand around an image before its splines are fitted; their effect fades by 3.7 a voxel.
_PADDING = 12
# Voxels of a large image that are treated at one time.
_AT_ONCE = 2**23

Prepare = Callable[[int, Float32], Float32]
PrepareOne = Callable[[Float32], Float32]
Weights = Callable[[Float64, int], Float32]


@dataclass(frozen=True)
class AxisMap:
    """One axis of a new grid seen from the old one: the voxel axis of the old grid that it runs
    along, and the position (n,) on it, in voxels, of each new voxel."""

    source: int
    positions: Float64

    @property
    def on_voxels(self) -> bool:
        """Whether every new voxel is an old one."""
        return bool(np.abs(self.positions - np.rint(self.positions)).max() < _ON_VOXEL)

    def inside(self, size: int) -> NDArray[np.bool_]:
        """Which new voxels lie within the old field of view, edge to edge."""
        return (self.positions >= -0.5 - _ON_VOXEL) & (self.positions <= size - 0.5 + _ON_VOXEL)


def axis_maps(source: Grid, onto: Grid) -> tuple[AxisMap, AxisMap, AxisMap] | None:
    """The map for each axis of ``onto``, or None where the axes of the grids are not parallel."""
    matrix = np.linalg.inv(source.affine) @ onto.affine
    maps = []
    for axis in range(3):
        column = matrix[:3, axis]
        along = int(np.argmax(np.abs(column)))
        # Off-axis drift over the whole new grid must stay invisible.
        if np.abs(np.delete(column, along)).max() * onto.shape[axis] > 10 * _ON_VOXEL:
            return None
        positions = matrix[along, 3] + column[along] * np.arange(onto.shape[axis])
        maps.append(AxisMap(along, positions))
    if len({m.source for m in maps}) != 3:
        return None
    return maps[0], maps[1], maps[2]


def linear_weights(positions: Float64, size: int) -> Float32:
    """Matrix (n, size) that interpolates linearly at ``positions`` (n,), in voxels of an axis with
    ``size`` of them. Beyond the outermost centres the edge value holds."""
    clamped = np.clip(positions, 0, size - 1)
    low = np.minimum(np.floor(clamped).astype(int), max(size - 2, 0))
    high = np.minimum(low + 1, size - 1)
    fraction = clamped - low
    rows = np.arange(len(clamped))
    weights = np.zeros((len(clamped), size), dtype=np.float32)
    np.add.at(weights, (rows, low), 1 - fraction)
    np.add.at(weights, (rows, high), fraction)
    return weights


def spline_weights(positions: Float64, size: int) -> Float32:
    """Matrix (n, size) of cubic B-spline interpolation, prefilter included, mirrored at the ends.

    The same as ``scipy.ndimage.map_coordinates(order=3, mode="mirror")`` along one axis, with the
    edge value beyond the outermost centres. Unser, "Splines: a perfect fit", 1999.
    """
    if size < 2:
        return linear_weights(positions, size)
    clamped = np.clip(positions, 0, size - 1)
    first = np.floor(clamped).astype(int) - 1
    t = clamped - first - 1
    basis = ((1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, 3 * (1 - t) ** 3 - 6 * (1 - t) ** 2 + 4, t**3)
    rows = np.arange(len(clamped))
    weights = np.zeros((len(clamped), size))
    period = 2 * (size - 1)
    for offset, value in enumerate(basis):
        index = np.abs(first + offset) % period
        index = np.where(index >= size, period - index, index)
        np.add.at(weights, (rows, index), value / 6)
    # The coefficients are those whose spline passes through the values: 1/6, 4/6, 1/6 of each and its
    # neighbours, mirrored at the ends.
    through = (
        np.diag(np.full(size, 4 / 6)) + np.diag(np.full(size - 1, 1 / 6), 1) + np.diag(np.full(size - 1, 1 / 6), -1)
    )
    through[0, 1] = through[-1, -2] = 2 / 6
    return np.asarray(np.linalg.solve(through.T, weights.T).T, dtype=np.float32)


def nearest(positions: Float64, size: int) -> NDArray[np.intp]:
    """The voxels (n,) nearest to positions (n,) on an axis of ``size``."""
    return np.clip(np.floor(positions + 0.5 + _TIE), 0, size - 1).astype(np.intp)


def padded_spline_weights(positions: Float64, size: int) -> Float32:
    """Matrix (n, size) of cubic B-spline interpolation of an axis whose edge values go on for ever.

    The same as ``scipy.ndimage.map_coordinates(order=3, mode="nearest")`` along one axis.
    """
    edges = np.zeros((size + 2 * _PADDING, size), dtype=np.float32)
    edges[np.arange(len(edges)), np.clip(np.arange(len(edges)) - _PADDING, 0, size - 1)] = 1
    return spline_weights(positions + _PADDING, len(edges)) @ edges


def stretch(
    volume: Volume, onto: Grid, *, thick: int | None = None, linear: bool = False, prepare: Prepare | None = None
) -> Volume:
    """``volume`` on another grid over the same field of view, as scikit-image's ``resize`` does it:
    float32, by cubic B-splines through values that go on beyond the edges, clipped to the range of
    the values, or linearly. Along the axis ``thick`` the nearest slice is taken, each interpolated
    and clipped by itself. ``prepare`` is as for `resample`.

    Raises ValueError where the grids' axes are not the same.
    """
    maps = axis_maps(volume.grid, onto)
    if maps is None or any(m.source != axis for axis, m in enumerate(maps)):
        raise ValueError("the grids' axes differ")
    out = np.empty((volume.channels, *onto.shape), dtype=np.float32)
    weights = linear_weights if linear else padded_spline_weights
    for number, (channel, one) in enumerate(zip(out, volume.values, strict=True)):
        prepared = partial(prepare, number) if prepare else None
        if thick is None:
            _stretched(one, maps, prepared, weights, channel)
        else:
            _stretched_slices(one, maps, thick, prepared, weights, channel)
    return Volume(out, onto)


def _stretched(
    values: NDArray[Any], maps: tuple[AxisMap, ...], prepare: PrepareOne | None, weights: Weights, out: Float32
) -> None:
    low, high = np.float32(np.inf), np.float32(-np.inf)

    def watched(part: Float32) -> Float32:
        nonlocal low, high
        made = prepare(part) if prepare else part
        low, high = min(low, made.min()), max(high, made.max())
        return made

    out[...] = _in_parts(values, maps, watched, weights)
    np.clip(out, low, high, out=out)


def _stretched_slices(
    values: NDArray[Any],
    maps: tuple[AxisMap, ...],
    thick: int,
    prepare: PrepareOne | None,
    weights: Weights,
    out: Float32,
) -> None:
    used, back = np.unique(nearest(maps[thick].positions, values.shape[thick]), return_inverse=True)
    slices = np.take(values, used, axis=thick).astype(np.float32, copy=False)
    if prepare:
        slices = prepare(slices)
    within = tuple(axis for axis in range(3) if axis != thick)
    low, high = slices.min(axis=within, keepdims=True), slices.max(axis=within, keepdims=True)
    moved = tuple(m if axis != thick else None for axis, m in enumerate(maps))
    out[...] = np.take(np.clip(_apply(slices, moved, weights), low, high), back, axis=thick)


@overload
def resample(image: Volume, onto: Grid, *, fill: float = 0.0, prepare: Prepare | None = None) -> Volume: ...
@overload
def resample(image: LabelMap, onto: Grid) -> LabelMap: ...
def resample(
    image: Volume | LabelMap, onto: Grid, *, fill: float = 0.0, prepare: Prepare | None = None
) -> Volume | LabelMap:
    """``image`` as seen on the grid ``onto``.

    Intensities are interpolated by cubic B-splines and come back as float32; ``fill`` stands
    outside the old field of view, which reaches to the outer edges of its outermost voxels. Labels
    take, at each new voxel, the one with the largest linearly interpolated weight, ties going to
    the background and then to the lower number; outside is background. Where every new voxel is an
    old one (cropping, padding, flipping, permuting) values are copied, keeping their dtype unless it
    cannot hold ``fill``.

    ``prepare`` is applied to the old values before they are interpolated: it takes a channel's number
    and some of its values as float32, which it may change, and gives back as many. So a large scan of
    integers is never held as floats.
    """
    maps = axis_maps(image.grid, onto)
    if isinstance(image, LabelMap):
        if maps is not None and all(m.on_voxels for m in maps):
            return LabelMap(_owned(_copy(image.values[None], maps, onto, 0), image.values)[0], onto, image.labels)
        return LabelMap(_vote(image, maps, onto), onto, image.labels)
    if maps is not None and not all(m.on_voxels for m in maps):
        return Volume(_interpolate(image, maps, onto, fill, prepare), onto)
    if prepare is not None:
        values = np.stack([prepare(n, one.astype(np.float32)) for n, one in enumerate(image.values)])
        image = Volume(values, image.grid)
    if maps is None:
        return Volume(_interpolate_oblique(image, onto, fill), onto)
    return Volume(_owned(_copy(image.values, maps, onto, fill), image.values), onto)


def crop(image: Volume, onto: Grid) -> Volume:
    """A box of a volume, its axes turned or flipped perhaps, that shares the volume's memory.

    Raises ValueError where ``onto`` is no such box.
    """
    maps = axis_maps(image.grid, onto)
    if maps is not None and all(m.on_voxels for m in maps):
        values = _copy(image.values, maps, onto, 0)
        if np.may_share_memory(values, image.values):
            return Volume(values, onto)
    raise ValueError(f"{onto} is no box of {image.grid}")


def _copy(values: NDArray[Any], maps: tuple[AxisMap, ...], onto: Grid, fill: float) -> NDArray[Any]:
    """Values (C, X, Y, Z) picked voxel by voxel; a view where the new grid lies within the old one."""
    values = values.transpose(0, *(1 + m.source for m in maps))
    picks = [np.rint(m.positions).astype(int) for m in maps]
    keeps = [np.flatnonzero((p >= 0) & (p < n)) for p, n in zip(picks, values.shape[1:], strict=True)]
    within = tuple(len(k) for k in keeps) == onto.shape
    target = (slice(None), *(slice(k[0], k[-1] + 1) if len(k) else slice(0, 0) for k in keeps))
    if all(len(k) for k in keeps):
        for axis, (pick, keep) in enumerate(zip(picks, keeps, strict=True), start=1):
            start, stop, step = pick[keep[0]], pick[keep[-1]], 1 if len(keep) < 2 else pick[keep[1]] - pick[keep[0]]
            if abs(step) == 1:  # a slice is a view, where fancy indexing would copy the volume
                edge = stop + step
                values = values[(slice(None),) * axis + (slice(start, edge if edge >= 0 else None, step),)]
            else:
                values = np.take(values, pick[keep], axis=axis)
        if within:
            return values
    out = np.full((len(values), *onto.shape), fill, values.dtype if _holds(values.dtype, fill) else np.float32)
    if all(len(k) for k in keeps):
        out[target] = values
    return out


def _owned(values: NDArray[Any], old: NDArray[Any]) -> NDArray[Any]:
    return values.copy(order="K") if np.may_share_memory(values, old) else values


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    if np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        return float(value).is_integer() and int(limits.min) <= value <= int(limits.max)
    return True


def _interpolate(image: Volume, maps: tuple[AxisMap, ...], onto: Grid, fill: float, prepare: Prepare | None) -> Float32:
    values = image.values.transpose(0, *(1 + m.source for m in maps))
    out = np.empty((image.channels, *onto.shape), dtype=np.float32)
    for number, (channel, one) in enumerate(zip(out, values, strict=True)):
        channel[...] = _in_parts(one, maps, prepare and partial(prepare, number), spline_weights)
    _outside(out, maps, values.shape[1:], fill)
    return out


def _in_parts(values: NDArray[Any], maps: tuple[AxisMap, ...], prepare: PrepareOne | None, weights: Weights) -> Float32:
    """Values (X, Y, Z) made float32 and interpolated along two axes in parts of the third, along which
    they lie farthest apart in memory, and then along that."""
    far = int(np.argmax(np.abs(values.strides)))
    near = tuple(AxisMap(a, m.positions) if a != far else None for a, m in enumerate(maps))
    shape = [len(m.positions) for m in maps]
    shape[far] = values.shape[far]
    # The new array has its axes in the old one's order in memory.
    order = sorted(range(3), key=lambda a: -abs(values.strides[a]))
    half = np.empty([shape[a] for a in order], dtype=np.float32).transpose(np.argsort(order))
    step = max(1, _AT_ONCE // (values.size // values.shape[far]))
    for first in range(0, values.shape[far], step):
        where = (slice(None),) * far + (slice(first, first + step),)
        part = values[where].astype(np.float32, order="K")
        half[where] = _apply(prepare(part) if prepare else part, near, weights)
    return _apply(half, tuple(maps[a] if a == far else None for a in range(3)), weights)


def _apply(values: NDArray[Any], maps: tuple[AxisMap | None, ...], weights: Weights) -> NDArray[Any]:
    """One matrix per axis, None where it stays; the axes that shrink most come first, so that the
    rest is cheap."""
    wanted = [(a, m.positions) for a, m in enumerate(maps) if m is not None]
    for axis, positions in sorted(wanted, key=lambda w: len(w[1]) / values.shape[w[0]]):
        size = values.shape[axis]
        if len(positions) == size and np.abs(positions - np.arange(size)).max() < _ON_VOXEL:
            continue
        values = _along(values, axis, weights(positions, size))
    return values


def _along(values: NDArray[Any], axis: int, weights: Float32) -> NDArray[Any]:
    """Values (X, Y, Z) with a matrix applied along an axis.

    The matrix is banded, so that some rows of it at a time meet few of the values. The axis that
    varies fastest in memory costs no copy, and the result varies fastest along the next slower one.
    """
    order = sorted(range(3), key=lambda a: -abs(values.strides[a]))
    order.append(order.pop(order.index(axis)))
    lying = values.transpose(order)
    flat = lying.reshape(-1, lying.shape[2])
    out = np.empty((len(weights), len(flat)), dtype=np.float32)
    for first in range(0, len(weights), _ROWS):
        rows = weights[first : first + _ROWS]
        used = np.flatnonzero((np.abs(rows) > _NOTHING).any(axis=0))
        near = slice(int(used[0]), int(used[-1]) + 1)
        np.matmul(rows[:, near], flat[:, near].T, out=out[first : first + _ROWS])
    made = out.reshape(len(weights), *lying.shape[:2])
    return made.transpose(np.argsort([order[2], *order[:2]]))


def _outside(out: NDArray[Any], maps: tuple[AxisMap, ...], sizes: tuple[int, ...], fill: float) -> None:
    for axis, (m, size) in enumerate(zip(maps, sizes, strict=True), start=out.ndim - 3):
        beyond = ~m.inside(size)
        if beyond.any():
            out[(slice(None),) * axis + (beyond,)] = fill


def _vote(image: LabelMap, maps: tuple[AxisMap, ...] | None, onto: Grid) -> NDArray[Any]:
    """Running maximum over labels, each computed only where its bounding box reaches."""
    out = np.zeros(onto.shape, dtype=image.values.dtype)
    best = np.zeros(onto.shape, dtype=np.float32)
    total = np.zeros(onto.shape, dtype=np.float32)
    for number in np.unique(image.values):
        if number == 0:
            continue
        where, weight = _weight_of(image, maps, onto, number)
        wins = weight > best[where]
        out[where][wins] = number
        best[where][wins] = weight[wins]
        total[where] += weight
    out[1 - total >= best] = 0
    return out


def _weight_of(
    image: LabelMap, maps: tuple[AxisMap, ...] | None, onto: Grid, number: Any
) -> tuple[tuple[slice, ...], NDArray[Any]]:
    mask = image.values == number
    if maps is None:
        weight = _interpolate_oblique(Volume(mask[None], image.grid), onto, 0.0, order=1)[0]
        return (slice(None),) * 3, weight
    mask = mask.transpose([m.source for m in maps])
    where, boxes, reached = [], [], []
    for axis, m in enumerate(maps):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != axis)))
        size = mask.shape[axis]
        low, high = max(int(hit[0]) - 1, 0), min(int(hit[-1]) + 2, size)
        near = np.flatnonzero(m.inside(size) & (m.positions > low - 1) & (m.positions < high))
        if not len(near):
            return (slice(0, 0),) * 3, np.zeros((0, 0, 0), dtype=np.float32)
        boxes.append(slice(low, high))
        where.append(slice(int(near[0]), int(near[-1]) + 1))
        reached.append(AxisMap(axis, m.positions[near[0] : near[-1] + 1] - low))
    weight = _apply(mask[tuple(boxes)].astype(np.float32), tuple(reached), linear_weights)
    return tuple(where), weight


def _interpolate_oblique(image: Volume, onto: Grid, fill: float, order: int = 3) -> Float32:
    from scipy.ndimage import affine_transform

    matrix = np.linalg.inv(image.grid.affine) @ onto.affine
    out = np.empty((image.channels, *onto.shape), dtype=np.float32)
    for channel, one in zip(out, image.values, strict=True):
        affine_transform(
            np.asarray(one, dtype=np.float32),
            matrix,
            output_shape=onto.shape,
            output=channel,
            order=order,
            mode="nearest",
        )
    i, j, k = (np.arange(n) for n in onto.shape)
    for axis, size in enumerate(image.grid.shape):
        position = matrix[axis, 3] + matrix[axis, 0] * i[:, None, None]
        position = position + matrix[axis, 1] * j[None, :, None] + matrix[axis, 2] * k[None, None, :]
        out[:, (position < -0.5 - _ON_VOXEL) | (position > size - 0.5 + _ON_VOXEL)] = fill
    return out
