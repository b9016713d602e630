"""Mask R-CNN (He et al., 2017) for things that are counted, in three dimensions or two: a feature pyramid
(Lin et al., 2017), region proposals, and for each box a class, a better box and a mask.

Anchors, the coding of boxes and their overlaps are MONAI's. Two things are not as in the paper. A semantic
branch as in panoptic FPN (Kirillov et al., 2019) says at full resolution which class each voxel has: it teaches
the pyramid what voxels are from the first step on, and is what the network gives for its logits. And masks are
cut from that branch's features, not from a coarse level, as things in scans may be a few voxels wide.

Boxes are (low corner, high corner) in voxels of the patch, where voxel i reaches from i to i + 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from monai.apps.detection.utils.anchor_utils import AnchorGeneratorWithAnchorShape
from monai.apps.detection.utils.box_coder import BoxCoder
from monai.data.box_utils import box_iou
from monai.networks.blocks.dynunet_block import UnetBasicBlock
from torch import Tensor, nn
from torch.nn import functional as F

from medseg.models.parts import BOX_BINS, MASK_BINS, seen
from medseg.models.roi import roi_align
from medseg.models.unet import Block
from medseg.plan.plan import Configuration

# Anchors are so many strides of their level long; boxes go from there by a factor, so one a place is enough.
_ANCHOR = 3
# Of an image the best so many anchors become boxes; of these, as many as do not overlap more than so.
_CANDIDATES, _PROPOSALS, _PROPOSALS_OVERLAP = 256, 64, 0.7
# What is said of an image: at most so many things, which do not overlap more than so, and are at least so likely.
_THINGS, _THINGS_OVERLAP, _LEAST_SCORE = 64, 0.35, 0.05
# Voxels begin as background with so much larger a logit, as things are few: narrow features would take hundreds
# of steps to learn as much.
_MOSTLY_NOTHING = 3.0
# Along each axis a box is so many voxels long at least.
_SHORTEST = 1.0

Dense: TypeAlias = tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Detections:
    """The N things found in one image, the likeliest first: ``boxes`` (N, 2 D), ``scores`` (N,) from 0 to 1,
    ``classes`` (N,) from 1 on, and ``masks`` (N, bins, ...), the probability at the middle of each bin of a
    box that it belongs to the thing. float32."""

    boxes: Tensor
    scores: Tensor
    classes: Tensor
    masks: Tensor


@dataclass(frozen=True, eq=False)
class Proposals:
    """What a network makes of a batch before it looks at single boxes: feature ``levels`` (B, C, ...), finest
    first; ``fine`` features (B, C, *patch) and ``semantic`` logits (B, classes, *patch); of each anchor its
    ``objectness`` (B, A), a logit, and ``deltas`` (B, A, 2 D) to the box there. ``network`` has the heads."""

    network: Detector
    levels: list[Tensor]
    fine: Tensor
    semantic: Tensor
    objectness: Tensor
    deltas: Tensor

    @property
    def patch(self) -> tuple[int, ...]:
        return tuple(self.fine.shape[2:])


class Detector:
    """What lies between the three parts that have weights, whoever computes these: it chooses and cuts boxes.

    ``dense`` makes of images (B, channels, *patch) the fields of `Proposals` but for the network; the heads see
    features of boxes, as `BoxHead` and `MaskHead` do.
    """

    dense: Callable[[Tensor], Dense]
    box_head: Callable[[Tensor], tuple[Tensor, Tensor]]
    mask_head: Callable[[Tensor], Tensor]

    def lay_out(self, strides: Sequence[Sequence[int]]) -> None:
        """Anchors and the coding of boxes for stages of these strides."""
        dimensions = len(strides[0])
        self.anchor_shapes = _anchor_shapes(strides)
        self.region_coder = BoxCoder((1.0,) * 2 * dimensions)
        self.box_coder = BoxCoder((10.0,) * dimensions + (5.0,) * dimensions)

    def propose(self, images: Tensor) -> Proposals:
        """All of a batch that does not depend on single boxes."""
        return Proposals(self, *self.dense(images))

    def anchors(self, found: Proposals) -> Tensor:
        """Anchors (A, 2 D) of a batch, level by level."""
        shapes = [torch.zeros((1, 1, *one.shape[2:]), device=one.device) for one in found.levels]
        generator = AnchorGeneratorWithAnchorShape((1,), (self.anchor_shapes[0],))
        generator.cell_anchors = [generator.generate_anchors_using_shape(torch.tensor([s])) for s in self.anchor_shapes]
        anchors: Tensor = generator(found.fine[:1], shapes)[0]
        return anchors

    def regions(self, found: Proposals) -> list[Tensor]:
        """Boxes (n, 2 D) of each image in which there may be something, the likeliest first; one at least."""
        with torch.no_grad():
            anchors = self.anchors(found)
            return [
                self._regions(objectness.float(), deltas.float(), anchors, found.patch)
                for objectness, deltas in zip(found.objectness, found.deltas, strict=True)
            ]

    def _regions(self, objectness: Tensor, deltas: Tensor, anchors: Tensor, patch: Sequence[int]) -> Tensor:
        objectness, best = objectness.nan_to_num().topk(min(_CANDIDATES, len(objectness)))
        boxes = self.region_coder.decode_single(deltas[best].nan_to_num(), anchors[best])
        boxes = within(boxes, patch)
        return boxes[apart(boxes, objectness, _PROPOSALS_OVERLAP, _PROPOSALS)]

    def look(self, found: Proposals, boxes: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """What the box head says of the boxes (n, 2 D) of each image: logits (N, classes) and deltas (N, 2 D)."""
        rows = torch.cat(list(boxes))
        images = torch.cat([torch.full((len(one),), i) for i, one in enumerate(boxes)]).to(rows.device)
        level_of = self._level_of(rows)
        parts, order = [], []
        for number, level in enumerate(found.levels):
            own = level_of == number
            if own.any():
                # In the order of the images, as `roi_align` gives them.
                order.append(own.nonzero().flatten())
                parts.append(
                    roi_align(level, [rows[own & (images == i)] for i in range(len(boxes))], BOX_BINS, found.patch)
                )
        back = torch.cat(order).argsort()
        logits, deltas = self.box_head(torch.cat(parts)[back])
        return logits, deltas

    def _level_of(self, boxes: Tensor) -> Tensor:
        """The level (N,) whose anchors are most like the boxes in size."""
        low, high = boxes.chunk(2, dim=1)
        sizes = (high - low).clamp_min(_SHORTEST).log().mean(dim=1)
        anchors = torch.tensor(self.anchor_shapes, device=boxes.device).log().mean(dim=1)
        return (sizes[:, None] - anchors).abs().argmin(dim=1)

    def mask(self, found: Proposals, boxes: Sequence[Tensor]) -> Tensor:
        """Mask logits (N, classes - 1, bins, ...) of the boxes (n, 2 D) of each image."""
        logits: Tensor = self.mask_head(roi_align(found.fine, boxes, MASK_BINS, found.patch))
        return logits

    def detect(self, images: Tensor) -> list[Detections]:
        """The things in each image (B, channels, *patch)."""
        with torch.no_grad():
            return self.detections(self.propose(images))

    def detections(self, found: Proposals) -> list[Detections]:
        """The things in each image of a batch, of what is known of it already."""
        with torch.no_grad():
            boxes = self.regions(found)
            logits, deltas = (said.float().nan_to_num() for said in self.look(found, boxes))
            better = within(self.box_coder.decode_single(deltas, torch.cat(boxes)), found.patch)
            scores, classes = logits.softmax(dim=1)[:, 1:].max(dim=1)
            counts = [len(one) for one in boxes]
            chosen = [
                _likeliest(*one)
                for one in zip(better.split(counts), scores.split(counts), classes.split(counts), strict=True)
            ]
            masks = self.mask(found, [box for box, _, _ in chosen]).float().sigmoid()
            parts = masks.split([len(box) for box, _, _ in chosen])
            return [
                Detections(box, score, number + 1, mask[torch.arange(len(box), device=mask.device), number])
                for (box, score, number), mask in zip(chosen, parts, strict=True)
            ]


class MaskRCNN(Detector, nn.Module):
    """The network. `dense`, `box_head` and `mask_head` are all that has weights.

    In training a call gives `Proposals`, of which and the truth `medseg.train.detection` makes the loss; else
    semantic logits (B, classes, *patch). `detect` gives things.
    """

    def __init__(
        self,
        channels: int,
        classes: int,
        features: Sequence[int],
        kernels: Sequence[Sequence[int]],
        strides: Sequence[Sequence[int]],
    ) -> None:
        super().__init__()
        self.dimensions = len(kernels[0])
        width = features[1]
        self.stages = nn.ModuleList(
            _block(ins, outs, kernel, stride)
            for ins, outs, kernel, stride in zip([channels, *features], features, kernels, strides, strict=False)
        )
        self.laterals = nn.ModuleList(_convolution(self.dimensions, f, width, 1) for f in features[1:])
        self.smooth = nn.ModuleList(_convolution(self.dimensions, width, width, kernel) for kernel in kernels[1:])
        self.down_to_fine = _convolution(self.dimensions, width, features[0], 1)
        self.fine = _block(features[0], features[0], kernels[0], [1] * self.dimensions)
        self.semantic = _convolution(self.dimensions, features[0], classes, 1)
        with torch.no_grad():
            bias = self.semantic.get_parameter("bias")
            bias[0] = _MOSTLY_NOTHING
        self.region = _RegionHead(self.dimensions, width)
        self.box_head = BoxHead(self.dimensions, width, classes)
        self.mask_head = MaskHead(self.dimensions, features[0], classes)
        self._strides = [list(stride) for stride in strides]
        self.lay_out(strides)

    def forward(self, images: Tensor) -> Proposals | Tensor:
        """See `MaskRCNN`; ``images`` are (B, channels, *patch)."""
        found = self.propose(images)
        return found if self.training else found.semantic

    def dense(self, images: Tensor) -> Dense:
        """See `Detector`."""
        maps = []
        x = images
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        joined = [lateral(one) for lateral, one in zip(self.laterals, maps[1:], strict=True)]
        for number in range(len(joined) - 1, 0, -1):
            joined[number - 1] = joined[number - 1] + _enlarged(joined[number], self._strides[number + 1])
        levels = [smooth(one) for smooth, one in zip(self.smooth, joined, strict=True)]
        fine = self.fine(maps[0] + _enlarged(self.down_to_fine(joined[0]), self._strides[1]))
        said = [self.region(one) for one in levels]
        objectness = torch.cat([objects.flatten(1) for objects, _ in said], dim=1)
        deltas = torch.cat([delta.flatten(2).transpose(1, 2) for _, delta in said], dim=1)
        return levels, fine, self.semantic(fine), objectness, deltas


def _likeliest(boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of one image the boxes that are likely enough and no second look at the same thing."""
    likely = scores >= _LEAST_SCORE
    boxes, scores, classes = boxes[likely], scores[likely], classes[likely]
    keep = apart(boxes, scores, _THINGS_OVERLAP, _THINGS)
    return boxes[keep], scores[keep], classes[keep]


def apart(boxes: Tensor, scores: Tensor, overlap: float, most: int) -> Tensor:
    """Which of the boxes (N, 2 D) stay, the likeliest first and no more than ``most``, where none may overlap a
    likelier one by more than ``overlap`` (intersection over union). MONAI's ``non_max_suppression``, which asks
    for the overlaps box by box, takes a hundred times as long."""
    order = scores.argsort(descending=True, stable=True)
    near = (box_iou(boxes[order], boxes[order]) > overlap).cpu().numpy()
    gone = np.zeros(len(near), dtype=bool)
    keep: list[int] = []
    for number, others in enumerate(near):
        if not gone[number] and len(keep) < most:
            keep.append(number)
            gone |= others
    return order[torch.tensor(keep, dtype=torch.int64, device=order.device)]


def within(boxes: Tensor, patch: Sequence[int]) -> Tensor:
    """Boxes (N, 2 D) cut off at the patch, a voxel long at least along each axis."""
    low, high = boxes.chunk(2, dim=1)
    size = torch.tensor(patch, device=boxes.device, dtype=boxes.dtype)
    low = torch.minimum(low.clamp_min(0), size - _SHORTEST)
    return torch.cat([low, torch.maximum(torch.minimum(high, size), low + _SHORTEST)], dim=1)


class _RegionHead(nn.Module):
    """Whether there is something at each place of a level (B, C, ...): a logit (B, 1, ...), and by how much its
    box differs from the anchor (B, 2 D, ...). The same for all levels."""

    def __init__(self, dimensions: int, width: int) -> None:
        super().__init__()
        self.shared = _convolution(dimensions, width, width, 3)
        self.objectness = _convolution(dimensions, width, 1, 1)
        self.deltas = _convolution(dimensions, width, 2 * dimensions, 1)
        _begin_small(self.objectness, self.deltas)

    def forward(self, level: Tensor) -> tuple[Tensor, Tensor]:
        shared = F.leaky_relu(self.shared(F.leaky_relu(level, 0.01)), 0.01)
        return self.objectness(shared), self.deltas(shared)


class BoxHead(nn.Module):
    """Of the features (N, C, bins, ...) in a box: logits (N, classes) of what it holds, and by how much the
    thing's own box differs (N, 2 D)."""

    def __init__(self, dimensions: int, width: int, classes: int) -> None:
        super().__init__()
        hidden = 4 * width
        self.convolution = _convolution(dimensions, width, width, 3, stride=2)
        self.hidden = nn.Linear(width * (BOX_BINS // 2) ** dimensions, hidden)
        self.classes = nn.Linear(hidden, classes)
        self.deltas = nn.Linear(hidden, 2 * dimensions)
        _begin_small(self.classes, self.deltas)

    def forward(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        x = F.leaky_relu(self.convolution(rois), 0.01)
        x = F.leaky_relu(self.hidden(x.flatten(1)), 0.01)
        return self.classes(x), self.deltas(x)


class MaskHead(nn.Module):
    """Of the features (N, C, bins, ...) in a box, for each class but the background the logits (N, classes - 1,
    bins, ...) of the thing's mask. Where in the box a bin lies is a feature too (CoordConv, Liu et al., 2018),
    as what tells a thing from its neighbour is that it lies in the middle."""

    def __init__(self, dimensions: int, width: int, classes: int) -> None:
        super().__init__()
        self.first = _convolution(dimensions, width + dimensions, width, 3)
        self.second = _convolution(dimensions, width, width, 3)
        self.logits = _convolution(dimensions, width, classes - 1, 1)

    def forward(self, rois: Tensor) -> Tensor:
        nought = 0 * rois[:, :1]  # of the batch's size without that number, which no graph holds
        where = [nought + _along(axis, rois) for axis in range(2, rois.ndim)]
        x = F.leaky_relu(self.first(torch.cat([rois, *where], dim=1)), 0.01)
        x = F.leaky_relu(self.second(x), 0.01)
        logits: Tensor = self.logits(x)
        return logits


def _along(axis: int, x: Tensor) -> Tensor:
    """From -1 to 1 along one axis, in a shape to be added to ``x``."""
    line = torch.linspace(-1, 1, x.shape[axis], device=x.device, dtype=x.dtype)
    return line.reshape([-1 if a == axis else 1 for a in range(x.ndim)])


def _begin_small(*layers: nn.Module) -> None:
    """Every box begins as its anchor, and every place as likely as any other."""
    for layer in layers:
        nn.init.normal_(layer.weight, std=0.01)  # type: ignore[arg-type]
        nn.init.zeros_(layer.bias)  # type: ignore[arg-type]


def _block(ins: int, outs: int, kernel: Sequence[int], stride: Sequence[int]) -> Block:
    norm = ("INSTANCE", {"affine": True, "eps": 1e-5})
    act = ("leakyrelu", {"inplace": True, "negative_slope": 0.01})
    return Block(UnetBasicBlock(len(kernel), ins, outs, kernel, stride, norm, act))


def _convolution(dimensions: int, ins: int, outs: int, kernel: int | Sequence[int], stride: int = 1) -> nn.Module:
    kernels = [kernel] * dimensions if isinstance(kernel, int) else list(kernel)
    kind: Any = {2: nn.Conv2d, 3: nn.Conv3d}[dimensions]
    layer: nn.Module = kind(ins, outs, kernels, stride=stride, padding=[k // 2 for k in kernels])
    return layer


def _enlarged(x: Tensor, by: Sequence[int]) -> Tensor:
    """Each place of (B, C, ...) repeated so many times along each axis."""
    return F.interpolate(x, scale_factor=[float(n) for n in by], mode="nearest")


def _anchor_shapes(strides: Sequence[Sequence[int]]) -> list[list[float]]:
    """Of each level but the finest stage's the sides of its anchors in voxels."""
    shapes, reached = [], [1] * len(strides[0])
    for stride in strides:
        reached = [r * s for r, s in zip(reached, stride, strict=True)]
        shapes.append([float(_ANCHOR * r) for r in reached])
    return shapes[1:]


def mask_rcnn(configuration: Configuration, channels: int, classes: int) -> nn.Module:
    """A Mask R-CNN whose backbone has the configuration's stages; see `medseg.models.build.build`. Its pyramid
    is as wide as the second of them."""
    network = configuration.network.value
    return MaskRCNN(
        channels,
        classes,
        network.features,
        [seen(configuration, kernel) for kernel in network.kernels],
        [seen(configuration, stride) for stride in network.strides],
    )
