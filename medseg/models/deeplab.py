"""DeepLab v3+ (Chen et al., 2018): a residual encoder whose last stages are dilated instead of striding, pyramid
pooling of what they find at several dilations and of the whole patch, and a decoder that joins it to finer features.

Kernels and dilations follow the plan: along an axis that a stage does not span, as that of thick slices, nothing is
dilated, and within the plane all is."""

from __future__ import annotations

import numpy as np
import torch
from monai.networks.layers.factories import Pool
from torch import Tensor, nn

from medseg.models.layers import Axes, Backbone, Stage, convolution, enlarged, stages_of
from medseg.models.norm import with_quick_norms
from medseg.plan.plan import Configuration

# Dilations of the pooling's branches, as shares of the coarsest features' extent: its authors' 6, 12 and 18 of 33
# at an output stride of 16, and 12, 24 and 36 of 65 at 8.
_RATES = (6 / 33, 12 / 33, 18 / 33)
# The decoder sees the finer features through so few.
_FINER = 0.5


class Pyramid(nn.Module):
    """Atrous spatial pyramid pooling with the mean over the patch: (B, ins, ...) to (B, outs, ...)."""

    def __init__(self, stage: Stage, outs: int, rates: list[Axes]) -> None:
        super().__init__()
        ins, one = stage.features, (1,) * stage.dimensions
        self.branches = nn.ModuleList([convolution(stage, ins, outs, kernel_size=one)])
        for rate in rates:
            self.branches.append(convolution(stage, ins, outs, dilation=rate))
        self.mean = Pool[Pool.ADAPTIVEAVG, stage.dimensions](1)
        # No norm: a single voxel has no variance.
        self.whole = convolution(stage, ins, outs, kernel_size=one, norm=None, bias=True)
        self.join = convolution(stage, (len(self.branches) + 1) * outs, outs, kernel_size=one)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        whole = self.whole(self.mean(x)).expand(-1, -1, *x.shape[2:])
        out: Tensor = self.join(torch.cat([*(branch(x) for branch in self.branches), whole], dim=1))
        return out


class DeepLab(nn.Module):
    """See `medseg.models.build.build`. One output, at full resolution, in training too."""

    def __init__(self, stages: list[Stage], channels: int, classes: int, size: Axes) -> None:
        super().__init__()
        self.backbone = Backbone(stages, channels)
        last, finer = stages[-1], stages[1]
        outs = last.features // 2
        self.pyramid = Pyramid(last, outs, _rates(stages, size))
        few = max(1, int(_FINER * finer.features))
        self.finer = convolution(finer, finer.features, few, kernel_size=1)
        self.decode = nn.Sequential(convolution(finer, outs + few, outs), convolution(finer, outs, outs))
        self.last = convolution(finer, outs, classes, kernel_size=1, conv_only=True, bias=True)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, ...); in training a list of one."""
        found = self.backbone(x)
        finer = self.finer(found[1])
        context = enlarged(self.pyramid(found[-1]), finer.shape[2:])
        out = enlarged(self.last(self.decode(torch.cat((context, finer), dim=1))), x.shape[2:])
        return [out] if self.training else out


def _rates(stages: list[Stage], size: Axes) -> list[Axes]:
    """The dilations of the pyramid for patches of this ``size``, along the axes that the last stage's kernel spans."""
    last = stages[-1]
    extent = np.array(size) // np.prod([stage.stride for stage in stages], axis=0)
    found = [
        tuple(max(1, round(share * int(n))) if k > 1 else 1 for n, k in zip(extent, last.kernel, strict=True))
        for share in _RATES
    ]
    return list(dict.fromkeys(found))


def deeplab(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`."""
    size = tuple(n for axis, n in enumerate(configuration.patch.value) if axis != configuration.slice_axis)
    return with_quick_norms(DeepLab(stages_of(configuration), channels, classes, size))
