"""A large CT out of a small one: 512x512x400 voxels of 0.8x0.8x1.5 mm, int16.

    python benchmarks/predict/big_case.py example_ct.nii.gz big.nii.gz

The small one is stretched to fill it, and gets noise of 10 HU, so that it packs and looks as a scan does.
"""

import sys
from pathlib import Path

import numpy as np

from medseg.core.grid import Grid
from medseg.core.resample import resample
from medseg.core.volume import Volume
from medseg.io.nifti import read_volume, write_volume

SHAPE, SPACING = (512, 512, 400), (0.8, 0.8, 1.5)


def main(source: Path, target: Path) -> None:
    small = read_volume(source)
    # The same voxels, called as large as they must be to fill the large grid.
    turned = resample(small, onto=small.grid.reoriented())
    stretched = np.array(SHAPE) * SPACING / np.array(turned.grid.shape)
    direction = np.diag([-1.0, -1.0, 1.0])
    grid = Grid.from_spacing(turned.grid.shape, stretched, direction=direction)
    box = np.array(stretched) - np.array(SPACING)
    large = Grid.from_spacing(SHAPE, SPACING, direction @ (-box / 2), direction)
    made = resample(Volume(turned.values, grid), onto=large).values[0]
    rng = np.random.default_rng(0)
    out = np.empty((1, *SHAPE), dtype=np.int16, order="F")
    for z in range(SHAPE[2]):
        out[0, :, :, z] = np.rint(np.clip(made[:, :, z] + rng.normal(0, 10, SHAPE[:2]), -1024, 3071))
    write_volume(target, Volume(out, large))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
