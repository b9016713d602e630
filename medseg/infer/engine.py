"""What runs the networks: one small interface, whatever computes behind it."""

from __future__ import annotations

from itertools import chain, combinations
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from medseg.plan.plan import Configuration

if TYPE_CHECKING:
    import torch
    from torch import nn

Float32 = NDArray[np.float32]
# Arrays live where the engine computes: numpy's, or torch's on a GPU. Both are indexed, added and
# multiplied alike, and the code that adds tiles up does no more than that.
Array = Any


class Engine(Protocol):
    """A model that is ready to run on tiles of its configuration's patch."""

    name: str
    outputs: int

    def run(self, tiles: Float32) -> Array:
        """Logits (B, outputs, X, Y, Z), float32, of tiles (B, channels, X, Y, Z): the mean over the
        model's members and, for each, over its mirrored copies. A 2D model takes and gives tiles one
        voxel thick along its slice axis."""

    def zeros(self, shape: tuple[int, ...]) -> Array:
        """Float32 zeros where `run` leaves its results."""

    def array(self, values: Float32) -> Array:
        """Values put where `run` leaves its results."""

    def numpy(self, values: Array) -> Float32:
        """Values brought back."""


class TorchEngine:
    """Networks in torch, on a CPU or a GPU. ``mirror`` lists the axes (0 x, 1 y, 2 z) along which
    mirrored copies are averaged, in every combination."""

    def __init__(
        self,
        networks: list[nn.Module],
        configuration: Configuration,
        outputs: int,
        device: torch.device,
        mirror: tuple[int, ...] = (),
    ) -> None:
        self.name = f"torch-{device.type}"
        self.outputs = outputs
        self._networks = networks
        self._device = device
        self._flat = configuration.slice_axis
        self._flips = flips(mirror)

    def run(self, tiles: Float32) -> torch.Tensor:
        """See `Engine`."""
        import torch

        images = torch.from_numpy(np.ascontiguousarray(tiles)).to(self._device)
        total: Any = None
        with torch.inference_mode(), torch.autocast(self._device.type, torch.bfloat16):
            for flip in self._flips:
                turned = images.flip([2 + a for a in flip]) if flip else images
                for network in self._networks:
                    out = self._forward(network, turned)
                    out = out.flip([2 + a for a in flip]) if flip else out
                    total = out if total is None else total.add_(out)
            return total / (len(self._flips) * len(self._networks))

    def _forward(self, network: nn.Module, images: torch.Tensor) -> torch.Tensor:
        if self._flat is None:
            return network(images).float()
        return network(images.squeeze(2 + self._flat)).float().unsqueeze(2 + self._flat)

    def zeros(self, shape: tuple[int, ...]) -> torch.Tensor:
        """See `Engine`."""
        import torch

        return torch.zeros(shape, device=self._device)

    def array(self, values: Float32) -> torch.Tensor:
        """See `Engine`."""
        import torch

        return torch.from_numpy(values).to(self._device)

    def numpy(self, values: torch.Tensor) -> Float32:
        """See `Engine`."""
        out: Float32 = values.cpu().numpy()
        return out


def flips(mirror: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """Every set of the axes, the empty one first: (0, 1) gives (), (0,), (1,), (0, 1)."""
    return tuple(chain.from_iterable(combinations(mirror, n) for n in range(len(mirror) + 1)))
