"""The way in and the way home of a 512x512x400 CT, without a network.

    python benchmarks/predict/parts.py in big.nii.gz
    python benchmarks/predict/parts.py home CLASSES

``in`` reads the CT and brings it to 1.5 mm, clipped and scaled. ``home`` brings smooth made-up logits, a fifth
of whose neighbours have different winners, from 274x274x400 to 512x512x400 voxels, making them not counted.
"""

import os
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from scipy.ndimage import zoom

from medseg.core.grid import Grid
from medseg.core.resample import crop, resample
from medseg.infer.stream import Decision, bring_home
from medseg.infer.window import Slab
from medseg.io.nifti import read_volume
from medseg.preprocess.normalise import Scaling
from medseg.preprocess.regrid import occupied

THICK = 64


def way_in(path: Path) -> None:
    started = time.perf_counter()
    volume = read_volume(path)
    read = time.perf_counter()
    box, scale = occupied(volume), Scaling(-900, 1200, 80, 130)
    resample(crop(volume, box), onto=box.with_spacing((1.5, 1.5, 1.5)), prepare=lambda _, values: scale(values))
    print(f"read {read - started:.2f} s, resampled {time.perf_counter() - read:.2f} s")


def way_home(classes: int) -> None:
    scan = Grid.from_spacing((512, 512, 400), (0.8, 0.8, 1.5))
    source = scan.with_spacing((1.5, 1.5, 1.5))
    x, y, z = source.shape
    coarse = np.random.default_rng(0).normal(size=(classes, 16, 16, 25)).astype(np.float32) * 5
    seconds = 0.0

    def slabs() -> Iterator[Slab]:
        nonlocal seconds
        for first in range(0, z, THICK):
            low, high = max(0, first - 1), min(z, first + THICK)
            at = np.linspace(0, 24, z)[low:high]
            below = np.minimum(at.astype(int), 23)
            share = (at - below).astype(np.float32)
            values = np.stack(
                [
                    zoom(one[:, :, below] * (1 - share) + one[:, :, below + 1] * share, (x / 16, y / 16, 1), order=1)
                    for one in coarse
                ]
            )
            before = time.perf_counter()
            yield Slab((slice(0, x), slice(0, y), slice(low, high)), values, None)
            seconds += time.perf_counter() - before

    bring_home(slabs(), source, scan, Decision(classes), threads=len(os.sched_getaffinity(0)))
    print(f"{classes} classes home in {seconds:.2f} s")


if __name__ == "__main__":
    way_in(Path(sys.argv[2])) if sys.argv[1] == "in" else way_home(int(sys.argv[2]))
    print(f"peak {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB")
