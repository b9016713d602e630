"""Plan to network."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    from torch import nn


def _unet(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    from medseg.models.unet import unet

    return unet(configuration, channels, classes)


BUILDERS: dict[str, Callable[[Configuration, int, int], nn.Module]] = {"unet": _unet}


def build(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """The network that a configuration describes, with fresh weights.

    It takes (B, channels, X, Y, Z), or (B, channels, *plane) in 2D, and gives logits (B, classes,
    ...) of the same size; in training mode a list of them, from full resolution down, for deep
    supervision. ``classes`` counts the background.
    """
    return BUILDERS[configuration.network.value.family](configuration, channels, classes)
