"""A volume larger than the patch, tile by tile."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    import torch
    from torch import nn

Float32 = NDArray[np.float32]
# Neighbouring tiles share this much of their length.
OVERLAP = 0.5
_VOXELS_AT_ONCE = 2**18


def tile_starts(size: int, patch: int, overlap: float = OVERLAP) -> list[int]:
    """First voxels of the fewest tiles that cover an axis with at least ``overlap``, evenly laid."""
    if size <= patch:
        return [0]
    step = max(1, int(patch * (1 - overlap)))
    count = -(-(size - patch) // step) + 1
    return [round(i * (size - patch) / (count - 1)) for i in range(count)]


def gaussian(patch: tuple[int, ...]) -> Float32:
    """Weight of each voxel of a tile: 1 in the middle, falling off with a deviation of an eighth of
    the length (as in nnU-Net), never below 1e-3, so that no voxel is without weight."""
    weight = np.ones(patch, dtype=np.float64)
    for axis, n in enumerate(patch):
        line = np.exp(-0.5 * ((np.arange(n) - (n - 1) / 2) / (n / 8)) ** 2) if n > 1 else np.ones(1)
        weight = weight * line.reshape([-1 if a == axis else 1 for a in range(len(patch))])
    return np.maximum(weight, 1e-3).astype(np.float32)


def sliding_window(
    networks: list[nn.Module], image: Float32, configuration: Configuration, classes: int, device: torch.device
) -> Float32:
    """Logits (classes, X, Y, Z) of an image (C, X, Y, Z) on the network's grid, averaged over the
    networks and, weighted by `gaussian`, over overlapping tiles.

    An image smaller than the patch is padded with zeros around it. In 2D tiles are slices.
    """
    import torch

    patch = configuration.patch.value
    sizes = image.shape[1:]
    before = [max(0, p - n) // 2 for n, p in zip(sizes, patch, strict=True)]
    after = [max(0, p - n) - b for n, p, b in zip(sizes, patch, before, strict=True)]
    padded = torch.from_numpy(np.pad(image, [(0, 0), *zip(before, after, strict=True)])).to(device)
    starts = [tile_starts(n, p) for n, p in zip(padded.shape[1:], patch, strict=True)]
    weight = torch.from_numpy(gaussian(patch)).to(device)
    total = torch.zeros((classes, *padded.shape[1:]), device=device)
    norm = torch.zeros(tuple(padded.shape[1:]), device=device)
    flat = configuration.slice_axis
    for corners in _batches(list(product(*starts)), max(1, _VOXELS_AT_ONCE // int(np.prod(patch)))):
        boxes = [tuple(slice(c, c + p) for c, p in zip(corner, patch, strict=True)) for corner in corners]
        tiles = torch.stack([padded[(slice(None), *box)] for box in boxes])
        logits = _forward(networks, tiles if flat is None else tiles.squeeze(2 + flat))
        if flat is not None:
            logits = logits.unsqueeze(2 + flat)
        for box, one in zip(boxes, logits, strict=True):
            total[(slice(None), *box)] += one * weight
            norm[box] += weight
    total /= norm
    inner = tuple(slice(b, b + n) for b, n in zip(before, sizes, strict=True))
    out: Float32 = total[(slice(None), *inner)].cpu().numpy()
    return out


def _forward(networks: list[nn.Module], tiles: torch.Tensor) -> torch.Tensor:
    import torch

    with torch.inference_mode(), torch.autocast(tiles.device.type, torch.bfloat16):
        outs = [network(tiles).float() for network in networks]
    return torch.stack(outs).mean(dim=0) if len(outs) > 1 else outs[0]


def _batches(items: list[tuple[int, ...]], size: int) -> Iterator[list[tuple[int, ...]]]:
    for first in range(0, len(items), size):
        yield items[first : first + size]
