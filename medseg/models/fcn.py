"""The fully convolutional network (Long et al., 2015) on a residual encoder: each of its coarsest stages gives an
answer, which is enlarged to the next finer one's and added to it, and in the end to full resolution.

Of an encoder that halves five times one answer is FCN-32s, two are FCN-16s, three FCN-8s."""

from __future__ import annotations

from torch import Tensor, nn

from medseg.models.layers import Backbone, Stage, convolution, enlarged, stages_of
from medseg.models.norm import with_quick_norms
from medseg.plan.plan import Configuration

_FUSED = 3


class FCN(nn.Module):
    """See `medseg.models.build.build`. One output, at full resolution, in training too."""

    def __init__(self, stages: list[Stage], channels: int, classes: int, fused: int) -> None:
        super().__init__()
        self.backbone = Backbone(stages, channels)
        # Never one at full resolution, which would make a U-Net of it.
        answering = list(reversed(stages[1:]))[:fused]
        self.heads = nn.ModuleList(
            convolution(stage, stage.features, classes, kernel_size=1, conv_only=True, bias=True) for stage in answering
        )

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Logits (B, classes, ...); in training a list of one."""
        found = self.backbone(x)
        out: Tensor | None = None
        for head, features in zip(self.heads, reversed(found), strict=False):
            answer = head(features)
            out = answer if out is None else answer + enlarged(out, answer.shape[2:])
        assert out is not None  # noqa: S101 - there is one head at the least
        out = enlarged(out, x.shape[2:])
        return [out] if self.training else out


def fcn(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """See `medseg.models.build.build`."""
    fused = configuration.network.value.fused or _FUSED
    return with_quick_norms(FCN(stages_of(configuration), channels, classes, fused))
