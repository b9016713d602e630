"""A Mask R-CNN whose graphs another computes; what lies between them is torch's, and the same for all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from medseg.models.mask_rcnn import Dense, Detector
from medseg.models.parts import seen
from medseg.plan.plan import Configuration

Float32 = NDArray[np.float32]
Run = Callable[[Float32], list[Float32]]


class GraphDetector(Detector):
    """One of a configuration's network. Each of its parts, as `medseg.models.parts` has them, is run by a function
    that may write over what it gave before."""

    def __init__(self, configuration: Configuration, dense: Run, box_head: Run, mask_head: Run) -> None:
        self._dense, self._box_head, self._mask_head = dense, box_head, mask_head
        self.lay_out([seen(configuration, stride) for stride in configuration.network.value.strides])

    def dense(self, images: Tensor) -> Dense:
        """See `Detector`."""
        *levels, fine, semantic, objectness, deltas = _run(self._dense, images)
        return levels, fine, semantic, objectness, deltas

    def box_head(self, rois: Tensor) -> tuple[Tensor, Tensor]:
        """See `Detector`."""
        classes, deltas = _run(self._box_head, rois)
        return classes, deltas

    def mask_head(self, rois: Tensor) -> Tensor:
        """See `Detector`."""
        (masks,) = _run(self._mask_head, rois)
        return masks


def _run(run: Run, values: Tensor) -> list[Tensor]:
    return [torch.from_numpy(one) for one in run(values.contiguous().numpy())]
