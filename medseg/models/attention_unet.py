"""The U-Net whose skips pass a gate that the layer below controls, as MONAI has it (Oktay et al., 2018)."""

from __future__ import annotations

from itertools import pairwise

from monai.networks.blocks import Convolution
from monai.networks.nets.attentionunet import AttentionUnet
from torch import nn

from medseg.models.layers import Single, stages_of
from medseg.plan.plan import Configuration


def attention_unet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`. Batch norm, and one output."""
    stages = stages_of(configuration)
    network = AttentionUnet(
        spatial_dims=configuration.dimensions,
        in_channels=channels,
        out_channels=classes,
        channels=[stage.features for stage in stages],
        strides=[stage.stride for stage in stages[1:]],
        kernel_size=stages[0].kernel,
        up_kernel_size=stages[0].kernel,
    )
    _without_idle_biases(network)
    return Single(network)


def _without_idle_biases(network: nn.Module) -> None:
    """Before batch norm a bias changes nothing, and never learns."""
    for module in network.modules():
        if isinstance(module, nn.Sequential):
            for first, second in pairwise(module):
                if isinstance(first, Convolution) and isinstance(second, nn.BatchNorm2d | nn.BatchNorm3d):
                    first.conv.bias = None
        if isinstance(module, Convolution) and hasattr(module, "adn"):
            module.conv.bias = None
