"""The U-Net of nnU-Net, as MONAI has it (DynUNet): two convolutions a stage, instance norm, leaky
ReLU, strided downsampling, transposed upsampling, deep supervision."""

from __future__ import annotations

from typing import Any

import torch
from monai.networks.nets.dynunet import DynUNet, UnetBasicBlock
from torch import Tensor, nn

from medseg.models.norm import norm_activation
from medseg.plan.plan import Configuration

# Below a quarter of the resolution supervision adds cost and little else.
_SUPERVISED = 2
_SLOPE = 0.01
_EPSILON = 1e-5


class Block(nn.Module):
    """Two convolutions, each with instance norm and leaky ReLU: MONAI's block, whose layers it takes over.

    In training on a processor activations go on in channels-last order, in which convolutions take little
    more than half as long.
    """

    def __init__(self, block: UnetBasicBlock) -> None:
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ins, ...) to (B, outs, ...)."""
        return self._half(self._half(x, self.conv1, self.norm1), self.conv2, self.norm2)

    def _half(self, x: Tensor, convolution: Any, norm: Any) -> Tensor:
        x = convolution(x)
        if self.training and norm.weight.device.type == "cpu" and not torch.compiler.is_compiling():
            return norm_activation(x, norm.weight, norm.bias, _EPSILON, _SLOPE)
        out: Tensor = self.get_submodule("lrelu")(norm(x))
        return out


class UNet(DynUNet):
    """DynUNet whose deeper outputs keep their own, lower resolution in training.

    MONAI enlarges them all to the patch's size first, which costs time and memory for nothing. Each
    block is held once, under its plain name, where DynUNet also nests them: weights files could
    not hold them twice.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        del self.skip_layers, self.heads
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if isinstance(child, UnetBasicBlock):
                    parent.add_module(name, Block(child))

    def check_kernel_stride(self) -> None:
        """Nothing: the plan has been checked, and MONAI would refuse two stages, which small scans get."""

    def forward(self, x: torch.Tensor) -> torch.Tensor | list[torch.Tensor]:
        """Logits (B, classes, ...); in training a list, finest first."""
        skips = [self.input_block(x)]
        for block in self.downsamples:
            skips.append(block(skips[-1]))
        decoded = [self.bottleneck(skips[-1])]
        for block, skip in zip(self.upsamples, reversed(skips), strict=True):
            decoded.append(block(decoded[-1], skip))
        out: torch.Tensor = self.output_block(decoded[-1])
        if not self.training:
            return out
        if not self.deep_supervision:
            return [out]
        coarser = reversed(decoded[-1 - len(self.deep_supervision_heads) : -1])
        return [out, *(head(one) for head, one in zip(self.deep_supervision_heads, coarser, strict=True))]


def unet(configuration: Configuration, channels: int, classes: int, *, residual: bool = False) -> nn.Module:
    """A U-Net of the configuration's stages, with ``residual`` blocks on the way down or plain ones; see
    `medseg.models.build.build`."""
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
        norm_name=("INSTANCE", {"affine": True, "eps": _EPSILON}),
        act_name=("leakyrelu", {"inplace": True, "negative_slope": _SLOPE}),
        deep_supervision=supervised > 0,
        deep_supr_num=max(supervised, 1),
        res_block=residual,
    )
