"""What training takes, reckoned from the plan: memory, work, disk. Measuring one step corrects it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

from medseg.core.errors import InputError
from medseg.plan.families import FAMILIES
from medseg.plan.plan import Configuration, Network, Three

# Tensors of a stage's features that autograd keeps: of each of two convolutions what it gives and what
# the norm and its activation make of it; on the way up also what was joined, of twice the features.
_DOWN, _UP = 4, 6
# Tensors of the finest stage's features that backward holds for a while on top of what is kept: on a
# processor many more, since oneDNN turns what goes in and comes out into layouts of its own.
_PASSING = {"cpu": 13, "gpu": 4}
# float32 tensors of the classes' size that the loss keeps: log-softmax, its exponential, the truth and a product.
_LOSS = 4
# Tensors of the weights' size, float32: weights, gradients, two moments of AdamW, the average.
_WEIGHTS = 5
# Multiplications that reading and writing one kept value is worth: norms and activations compute little.
_PER_VALUE = 200
# Of a step the forward pass is a third.
_FORWARD = 1 / 3
# Which a run adds to a step on a processor, where patches are cut and varied beside it.
FEEDING = {"cpu": 1.1, "gpu": 1.02}
# What oneDNN and the allocator hold whatever the network.
_BUFFERS = {"cpu": 15 * 2**20, "gpu": 0}
# Python, torch and what they hold by the way; the driver's own part of a GPU's memory, and what torch's
# allocator leaves unused.
BASE_RAM = {"cpu": 700 * 2**20, "gpu": 2500 * 2**20}
GPU_OVERHEAD = 900 * 2**20
# Threads that make batches: on a CPU the network needs the cores itself; a GPU waits for nothing that
# four threads make.
FEEDERS = {"cpu": 1, "gpu": 4}
# A batch being made holds so many of its size: what is cut out, where it is moved to, the result.
_MADE_OF = 2
# Neighbouring tiles of a prediction share this much of their length.
OVERLAP = 0.5


Kind = Literal["cpu", "gpu"]


@dataclass(frozen=True)
class Step:
    """One training step as it was measured: seconds, bytes at the most, and where."""

    seconds: float
    memory_bytes: int
    measured_on: str
    threads: int | None


class DoesNotFitError(InputError):
    """A step takes more memory than there is."""

    def __reduce__(self) -> tuple[object, ...]:
        return (DoesNotFitError, (self.fault, self.remedy))


# Measures a step of a configuration with so many channels and classes (background included). Raises
# DoesNotFitError where memory runs out.
Meter = Callable[[Configuration, int, int], Step]


@dataclass(frozen=True)
class Estimate:
    """What one step takes, reckoned. ``work`` are multiplications and what is worth as much."""

    memory_bytes: int
    work: float
    parameters: int


def estimate(configuration: Configuration, channels: int, classes: int, *, kind: Kind, half: bool) -> Estimate:
    """Memory and work of a training step on a ``cpu`` or ``gpu``: those of medseg's own U-Net of the same stages,
    by what the family was found to take of them; ``half`` where features are bfloat16."""
    network, batch = configuration.network.value, configuration.batch.value
    family = FAMILIES[network.family]
    size = 2 if half else 4
    voxels = _stage_voxels(network, configuration.patch.value)
    features, last = network.features, len(network.features) - 1
    kept = float(channels * voxels[0] * 4)
    for stage, (f, v) in enumerate(zip(features, voxels, strict=True)):
        kept += (_DOWN + (_UP if stage < last else 0)) * f * v * size
    for v in voxels[: max(1, min(3, last))]:
        # The truth as 64-bit numbers and its weights go with it.
        kept += classes * v * (_LOSS * 4 + (size + 4 if half else 0)) + 16 * v
    passing = _PASSING[kind] * features[0] * voxels[0] * size
    parameters, multiplications = _convolutions(network, voxels, channels, classes)
    weights = parameters * (4 * _WEIGHTS + (2 if half else 0))
    return Estimate(
        memory_bytes=int(family.memory * batch * (kept + passing) + weights) + _BUFFERS[kind],
        work=family.work * batch * (3 * multiplications + _PER_VALUE * kept / size),
        parameters=parameters,
    )


def _stage_voxels(network: Network, patch: Three) -> list[int]:
    """Voxels of each stage's features."""
    size, voxels = np.array(patch), []
    for stride in network.strides:
        size = size // np.array(stride)
        voxels.append(int(np.prod(size)))
    return voxels


def _convolutions(network: Network, voxels: list[int], channels: int, classes: int) -> tuple[int, float]:
    """Weights of all convolutions, and the multiplications of one forward pass of one patch."""
    parameters, work = 0, 0.0

    def convolution(kernel: int, ins: int, outs: int, at: int) -> None:
        nonlocal parameters, work
        parameters += kernel * ins * outs + 3 * outs
        work += float(kernel) * ins * outs * at

    ins = channels
    for f, kernel, v in zip(network.features, network.kernels, voxels, strict=True):
        convolution(math.prod(kernel), ins, f, v)
        convolution(math.prod(kernel), f, f, v)
        ins = f
    for stage in reversed(range(len(voxels) - 1)):
        f, kernel, stride = network.features[stage], network.kernels[stage], network.strides[stage + 1]
        convolution(math.prod(stride), network.features[stage + 1], f, voxels[stage + 1])
        convolution(math.prod(kernel), 2 * f, f, voxels[stage])
        convolution(math.prod(kernel), f, f, voxels[stage])
        convolution(1, f, classes, voxels[stage])
    return parameters, work


@dataclass(frozen=True)
class Cases:
    """The training cases: how many, a typical one's voxels on its own grid, its shape on the network's,
    and all voxels there."""

    count: int
    own_voxels: float
    shape: tuple[float, float, float]
    voxels_in_all: float

    @property
    def voxels(self) -> float:
        return math.prod(self.shape)

    @property
    def held_out(self) -> int:
        """How many a fold holds out, where five are dealt."""
        return max(1, self.count // 5)


def disk_bytes(cases: Cases, channels: int, label_voxels: float) -> int:
    """The preprocessed store: float16 images, labels of a byte, and places of the structures' voxels,
    of which ``label_voxels`` are kept in all."""
    return int(cases.voxels_in_all * (2 * channels + 1) + 8 * label_voxels)


def feed_bytes(configuration: Configuration, inputs: int, kind: Kind) -> int:
    """The batches that threads make ahead of the step that wants them: one ready, and one in the making
    for each thread."""
    voxels = configuration.batch.value * math.prod(configuration.patch.value)
    return int((1 + _MADE_OF * FEEDERS[kind]) * voxels * (4 * inputs + 8))


def ram_bytes(
    cases: Cases, channels: int, classes: int, memory_bytes: int, *, kind: Kind, watched: int, further: int = 0
) -> int:
    """The whole training process: libraries, ``watched`` scans as they are stored (one at the least, which
    calibration reads), one of them being predicted, and, where there is no GPU that holds them, network and
    batches, of ``memory_bytes``. A second stage has ``further`` channels, which are stored as one label map."""
    scans = max(1, watched) * cases.own_voxels * (2 * channels + 1 + bool(further))
    predicted = cases.voxels * 4 * (channels + further + classes / 2)
    return int(BASE_RAM[kind] + scans + predicted + (memory_bytes if kind == "cpu" else 0))


def tile_count(size: int, patch: int, overlap: float = OVERLAP, *, loose: bool = False) -> int:
    """How many tiles cover an axis with at least ``overlap``: see `medseg.infer.window.tile_starts`."""
    if size <= patch:
        return 1
    step = max(1.0, patch * (1 - overlap))
    return math.ceil((size - patch) / (step if loose else int(step))) + 1


def prediction_seconds(configuration: Configuration, cases: Cases, seconds_per_step: float) -> float:
    """One prediction of a typical case, without mirrored copies, by its tiles."""
    sizes = zip(cases.shape, configuration.patch.value, strict=True)
    tiles = math.prod(tile_count(round(n), p) for n, p in sizes)
    return tiles * tile_seconds(configuration, seconds_per_step)


def tile_seconds(configuration: Configuration, seconds_per_step: float) -> float:
    """The forward pass of one tile, by what a step takes."""
    return seconds_per_step * _FORWARD / configuration.batch.value


def require_room(
    configuration: Configuration,
    channels: int,
    classes: int,
    available: int,
    *,
    kind: Kind,
    half: bool,
    measured: int | None = None,
) -> None:
    """InputError where training would take more than the ``available`` bytes of a device, with the
    largest batch and patch of this network that would not. ``measured`` corrects what is reckoned."""
    reckoned = estimate(configuration, channels, classes, kind=kind, half=half).memory_bytes
    scale = measured / reckoned if measured else 1.0
    if scale * reckoned <= available:
        return

    def fits(other: Configuration) -> bool:
        return scale * estimate(other, channels, classes, kind=kind, half=half).memory_bytes <= available

    raise InputError(
        f"patch {_by(configuration.patch.value)} with batch {configuration.batch.value} takes "
        f"{gib(scale * reckoned)} to train, there are {gib(available)}",
        largest(configuration, fits) or "Plan with fewer features, or for a machine with more memory",
    )


def largest(configuration: Configuration, fits: Callable[[Configuration], bool]) -> str | None:
    """Words on the largest batch, or else the largest patch, of this network that fits; None where none does."""
    batch = configuration.batch
    for fewer in range(batch.value - 1, 0, -1):
        if fits(_with(configuration, configuration.patch.value, fewer)):
            return f"A batch of {fewer} would fit" + _or_patch(configuration, fits)
    patch = _largest_patch(configuration, 1, fits)
    return f"A patch of {_by(patch)} with batch 1 would fit" if patch else None


def _or_patch(configuration: Configuration, fits: Callable[[Configuration], bool]) -> str:
    patch = _largest_patch(configuration, configuration.batch.value, fits)
    return f", or a patch of {_by(patch)}" if patch else ""


def _largest_patch(configuration: Configuration, batch: int, fits: Callable[[Configuration], bool]) -> Three | None:
    """The patch of most voxels among those that the strides divide and that are as much smaller along each axis."""
    patch, divisor = configuration.patch.value, configuration.network.value.divisor
    for share in itertools.takewhile(lambda s: s > 0, (1 - n / 32 for n in range(33))):
        x, y, z = (max(d, int(p * share) // d * d) for p, d in zip(patch, divisor, strict=True))
        if (x, y, z) != divisor and fits(_with(configuration, (x, y, z), batch)):
            return x, y, z
    return None


def _with(configuration: Configuration, patch: Three, batch: int) -> Configuration:
    return configuration.model_copy(
        update={
            "patch": configuration.patch.model_copy(update={"value": patch}),
            "batch": configuration.batch.model_copy(update={"value": batch}),
        }
    )


def gib(size: float) -> str:
    """Bytes in words."""
    if size < 2**30 / 20:
        return f"{size / 2**20:.0f} MiB"
    return f"{size / 2**30:.2f} GiB" if size < 10 * 2**30 else f"{size / 2**30:.0f} GiB"


def _by(values: Three) -> str:
    return "x".join(map(str, values))
