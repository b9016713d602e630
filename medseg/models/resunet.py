"""The U-Net with residual blocks on the way down, as MONAI's DynUNet has them."""

from __future__ import annotations

from typing import Any

from monai.networks.blocks.dynunet_block import UnetResBlock
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.models.norm import with_quick_norms
from medseg.models.unet import unet
from medseg.plan.plan import Configuration


class Shortcut(nn.Module):
    """A strided convolution of one voxel, whose weights it takes over. It sees but every n-th voxel, and these are
    taken first: of fewer than 8 features in channels-last order, in two dimensions, oneDNN's gradient of a convolution
    with such a stride writes over memory that is not its own (seen with torch 2.13 on AVX2)."""

    def __init__(self, convolution: Any) -> None:
        super().__init__()
        self.weight, self.bias, self.stride = convolution.weight, convolution.bias, convolution.stride

    def forward(self, x: Tensor) -> Tensor:
        """(B, ins, ...) to (B, outs, ...)."""
        every = tuple(slice(None, None, step) for step in self.stride)
        seen = x[(slice(None), slice(None), *every)]
        return (F.conv3d if x.ndim == 5 else F.conv2d)(seen, self.weight, self.bias)


def resunet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`."""
    network = unet(configuration, channels, classes, residual=True)
    for block in network.modules():
        if isinstance(block, UnetResBlock) and block.downsample:
            block.conv3.conv = Shortcut(block.conv3.conv)
    return with_quick_norms(network)
