"""Time a random patch of a large preprocessed case, read anew from disk: in blocks, and out of a mapped .npy.

    python benchmarks/train/parts.py FOLDER

Writes 1.6 GiB to FOLDER, a case of 512 x 512 x 1000 voxels both ways. Before each cold reading the system is
told to forget the files, which those of a virtual machine's host may still remember.
"""

import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np

from medseg.io.store import CaseStore

SHAPE, PATCH, TIMES = (512, 512, 1000), 128, 12


def main() -> None:
    """Print median milliseconds, cold and warm, of each way."""
    folder = Path(sys.argv[1])
    store, plain = CaseStore(folder), folder / "plain.npy"
    rng = np.random.default_rng(0)
    if not plain.exists():
        image = np.empty((1, *SHAPE), dtype=np.float16)
        for plane in image[0]:
            plane[...] = rng.normal(size=SHAPE[1:])
        np.save(plain, image)
        store.write("case", image, np.zeros(SHAPE, dtype=np.uint8), {})
    case = store.read("case")
    ways = {
        "blocks": (case.image.__getitem__, folder / "case.image.npy"),
        "mapped": (lambda box: np.array(np.load(plain, mmap_mode="r")[box]), plain),
    }
    for name, (read, path) in ways.items():
        cold, warm = [], []
        for _ in range(TIMES):
            box = (slice(None), *(slice(a, a + PATCH) for a in (int(rng.integers(n - PATCH + 1)) for n in SHAPE)))
            forget(path)
            cold.append(timed(read, box))
            warm.append(timed(read, box))
        print(f"{name}: cold {statistics.median(cold):.1f} ms, warm {statistics.median(warm):.1f} ms")


def timed(read, box) -> float:  # type: ignore[no-untyped-def]
    """Milliseconds of a reading."""
    before = time.perf_counter()
    read(box)
    return 1e3 * (time.perf_counter() - before)


def forget(path: Path) -> None:
    """Drop a file from the page cache."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


if __name__ == "__main__":
    main()
