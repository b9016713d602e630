"""Dice after so many minutes of training on this machine: `medseg train` with budgets, on one fold or all.

    python benchmarks/train/minutes.py TASK WORK --minutes 1 2 5 15

Each budget is a run of its own in WORK, from the plan on: `medseg plan --budget 3d=1m`, `preprocess`,
`train`, `predict --held-out`, `evaluate`. The minutes are those of the whole `medseg train`, with its
validation and calibration. Prints a line of JSON for each; what is done already is not done again.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path


def medseg(*arguments: object) -> float:
    """Run a command; the seconds it took. Its errors are shown."""
    before = time.perf_counter()
    command = [sys.executable, "-m", "medseg", *map(str, arguments)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - before


def measured(task: Path, run: Path, minutes: float, fold: int) -> dict[str, object]:
    """Train a fold within a budget, and score its held-out cases."""
    if not (run / "3d" / "preprocessed").exists():
        medseg("plan", task, "-o", run, "--budget", f"3d={minutes}m", "--budget", "2d=1m")
        medseg("preprocess", run, "-c", "3d")
    at = run / "3d" / f"fold{fold}"
    seconds = medseg("train", run, "-c", "3d", "--fold", fold)
    medseg("predict", task, "--held-out", "-m", at / "model", "-o", at / "predictions")
    medseg("evaluate", at / "predictions", task, "-o", at)
    plan = json.loads((run / "plan.json").read_text())["configurations"]["3d"]
    scores = json.loads((at / "metrics.json").read_text())["summary"]
    dice = {score["name"]: score["dice_mean"] for score in scores}
    return {
        "minutes": minutes,
        "fold": fold,
        "seconds": round(seconds, 1),
        "steps": plan["steps"]["value"],
        "patch": plan["patch"]["value"],
        "features": plan["network"]["value"]["features"][0],
        "dice": dice,
        "mean": statistics.mean(dice.values()),
    }


def main() -> None:
    """Each budget, each fold."""
    parser = argparse.ArgumentParser()
    parser.add_argument("task", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--minutes", type=float, nargs="+", default=[1, 2, 5, 15])
    parser.add_argument("--folds", type=int, nargs="+", default=[0])
    wanted = parser.parse_args()
    wanted.work.mkdir(parents=True, exist_ok=True)
    for minutes in wanted.minutes:
        for fold in wanted.folds:
            kept = wanted.work / f"{minutes:g}-{fold}.json"
            if not kept.exists():
                found = measured(wanted.task, wanted.work / f"{minutes:g}", minutes, fold)
                kept.write_text(json.dumps(found))
            print(kept.read_text(), flush=True)


if __name__ == "__main__":
    main()
