"""Every family at equal minutes on this machine: one fold of each task, from the plan to the scores.

    medseg phantom PHANTOMS -t abdomen
    python benchmarks/families/compare.py WORK PHANTOMS/Phantom_Abdomen data/Task04_Hippocampus --minutes 5

For each task and family `medseg plan --family NAME --budget 3d=5m`, `preprocess`, `train` (fold 0), `predict
--held-out` and `evaluate`, in a folder of its own in WORK. What is done is not done again, so that it can be stopped
and gone on with. Prints a table for each task and writes it to WORK/README.md, and a plot to WORK/dice.svg. The U-Net
comes first and last: what lies between the two is what the machine did.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))
from measure import run

from medseg.plan.cost import gib
from medseg.plan.families import TRAINED
from medseg.plan.plan import read_plan

_AGAIN = "unet again"


def medseg(*arguments: object) -> tuple[float, int]:
    """Run a command: its seconds, and the most bytes that it held."""
    seconds, _, peak = run([sys.executable, "-m", "medseg", *map(str, arguments)])
    return seconds, peak


def measured(task: Path, folder: Path, family: str, minutes: float) -> dict[str, Any]:
    """Train a family for so long, and score the cases held out."""
    from medseg.models.build import weigh

    if not (folder / "3d" / "preprocessed").exists():
        medseg("plan", task, "-o", folder, "--family", family, "--budget", f"3d={minutes}m", "--budget", "2d=1m")
        medseg("preprocess", folder, "-c", "3d")
    at = folder / "3d" / "fold0"
    seconds, peak = medseg("train", folder, "-c", "3d")
    medseg("predict", task, "--held-out", "-m", at / "model", "-o", at / "predictions")
    medseg("evaluate", at / "predictions", task, "-o", at)
    plan = read_plan(folder / "plan.json")
    one = plan.configuration("3d")
    assert one.steps
    assert one.cost
    rows = json.loads((at / "metrics.json").read_text())["summary"]
    rows = [row for row in rows if row["label"] is not None]
    return {
        "family": family,
        "parameters": weigh(one, len(plan.channels), plan.outputs)[0],
        "patch": list(one.patch.value),
        "features": one.network.value.features[0],
        "members": one.members.value if one.members else 1,
        "steps": one.steps.value,
        "seconds_per_step": one.cost.seconds_per_step,
        "memory_bytes": one.cost.memory_bytes,
        "peak_bytes": peak,
        "seconds": round(seconds, 1),
        "dice": statistics.mean(row["dice_mean"] for row in rows),
        "hd95_mm": statistics.mean(row["hd95_mean_mm"] for row in rows),
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows of one task."""
    first = next((row["dice"] for row in rows if row["family"] == "unet"), None)
    lines = [
        "| family | parameters | patch, features, networks | steps | s a step | memory of a step | train (s) | peak | "
        "Dice | to the U-Net | HD95 (mm) |",
        "| --- | ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        size = f"{'x'.join(map(str, row['patch']))}, {row['features']}, {row['members']}"
        away = "" if first is None else f"{row['dice'] - first:+.3f}"
        lines.append(
            f"| {row['family']} | {row['parameters']:,} | {size} | {row['steps']:,} | {row['seconds_per_step']:.3g} | "
            f"{gib(row['memory_bytes'])} | {row['seconds']:.0f} | {gib(row['peak_bytes'])} | {row['dice']:.3f} | "
            f"{away} | {row['hd95_mm']:.2f} |"
        )
    return "\n".join(lines)


def plot(found: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Dice of every family, a row each, a mark for each task, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "medseg"  # the same figures give the same file
    names = list(dict.fromkeys(row["family"] for rows in found.values() for row in rows))
    figure = Figure(figsize=(7, 0.3 * len(names) + 1), layout="constrained")
    axes = figure.add_subplot()
    for task, rows in found.items():
        places = [names.index(row["family"]) for row in rows]
        axes.plot([row["dice"] for row in rows], places, "o", label=task, alpha=0.85)
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.grid(color="#ddd", lw=0.6)
    axes.set_xlabel("mean Dice")
    axes.legend(frameon=False)
    figure.savefig(path, metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("tasks", type=Path, nargs="+")
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--family", nargs="*", default=[*TRAINED, _AGAIN])
    wanted = parser.parse_args()
    found: dict[str, list[dict[str, Any]]] = {}
    for task in wanted.tasks:
        folder = wanted.work / f"{task.name}-{wanted.minutes:g}m"
        folder.mkdir(parents=True, exist_ok=True)
        for name in wanted.family:
            kept = folder / f"{name.replace(' ', '-')}.json"
            if not kept.exists():
                row = measured(task, folder / name.replace(" ", "-"), name.split()[0], wanted.minutes)
                kept.write_text(json.dumps({**row, "family": name}))
            found.setdefault(task.name, []).append(json.loads(kept.read_text()))
            print(kept.read_text(), flush=True)
    text = "\n\n".join(f"{task}, {wanted.minutes:g} minutes:\n\n{table(rows)}" for task, rows in found.items())
    print(text)
    (wanted.work / "README.md").write_text(text + "\n")
    plot(found, wanted.work / "dice.svg")


if __name__ == "__main__":
    main()
