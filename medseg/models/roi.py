"""Features of a box: RoIAlign by grid sampling, in two and three dimensions."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F


def bin_centres(boxes: Tensor, size: int) -> Tensor:
    """Positions (N, size, D) along each axis of the middles of the ``size`` bins that divide boxes (N, 2 D),
    the lower corners before the upper ones."""
    low, high = boxes.chunk(2, dim=1)
    steps = (torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5) / size
    return low.unsqueeze(1) + steps.view(1, -1, 1) * (high - low).unsqueeze(1)


def roi_align(features: Tensor, boxes: Sequence[Tensor], size: int, patch: Sequence[int]) -> Tensor:
    """Features (N, C, size, ...) in the boxes of a batch, interpolated linearly at the middle of each bin
    (RoIAlign of He et al., 2017, with one sample a bin). Beyond the outermost centres the edge value holds.

    ``features`` (B, C, ...) lie evenly over a ``patch`` of so many voxels; ``boxes`` holds (n, 2 D) for each
    image, in voxels of the patch, where voxel i reaches from i to i + 1. float32 back.

    The boxes of an image lie one behind the other in one grid, so that no feature map is ever repeated: a copy
    for each box would take tens of gigabytes in 3D.
    """
    extent = torch.tensor(patch, device=features.device, dtype=torch.float32)
    parts = [_of_image(one[None].float(), own.float(), size, extent) for one, own in zip(features, boxes, strict=True)]
    return torch.cat(parts)


def _of_image(features: Tensor, boxes: Tensor, size: int, extent: Tensor) -> Tensor:
    channels, dimensions = features.shape[1], len(extent)
    count = len(boxes)
    if not count:
        return features.new_zeros((0, channels, *[size] * dimensions))
    at = 2 * bin_centres(boxes, size) / extent - 1
    axes = []
    for axis in range(dimensions):
        shape = [count, *[1] * dimensions]
        shape[1 + axis] = size
        axes.append(at[..., axis].reshape(shape).expand(count, *[size] * dimensions))
    # The last axis of an image comes first in a grid.
    grid = torch.stack(axes[::-1], dim=-1).reshape(1, count * size, *[size] * (dimensions - 1), dimensions)
    found = F.grid_sample(features, grid, mode="bilinear", padding_mode="border", align_corners=False)
    return found.reshape(channels, count, *[size] * dimensions).transpose(0, 1)
