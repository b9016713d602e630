"""What several families are made of: a plan's stages along the axes that a network sees, MONAI's layers by those,
and the list of outputs that training expects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from monai.networks.blocks import Convolution, ResidualUnit
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.plan.plan import Configuration

Axes = tuple[int, ...]
INSTANCE = ("INSTANCE", {"affine": True})
LEAKY = ("LEAKYRELU", {"negative_slope": 0.01, "inplace": True})


@dataclass(frozen=True)
class Stage:
    """One of a plan's, along the ``dimensions`` axes that a network sees. ``dilation`` is above 1 where earlier
    stages of it kept the resolution."""

    dimensions: int
    features: int
    kernel: Axes
    stride: Axes
    dilation: Axes


def stages_of(configuration: Configuration) -> list[Stage]:
    """A plan's stages, from full resolution down. Where a stage but the first does not stride, its kernels, and those
    of all that follow, reach twice as far as before along the axes that they span."""
    network = configuration.network.value
    axes = [a for a in range(3) if a != configuration.slice_axis]
    stages, reach = [], 1
    for number, (features, kernel, stride) in enumerate(
        zip(network.features, network.kernels, network.strides, strict=True)
    ):
        reach *= 2 if number and set(stride) == {1} else 1
        dilation = tuple(reach if kernel[a] > 1 else 1 for a in axes)
        spans, steps = tuple(kernel[a] for a in axes), tuple(stride[a] for a in axes)
        stages.append(Stage(configuration.dimensions, features, spans, steps, dilation))
    return stages


def convolution(stage: Stage, ins: int, outs: int, **arguments: Any) -> nn.Module:
    """MONAI's, with instance norm and leaky ReLU, of the stage's kernel, unless ``arguments`` say otherwise."""
    usual = {"kernel_size": stage.kernel, "norm": INSTANCE, "act": LEAKY, "bias": False}
    return Convolution(stage.dimensions, ins, outs, **{**usual, **arguments})


def residual(stage: Stage, ins: int, outs: int, stride: Axes) -> nn.Module:
    """MONAI's residual unit of two convolutions with the stage's kernel and dilation."""
    return ResidualUnit(
        stage.dimensions,
        ins,
        outs,
        strides=stride,
        kernel_size=stage.kernel,
        dilation=stage.dilation,
        norm=INSTANCE,
        act=LEAKY,
        bias=False,
    )


class Backbone(nn.Module):
    """A residual encoder: one convolution at full resolution, then two residual units a stage, of which the first
    strides (He et al., 2016; there is no max pooling, as volumes are small)."""

    def __init__(self, stages: list[Stage], channels: int) -> None:
        super().__init__()
        first = stages[0]
        self.stem = convolution(first, channels, first.features)
        self.stages = nn.ModuleList()
        ins = first.features
        for stage in stages[1:]:
            one = (1,) * stage.dimensions
            self.stages.append(
                nn.Sequential(
                    residual(stage, ins, stage.features, stage.stride),
                    residual(stage, stage.features, stage.features, one),
                )
            )
            ins = stage.features

    def forward(self, x: Tensor) -> list[Tensor]:
        """(B, channels, ...) to the features of every stage, from full resolution down."""
        found = [self.stem(x)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found


def enlarged(x: Tensor, size: torch.Size) -> Tensor:
    """(B, C, ...) to the spatial ``size``, linearly between the middles of voxels."""
    mode = "trilinear" if x.ndim == 5 else "bilinear"
    return F.interpolate(x, size=list(size), mode=mode, align_corners=False)


class Single(nn.Module):
    """A network of one output, which is in a list while training."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, ...); in training a list of one."""
        out: Tensor = self.network(x)
        return [out] if self.training else out


class _Exact:
    """A convolution that is computed in full precision on a processor where an axis is shorter than its kernel: of
    such oneDNN's gradient of bfloat16 weights reads memory that nobody wrote (seen with torch 2.13, Zen 4)."""

    def _conv_forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        compute: Callable[..., Tensor] = super()._conv_forward  # type: ignore[misc]
        halved = x.is_cpu and torch.is_autocast_enabled("cpu")
        if not (halved and any(n < k for n, k in zip(x.shape[2:], weight.shape[2:], strict=True))):
            return compute(x, weight, bias)
        with torch.autocast("cpu", enabled=False):
            return compute(x.float(), weight, bias)


class _Exact2d(_Exact, nn.Conv2d):
    pass


class _Exact3d(_Exact, nn.Conv3d):
    pass


def exact_where_small(network: nn.Module) -> None:
    """Lets a network's convolutions, also those of libraries, be computed in full precision where half of it
    gives wrong gradients."""
    for module in network.modules():
        if type(module) is nn.Conv3d:
            module.__class__ = _Exact3d
        elif type(module) is nn.Conv2d:
            module.__class__ = _Exact2d
