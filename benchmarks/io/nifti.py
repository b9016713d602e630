"""Read a CT and write its labels as .nii.gz with medseg, nibabel and SimpleITK; print a Markdown table.

    taskset -c 0 python benchmarks/io/nifti.py --folder FOLDER --repeat 5

The CT is made up: a smooth body with noise of 14 HU in it and air around it, 512x512x400 int16, which
packs about as well as a real one. Labels are ellipsoids, some of them hollow. Each measurement is a
process of its own; its time leaves imports out, its memory is the peak beyond what it had after
them, in units of the array.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

SHAPE = (512, 512, 400)


def make(folder: Path) -> None:
    """Write ct.nii.gz and the labels as arrays, once."""
    from medseg.core.grid import Grid
    from medseg.core.labels import LabelSet
    from medseg.core.volume import LabelMap, Volume
    from medseg.io.nifti import write_labels, write_volume

    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "labels.nii.gz").exists():
        return
    rng = np.random.default_rng(0)
    grid = Grid.from_spacing(SHAPE, (0.8, 0.8, 1.0), (-200, -200, 0))
    values = np.empty((SHAPE[2], SHAPE[1], SHAPE[0]), dtype=np.int16).T
    labels = np.zeros((SHAPE[2], SHAPE[1], SHAPE[0]), dtype=np.uint8).T
    x, y = np.meshgrid(np.linspace(-1, 1, SHAPE[0]), np.linspace(-1, 1, SHAPE[1]), indexing="ij")
    organs = rng.uniform((-0.5, -0.4, -0.8, 0.05), (0.5, 0.4, 0.8, 0.22), (20, 4))
    body = (x / 0.85) ** 2 + (y / 0.65) ** 2 < 1
    for k, z in enumerate(np.linspace(-1, 1, SHAPE[2])):
        tissue = 40 + 60 * np.sin(5 * x + 3 * z) * np.cos(4 * y - 2 * z) + rng.normal(0, 14, body.shape)
        values[:, :, k] = np.where(body, tissue, -1024 + rng.integers(0, 12, body.shape))
        for number, (a, b, c, r) in enumerate(organs, start=1):
            squared = (x - a) ** 2 + (y - b) ** 2 + (z - c) ** 2
            labels[:, :, k][(squared < r * r) & (squared > 0.3 * r * r * (number % 2))] = number
    write_volume(folder / "ct.nii.gz", Volume(values[None], grid))
    names = LabelSet.from_names([f"organ {n}" for n in range(1, 21)])
    write_labels(folder / "labels.nii.gz", LabelMap(labels, grid, names))


def peak_kilobytes() -> int:
    """Largest resident size so far."""
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1])


def measure(what: str, folder: Path) -> None:
    """In the child: do it once; print seconds, peak bytes beyond the start, bytes of the array and of the file."""
    program, verb = what.split()
    ct, given, out = folder / "ct.nii.gz", folder / "labels.nii.gz", folder / f"out-{program}.nii.gz"
    if program == "medseg":
        from medseg.core.labels import LabelSet
        from medseg.core.volume import LabelMap
        from medseg.io import nifti

        names = LabelSet.from_names([f"organ {n}" for n in range(1, 21)])
        labels = nifti.read_labels(given, names) if verb != "read" else None
        if verb == "write-c":  # as `medseg predict` has them
            labels = LabelMap(np.ascontiguousarray(labels.values), labels.grid, names)
        do = (lambda: nifti.read_volume(ct).values) if verb == "read" else (lambda: nifti.write_labels(out, labels))
    elif program == "nibabel":
        import nibabel as nib

        image = nib.load(given)
        again = nib.Nifti1Image(np.asanyarray(image.dataobj), image.affine) if verb != "read" else None
        do = (lambda: np.asanyarray(nib.load(ct).dataobj)) if verb == "read" else (lambda: nib.save(again, out))
    else:
        import SimpleITK as sitk  # noqa: N813

        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
        image = sitk.ReadImage(str(given)) if verb != "read" else None
        do = (
            (lambda: sitk.GetArrayViewFromImage(sitk.ReadImage(str(ct))))
            if verb == "read"
            else (lambda: sitk.WriteImage(image, str(out), useCompression=True))
        )
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = peak_kilobytes()
    started = time.perf_counter()
    result = do()
    seconds = time.perf_counter() - started
    peak = (peak_kilobytes() - before) * 1024
    size = result.nbytes if verb == "read" else SHAPE[0] * SHAPE[1] * SHAPE[2]
    print(json.dumps([seconds, peak, size, (ct if verb == "read" else out).stat().st_size]))


def main() -> None:
    """Make what is missing, measure each some times in turn, print a line each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--measure")
    options = parser.parse_args()
    if options.measure:
        measure(options.measure, options.folder)
        return
    make(options.folder)
    packed = (options.folder / "ct.nii.gz").stat().st_size / (2 * SHAPE[0] * SHAPE[1] * SHAPE[2])
    print(f"The CT packs to {packed:.0%}.\n")
    print("| what | median s | least s | most s | peak memory, of the array | file, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    whats = ["medseg read", "nibabel read", "SimpleITK read", "medseg write", "medseg write-c", "nibabel write"]
    rows: dict[str, list[list[float]]] = {what: [] for what in (*whats, "SimpleITK write")}
    for _ in range(options.repeat):
        for what, runs in rows.items():
            command = [sys.executable, __file__, "--folder", str(options.folder), "--measure", what]
            runs.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    for what, runs in rows.items():
        seconds = [run[0] for run in runs]
        peak = max(run[1] / run[2] for run in runs)
        print(
            f"| {what} | {statistics.median(seconds):.2f} | {min(seconds):.2f} | {max(seconds):.2f} "
            f"| {peak:.2f} | {runs[0][3] / 1e6:.1f} |"
        )


if __name__ == "__main__":
    main()
