"""Borders moved to where the scan has edges: a fully connected conditional random field near them.

Krähenbühl & Koltun, "Efficient inference in fully connected CRFs with Gaussian edge potentials", 2011, as
DeepLab used it (Chen et al. 2018). Each voxel x of a band around the borders takes the label l that minimises

    d(x, l) / border_mm  -  sum over kernels of weight * (K q_l)(x)

by mean field: q is the softmax of the negative of that, from the q before. Of the unary term, d is the distance in
mm from the voxel's middle to where the label was, so that without kernels nothing changes, and a border is dearer
to move the farther. (DeepLab's is the network's probability. Label maps are what held-out cases leave behind, so
with this one what is measured out of fold is what is done.) The kernels are Gaussians of position and
intensity ("appearance") and of position ("smoothness"), each made symmetric and of rows that sum to about 1
(D^-1/2 K D^-1/2, as the authors' program does), so that a weight means the same on fine and coarse grids; they
are blurred on the permutohedral lattice (Adams, Baek & Davis 2010), in a time that does not depend on their
widths. Only the labels near to a voxel have a q there.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.core.resample import crop
from medseg.core.volume import LabelMap, Volume
from medseg.models.refinement import Crf
from medseg.plan.plan import Normalisation
from medseg.preprocess.normalise import Scaling, scalings
from medseg.preprocess.regrid import occupied

Float64 = NDArray[np.float64]
Index = NDArray[np.intp]
Box = tuple[slice, ...]

# So many voxels of a scan are looked at in one go, with those around them that matter to them.
_AT_ONCE = 1 << 23
# Beyond so many standard deviations a kernel is nothing.
_REACH = 3.0
# Odd numbers drawn once. Cells of the lattice go by a sum of multiples of these modulo 2^64: that two of ten
# million cells meet has a chance of one in a hundred thousand, and would add a little of one to the other.
_MIX = np.random.default_rng(20110101).integers(1 << 62, size=64) * 2 + 1


def sharpened(label_map: LabelMap, volume: Volume, crf: Crf, rules: tuple[Normalisation, ...]) -> LabelMap:
    """The label map after the field, from the scan on the same grid, its intensities counted as the ``rules``
    normalise them. Voxels farther than ``band_mm`` from a border are as they were. Axes are taken as
    orthogonal. Deterministic.

    Raises InputError where the scan's channels are not those of the rules.
    """
    spacing = np.array(label_map.grid.spacing)
    scales = scalings(crop(volume, occupied(volume, "stored")), rules)
    values = label_map.values.copy(order="K")
    around = _dilated(_filled(label_map.values != 0), crf.band_mm / spacing + 0.5, label_map.values.shape)
    for inner, outer in _parts(around, spacing, crf, label_map.values.shape):
        part = label_map.values[outer]
        near = _near(part, spacing, crf.band_mm)
        if not len(near.voxels):
            continue
        found = part.copy()
        found.reshape(-1)[near.voxels] = _settled(near, _intensities(volume, outer, near, scales), spacing, crf)
        own = tuple(slice(i.start - o.start, i.stop - o.start) for i, o in zip(inner, outer, strict=True))
        values[inner] = found[own]
    return LabelMap(values, label_map.grid, label_map.labels)


@dataclass(frozen=True)
class _Near:
    """The ``voxels`` (n,) of a part (X, Y, Z) that lie in the band, by their place in it row by row, and each
    ``label`` (p,) that is near to one of them: to which (``voxel``, an index into ``voxels``), and how far off,
    in mm. In order of the labels."""

    shape: tuple[int, ...]
    voxels: Index
    had: NDArray[Any]
    voxel: Index
    label: NDArray[Any]
    distance: Float64

    def each_label(self) -> Iterator[slice]:
        """The pairs of one label after the other."""
        ends = np.flatnonzero(np.diff(self.label, append=-1)) + 1
        yield from (slice(int(a), int(b)) for a, b in zip([0, *ends[:-1]], ends, strict=True))

    def positions(self, spacing: Float64) -> Float64:
        """Where (n, 3) the voxels lie, in mm from the first voxel of the part."""
        return np.stack(np.unravel_index(self.voxels, self.shape), axis=1) * spacing


def _near(values: NDArray[Any], spacing: Float64, band_mm: float) -> _Near:
    found: list[tuple[Index, int, Float64]] = []
    for number in np.unique(values).tolist():
        mask = values == number
        # Nobody within reach is farther out than that, and no nearest voxel one voxel beyond the others.
        mine = _dilated(_filled(mask), band_mm / spacing + 0.5, values.shape)
        others = _dilated(_filled(~mask), np.ones(3), values.shape)
        box = tuple(slice(max(a.start, b.start), min(a.stop, b.stop)) for a, b in zip(mine, others, strict=True))
        if any(side.start >= side.stop for side in box) or not mask[box].any():
            continue
        at, distance = _distances(mask[box], spacing, band_mm)
        place = np.ravel_multi_index([a + side.start for a, side in zip(at, box, strict=True)], values.shape)
        found.append((place, number, distance))
    every = np.unique(np.concatenate([at for at, _, _ in found])) if found else np.zeros(0, dtype=np.intp)
    had = values.reshape(-1)[every]
    voxel = np.concatenate([np.arange(len(every)), *(np.searchsorted(every, at) for at, _, _ in found)])
    label = np.concatenate([had, *(np.full(len(at), number, dtype=had.dtype) for at, number, _ in found)])
    distance = np.concatenate([np.zeros(len(every)), *(far for _, _, far in found)])
    order = np.argsort(label, kind="stable")
    return _Near(values.shape, every, had, voxel[order], label[order].astype(np.int64), distance[order])


def _distances(mask: NDArray[np.bool_], spacing: Float64, band_mm: float) -> tuple[tuple[Index, ...], Float64]:
    """The voxels outside a mask (X, Y, Z) no farther than ``band_mm`` from it, and how far it is from the middle
    of each to the nearest side of the nearest voxel of the mask."""
    far, nearest = ndimage.distance_transform_edt(~mask, sampling=spacing, return_indices=True)
    # From middle to middle it may be half a voxel's diagonal more.
    at = np.nonzero((far > 0) & (far <= band_mm + np.linalg.norm(spacing) / 2))
    apart = [np.abs(one[at] - here) for one, here in zip(nearest, at, strict=True)]
    sides = [np.maximum(n - 0.5, 0) * step for n, step in zip(apart, spacing, strict=True)]
    distance = np.sqrt(sum(side * side for side in sides))
    within = distance <= band_mm
    return tuple(one[within] for one in at), distance[within]


def _settled(near: _Near, intensities: Float64, spacing: Float64, crf: Crf) -> NDArray[Any]:
    """The label (n,) that each voxel of the band has after mean field. Where it is a draw it keeps its own."""
    positions = near.positions(spacing)
    appearance = np.concatenate([positions / crf.appearance_mm, intensities / crf.contrast], axis=1)
    kernels = [(crf.appearance, Kernel(appearance)), (crf.smoothness, Kernel(positions / crf.smoothness_mm))]
    unary = -near.distance / crf.border_mm
    belief, total = unary, len(near.voxels)
    for _ in range(crf.iterations):
        share = _softmax(belief, near.voxel, total)
        belief = unary.copy()
        for label in near.each_label():
            rows = near.voxel[label]
            for weight, kernel in kernels:
                belief[label] += weight * kernel.of(rows, share[label])
    best = np.full(total, -np.inf)
    np.maximum.at(best, near.voxel, belief)
    found = near.had.copy()
    own = near.label == near.had[near.voxel]
    kept = np.zeros(total, dtype=np.bool_)
    kept[near.voxel[own & (belief >= best[near.voxel])]] = True
    wins = (belief >= best[near.voxel]) & ~kept[near.voxel]
    found[near.voxel[wins][::-1]] = near.label[wins][::-1]  # of several the lowest, which is written last
    return found


def _softmax(belief: Float64, voxel: Index, total: int) -> Float64:
    """Shares (p,) that sum to 1 over the pairs of each voxel."""
    best = np.full(total, -np.inf)
    np.maximum.at(best, voxel, belief)
    share = np.exp(belief - best[voxel])
    share /= np.bincount(voxel, weights=share, minlength=total)[voxel]
    return share


class Kernel:
    """A Gaussian of standard deviation 1 over points' features (n, d), made symmetric and of rows that sum to
    about 1, on the permutohedral lattice: each point's value is given to the d + 1 corners of its simplex, blurred
    along the lattice's axes, and read back."""

    def __init__(self, features: Float64) -> None:
        self._cells, self._weights, self._next = _lattice(features)
        every = np.arange(len(features))
        self._scale = np.ones(len(features))
        self._scale = 1 / np.sqrt(np.maximum(self.of(every, np.ones(len(features))), 1e-12))

    def of(self, rows: Index, values: Float64) -> Float64:
        """The kernel's sums (r,), at the points ``rows``, over the ``values`` (r,) there; others have 0."""
        cells, weights, scale = self._cells[rows], self._weights[rows], self._scale[rows]
        # One cell more, which stays empty, stands for those that are not there.
        held = np.bincount(
            cells.ravel(), (weights * (scale * values)[:, None]).ravel(), minlength=self._next.shape[2] + 1
        )
        for below, above in self._next:
            held[:-1] = 0.5 * held[:-1] + 0.25 * (held[below] + held[above])
        return np.asarray(scale * np.einsum("ij,ij->i", held[cells], weights))


def _lattice(features: Float64) -> tuple[Index, Float64, Index]:
    """Of each point (n, d) the cells (n, d + 1) at the corners of its simplex and its weights there, and of
    each axis the cells below and above every cell (d + 1, 2, cells), one past the last where there is none."""
    n, d = features.shape
    up = _elevated(features)
    # The nearest point of the lattice whose coordinates all are multiples of d + 1.
    base = np.rint(up / (d + 1)).astype(np.int64)
    rest = up - base * (d + 1)
    rank = np.empty((n, d + 1), dtype=np.int64)
    np.put_along_axis(rank, np.argsort(-rest, axis=1, kind="stable"), np.arange(d + 1), axis=1)
    # Rounding may leave the plane of sum 0; then those rounded farthest go one further.
    rank += base.sum(axis=1)[:, None]
    turn = (rank < 0).astype(np.int64) - (rank > d)
    base += turn
    rank += turn * (d + 1)
    rest = (up - base * (d + 1)) / (d + 1)
    ordered = np.empty_like(rest)
    np.put_along_axis(ordered, rank, rest, axis=1)
    # Corner k lies where the k coordinates of the highest ranks are d + 1 - k lower than the others are higher.
    weights = np.empty((n, d + 1))
    weights[:, 1:] = (ordered[:, :-1] - ordered[:, 1:])[:, ::-1]
    weights[:, 0] = 1 + ordered[:, -1] - ordered[:, 0]
    mix = _MIX[: d + 1]
    names = np.empty((n, d + 1), dtype=np.int64)
    for corner in range(d + 1):
        names[:, corner] = (base * (d + 1) + corner - (d + 1) * (rank > d - corner)) @ mix
    known, cells = np.unique(names, return_inverse=True)
    steps = mix.sum() - (d + 1) * mix
    follow = np.stack([np.stack([_find(known, known - step), _find(known, known + step)]) for step in steps])
    return cells.reshape(n, d + 1), weights, follow


def _elevated(features: Float64) -> Float64:
    """Features (n, d) in the plane (n, d + 1) of the lattice, on which blurring has standard deviation 1."""
    n, d = features.shape
    scale = np.sqrt(2 / 3) * (d + 1) / np.sqrt(np.arange(1, d + 1) * np.arange(2, d + 2))
    scaled = features * scale
    up = np.zeros((n, d + 1))
    above = np.zeros(n)
    for axis in range(d, 0, -1):
        up[:, axis] = above - axis * scaled[:, axis - 1]
        above += scaled[:, axis - 1]
    up[:, 0] = above
    return up


def _find(known: NDArray[np.int64], wanted: NDArray[np.int64]) -> Index:
    at = np.minimum(np.searchsorted(known, wanted), len(known) - 1)
    return np.where(known[at] == wanted, at, len(known))


def _intensities(volume: Volume, box: Box, near: _Near, scales: tuple[Scaling, ...]) -> Float64:
    """Normalised (n, C) at the voxels of the band."""
    inside = [
        scale(one[box].reshape(-1)[near.voxels].astype(np.float32))
        for scale, one in zip(scales, volume.values, strict=True)
    ]
    return np.stack(inside, axis=1).astype(np.float64)


def _filled(mask: NDArray[np.bool_]) -> Box:
    """The box of what is true; an empty one where nothing is."""
    sides = []
    for axis in range(mask.ndim):
        hit = np.flatnonzero(mask.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        sides.append(slice(int(hit[0]), int(hit[-1]) + 1) if len(hit) else slice(0, 0))
    return tuple(sides)


def _dilated(box: Box, by: Float64, shape: tuple[int, ...]) -> Box:
    """A box larger by so many voxels (3,) on each side, within a shape; an empty one stays so."""
    if any(side.start >= side.stop for side in box):
        return box
    more = np.ceil(by).astype(int).tolist()
    return tuple(slice(max(0, s.start - m), min(n, s.stop + m)) for s, m, n in zip(box, more, shape, strict=True))


def _parts(around: Box, spacing: Float64, crf: Crf, shape: tuple[int, ...]) -> Iterator[tuple[Box, Box]]:
    """Parts of a box along its longest axis, and each with all around it that matters to it."""
    sizes = [side.stop - side.start for side in around]
    axis = int(np.argmax(sizes))
    step = max(1, _AT_ONCE * sizes[axis] // max(1, int(np.prod(sizes))))
    halo = (crf.band_mm + _REACH * max(crf.appearance_mm, crf.smoothness_mm)) / spacing + 0.5
    for first in range(around[axis].start, around[axis].stop, step):
        inner = tuple(slice(first, min(first + step, s.stop)) if a == axis else s for a, s in enumerate(around))
        yield inner, _dilated(inner, halo, shape)
