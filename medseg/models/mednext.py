"""MedNeXt as MONAI has it: a U-Net of ConvNeXt blocks, depthwise convolutions between 1x1x1 ones that widen and
narrow (Roy et al., 2023)."""

from __future__ import annotations

from monai.networks.nets.mednext import MedNeXt
from torch import Tensor, nn

from medseg.models.layers import stages_of
from medseg.plan.plan import Configuration

# MedNeXt-S: two blocks a stage, which widen twice.
_BLOCKS, _EXPANSION = 2, 2


class _Supervised(nn.Module):
    """MedNeXt with its outputs in a list."""

    def __init__(self, network: MedNeXt) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, ...); in training a list, finest first."""
        out = self.network(x)
        return list(out) if self.training else out


def mednext(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`."""
    stages = stages_of(configuration)
    halvings = len(stages) - 1
    return _Supervised(
        MedNeXt(
            spatial_dims=configuration.dimensions,
            init_filters=stages[0].features,
            in_channels=channels,
            out_channels=classes,
            encoder_expansion_ratio=_EXPANSION,
            decoder_expansion_ratio=_EXPANSION,
            bottleneck_expansion_ratio=_EXPANSION,
            kernel_size=stages[0].kernel[0],
            deep_supervision=True,
            use_residual_connection=True,
            blocks_down=(_BLOCKS,) * halvings,
            blocks_bottleneck=_BLOCKS,
            blocks_up=(_BLOCKS,) * halvings,
        )
    )
