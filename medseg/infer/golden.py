"""The golden case: a scan made by formula, and what the shipped model finds in it, on any sound machine."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import medseg
from medseg.core.errors import MedsegError
from medseg.core.finding import Finding
from medseg.core.grid import Grid
from medseg.core.volume import Volume
from medseg.core.words import discreet

MODEL = "hippocampus"
# Engines and precisions differ by single voxels (benchmarks/predict: Dice above 0.999); a broken library by many.
LEAST_DICE = 0.99
_LABELS = Path(__file__).with_name("golden.nii.gz")
_SHAPE = (36, 50, 36)
# Ellipsoids: centre and radii in voxels, and how much brighter than the ground they are. They were fitted so that the
# shipped model finds both its structures in them, far from any border; they are no anatomy.
_BLOBS = (
    (22.6, 38, 20, 11.2, 12, 6, -36),
    (16.7, 23.3, 16.7, 7, 10, 6, 63),
    (17.2, 13.5, 14.4, 6.5, 7.2, 14.5, -74),
    (24.5, 3, 28.1, 11.4, 9.4, 9.7, -92),
    (7, 46, 24.6, 8.2, 8.8, 4, 94),
    (17.9, 27.5, 27.9, 14.4, 10.7, 4, 116),
    (17.8, 13.3, 21.3, 8.6, 7.1, 11.2, -35),
    (20.7, 25.1, 17.6, 12.9, 5.5, 6.6, -93),
    (36.5, 36.7, 7.4, 7.7, 9.9, 10.1, -115),
    (6.7, 16, 15.8, 7, 8.5, 16, -97),
)
_SECONDS = 300


@dataclass(frozen=True)
class Golden:
    """How the golden case went: the engine and its precision, seconds, and each structure's Dice with the labels that
    are stored; or, in place of these, the ``error``."""

    engine: str
    precision: str = ""
    seconds: float = 0.0
    dice: dict[str, float] | None = None
    error: str = ""


def golden_scan() -> Volume:
    """The scan, (1, 36, 50, 36) voxels of 1 mm, in whole numbers, so that it is the same on every machine."""
    x, y, z = np.meshgrid(*(np.arange(n, dtype=np.float64) for n in _SHAPE), indexing="ij")
    image = 200 + 6 * (np.sin(0.9 * x + 1.3 * y) + np.sin(1.1 * y - 0.7 * z) + np.sin(0.8 * z + 0.5 * x))
    for cx, cy, cz, rx, ry, rz, height in _BLOBS:
        distance = np.sqrt(((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 + ((z - cz) / rz) ** 2)
        image += height / (1 + np.exp(6 * (distance - 1)))
    return Volume(np.round(image).astype(np.float32)[None], Grid(_SHAPE, np.eye(4)))


def run_golden(engine: str, folder: Path, threads: int | None = None) -> Golden:
    """Write the scan into ``folder``, read and predict it, and compare. Raises whatever goes wrong."""
    from medseg.infer.predict import Predictor
    from medseg.io.nifti import read_labels, read_volume, write_volume
    from medseg.models.package import load_package
    from medseg.models.shelf import shipped

    started = time.perf_counter()
    package = load_package(shipped() / MODEL)
    path = folder / "golden.nii.gz"
    write_volume(path, golden_scan())
    predictor = Predictor(package, engine, threads=threads)
    found = predictor.predict(read_volume(path), force=True).label_map
    stored = read_labels(_LABELS, package.plan.label_set)
    dice = {label.name: _dice(found.values == label.number, stored.values == label.number) for label in stored.labels}
    return Golden(engine, predictor.engine.precision, time.perf_counter() - started, dice)


def try_golden(engine: str, folder: Path, threads: int | None = None) -> Golden:
    """Likewise in a process of its own, so that a library that crashes is a finding too."""
    # -P: the current folder, whoever's it is, is not where libraries are looked for.
    start = "import sys; sys.path.insert(0, sys.argv.pop(1)); from medseg.infer.golden import main; main()"
    root = str(Path(medseg.__file__).parents[1])
    command = [sys.executable, "-P", "-W", "ignore", "-c", start, root, engine, str(folder)]
    try:
        done = subprocess.run(  # noqa: S603
            [*command, *([str(threads)] if threads else [])],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Golden(engine, error=f"it took longer than {_SECONDS} s")
    if done.returncode == 0:
        return Golden(**json.loads(done.stdout.splitlines()[-1]))
    last = (done.stderr.strip().splitlines() or [""])[-1]
    return Golden(
        engine, error=f"its process ended by signal {-done.returncode}" if done.returncode < 0 else discreet(last)
    )


def judge_golden(golden: Golden) -> Finding:
    """Does this engine give the labels that it should?"""
    if golden.error or not golden.dice:
        return Finding(
            "golden case", "problem", f"{golden.engine} cannot predict the golden case: {golden.error.rstrip('.')}",
            _other(golden.engine),
        )  # fmt: skip
    numbers = ", ".join(f"{name} {dice:.4f}" for name, dice in golden.dice.items())
    text = f"{golden.engine} ({golden.precision}), {golden.seconds:.1f} s: Dice with the stored labels {numbers}"
    if min(golden.dice.values()) < LEAST_DICE:
        return Finding(
            "golden case", "problem", f"{text}; at least {LEAST_DICE} is expected",
            f"Do not trust what it gives on this machine. {_other(golden.engine)}",
        )  # fmt: skip
    return Finding("golden case", "ok", text)


def make_golden() -> None:
    """Store the labels anew, of torch in float32: where another model is shipped."""
    from medseg.infer.engine import open_engine
    from medseg.infer.predict import segment
    from medseg.io.nifti import write_labels
    from medseg.models.package import load_package
    from medseg.models.shelf import shipped

    package = load_package(shipped() / MODEL)
    mirror = package.plan.training.augmentation.value.mirror
    engine = open_engine(package, "torch-cpu", mirror=mirror, precision="f32")
    made = segment(engine, golden_scan(), package.plan, package.configuration_name)
    write_labels(_LABELS, made.label_map)


def _other(engine: str) -> str:
    other = "openvino" if engine == "torch-cpu" else "torch-cpu"
    return f"Install its libraries anew with the versions of constraints.txt; until then say --engine {other}"


def _dice(a: NDArray[np.bool_], b: NDArray[np.bool_]) -> float:
    return 2.0 * int((a & b).sum()) / max(1, int(a.sum()) + int(b.sum()))


def main() -> None:
    """Arguments: ENGINE FOLDER [THREADS]. Prints a `Golden` as JSON, or the error last."""
    engine, folder, *threads = sys.argv[1:]
    try:
        golden = run_golden(engine, Path(folder), int(threads[0]) if threads else None)
    except MedsegError as error:
        sys.exit(str(error))
    sys.stdout.write(json.dumps(asdict(golden)) + "\n")
