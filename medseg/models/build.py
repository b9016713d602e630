"""Plan to network."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING

from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    from torch import Tensor, nn


def _unet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.unet import unet

    return unet(configuration, channels, classes)


def _staged(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.stages import StagedUNet

    return StagedUNet(configuration, channels, classes)


BUILDERS: dict[str, Callable[[Configuration, int, int], nn.Module]] = {
    "unet": _unet,
    "nnunet-plain": _staged,
    "nnunet-residual": _staged,
}


def build(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """The network that a configuration describes, with fresh weights.

    It takes (B, channels, X, Y, Z), or (B, channels, *plane) in 2D, and gives logits (B, classes,
    ...) of the same size; in training mode a list of them, from full resolution down, for deep
    supervision. ``classes`` counts the background.
    """
    return BUILDERS[configuration.network.value.family](configuration, channels, classes)


def split_head(network: nn.Module) -> tuple[nn.Module, Tensor, Tensor] | None:
    """A network without its last 1x1x1 convolution, which so gives features (B, F, ...), and that
    convolution's weight (K, F) and bias (K,); None where it does not end in one. Weights are shared
    with the network, which stays as it is."""
    from torch import nn

    last = getattr(network, "output_block", None)
    convolutions = [m for m in last.modules() if not list(m.children())] if last is not None else []
    if len(convolutions) != 1 or not isinstance(convolutions[0], nn.Conv2d | nn.Conv3d):
        return None
    (convolution,) = convolutions
    if set(convolution.kernel_size) != {1} or convolution.bias is None:
        return None
    body = copy.copy(network)
    body._modules = {**network._modules, "output_block": nn.Identity()}
    return body, convolution.weight.detach().flatten(1), convolution.bias.detach()
