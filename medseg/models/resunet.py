"""The U-Net with residual blocks on the way down, as MONAI's DynUNet has them."""

from __future__ import annotations

from torch import nn

from medseg.models.norm import with_quick_norms
from medseg.models.unet import unet
from medseg.plan.plan import Configuration


def resunet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`."""
    return with_quick_norms(unet(configuration, channels, classes, residual=True))
