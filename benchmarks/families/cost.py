"""What a training step of each family takes, in what is reckoned of a U-Net of the same stages: the numbers
``work`` and ``memory`` of `medseg.plan.families`.

    python benchmarks/families/cost.py [--threads 2] [--family NAME ...]

Each family's network is the one that the planner makes for three kinds of scans, in 3D and in 2D. Steps of the U-Net
are measured beside each of them, since machines are not equally fast from minute to minute. Prints a table: of each
family the median over the six of its step's time by work reckoned, and of its memory, both divided by the U-Net's.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np

from medseg.plan.cost import estimate
from medseg.plan.families import FAMILIES, TRAINED
from medseg.plan.plan import Configuration
from medseg.plan.planner import _slices, _volumes
from medseg.plan.scale import SIZES
from medseg.train.measure import measure_step

# Small and nearly cubic, anisotropic, large.
SCANS = (((35, 50, 36), (1.0, 1.0, 1.0)), ((320, 320, 20), (0.6, 0.6, 3.6)), ((200, 200, 120), (1.5, 1.5, 2.0)))
CHANNELS, CLASSES = 1, 3


def configurations(family: str) -> Iterator[Configuration]:
    for shape, spacing in SCANS:
        extent = np.array(shape) * spacing
        measured = SimpleNamespace(
            spacings=np.array([spacing]),
            typical_shape=lambda s, extent=extent: extent / np.array(s),
        )
        for make in (_volumes, _slices):
            yield make(measured, SIZES[2], family)


def taken(configuration: Configuration, threads: int) -> tuple[float, float]:
    """Seconds by work reckoned, and memory by memory reckoned, whatever the family's own numbers are."""
    step = measure_step(configuration, CHANNELS, CLASSES, kind="cpu", threads=threads)
    family = FAMILIES[configuration.network.value.family]
    reckoned = estimate(configuration, CHANNELS, CLASSES, kind="cpu", half=False)
    return step.seconds / (reckoned.work / family.work), step.memory_bytes / (reckoned.memory_bytes / family.memory)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--family", nargs="*", default=[name for name in TRAINED if name != "unet"])
    given = parser.parse_args()
    unets = list(configurations("unet"))
    print("| family | work | memory | each, 3D and 2D in turn: work |\n| --- | --- | --- | --- |", flush=True)
    for name in given.family:
        ratios = []
        for own, unet in zip(configurations(name), unets, strict=True):
            beside, mine = taken(unet, given.threads), taken(own, given.threads)
            ratios.append((mine[0] / beside[0], mine[1] / beside[1]))
        work, memory = (statistics.median(column) for column in zip(*ratios, strict=True))
        each = " ".join(f"{ratio:.1f}" for ratio, _ in ratios)
        print(f"| {name} | {work:.2f} | {memory:.2f} | {each} |", flush=True)


if __name__ == "__main__":
    main()
