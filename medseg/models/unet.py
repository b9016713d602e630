"""The U-Net of nnU-Net, as MONAI has it (DynUNet): two convolutions a stage, instance norm, leaky
ReLU, strided downsampling, transposed upsampling, deep supervision."""

from __future__ import annotations

import torch
from monai.networks.nets.dynunet import DynUNet
from torch import nn

from medseg.plan.plan import Configuration

# Below a quarter of the resolution supervision adds cost and little else.
_SUPERVISED = 2


class UNet(DynUNet):
    """DynUNet whose deeper outputs keep their own, lower resolution in training.

    MONAI enlarges them all to the patch's size first, which costs time and memory for nothing.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, classes, ...); in training a list, finest first."""
        out: torch.Tensor = self.output_block(self.skip_layers(x))
        return [out, *self.heads] if self.training and self.deep_supervision else out


def unet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """A U-Net of the configuration's stages; see `medseg.models.build.build`."""
    network = configuration.network.value
    axes = [a for a in range(3) if a != configuration.slice_axis]
    kernels = [[kernel[a] for a in axes] for kernel in network.kernels]
    strides = [[stride[a] for a in axes] for stride in network.strides]
    supervised = min(_SUPERVISED, len(network.features) - 2)
    return UNet(
        spatial_dims=configuration.dimensions,
        in_channels=channels,
        out_channels=classes,
        kernel_size=kernels,
        strides=strides,
        upsample_kernel_size=strides[1:],
        filters=list(network.features),
        norm_name=("INSTANCE", {"affine": True}),
        act_name=("leakyrelu", {"inplace": True, "negative_slope": 0.01}),
        deep_supervision=supervised > 0,
        deep_supr_num=max(supervised, 1),
    )
