"""Which graphs the portable form of a network is made of: what each computes, takes and gives."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from medseg.models.onnx_file import Port
from medseg.plan.plan import Configuration

TILES, LOGITS, FEATURES, ROIS = "tiles", "logits", "features", "rois"
# Bins along each axis of a box, for its class and for its mask.
BOX_BINS, MASK_BINS = 6, 14
BATCH = "batch"


@dataclass(frozen=True)
class Part:
    """What one graph ``takes`` and ``gives``. ``method`` names what computes it, of the network; "" is the whole
    network, which may take tiles of other sizes, too."""

    method: str
    takes: Port
    gives: tuple[Port, ...]

    @property
    def whole(self) -> bool:
        return not self.method

    def file(self, member: str) -> str:
        """The name of its file, beside the weights file of a member."""
        return member.replace(".safetensors", f".{self.method}.onnx" if self.method else ".onnx")


def parts(configuration: Configuration, channels: int, classes: int) -> tuple[Part, ...]:
    """The graphs of a configuration's network; ``classes`` counts the background."""
    patch = seen(configuration, configuration.patch.value)
    if configuration.network.value.counts:
        return _of_detector(configuration, channels, classes, patch)
    return (Part("", _port(TILES, channels, *patch), (_port(LOGITS, classes, *patch),)),)


def _of_detector(configuration: Configuration, channels: int, classes: int, patch: tuple[int, ...]) -> tuple[Part, ...]:
    """Those of `medseg.models.mask_rcnn`: all before single boxes are looked at, and the heads that look."""
    network, space = configuration.network.value, len(patch)
    fine, width = network.features[:2]
    strides = accumulate((seen(configuration, stride) for stride in network.strides), _times)
    levels = [tuple(n // by for n, by in zip(patch, reached, strict=True)) for reached in strides][1:]
    anchors = sum(map(math.prod, levels))
    dense = (
        *(_port(f"level{number}", width, *size) for number, size in enumerate(levels)),
        _port("fine", fine, *patch),
        _port("semantic", classes, *patch),
        _port("objectness", anchors),
        _port("deltas", anchors, 2 * space),
    )
    boxes, masks = (BOX_BINS,) * space, (MASK_BINS,) * space
    return (
        Part("dense", _port(TILES, channels, *patch), dense),
        Part("box_head", _port(ROIS, width, *boxes), (_port("classes", classes), _port("deltas", 2 * space))),
        Part("mask_head", _port(ROIS, fine, *masks), (_port("masks", classes - 1, *masks),)),
    )


def seen(configuration: Configuration, sizes: Sequence[int]) -> tuple[int, ...]:
    """Those along the axes that the network sees."""
    return tuple(n for axis, n in enumerate(sizes) if axis != configuration.slice_axis)


def _port(name: str, *shape: int) -> Port:
    return Port(name, (BATCH, *shape))


def _times(one: Sequence[int], other: Sequence[int]) -> tuple[int, ...]:
    return tuple(a * b for a, b in zip(one, other, strict=True))
