"""What training minimises for things that are counted, beside the loss of the voxels: whether a place holds a
thing, which, in what box, and which of the box's voxels are its own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from monai.apps.detection.utils.ATSS_matcher import ATSSMatcher
from monai.apps.detection.utils.hard_negative_sampler import HardNegativeSampler
from monai.data.box_utils import box_iou, box_pair_giou
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from medseg.core.shape import connected
from medseg.models.mask_rcnn import Proposals
from medseg.models.parts import MASK_BINS
from medseg.models.roi import bin_centres

# What the patch's border leaves of a thing is no thing where it has fewer voxels, by dimensions.
_CRUMB = {2: 4, 3: 8}
# Anchors and boxes of an image that the losses look at, the share of them that hold something at the most, and
# from how many times as many of the hardest the others are taken.
_ANCHORS, _BOXES, _SHARE, _POOL = 48, 32, 1 / 3, 4
# An anchor fits nearly as well as another where its overlap is this share of the other's.
_NEARLY = 0.9
# A box holds a thing that it overlaps so much (intersection over union), by dimensions.
_HOLDS = {2: 0.5, 3: 0.35}
# Masks are learnt of so many boxes of an image.
_MASKS = 8


@dataclass(frozen=True, eq=False)
class Things:
    """The N things of a patch: ``boxes`` (N, 2 D) in voxels, ``classes`` (N,) from 1 on; ``index`` (*patch), the
    number of each voxel's thing from 1 on, 0 for none; ``unknown`` (*patch), where there may be one or not."""

    boxes: Tensor
    classes: Tensor
    index: Tensor
    unknown: Tensor


def things_in(classes: NDArray[np.int64], count: int = 2**31) -> Things:
    """The things of a patch of classes (*patch), two or three axes, which may be numbered (class + ``count`` x
    number): what has one number; and of what has none, what touches by faces, edges or corners and is of one class.
    Unknown is what is ignored (negative), and what the patch's border leaves of a thing where that is next to nothing.
    """
    space = classes.ndim
    numbers, known = np.divmod(np.where(classes > 0, classes, 0), count)
    solid = (*classes.shape, *[1] * (3 - space))
    parts = connected(known.astype(np.uint16).reshape(solid), numbers.reshape(solid) if numbers.any() else None)
    index = np.asarray(parts.index).reshape(classes.shape).astype(np.int64)
    edges = parts.edges[:, :space]
    cut = ((edges[:, :, 0] == 0) | (edges[:, :, 1] == np.array(classes.shape) - 1)).any(axis=1)
    crumbs = cut & (parts.sizes < _CRUMB[space]) & (parts.numbers > 0)
    kept = np.flatnonzero((parts.numbers > 0) & ~crumbs)
    table = np.zeros(len(parts.numbers), dtype=np.int64)
    table[kept] = np.arange(1, len(kept) + 1)
    return Things(
        torch.from_numpy(np.concatenate([edges[kept, :, 0], edges[kept, :, 1] + 1], axis=1).astype(np.float32)),
        torch.from_numpy(parts.numbers[kept].astype(np.int64)),
        torch.from_numpy(table[index]),
        torch.from_numpy((classes < 0) | crumbs[index]),
    )


class Hardest(HardNegativeSampler):
    """MONAI's sampler without chance, so that a run repeats itself: of what holds something some all over the
    list, of the rest every n-th of those that score most."""

    def select_positives(self, positive: Tensor, num_pos: int, labels: Tensor) -> Tensor:
        """As MONAI has it, but for the choice."""
        return _marked(_spread(positive, num_pos), labels)

    def select_negatives(self, negative: Tensor, num_neg: int, fg_probs: Tensor) -> Tensor:
        """As MONAI has it, but for the choice."""
        pool = min(len(negative), int(num_neg * self.pool_size))
        hardest = fg_probs[negative].topk(pool).indices
        step = max(1, pool // max(1, num_neg))
        return _marked(negative[hardest[::step][:num_neg]], fg_probs)


def _spread(values: Tensor, count: int) -> Tensor:
    """At most so many values, evenly from the whole list."""
    if len(values) <= count:
        return values
    return values[torch.arange(count, device=values.device) * len(values) // count]


def _marked(chosen: Tensor, like: Tensor) -> Tensor:
    mask = torch.zeros_like(like, dtype=torch.uint8)
    mask[chosen] = 1
    return mask


def detection_loss(found: Proposals, target: Tensor) -> Tensor:
    """The sum of five means: cross-entropy of whether anchors hold a thing, and of those that do one less the
    generalised overlap (Rezatofighi et al., 2019) of what they make of its box; the same of proposed boxes, by
    class; and of the masks in boxes that hold a thing cross-entropy plus soft Dice. ``target`` (B, *patch) are
    classes, numbered or not. The true boxes stand among those proposed.
    """
    count = found.semantic.shape[1]
    things = [_on(things_in(one, count), target.device) for one in target.cpu().numpy()]
    return _of_regions(found, things) + _of_boxes(found, things)


def _on(things: Things, device: torch.device) -> Things:
    return Things(*(getattr(things, name).to(device) for name in ("boxes", "classes", "index", "unknown")))


def _of_regions(found: Proposals, things: Sequence[Things]) -> Tensor:
    anchors = found.network.anchors(found)
    levels = [one.shape[2:].numel() for one in found.levels]
    matches = [matched(one.boxes, anchors, levels) for one in things]
    labels = [_labels((m >= 0).long(), anchors, one) for m, one in zip(matches, things, strict=True)]
    objectness, deltas = found.objectness.float(), found.deltas.float()
    sampler = Hardest(_ANCHORS, _SHARE, min_neg=_ANCHORS // 3, pool_size=_POOL)
    scores = objectness.detach().nan_to_num().sigmoid()
    positive, negative = sampler(labels, scores.flatten())
    holds = torch.stack([one.bool() for one in positive])
    sampled = holds | torch.stack([one.bool() for one in negative]) | _hardest_of_each(scores, labels, levels)
    wanted = torch.cat([one.boxes[match[held]] for one, match, held in zip(things, matches, holds, strict=True)])
    own = torch.cat([anchors[held] for held in holds])
    presence = F.binary_cross_entropy_with_logits(objectness[sampled], holds[sampled].float(), reduction="sum")
    return presence / max(1, int(sampled.sum())) + _apart(
        found.network.region_coder.decode_single(deltas[holds].nan_to_num(), own), wanted
    )


def _hardest_of_each(scores: Tensor, labels: Sequence[Tensor], levels: Sequence[int]) -> Tensor:
    """Which anchors (B, A) are the hardest of those on their level that hold nothing: a coarse level, which has few,
    would else hardly learn to be silent."""
    empty = torch.stack(list(labels)) == 0
    chosen = torch.zeros_like(empty)
    first = 0
    for count in levels:
        own = slice(first, first + count)
        best = scores[:, own].masked_fill(~empty[:, own], -1).argmax(dim=1, keepdim=True)
        chosen[:, own] = chosen[:, own].scatter(1, best, value=True)
        first += count
    return chosen & empty


def matched(boxes: Tensor, anchors: Tensor, levels: Sequence[int]) -> Tensor:
    """Of each anchor (A, 2 D) the box (N, 2 D) that it is to find, from 0 on, or a number below; there are so many
    anchors on each of the ``levels``. By ATSS (Zhang et al., 2020), which leaves out boxes that several anchors fit
    equally badly, as long thin ones; so a box gets all that fit nearly as well as the best, too."""
    quality, matches = ATSSMatcher(num_candidates=4, center_in_gt=False)(boxes, anchors, levels, 1)
    matches = matches.to(anchors.device)
    for number, row in enumerate(quality):
        matches[(row >= _NEARLY * row.max()) & (matches < 0)] = number
    return matches


def _of_boxes(found: Proposals, things: Sequence[Things]) -> Tensor:
    network = found.network
    boxes = [torch.cat([own.boxes, one]) for one, own in zip(network.regions(found), things, strict=True)]
    logits, deltas = network.look(found, boxes)
    owners = [_owners(one, own) for one, own in zip(boxes, things, strict=True)]
    labels = [_labels(_class_of(owner, own), one, own) for one, owner, own in zip(boxes, owners, things, strict=True)]
    sampler = Hardest(_BOXES, _SHARE, min_neg=_BOXES // 3, pool_size=_POOL)
    positive, negative = sampler(labels, 1 - logits.detach().nan_to_num().softmax(dim=1)[:, 0])
    holds = [one.bool() for one in positive]
    sampled = torch.cat([h | n.bool() for h, n in zip(holds, negative, strict=True)])
    classes = F.cross_entropy(logits[sampled], torch.cat(labels)[sampled], reduction="sum")
    wanted = torch.cat([own.boxes[owner[h]] for h, owner, own in zip(holds, owners, things, strict=True)])
    held = torch.cat(holds)
    better = network.box_coder.decode_single(deltas[held].nan_to_num(), torch.cat(boxes)[held])
    chosen = [_spread(h.nonzero().flatten(), _MASKS) for h in holds]
    cut = [one[c] for one, c in zip(boxes, chosen, strict=True)]
    masks = _of_masks(found, cut, [one[c] for one, c in zip(owners, chosen, strict=True)], things)
    return classes / max(1, int(sampled.sum())) + _apart(better, wanted) + masks


def _of_masks(found: Proposals, boxes: list[Tensor], owners: list[Tensor], things: Sequence[Things]) -> Tensor:
    truth = torch.cat([_mask_truth(*one) for one in zip(boxes, owners, things, strict=True)])
    count = len(truth)
    if not count:  # a box of nothing, so that the head has a gradient, if of zeros, like all the rest
        whole = [0.0] * len(found.patch) + [float(n) for n in found.patch]
        boxes = [torch.tensor([whole], device=truth.device), *boxes[1:]]
        return 0 * found.network.mask(found, boxes).sum()
    classes = torch.cat([one.classes[owner] for owner, one in zip(owners, things, strict=True)])
    logits = found.network.mask(found, boxes)[torch.arange(count, device=truth.device), classes - 1].flatten(1)
    probability, truth = logits.sigmoid(), truth.flatten(1)
    overlap, both = (probability * truth).sum(1), probability.sum(1) + truth.sum(1)
    return F.binary_cross_entropy_with_logits(logits, truth) + 1 - ((2 * overlap + 1) / (both + 1)).mean()


def _mask_truth(boxes: Tensor, owners: Tensor, things: Things) -> Tensor:
    """Whether the middle of each bin (n, bins, ...) lies in a voxel of the box's thing; float32."""
    at = bin_centres(boxes, MASK_BINS).floor().long()
    size = torch.tensor(things.index.shape, device=at.device)
    at = torch.minimum(at, size - 1)
    places = []
    for axis in range(len(size)):
        shape = [len(boxes), *[1] * len(size)]
        shape[1 + axis] = MASK_BINS
        places.append(at[..., axis].reshape(shape))
    numbers = things.index[tuple(places)]
    return (numbers == (owners + 1).view(-1, *[1] * len(size))).float()


def _owners(boxes: Tensor, things: Things) -> Tensor:
    """Of each box (n,) the thing that it overlaps most, from 0 on, -1 where that is too little."""
    if not len(things.boxes):
        return torch.full((len(boxes),), -1, device=boxes.device)
    overlap: Tensor = box_iou(boxes, things.boxes)
    most, owner = overlap.max(dim=1)
    return torch.where(most >= _HOLDS[boxes.shape[1] // 2], owner, -1)


def _class_of(owners: Tensor, things: Things) -> Tensor:
    """The class of each box's thing; 0 where it has none."""
    return torch.cat([things.classes, things.classes.new_zeros(1)])[owners]


def _labels(labels: Tensor, boxes: Tensor, things: Things) -> Tensor:
    """Labels (n,) of boxes, but -1 instead of 0 where nothing is known of what lies in the middle."""
    low, high = boxes.chunk(2, dim=1)
    size = torch.tensor(things.unknown.shape, device=boxes.device)
    at = torch.minimum(((low + high) / 2).floor().long().clamp_min(0), size - 1)
    return torch.where((labels == 0) & things.unknown[tuple(at.T)], -1, labels)


def _apart(said: Tensor, wanted: Tensor) -> Tensor:
    """One less the mean generalised intersection over union of boxes, pair by pair; 0 where there are none."""
    return (1 - box_pair_giou(said, wanted)).sum() / max(1, len(wanted))
