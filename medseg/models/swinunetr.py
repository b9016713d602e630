"""Swin UNETR as MONAI has it: attention within shifted windows on the way down, convolutions on the way up
(Hatamizadeh et al., 2022)."""

from __future__ import annotations

from monai.networks.nets.swin_unetr import SwinUNETR
from torch import nn

from medseg.models.layers import INSTANCE, Single, stages_of
from medseg.models.norm import with_quick_norms
from medseg.plan.plan import Configuration


def swinunetr(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`. Patches are multiples of 32 along every axis."""
    stages = stages_of(configuration)
    network = SwinUNETR(
        spatial_dims=configuration.dimensions,
        in_channels=channels,
        out_channels=classes,
        feature_size=stages[0].features,
        norm_name=INSTANCE,
    )
    return Single(with_quick_norms(network))
