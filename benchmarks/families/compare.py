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
from medseg.report.figures import axis

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


def plot(found: dict[str, list[dict[str, Any]]]) -> str:
    """Dice of every family, a row each, a mark for each task: an SVG that follows the page's colours."""
    names = list(dict.fromkeys(row["family"] for rows in found.values() for row in rows))
    along = axis([row["dice"] for rows in found.values() for row in rows], high=1.0)
    left, width, high, top = 130, 470, 26, 40
    bottom = top + high * len(names)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 20} {bottom + 30}" '
        'font-family="system-ui, sans-serif" font-size="12" fill="#222">',
        f'<rect width="{left + width + 20}" height="{bottom + 30}" fill="white"/>',
    ]
    for tick in along.ticks:
        x = left + width * along.percent(tick) / 100
        parts.append(f'<line x1="{x:.1f}" y1="{top}" x2="{x:.1f}" y2="{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{tick:g}</text>')
    for number, name in enumerate(names):
        y = top + high * (number + 0.5)
        parts.append(f'<text x="{left - 12}" y="{y + 4:.1f}" text-anchor="end">{name}</text>')
        parts.append(f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#f0f0f0"/>')
    colours = ("#0072b2", "#d55e00", "#009e73")
    for (task, rows), colour, place in zip(found.items(), colours, range(len(found)), strict=False):
        x = left + 200 * place
        parts.append(f'<circle cx="{x}" cy="18" r="5" fill="{colour}"/><text x="{x + 10}" y="22">{task}</text>')
        for row in rows:
            x, y = left + width * along.percent(row["dice"]) / 100, top + high * (names.index(row["family"]) + 0.5)
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="5" fill="{colour}" fill-opacity="0.85"/>')
    return "\n".join([*parts, "</svg>", ""])


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
    (wanted.work / "dice.svg").write_text(plot(found))


if __name__ == "__main__":
    main()
