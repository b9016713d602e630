"""Variation of training patches: drawn patch by patch from a generator, applied to a batch at once on
whatever device it lies on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor
from torch.nn import functional as F

from medseg.plan.plan import Augmentation, Configuration, Plan

Float64 = NDArray[np.float64]

# Rotation out of the plane of slices this much thicker than pixels would smear them.
_ANISOTROPIC = 3.0
_GAMMA_SHARE = 0.3
# Of the patches whose gamma is changed, those that are bent from the bright end (as nnU-Net has it).
_INVERTED_SHARE = 0.25
# Between the points that move, or that hold a bias field, in voxels of the finest axis.
_CELL, _BIAS_CELL = 16, 32
# Domain randomisation: knots of a contrast curve, how often it runs downwards, and the standard
# deviations of a structure's own brightness and of the logarithm of the bias.
_KNOTS, _DOWNWARDS, _OWN_BRIGHTNESS, _BIAS = 8, 0.3, 0.5, 0.3
# Of the stage before, in how many patches its borders are off and in how many a piece is missing, and below
# which share of a patch a piece may be (as in nnU-Net). By how many voxels of the finest axis borders are
# off: cubes of these sides hold as many voxels as nnU-Net's balls of 1 to 8.
_OFF_SHARE, _LOST_SHARE, _SMALL = 0.4, 0.2, 0.15
_OFF_VOXELS = 1.0, 6.5


@dataclass(frozen=True)
class Mistakes:
    """How what the stage before found is spoiled, structure by structure (L,), so that it is not merely copied.

    They come in the ``order``. ``kind`` numbers one of `_KINDS`, 0 for none, by so many ``voxels``
    (L, 3) to each side along each axis. ``lost`` says, from 0 to below 1, where in the row of a
    structure's small pieces the one stands that is missing; NaN where none is.
    """

    order: NDArray[np.int64]
    kind: NDArray[np.int64]
    voxels: NDArray[np.int64]
    lost: Float64


@dataclass(frozen=True)
class Variation:
    """All that is random about a patch but its noise.

    ``matrix`` (3, 3) takes offsets from the patch's middle to offsets in the case's array, in voxels;
    None where the patch is cut as it stands. ``bend`` (3, *points) moves those offsets first: cubic
    B-splines' coefficients, in voxels. The others are one per channel (C,), ``blur`` (standard
    deviations) and ``coarse`` (enlargement) one per channel and axis (C, 3), in voxels. Of domain
    randomisation: ``curve`` (C, knots) over the patch's range, ``own`` (C, classes) brightness, and
    ``bias`` (*points), a logarithm. ``mistakes`` are the stage before's, where there is one.
    """

    gamma: Float64
    inverted: NDArray[np.bool_]
    contrast: Float64
    gain: Float64
    shift: Float64
    blur: Float64
    coarse: Float64
    noise: Float64
    dropped: NDArray[np.bool_]
    matrix: Float64 | None = None
    bend: Float64 | None = None
    curve: Float64 | None = None
    own: Float64 | None = None
    bias: Float64 | None = None
    mistakes: Mistakes | None = None


def draw(rng: np.random.Generator, plan: Plan, configuration: Configuration) -> Variation:
    """Draw a variation within the plan's settings."""
    settings, channels = plan.training.augmentation.value, len(plan.channels)
    if settings.domain_randomisation:
        settings = _stronger(settings)
    matrix, bend = _draw_place(rng, settings, configuration)
    gamma = np.exp(rng.uniform(-settings.gamma, settings.gamma, channels) * (rng.random() < _GAMMA_SHARE))
    optional = np.isin(plan.channels, plan.optional_channels.value)
    variation = Variation(
        matrix=matrix,
        bend=bend,
        gamma=gamma,
        inverted=np.full(channels, rng.random() < _INVERTED_SHARE),
        contrast=1 + rng.uniform(-settings.contrast, settings.contrast, channels),
        gain=1 + rng.uniform(-settings.intensity, settings.intensity, channels),
        shift=rng.uniform(-settings.intensity, settings.intensity, channels),
        blur=_draw_blur(rng, settings, configuration, channels),
        coarse=_draw_coarse(rng, settings, configuration, channels),
        noise=np.full(channels, rng.uniform(0, settings.noise)),
        dropped=optional & (rng.random(channels) < settings.channel_dropout),
        mistakes=_draw_mistakes(rng, len(plan.labels), configuration) if configuration.previous else None,
    )
    return _randomised(rng, variation, plan, configuration) if settings.domain_randomisation else variation


def _stronger(settings: Augmentation) -> Augmentation:
    """What models that must travel are trained with, in the manner of SynthSeg (Billot et al., 2023)."""
    least = {
        "rotation_degrees": 30.0, "scaling": 0.3, "spatial_share": 0.8, "elastic_share": 0.5, "intensity": 0.4,
        "contrast": 0.4, "gamma": 0.5, "noise": 0.3, "blur": 2.0, "blur_share": 0.5, "low_resolution": 4.0,
        "low_resolution_share": 0.5,
    }  # fmt: skip
    return settings.model_copy(update={name: max(value, getattr(settings, name)) for name, value in least.items()})


def _randomised(rng: np.random.Generator, variation: Variation, plan: Plan, configuration: Configuration) -> Variation:
    """With a contrast curve, a brightness for each structure, and a bias field, each for one patch in two."""
    channels = len(plan.channels)
    level = np.linspace(0, 1, _KNOTS)
    if rng.random() < _DOWNWARDS:
        level = level[::-1]
    strength = rng.random((channels, 1))
    curve = (1 - strength) * level + strength * rng.random((channels, _KNOTS))
    own = rng.normal(0, _OWN_BRIGHTNESS, (channels, len(plan.labels) + 1))
    bias = rng.normal(0, _BIAS, _points(configuration, _BIAS_CELL))
    use = rng.random(3) < 0.5
    return replace(
        variation,
        curve=curve if use[0] else None,
        own=own if use[1] else None,
        bias=bias if use[2] else None,
    )


# ---- space --------------------------------------------------------------------------------------


def _draw_place(
    rng: np.random.Generator, settings: Augmentation, configuration: Configuration
) -> tuple[Float64 | None, Float64 | None]:
    """The matrix and the bend, None where there are none."""
    matrix = bend = None
    mirrors = [axis for axis in settings.mirror if rng.random() < 0.5]
    if rng.random() < settings.spatial_share:
        matrix = _rotation(rng, settings.rotation_degrees, configuration) * np.exp(
            rng.uniform(np.log(1 - settings.scaling), np.log(1 + settings.scaling))
        )
    if settings.elastic_share and rng.random() < settings.elastic_share:
        # Of one distance in mm along every axis; up to 1/2.48 of the cell nothing folds (Choi and Lee, 2000).
        bend = rng.uniform(-1, 1, (3, *_points(configuration, _CELL))) * settings.elastic
        bend *= _cell(configuration, _CELL).reshape(3, 1, 1, 1)
        thick = _thick(configuration)
        if thick is not None:
            bend[thick] = 0
        matrix = np.eye(3) if matrix is None else matrix
    if mirrors:
        signs = np.array([-1.0 if axis in mirrors else 1.0 for axis in range(3)])
        matrix = (np.eye(3) if matrix is None else matrix) * signs
    return matrix, bend


def _thick(configuration: Configuration) -> int | None:
    """The axis that patches are not turned or bent out of the plane of: that of a 2D configuration's
    slices, or one of thick slices."""
    spacing = np.array(configuration.spacing.value)
    if configuration.slice_axis is None and spacing.max() > _ANISOTROPIC * spacing.min():
        return int(np.argmax(spacing))
    return configuration.slice_axis


def _rotation(rng: np.random.Generator, degrees: float, configuration: Configuration) -> Float64:
    """A rotation in space, in voxels: about the slice axis alone in 2D or where slices are thick."""
    spacing, thick = np.array(configuration.spacing.value), _thick(configuration)
    angles = np.deg2rad(rng.uniform(-degrees, degrees, 3))
    matrix = np.eye(3)
    for axis, angle in enumerate(angles):
        if thick is not None and axis != thick:
            continue
        a, b = (axis + 1) % 3, (axis + 2) % 3
        turn = np.eye(3)
        turn[a, a] = turn[b, b] = np.cos(angle)
        turn[a, b], turn[b, a] = -np.sin(angle), np.sin(angle)
        matrix = matrix @ turn
    return matrix * spacing[None, :] / spacing[:, None]


def _finest(configuration: Configuration) -> Float64:
    """Voxels of the finest axis, in voxels of each axis (3,)."""
    spacing = np.array(configuration.spacing.value)
    return min(spacing[a] for a in _axes(configuration)) / spacing


def _axes(configuration: Configuration) -> list[int]:
    return [a for a in range(3) if a != configuration.slice_axis]


def _cell(configuration: Configuration, finest: int) -> Float64:
    return finest * _finest(configuration)


def _points(configuration: Configuration, cell: int) -> tuple[int, ...]:
    """How many coefficients a spline over the patch has along each axis; 1 along that of slices."""
    sides = zip(configuration.patch.value, _cell(configuration, cell), strict=True)
    return tuple(1 if a == configuration.slice_axis else int((n - 1) / c) + 4 for a, (n, c) in enumerate(sides))


def reach(variation: Variation, patch: Sequence[int]) -> Float64:
    """How far from its middle a patch sees along each axis of the case's array (3,), in voxels."""
    half = (np.array(patch) - 1) / 2
    if variation.matrix is None:
        return half
    if variation.bend is not None:  # a spline lies within its coefficients
        half = half + np.abs(variation.bend).max(axis=(1, 2, 3))
    return np.abs(variation.matrix) @ half


def move(
    images: Tensor,
    classes: Tensor,
    middles: Float64,
    variations: Sequence[Variation],
    configuration: Configuration,
    masks: int = 0,
) -> tuple[Tensor, Tensor]:
    """Patches (B, C, *patch) float32 and their classes (B, *patch) int64 out of boxes of cases (B, C,
    *box) and (B, *box), in 2D without the slice axis.

    ``middles`` (B, 3) says where in its box the middle of each patch is to come from. A patch without
    a matrix is the box's first corner; the others are interpolated, linearly for images and to the
    nearest voxel for classes, with zeros outside of the box. The last ``masks`` channels are found
    labels, and go with the classes.
    """
    axes, soft = _axes(configuration), images.shape[1] - masks
    patch = [configuration.patch.value[a] for a in axes]
    still = [i for i, v in enumerate(variations) if v.matrix is None]
    moving = [i for i, v in enumerate(variations) if v.matrix is not None]
    out = images.new_empty((*images.shape[:2], *patch), dtype=torch.float32)
    found = classes.new_empty((len(classes), *patch), dtype=torch.int64)
    corner = tuple(slice(0, n) for n in patch)
    for i in still:
        out[i], found[i] = images[i][(slice(None), *corner)], classes[i][corner]
    if moving:
        grid = _grid(images, middles[moving], [variations[i] for i in moving], configuration)
        boxes, labels = (values if not still else values[moving] for values in (images, classes))
        linear = F.grid_sample(boxes[:, :soft].float(), grid, mode="bilinear", align_corners=False)
        nearest = F.grid_sample(labels.unsqueeze(1).float(), grid, mode="nearest", align_corners=False).squeeze(1)
        for row, i in enumerate(moving):
            out[i, :soft], found[i] = linear[row], nearest[row]
        if masks:
            out[moving, soft:] = F.grid_sample(boxes[:, soft:].float(), grid, mode="nearest", align_corners=False)
    return out, found


def _grid(images: Tensor, middles: Float64, variations: Sequence[Variation], configuration: Configuration) -> Tensor:
    """Where each voxel of each patch comes from (B, *patch, d), normalised to (-1, 1) edge to edge
    and ordered z, y, x, as grid_sample has it."""
    axes = _axes(configuration)
    extent = np.array(images.shape[2:], dtype=float)[None]
    scale = (2 / extent)[:, :, None]
    matrices = np.stack([v.matrix[np.ix_(axes, axes)] for v in variations if v.matrix is not None]) * scale
    start = (2 * middles[:, axes] + 1) / extent - 1
    patch = [configuration.patch.value[a] for a in axes]
    # Sums, not a matrix product, which a GPU may round to ten bits.
    grid = _tensor(start[:, ::-1], images).view(len(start), *[1] * len(patch), len(patch))
    for a, size in enumerate(patch):
        steps = _tensor(matrices[:, ::-1, a, None] * (np.arange(size) - (size - 1) / 2), images)  # (B, d, size)
        grid = grid + steps.mT.reshape(len(start), *[size if b == a else 1 for b in range(len(patch))], len(patch))
    bent = [i for i, v in enumerate(variations) if v.bend is not None]
    if bent:
        bends = np.stack([_plane(v.bend[axes], configuration) for v in variations if v.bend is not None])
        # Splines are linear in their coefficients, so these can be turned in place of the patch.
        turned = np.einsum("mij,mj...->mi...", matrices[bent], bends)[:, ::-1]
        moved = _spline(_tensor(turned.reshape(-1, *turned.shape[2:]), images), patch, configuration, _CELL)
        grid[bent] += moved.view(len(bent), len(patch), *patch).movedim(1, -1)
    return grid


def _plane(points: Float64, configuration: Configuration) -> Float64:
    """Coefficients without the slice axis of a 2D configuration, which is one along it."""
    flat = configuration.slice_axis
    return points if flat is None else points.squeeze(points.ndim - 3 + flat)


def _spline(points: Tensor, patch: Sequence[int], configuration: Configuration, cell: int) -> Tensor:
    """A uniform cubic B-spline's values (N, *patch) of its coefficients (N, *points)."""
    cells = _cell(configuration, cell)[_axes(configuration)]
    bases = [_basis(n, c, k)[None] for n, c, k in zip(patch, cells, points.shape[1:], strict=True)]
    return _along(points, [_tensor(basis, points) for basis in bases])


def _basis(size: int, cell: float, points: int) -> Float64:
    """(size, points): the weight of each coefficient at each voxel."""
    first, t = np.divmod(np.arange(size) / cell, 1)
    weights = np.stack([(1 - t) ** 3, 3 * t**3 - 6 * t**2 + 4, -3 * t**3 + 3 * t**2 + 3 * t + 1, t**3]) / 6
    basis = np.zeros((size, points))
    for k, weight in enumerate(weights):
        basis[np.arange(size), first.astype(int) + k] = weight
    return basis


# ---- intensities --------------------------------------------------------------------------------


def _draw_blur(
    rng: np.random.Generator, settings: Augmentation, configuration: Configuration, channels: int
) -> Float64:
    """Standard deviations (C, 3), the same in mm along every axis; 0 where nothing is blurred."""
    chosen = rng.random((channels, 1)) < settings.blur_share
    return chosen * rng.uniform(0, settings.blur, (channels, 1)) * _finest(configuration)


def _draw_coarse(
    rng: np.random.Generator, settings: Augmentation, configuration: Configuration, channels: int
) -> Float64:
    """Voxels' enlargement (C, 3): to cubes, or one patch in two, where domains are randomised, to slices
    across one axis."""
    chosen = rng.random((channels, 1)) < settings.low_resolution_share
    size = 1 + chosen * rng.uniform(0, settings.low_resolution - 1, (channels, 1)) * np.ones(3)
    if settings.domain_randomisation and rng.random() < 0.5:
        across = rng.integers(3)
        size = np.where(np.arange(3) == across, size, 1)
    return np.maximum(1, size * _finest(configuration))


def change(
    images: Tensor, classes: Tensor, variations: Sequence[Variation], configuration: Configuration, seed: int
) -> Tensor:
    """Change the intensities of patches (B, C, ...) float32, in place, and give them back. ``classes``
    (B, ...) are theirs; noise comes from a generator of the images' device with the ``seed``."""
    rows = images.flatten(0, 1)

    def of(name: str) -> NDArray[Any]:
        return np.concatenate([getattr(v, name) for v in variations])

    _randomise(images, classes, variations, configuration)
    gamma = of("gamma")
    _where(rows, gamma != 1, lambda some, which: _gamma(some, gamma[which], of("inverted")[which]))
    _affine(rows, of("contrast"), of("gain"), of("shift"))
    blur, coarse = (of(name)[:, _axes(configuration)] for name in ("blur", "coarse"))
    _where(rows, (blur > 0).any(1) | (coarse > 1).any(1), lambda some, which: _blur(some, blur[which], coarse[which]))
    noise = of("noise")
    if noise.any():
        generator = torch.Generator(images.device).manual_seed(seed)
        rows.addcmul_(torch.randn(rows.shape, generator=generator, device=images.device), _column(noise, rows))
    dropped = of("dropped")
    _where(rows, dropped, lambda some, _: torch.zeros_like(some))
    return images


def _where(rows: Tensor, chosen: Any, act: Callable[[Tensor, NDArray[np.intp]], Tensor]) -> None:
    """Put in the place of the rows that are chosen (N,) what ``act`` makes of them and their numbers."""
    which = np.flatnonzero(chosen)
    if len(which):
        index = torch.from_numpy(which).to(rows.device)
        rows[index] = act(rows[index], which)


def _randomise(images: Tensor, classes: Tensor, variations: Sequence[Variation], configuration: Configuration) -> None:
    """Domain randomisation: curve, a brightness for each structure, bias; sample by sample."""
    for image, truth, variation in zip(images, classes, variations, strict=True):
        if variation.curve is not None:
            image.copy_(_curve(image, _tensor(variation.curve, image)))
        if variation.own is not None:
            image += _tensor(variation.own, image)[:, truth.clamp_min(0)]
        if variation.bias is not None:
            points = _tensor(_plane(variation.bias, configuration)[None], image)
            low, _ = _range(image)
            field = _spline(points, image.shape[1:], configuration, _BIAS_CELL)
            image.sub_(low).mul_(field.exp()).add_(low)


def _curve(rows: Tensor, knots: Tensor) -> Tensor:
    """Bend each row (N, ...) by its own broken line (N, knots) over the row's range."""
    low, span = _range(rows)
    at = ((rows - low) / span * (knots.shape[1] - 1)).flatten(1)
    first = at.floor().clamp(0, knots.shape[1] - 2).long()
    before, after = knots.gather(1, first), knots.gather(1, first + 1)
    return (before + (after - before) * (at - first)).view_as(rows) * span + low


def _gamma(rows: Tensor, gamma: Float64, inverted: NDArray[np.bool_]) -> Tensor:
    """Gamma of each row on its own range, or on its negative's."""
    sign = _column(np.where(inverted, -1.0, 1.0), rows)
    rows = rows * sign
    low, span = _range(rows)
    return (((rows - low) / span).pow(_column(gamma, rows)) * span + low) * sign


def _range(rows: Tensor) -> tuple[Tensor, Tensor]:
    """The lowest of each row (N, 1, ...), and how far above it the highest is."""
    axes = list(range(1, rows.ndim))
    low, high = rows.amin(axes, keepdim=True), rows.amax(axes, keepdim=True)
    return low, (high - low).clamp_min(1e-6)


def _affine(rows: Tensor, contrast: Float64, gain: Float64, shift: Float64) -> None:
    """Contrast about the row's mean, then gain and shift, in place."""
    offset = _column(shift, rows)
    if (contrast != 1).any():
        offset = offset + rows.mean(list(range(1, rows.ndim)), keepdim=True) * _column((1 - contrast) * gain, rows)
    rows.mul_(_column(contrast * gain, rows)).add_(offset)


def _blur(rows: Tensor, blur: Float64, coarse: Float64) -> Tensor:
    """Blur and coarsen rows (N, ...) by (N, d): both are one matrix for each row and axis, and a
    product of small matrices is quicker than convolutions, of another width in every row."""
    matrices = [
        np.stack([_coarser(size, c) @ _gaussian(size, b) for b, c in zip(blur[:, axis], coarse[:, axis], strict=True)])
        for axis, size in enumerate(rows.shape[1:])
    ]
    return _along(rows, [_tensor(matrix, rows) for matrix in matrices])


def _gaussian(size: int, deviation: float) -> Float64:
    """(size, size): a Gaussian about each voxel, of sum 1 within the patch."""
    if deviation < 0.1:  # the next voxel would weigh e^-50
        return np.eye(size)
    away = np.subtract.outer(np.arange(size), np.arange(size)) / deviation
    weights = np.exp(-0.5 * away**2)
    return weights / weights.sum(axis=1, keepdims=True)


def _coarser(size: int, enlargement: float) -> Float64:
    """(size, size): means over larger voxels, and linear interpolation between their middles."""
    count = max(1, round(size / enlargement))
    if count == size:
        return np.eye(size)
    edges = np.linspace(0, size, count + 1)
    low, high = (np.clip(e[:, None], np.arange(size), np.arange(1, size + 1)) for e in (edges[:-1], edges[1:]))
    means = (high - low) / (size / count)
    middles = (edges[:-1] + edges[1:]) / 2
    return np.stack([np.interp(np.arange(size) + 0.5, middles, one) for one in means.T], axis=1)


# ---- the stage before ---------------------------------------------------------------------------


def _draw_mistakes(rng: np.random.Generator, labels: int, configuration: Configuration) -> Mistakes:
    off, lost = rng.random() < _OFF_SHARE, rng.random() < _LOST_SHARE
    sides = rng.uniform(*_OFF_VOXELS, (labels, 1)) * _finest(configuration)
    return Mistakes(
        order=rng.permutation(labels),
        kind=rng.integers(1, len(_KINDS), labels) * off,
        voxels=np.rint(sides).astype(np.int64),
        lost=np.where(lost, rng.random(labels), np.nan),
    )


def mistaken(found: Tensor, mistakes: Mistakes, configuration: Configuration) -> Tensor:
    """Make mistakes in what the stage before found (L, *patch), 0 or 1 and no two labels in a voxel, in
    place. What a structure grows over is no other's. Structure by structure: masks grown, shrunk,
    opened or closed by a cube, as if they went on beyond the patch; then small pieces lost. After nnU-Net's
    cascades (Isensee et al., Nature Methods 2021)."""
    sides = mistakes.voxels[:, _axes(configuration)]
    for label in mistakes.order:
        shape = _KINDS[mistakes.kind[label]]
        if shape is not None and found[label].any():
            mask = shape(found[label], sides[label])
            found.masked_fill_(mask > found[label], 0)
            found[label] = mask
    for label in np.flatnonzero(~np.isnan(mistakes.lost)):
        found[label] = _without_piece(found[label], mistakes.lost[label])
    return found


def _grown(mask: Tensor, sides: NDArray[np.int64]) -> Tensor:
    for axis, side in enumerate(sides.tolist()):
        rows = mask.movedim(axis, -1)
        wide = F.max_pool1d(rows.reshape(1, -1, rows.shape[-1]), 2 * side + 1, stride=1, padding=side)
        mask = wide.view(rows.shape).movedim(-1, axis)
    return mask


def _shrunk(mask: Tensor, sides: NDArray[np.int64]) -> Tensor:
    return 1 - _grown(1 - mask, sides)


def _opened(mask: Tensor, sides: NDArray[np.int64]) -> Tensor:
    return _grown(_shrunk(mask, sides), sides)


def _closed(mask: Tensor, sides: NDArray[np.int64]) -> Tensor:
    return _shrunk(_grown(mask, sides), sides)


_KINDS = (None, _grown, _shrunk, _opened, _closed)


def _without_piece(mask: Tensor, where: float) -> Tensor:
    """A mask without that of its small pieces which stands at ``where`` in their row; as it is where it has
    none. A piece is what touches by faces, edges or corners."""
    parts, _ = ndimage.label(mask.cpu().numpy(), np.ones((3,) * mask.ndim))
    sizes = np.bincount(parts.ravel())[1:]
    small = 1 + np.flatnonzero(sizes < _SMALL * mask.numel())
    if not len(small):
        return mask
    return mask * _tensor(parts != small[int(where * len(small))], mask)


# ---- both ---------------------------------------------------------------------------------------


def _along(values: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """Multiply values (N, ...) along each axis by its matrix (N or 1, new, old)."""
    for axis, matrix in enumerate(matrices, start=1):
        turned = values.movedim(axis, 1)
        product = matrix @ turned.flatten(2)
        values = product.view(len(turned), -1, *turned.shape[2:]).movedim(1, axis)
    return values


def _tensor(values: NDArray[Any], like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(values, dtype=np.float32)).to(like.device, non_blocking=True)


def _column(values: NDArray[Any], rows: Tensor) -> Tensor:
    """A number for each row (N, ...), shaped to be multiplied with it."""
    return _tensor(values, rows).view(-1, *[1] * (rows.ndim - 1))
