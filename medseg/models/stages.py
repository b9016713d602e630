"""U-Nets with any number of convolutions, or residual blocks, a stage: the networks of nnU-Net v2 models.

Blocks as in He et al., "Bag of tricks for image classification", 2019: where a residual block halves the
resolution, its shortcut averages first and convolves then.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from medseg.plan.plan import Configuration

_SLOPE = 0.01
_Axes = tuple[int, ...]


class Dimension:
    """The layers of a network of two or three spatial axes."""

    def __init__(self, spatial: int, bias: bool) -> None:
        self.conv: Callable[..., nn.Module] = nn.Conv2d if spatial == 2 else nn.Conv3d
        self.transposed: Callable[..., nn.Module] = nn.ConvTranspose2d if spatial == 2 else nn.ConvTranspose3d
        self.norm: Callable[..., nn.Module] = nn.InstanceNorm2d if spatial == 2 else nn.InstanceNorm3d
        self.average: Callable[..., nn.Module] = nn.AvgPool2d if spatial == 2 else nn.AvgPool3d
        self.one: _Axes = (1,) * spatial
        self.bias = bias


class Conv(nn.Module):
    """Convolution and instance norm; leaky ReLU where ``active``."""

    def __init__(
        self, d: Dimension, ins: int, outs: int, kernel: _Axes, stride: _Axes, *, active: bool = True, bias: bool = True
    ) -> None:
        super().__init__()
        padding = tuple((k - 1) // 2 for k in kernel)
        self.conv = d.conv(ins, outs, kernel, stride, padding, bias=bias and d.bias)
        self.norm = d.norm(outs, affine=True)
        self.activation = nn.LeakyReLU(_SLOPE, inplace=True) if active else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ins, ...) to (B, outs, ...)."""
        out: torch.Tensor = self.activation(self.norm(self.conv(x)))
        return out


class Residual(nn.Module):
    """Two convolutions beside a shortcut, which is averaged where they stride and convolved where the
    number of features changes."""

    def __init__(self, d: Dimension, ins: int, outs: int, kernel: _Axes, stride: _Axes) -> None:
        super().__init__()
        self.conv1 = Conv(d, ins, outs, kernel, stride)
        self.conv2 = Conv(d, outs, outs, kernel, d.one, active=False)
        self.average = d.average(stride, stride) if any(s != 1 for s in stride) else nn.Identity()
        self.skip = Conv(d, ins, outs, d.one, d.one, active=False, bias=False) if ins != outs else nn.Identity()
        self.activation = nn.LeakyReLU(_SLOPE, inplace=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, ins, ...) to (B, outs, ...)."""
        out: torch.Tensor = self.activation(self.conv2(self.conv1(x)) + self.skip(self.average(x)))
        return out


class StagedUNet(nn.Module):
    """See `medseg.models.build.build`. One output, at full resolution, in training too."""

    def __init__(self, configuration: Configuration, channels: int, classes: int) -> None:
        super().__init__()
        network = configuration.network.value
        axes = [a for a in range(3) if a != configuration.slice_axis]
        kernels = [tuple(k[a] for a in axes) for k in network.kernels]
        strides = [tuple(s[a] for a in axes) for s in network.strides]
        d = Dimension(configuration.dimensions, network.bias)
        block = Conv if network.stem is None else Residual
        self.stem = nn.Identity() if network.stem is None else Conv(d, channels, network.stem, kernels[0], d.one)
        ins = network.stem or channels
        self.encoder = nn.ModuleList()
        for outs, kernel, stride, count in zip(network.features, kernels, strides, network.blocks, strict=True):
            first = block(d, ins, outs, kernel, stride)
            self.encoder.append(nn.Sequential(first, *(block(d, outs, outs, kernel, d.one) for _ in range(count - 1))))
            ins = outs
        self.up, self.decoder = nn.ModuleList(), nn.ModuleList()
        for stage, count in zip(reversed(range(len(kernels) - 1)), network.decoder_blocks, strict=True):
            outs = network.features[stage]
            self.up.append(d.transposed(ins, outs, strides[stage + 1], strides[stage + 1], bias=d.bias))
            first = Conv(d, 2 * outs, outs, kernels[stage], d.one)
            rest = (Conv(d, outs, outs, kernels[stage], d.one) for _ in range(count - 1))
            self.decoder.append(nn.Sequential(first, *rest))
            ins = outs
        self.output_block = d.conv(ins, classes, d.one)

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, classes, ...); in training a list of one."""
        x = self.stem(x)
        skips = []
        for stage in self.encoder:
            x = stage(x)
            skips.append(x)
        for up, decode, skip in zip(self.up, self.decoder, reversed(skips[:-1]), strict=True):
            x = decode(torch.cat((up(x), skip), dim=1))
        out: torch.Tensor = self.output_block(x)
        return [out] if self.training else out
