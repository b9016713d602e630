"""Variation of training patches: drawn by one function, applied by another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.plan.plan import Augmentation, Configuration

# Rotation out of the plane of slices this much thicker than pixels would smear them.
_ANISOTROPIC = 3.0
_GAMMA_SHARE = 0.3


@dataclass(frozen=True)
class Variation:
    """All that is random about a patch. ``matrix`` (3, 3) takes offsets from the patch's middle to
    offsets in the case's array, in voxels; None where the patch is cut as it stands. The intensity
    figures are one per channel."""

    matrix: NDArray[np.float64] | None
    gain: NDArray[np.float64]
    shift: NDArray[np.float64]
    gamma: NDArray[np.float64]
    noise: float
    noise_seed: int


def draw(rng: np.random.Generator, settings: Augmentation, configuration: Configuration, channels: int) -> Variation:
    """Draw a variation within the settings."""
    matrix = None
    mirrors = [axis for axis in settings.mirror if rng.random() < 0.5]
    if rng.random() < settings.spatial_share:
        matrix = _rotation(rng, settings.rotation_degrees, configuration) * np.exp(
            rng.uniform(np.log(1 - settings.scaling), np.log(1 + settings.scaling))
        )
    if mirrors:
        signs = np.array([-1.0 if axis in mirrors else 1.0 for axis in range(3)])
        matrix = (np.eye(3) if matrix is None else matrix) * signs
    return Variation(
        matrix=matrix,
        gain=1 + rng.uniform(-settings.intensity, settings.intensity, channels),
        shift=rng.uniform(-settings.intensity, settings.intensity, channels),
        gamma=np.exp(rng.uniform(-settings.gamma, settings.gamma, channels) * (rng.random() < _GAMMA_SHARE)),
        noise=float(rng.uniform(0, settings.noise)),
        noise_seed=int(rng.integers(2**62)),
    )


def _rotation(rng: np.random.Generator, degrees: float, configuration: Configuration) -> NDArray[np.float64]:
    """A rotation in space, in voxels: about the slice axis alone in 2D or where slices are thick."""
    spacing = np.array(configuration.spacing.value)
    angles = np.deg2rad(rng.uniform(-degrees, degrees, 3))
    thick: int | None = configuration.slice_axis
    if thick is None and spacing.max() > _ANISOTROPIC * spacing.min():
        thick = int(np.argmax(spacing))
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


def cut(
    image: NDArray[Any],
    labels: NDArray[Any],
    centre: tuple[float, float, float],
    patch: tuple[int, int, int],
    matrix: NDArray[np.float64] | None,
) -> tuple[Tensor, Tensor]:
    """A patch (C, *patch) float32 and its labels (*patch) int64 out of a case's arrays (C, X, Y, Z)
    and (X, Y, Z), zeros outside them; turned and scaled by ``matrix`` about ``centre``, linearly
    for the image, to the nearest voxel for the labels."""
    offsets = [np.arange(p) - (p - 1) / 2 for p in patch]
    if matrix is None:
        start = [round(c - (p - 1) / 2) for c, p in zip(centre, patch, strict=True)]
        return _box(image, start, patch, torch.float32), _box(labels[None], start, patch, torch.int64)[0]
    corners = np.stack(np.meshgrid(*[o[[0, -1]] for o in offsets], indexing="ij"), -1).reshape(-1, 3) @ matrix.T
    low = np.floor(corners.min(axis=0) + centre).astype(int) - 1
    size = np.ceil(corners.max(axis=0) + centre).astype(int) + 2 - low
    start, shape = [int(v) for v in low], (int(size[0]), int(size[1]), int(size[2]))
    # Positions in the box, normalised to (-1, 1) edge to edge and ordered z, y, x, as grid_sample has it.
    x, y, z = (torch.tensor(np.outer(matrix[:, a], o), dtype=torch.float32) for a, o in enumerate(offsets))
    grid = x[:, :, None, None] + y[:, None, :, None] + z[:, None, None, :]
    middle = torch.tensor(np.asarray(centre) - low, dtype=torch.float32).view(3, 1, 1, 1)
    extent = torch.tensor(shape, dtype=torch.float32).view(3, 1, 1, 1)
    grid = ((2 * (grid + middle) + 1) / extent - 1).flip(0).permute(1, 2, 3, 0)[None]
    values = F.grid_sample(_box(image, start, shape, torch.float32)[None], grid, mode="bilinear", align_corners=False)[
        0
    ]
    classes = _box(labels[None], start, shape, torch.float32)[None]
    nearest = F.grid_sample(classes, grid, mode="nearest", align_corners=False)[0, 0]
    return values, nearest.round().long()


def _box(values: NDArray[Any], start: list[int], shape: tuple[int, int, int], dtype: torch.dtype) -> Tensor:
    """A box (C, *shape) of an array (C, X, Y, Z), zeros where it reaches outside."""
    out = torch.zeros((len(values), *shape), dtype=dtype)
    inner, outer = [], []
    for s, n, size in zip(start, shape, values.shape[1:], strict=True):
        first, last = max(s, 0), min(s + n, size)
        if last <= first:
            return out
        inner.append(slice(first, last))
        outer.append(slice(first - s, last - s))
    # Copied, since torch takes no read-only arrays, which mapped files are.
    out[(slice(None), *outer)] = torch.from_numpy(np.array(values[(slice(None), *inner)])).to(dtype)
    return out


def vary(image: Tensor, variation: Variation) -> Tensor:
    """Change the intensities of a patch (C, ...): gamma on its own range, gain, shift, noise."""
    channels = (-1, *[1] * (image.ndim - 1))
    gamma = torch.tensor(variation.gamma, dtype=torch.float32).view(channels)
    if bool((gamma != 1).any()):
        axes = list(range(1, image.ndim))
        low, high = image.amin(axes, keepdim=True), image.amax(axes, keepdim=True)
        reach = (high - low).clamp_min(1e-6)
        image = ((image - low) / reach).pow(gamma) * reach + low
    gain = torch.tensor(variation.gain, dtype=torch.float32).view(channels)
    shift = torch.tensor(variation.shift, dtype=torch.float32).view(channels)
    generator = torch.Generator().manual_seed(variation.noise_seed)
    noise = torch.randn(image.shape, generator=generator) * variation.noise
    return image * gain + shift + noise
