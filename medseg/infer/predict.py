"""One scan in, one label map out."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from medseg.core.errors import InputError
from medseg.core.volume import LabelMap, Volume
from medseg.infer.stream import bring_home
from medseg.infer.window import sliding_window
from medseg.models.build import build
from medseg.models.package import ModelPackage
from medseg.plan.plan import Plan
from medseg.preprocess.regrid import preprocess

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True)
class Organ:
    """What was found of one structure. ``confidence`` is the mean probability of its voxels, None
    where it has none; ``cut`` says that it reaches the border of the scan."""

    name: str
    number: int
    voxels: int
    volume_ml: float
    confidence: float | None
    cut: bool


@dataclass(frozen=True)
class Prediction:
    """Labels on the scan's own grid, organ by organ, which model made them, and what to beware of."""

    label_map: LabelMap
    organs: tuple[Organ, ...]
    model: str
    model_digest: str
    seconds: float
    warnings: tuple[str, ...] = ()


class Predictor:
    """A model loaded once, for many scans. ``device`` is "cpu", "cuda" or "auto".

    Raises InputError where the package's weights are not of the network that its plan describes.
    """

    def __init__(self, package: ModelPackage, device: str = "auto") -> None:
        self.package = package
        self.device = pick_device(device)
        self._digest = package.digest()
        classes = len(package.plan.labels) + 1
        self.networks: list[nn.Module] = []
        for weights in package.members:
            network = build(package.configuration, len(package.plan.channels), classes)
            try:
                network.load_state_dict(weights)
            except RuntimeError:
                raise InputError(
                    f"the weights of {package.name} do not fit its plan", "Get the package again, or train it anew"
                ) from None
            self.networks.append(network.to(self.device).eval())

    def predict(self, volume: Volume) -> Prediction:
        """Segment a scan. Raises InputError where its channels are not the model's."""
        started = time.perf_counter()
        label_map, probability = segment(
            self.networks, volume, self.package.plan, self.package.configuration_name, self.device
        )
        organs = describe(label_map, probability)
        warnings = tuple(f"{o.name} is cut by the border of the scan" for o in organs if o.cut)
        if not any(o.voxels for o in organs):
            warnings = ("nothing was found",)
        return Prediction(label_map, organs, self.package.name, self._digest, time.perf_counter() - started, warnings)


def predict(volume: Volume, package: ModelPackage, *, device: str = "auto") -> Prediction:
    """Segment one scan; for several, load a `Predictor` once."""
    return Predictor(package, device).predict(volume)


def segment(
    networks: list[nn.Module], volume: Volume, plan: Plan, configuration_name: str, device: Any
) -> tuple[LabelMap, NDArray[np.float32]]:
    """Labels, and the probability of each voxel's label, on the scan's own grid.

    Training validates by this very function.
    """
    configuration = plan.configuration(configuration_name)
    prepared = preprocess(volume, plan, configuration)
    logits = sliding_window(networks, prepared.values, configuration, len(plan.labels) + 1, device)
    classes, probability = bring_home(logits, prepared.grid, volume.grid)
    numbers = np.array([0, *plan.label_set.numbers])
    values = numbers.astype(np.uint8 if numbers.max() < 256 else np.uint16)[classes]
    return LabelMap(values, volume.grid, plan.label_set), probability


def describe(label_map: LabelMap, probability: NDArray[np.float32]) -> tuple[Organ, ...]:
    """Volume, mean probability and completeness of every structure."""
    values = label_map.values
    counts = np.bincount(values.ravel(), minlength=max(label_map.labels.numbers) + 1)
    sums = np.bincount(values.ravel(), weights=probability.ravel(), minlength=len(counts))
    border: set[int] = set()
    for axis in range(3):
        for end in (0, -1):
            border |= set(np.unique(np.take(values, end, axis=axis)).tolist())
    return tuple(
        Organ(
            name=label.name,
            number=label.number,
            voxels=int(counts[label.number]),
            volume_ml=float(counts[label.number] * label_map.grid.voxel_volume / 1000),
            confidence=float(sums[label.number] / counts[label.number]) if counts[label.number] else None,
            cut=label.number in border,
        )
        for label in label_map.labels
    )


def pick_device(name: str) -> Any:
    """A torch device: the one named, or for "auto" the GPU where there is one.

    Raises InputError where a GPU is asked for and torch sees none.
    """
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("torch sees no GPU", "Use --device cpu, or install a torch built for this GPU's driver")
    if name not in ("cpu", "cuda"):
        raise InputError(f"no device is called {name!r}", "Say auto, cpu or cuda")
    return torch.device(name)
