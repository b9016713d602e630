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


def _unet_classic(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.unet_classic import unet_classic

    return unet_classic(configuration, channels, classes)


def _resunet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.resunet import resunet

    return resunet(configuration, channels, classes)


def _attention_unet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.attention_unet import attention_unet

    return attention_unet(configuration, channels, classes)


def _segresnet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.segresnet import segresnet

    return segresnet(configuration, channels, classes)


def _swinunetr(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.swinunetr import swinunetr

    return swinunetr(configuration, channels, classes)


def _mednext(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.mednext import mednext

    return mednext(configuration, channels, classes)


def _fcn(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.fcn import fcn

    return fcn(configuration, channels, classes)


def _deeplab(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.deeplab import deeplab

    return deeplab(configuration, channels, classes)


def _staged(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.stages import StagedUNet

    return StagedUNet(configuration, channels, classes)


def _mask_rcnn(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.mask_rcnn import mask_rcnn

    return mask_rcnn(configuration, channels, classes)


BUILDERS: dict[str, Callable[[Configuration, int, int], nn.Module]] = {
    "unet": _unet,
    "unet-classic": _unet_classic,
    "resunet": _resunet,
    "attention-unet": _attention_unet,
    "segresnet": _segresnet,
    "swinunetr": _swinunetr,
    "mednext": _mednext,
    "fcn": _fcn,
    "deeplab": _deeplab,
    "mask-rcnn": _mask_rcnn,
    "nnunet-plain": _staged,
    "nnunet-residual": _staged,
}


def build(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """The network that a configuration describes, with fresh weights.

    It takes (B, channels, X, Y, Z), or (B, channels, *plane) in 2D, and gives logits (B, classes,
    ...) of the same size; in training mode a list of them, from full resolution down, for deep
    supervision. ``classes`` counts the background.
    """
    from medseg.models.layers import exact_where_small

    network = BUILDERS[configuration.network.value.family](configuration, channels, classes)
    _only_floats(network)
    exact_where_small(network)
    return network


def weigh(configuration: Configuration, channels: int, classes: int) -> tuple[int, int]:
    """The parameters of a configuration's network, and the multiplications of one forward pass of one patch, by
    its convolutions and matrix products, counted while they run."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    network = build(configuration, channels, classes).eval()
    patch = [n for axis, n in enumerate(configuration.patch.value) if axis != configuration.slice_axis]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(torch.zeros((1, channels, *patch)))
    return sum(p.numel() for p in network.parameters()), counter.get_total_flops() // 2


# What batch norm calls the number of batches that it has seen.
_COUNT = "num_batches_tracked"


def _uncounted(module: nn.Module, tensors: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Takes out the number that batch norm puts among weights which it takes for those of an early torch."""
    tensors.pop(prefix + _COUNT, None)


def _only_floats(network: nn.Module) -> None:
    """Of what a network holds only real numbers are learnt and so are kept in files: batch norm does not count
    its batches, and tables of indices are made anew."""
    for module in network.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name == _COUNT:
                module.register_buffer(name, None)
                module.register_load_state_dict_pre_hook(_uncounted)
            elif not buffer.is_floating_point():
                module.register_buffer(name, buffer, persistent=False)


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
