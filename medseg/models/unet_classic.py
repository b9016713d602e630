"""The U-Net as the field first had it (Ronneberger et al., 2015; in 3D Çiçek et al., 2016): double 3x3
convolutions with batch norm and ReLU, max pooling, transposed convolutions, skips by concatenation.

Where the original's convolutions lose the border, these keep it, as all later ones do."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medseg.models.layers import Axes, Stage, convolution, stages_of
from medseg.plan.plan import Configuration


class ClassicUNet(nn.Module):
    """See `medseg.models.build.build`. One output, at full resolution, in training too."""

    def __init__(self, stages: list[Stage], channels: int, classes: int) -> None:
        super().__init__()
        layers = _Layers(stages[0].dimensions)
        self.down, self.pool = nn.ModuleList(), nn.ModuleList()
        ins = channels
        for stage in stages:
            self.pool.append(layers.pool(stage.stride) if max(stage.stride) > 1 else nn.Identity())
            self.down.append(_double(stage, ins))
            ins = stage.features
        self.up, self.join = nn.ModuleList(), nn.ModuleList()
        for stage, below in zip(reversed(stages[:-1]), reversed(stages[1:]), strict=True):
            self.up.append(layers.up(below.features, stage.features, below.stride))
            self.join.append(_double(stage, 2 * stage.features))
        self.output_block = layers.last(stages[0].features, classes)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, ...); in training a list of one."""
        skips = []
        for pool, down in zip(self.pool, self.down, strict=True):
            x = down(pool(x))
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, reversed(skips[:-1]), strict=True):
            x = join(torch.cat((skip, up(x)), dim=1))
        out: Tensor = self.output_block(x)
        return [out] if self.training else out


class _Layers:
    """Of two or three dimensions."""

    def __init__(self, dimensions: int) -> None:
        self._flat = dimensions == 2

    def pool(self, stride: Axes) -> nn.Module:
        return nn.MaxPool2d(stride) if self._flat else _MaxPool3d(stride)

    def up(self, ins: int, outs: int, stride: Axes) -> Any:
        layer: Any = nn.ConvTranspose2d if self._flat else nn.ConvTranspose3d
        return layer(ins, outs, stride, stride)

    def last(self, ins: int, classes: int) -> nn.Module:
        return nn.Conv2d(ins, classes, 1) if self._flat else nn.Conv3d(ins, classes, 1)


class _MaxPool3d(nn.MaxPool3d):
    """The same, also where only algorithms that repeat themselves are allowed: torch has none for its gradient on
    a GPU. Voxels that share a window's maximum then share its gradient."""

    def forward(self, x: Tensor) -> Tensor:
        if not (x.is_cuda and torch.are_deterministic_algorithms_enabled()):
            return super().forward(x)
        size: Any = self.kernel_size
        return largest_of_windows(x, size)


def largest_of_windows(x: Tensor, size: Axes) -> Tensor:
    """The maximum (B, C, X / size, ...) of windows side by side; what fills no window is left out."""
    whole = [n // s for n, s in zip(x.shape[2:], size, strict=True)]
    for axis, (n, s) in enumerate(zip(whole, size, strict=True), 2):
        x = x.narrow(axis, 0, n * s)
    windows = x.reshape(*x.shape[:2], *(n for pair in zip(whole, size, strict=True) for n in pair))
    return windows.amax(dim=[3 + 2 * axis for axis in range(len(whole))])


def _double(stage: Stage, ins: int) -> nn.Module:
    first, second = (
        convolution(stage, before, stage.features, norm="BATCH", act="RELU") for before in (ins, stage.features)
    )
    return nn.Sequential(first, second)


def unet_classic(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`."""
    return ClassicUNet(stages_of(configuration), channels, classes)
