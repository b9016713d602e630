"""All metrics of one large case, beside MONAI's Dice, HD95, ASSD and NSD of the same masks.

    python benchmarks/metrics/measure.py                      512x512x400 voxels, 25 organs
    python benchmarks/metrics/measure.py --shape 256 256 200

Organs are smooth lumps of many sizes, the prediction another drawing of each, a millimetre or so off. Each program runs
in a process of its own; its seconds are those of the metrics alone, its memory all that the process held.

    ours          everything in a row of metrics.csv, of which MONAI's four metrics are a part
    monai         its four metrics of one-hot volumes, as its documentation has them, but of one byte a voxel and class:
                  in float32 two of them would take 21 GiB
    monai-boxes   the same, of each label in its own box and a margin of two voxels, cut out by hand

Then the figures are compared, label by label.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import run

SPACING = (0.8, 0.8, 1.0)
TOLERANCE = 2.0


def lumps(shape: tuple[int, int, int], organs: int) -> tuple[np.ndarray, np.ndarray]:
    """Two drawings of the same organs, as label maps."""
    rng = np.random.default_rng(0)
    maps = np.zeros((2, *shape), np.uint8)
    size = min(shape)
    for number in range(1, organs + 1):
        centre = rng.uniform(0.2, 0.8, 3) * shape
        radii = rng.uniform(0.03, 0.27 if number <= 5 else 0.17, 3) * size
        for which, (middle, reach, bumps) in enumerate(
            [(centre, radii, 0.20), (centre + rng.normal(0, 1, 3), radii * rng.uniform(0.97, 1.03, 3), 0.23)]
        ):
            box = tuple(
                slice(max(0, int(m - 1.4 * r)), min(n, int(m + 1.4 * r) + 1))
                for m, r, n in zip(middle, reach, shape, strict=True)
            )
            x, y, z = np.ogrid[box]
            far = sum(((v - m) / r) ** 2 for v, m, r in zip((x, y, z), middle, reach, strict=True))
            maps[which][box][far + bumps * np.sin(x / 9) * np.sin(y / 7) * np.cos(z / 8) < 1] = number
    return maps[0], maps[1]


def ours(reference: np.ndarray, prediction: np.ndarray, organs: int, threads: int) -> dict[str, list[float]]:
    from medseg.core.grid import Grid
    from medseg.core.labels import LabelSet
    from medseg.core.volume import LabelMap
    from medseg.evaluate.score import score

    grid = Grid.from_spacing(reference.shape, SPACING)
    labels = LabelSet.from_names(["aorta", *(f"organ {n}" for n in range(2, organs + 1))])
    truth, found = LabelMap(reference, grid, labels), LabelMap(prediction, grid, labels)
    rows = score(found, truth, case="a", tolerance_mm=TOLERANCE, threads=threads)
    return {name: [getattr(row, name) for row in rows] for name in ("dice", "hd95_mm", "assd_mm", "nsd")}


def monai(reference: np.ndarray, prediction: np.ndarray, organs: int, threads: int) -> dict[str, list[float]]:
    import torch

    torch.set_num_threads(threads)
    one, other = (
        torch.from_numpy(np.stack([m == n for n in range(1, organs + 1)])[None].view(np.uint8))
        for m in (prediction, reference)
    )
    return {name: values.ravel().tolist() for name, values in measured(one, other).items()}


def monai_boxes(reference: np.ndarray, prediction: np.ndarray, organs: int, threads: int) -> dict[str, list[float]]:
    import torch
    from scipy.ndimage import find_objects

    torch.set_num_threads(threads)
    found: dict[str, list[float]] = {}
    both = [find_objects(m, max_label=organs) for m in (reference, prediction)]
    for number in range(1, organs + 1):
        sides = zip(*(boxes[number - 1] for boxes in both), strict=True)
        box = tuple(slice(max(0, min(s.start for s in side) - 2), max(s.stop for s in side) + 2) for side in sides)
        one, other = (torch.from_numpy((m[box] == number)[None, None].view(np.uint8)) for m in (prediction, reference))
        for name, value in measured(one, other).items():
            found.setdefault(name, []).append(float(value))
    return found


def measured(one, other):
    """MONAI's four metrics (batch, classes) of one-hot volumes (batch, classes, X, Y, Z)."""
    from monai import metrics

    more = {"include_background": True, "spacing": list(SPACING)}
    tolerances = [TOLERANCE] * one.shape[1]
    return {
        "dice": metrics.compute_dice(one, other, include_background=True),
        "hd95_mm": metrics.compute_hausdorff_distance(one, other, percentile=95, **more),
        "assd_mm": metrics.compute_average_surface_distance(one, other, symmetric=True, **more),
        "nsd": metrics.compute_surface_dice(one, other, tolerances, use_subvoxels=True, **more),
    }


PROGRAMS = {"ours": ours, "monai": monai, "monai-boxes": monai_boxes}


def child(folder: Path, which: str, organs: int, threads: int) -> None:
    maps = [np.load(folder / f"{name}.npy") for name in ("reference", "prediction")]
    program = PROGRAMS[which]
    dot = np.zeros((40, 40, 40), np.uint8)
    dot[5:9, 5:9, 5:9] = 1
    program(dot, dot, 1, threads)  # whatever is imported
    start = time.perf_counter()
    found = program(*maps, organs, threads)
    (folder / f"{which}.json").write_text(json.dumps({"seconds": time.perf_counter() - start, **found}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(512, 512, 400))
    parser.add_argument("--organs", type=int, default=25)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--programs", nargs="+", choices=PROGRAMS, default=list(PROGRAMS))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(Path(given.child[0]), given.child[1], given.organs, given.threads)
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        maps = lumps(tuple(given.shape), given.organs)
        for which, one in zip(("reference", "prediction"), maps, strict=True):
            np.save(folder / f"{which}.npy", one)
        del maps
        more = ["--organs", str(given.organs), "--threads", str(given.threads)]
        results = {}
        for which in given.programs:
            seconds, peaks = [], []
            for _ in range(given.runs if which == "ours" else 1):
                try:
                    _, _, peak = run([sys.executable, __file__, "--child", name, which, *more])
                except SystemExit as failed:
                    print(f"{which}: {failed}", flush=True)
                    break
                results[which] = json.loads((folder / f"{which}.json").read_text())
                seconds.append(results[which]["seconds"])
                peaks.append(peak)
            if not seconds:
                continue
            every = ", ".join(f"{s:.1f}" for s in seconds)
            print(f"{which}: {statistics.median(seconds):.1f} s ({every}), {max(peaks) / 2**30:.2f} GiB", flush=True)
        for peer in results.keys() - {"ours"}:
            for field in ("dice", "nsd", "hd95_mm", "assd_mm"):
                apart = np.abs(np.subtract(results["ours"][field], results[peer][field]))
                print(f"{field} of {peer}: {apart.max():.2g} away at the most, {np.median(apart):.2g} in the median")


if __name__ == "__main__":
    main()
