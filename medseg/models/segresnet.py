"""SegResNet as MONAI has it, with deep supervision and strides that follow the spacing (SegResNetDS;
Myronenko, 2018)."""

from __future__ import annotations

from monai.networks.nets.segresnet_ds import SegResNetDS
from torch import nn

from medseg.models.layers import INSTANCE, Stage, stages_of
from medseg.models.norm import with_quick_norms
from medseg.plan.plan import Configuration

# Residual blocks of each stage, of which there are more where they cost less (Auto3DSeg's).
_BLOCKS = (1, 2, 2, 4, 4)
_SUPERVISED = 3


def segresnet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`. Instance norm where MONAI's default is batch norm, since batches are small."""
    stages = stages_of(configuration)
    network = SegResNetDS(
        spatial_dims=configuration.dimensions,
        init_filters=stages[0].features,
        in_channels=channels,
        out_channels=classes,
        norm=INSTANCE,
        blocks_down=tuple(_BLOCKS[min(n, len(_BLOCKS) - 1)] for n in range(len(stages))),
        dsdepth=min(_SUPERVISED, len(stages) - 1),
        resolution=_resolution(stages),
    )
    return with_quick_norms(network)


def _resolution(stages: list[Stage]) -> tuple[float, ...]:
    """The spacing, in units of the coarsest axis, from which MONAI derives the plan's strides."""
    steps = [stage.stride for stage in stages[1:]]
    alike = next((n for n in range(len(steps)) if all(set(step) == {2} for step in steps[n:])), len(steps))
    return tuple(2.0 ** -sum(step[axis] == 2 for step in steps[:alike]) for axis in range(stages[0].dimensions))
