"""Dice against the overlap of tiles, on the held-out cases of trained runs.

    python benchmarks/predict/overlap.py RUN [RUN ...]

For each run's fold 0 in 3D and each overlap: tiles run, seconds, mean Dice over cases and structures, and
the largest loss of a structure's mean Dice against half overlap.
"""

import os
import sys
import time
from pathlib import Path

import numpy as np

from medseg.dataset.task import load_case, load_task
from medseg.evaluate.overlap import dice
from medseg.infer.predict import Predictor
from medseg.io.files import read_json
from medseg.models.package import load_package

OVERLAPS = (0.5, 0.375, 0.25, 0.125, 0.0)


def main() -> None:
    print("| task | cases | overlap | tiles | seconds | Dice | largest loss of a structure |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    for run in map(Path, sys.argv[1:]):
        package = load_package(run / "3d" / "fold0" / "model")
        task = load_task(Path(read_json(run / "run.json")["task"]))
        cases = [load_case(task, task.case(case)) for case in package.held_out]
        half: np.ndarray | None = None
        for overlap in OVERLAPS:
            predictor = Predictor(package, quality=False, overlap=overlap, threads=len(os.sched_getaffinity(0)))
            tiles = 0

            def count(rows: range, total: int) -> range:
                nonlocal tiles
                tiles += total
                return rows

            started = time.perf_counter()
            scores = []
            for volume, truth in cases:
                found = predictor.predict(volume, progress=count).label_map.values
                numbers = package.plan.label_set.numbers
                scores.append(
                    [dice(found == n, truth.values == n) if (truth.values == n).any() else np.nan for n in numbers]
                )
            seconds = time.perf_counter() - started
            by_label = np.nanmean(np.array(scores), axis=0)
            half = by_label if half is None else half
            print(
                f"| {package.plan.task} | {len(cases)} | {overlap} | {tiles} | {seconds:.1f} | {by_label.mean():.4f} "
                f"| {(half - by_label).max():+.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
