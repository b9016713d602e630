"""Dice against the number of tiles, on the held-out cases of trained runs.

    python benchmarks/predict/overlap.py [--wide NOISE] RUN [RUN ...]

For each run's fold 0 in 3D, each overlap, and each probability from which scouting suspects a structure: tiles
run (scouting's too), processor seconds, mean Dice over cases and structures, and the largest loss of a
structure's mean Dice against every tile of half overlap. With --wide the scans see twice as far in every
direction: phantoms are made anew so, others get the mean of their border around them and NOISE times its
deviation; 4 cases at most.
"""

import os
import re
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from medseg.core.volume import LabelMap, Volume
from medseg.dataset.phantom import TASKS
from medseg.dataset.task import load_case, load_task
from medseg.evaluate.overlap import dice
from medseg.infer import scout
from medseg.infer.predict import Predictor
from medseg.io.files import read_json
from medseg.models.package import ModelPackage, load_package


@dataclass(frozen=True)
class Way:
    overlap: float
    suspicion: float | None = None

    def __str__(self) -> str:
        return f"{self.overlap}" + (f", scouted at {self.suspicion}" if self.suspicion else "")


ALL = [Way(0.5), *(Way(0.5, least) for least in (0.1, 0.01, 0.001)), *map(Way, (0.375, 0.25, 0.125, 0.0))]
WIDE = [Way(0.5), *(Way(0.5, least) for least in (0.1, 0.01, 0.001)), Way(0.25), Way(0.25, 0.01), Way(0.0)]


def widened(
    volume: Volume, labels: LabelMap, noise: float, scene: tuple[str, int, int] | None
) -> tuple[Volume, LabelMap]:
    """A scan that sees twice as far: half its length more at either end of each axis. Of a phantom,
    ``scene`` names task, case and seed."""
    around = [n // 2 for n in volume.grid.shape]
    x, y, z = (n + 2 * a for n, a in zip(volume.grid.shape, around, strict=True))
    grid = volume.grid.window([-a for a in around], (x, y, z))
    if scene:
        drawn, rng = TASKS[scene[0]].scene(*scene[1:])
        drawn = replace(drawn, grid=grid)
        return Volume(drawn.image(rng), grid), LabelMap(drawn.labels(), grid, labels.labels)
    inner = (slice(1, -1),) * 3
    border = np.ones(volume.grid.shape, dtype=bool)
    border[inner] = False
    rng, old = np.random.default_rng(0), tuple(slice(a, -a) for a in around)
    edges = [channel[border] for channel in volume.values]
    values = np.stack([e.mean() + noise * rng.normal(0, e.std(), grid.shape) for e in edges]).astype(np.float32)
    values[(slice(None), *old)] = volume.values
    truth = np.zeros(grid.shape, dtype=labels.values.dtype)
    truth[old] = labels.values
    return Volume(values, grid), LabelMap(truth, grid, labels.labels)


def cases_of(run: Path, package: ModelPackage, wide: float | None) -> list[tuple[Volume, LabelMap]]:
    folder = Path(read_json(run / "run.json")["task"])
    task = load_task(folder)
    names = package.held_out[:4] if wide else package.held_out
    cases = [load_case(task, task.case(name)) for name in names]
    if not wide:
        return cases
    seed = re.fullmatch(r"medseg phantom, seed (\d+)", read_json(folder / "dataset.json").get("reference", ""))
    scenes = [(name.rsplit("_", 1)[0], int(name.rsplit("_", 1)[1]), int(seed[1])) if seed else None for name in names]
    return [widened(*case, wide, scene) for case, scene in zip(cases, scenes, strict=True)]


class Counting:
    """An engine that counts its tiles."""

    def __init__(self, engine: Any) -> None:
        self._engine, self.tiles = engine, 0

    def run(self, tiles: np.ndarray) -> Any:
        self.tiles += len(tiles)
        return self._engine.run(tiles)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def main() -> None:
    runs = sys.argv[1:]
    wide = float(runs.pop(1)) if runs[0] == "--wide" else None
    runs = runs[1:] if wide else runs
    print("| task | cases | overlap | tiles | seconds | Dice | largest loss of a structure |")
    print("| --- | ---: | --- | ---: | ---: | ---: | ---: |")
    for run in map(Path, runs):
        package = load_package(run / "3d" / "fold0" / "model")
        cases = cases_of(run, package, wide)
        full: np.ndarray | None = None
        for way in WIDE if wide else ALL:
            predictor = Predictor(package, overlap=way.overlap, threads=len(os.sched_getaffinity(0)))
            predictor.engine = counting = Counting(predictor.engine)
            predictor.scouted, scout.SUSPICION = way.suspicion is not None, way.suspicion or scout.SUSPICION
            started = time.process_time()
            scores = []
            for volume, truth in cases:
                found = predictor.predict(volume, force=True).label_map.values
                numbers = package.plan.label_set.numbers
                scores.append(
                    [dice(found == n, truth.values == n) if (truth.values == n).any() else np.nan for n in numbers]
                )
            seconds = time.process_time() - started
            by_label = np.nanmean(np.array(scores), axis=0)
            full = by_label if full is None else full
            print(
                f"| {package.plan.task} | {len(cases)} | {way} | {counting.tiles} | {seconds:.1f} "
                f"| {by_label.mean():.4f} | {(full - by_label).max():+.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
