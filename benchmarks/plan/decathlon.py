"""Plan all ten tasks of the Medical Segmentation Decathlon from their published figures, beside nnU-Net.

    python benchmarks/plan/decathlon.py ../shared/reference/decathlon.json

Prints the table of docs/planning.md. Nothing is downloaded and nothing measured: what a task looks like
(median size once empty surroundings are cut away, spacing, channels, labels, cases) is made into as many
cases that are all alike, so figures that depend on how cases differ are missing here.

The reference file has spacing, patch, batch and channels. It has no sizes but Task04's: those below are the
median shapes at the target spacing that nnU-Net's authors give in their supplements (Isensee et al., Nature
Methods 2021, and arXiv:1809.10486 for the first seven), written down from memory of them, x, y, z; likewise
its low resolution patches. Where labels lie is not published, so mirroring is left out.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from medseg.core.labels import LabelSet
from medseg.plan.fingerprint import CasePrint, ChannelPrint, Fingerprint, Intensities, LabelPlace
from medseg.plan.plan import Configuration, Plan
from medseg.plan.planner import plan
from medseg.plan.scale import Target

GIB = 2**30
# Median voxels along x, y, z, and nnU-Net's low resolution: spacing in mm and patch.
SHAPES: dict[str, tuple[int, int, int]] = {
    "Task01_BrainTumour": (138, 169, 138),
    "Task02_Heart": (232, 320, 115),
    "Task03_Liver": (512, 512, 482),
    "Task04_Hippocampus": (36, 50, 35),
    "Task05_Prostate": (319, 320, 20),
    "Task06_Lung": (512, 512, 252),
    "Task07_Pancreas": (512, 512, 96),
    "Task08_HepaticVessel": (512, 512, 150),
    "Task09_Spleen": (512, 512, 187),
    "Task10_Colon": (512, 512, 150),
}
TARGETS = {
    "GPU 8 GiB": Target("gpu", 8 * GIB, half=True),
    "GPU 80 GiB, 1 day": Target("gpu", 80 * GIB, half=True, budgets={"": 86_400.0}),
    "CPU, 15 min": Target("cpu", 8 * GIB, budgets={"": 900.0}),
}


def published(name: str, task: dict[str, Any]) -> tuple[Fingerprint, LabelSet]:
    """A fingerprint of as many cases as the task has, all of its median size."""
    labels = LabelSet.from_names(task["labels"][1:])
    shape, spacing = SHAPES[name], tuple(float(s) for s in task["reference_plan"]["spacing_mm"])
    low, high = task["reference_plan"].get("ct_clip_hu", (0.0, 1000.0))
    everywhere = LabelPlace(centre=(0.5, 0.5, 0.5), extent=(0.2, 0.2, 0.2))
    channel = ChannelPrint(percentiles=(low,) * 7, zero_share=0, negative_share=0)
    case = CasePrint(
        id="",
        shape=shape,
        box=shape,
        spacing=spacing,  # type: ignore[arg-type]
        orientation="RAS",
        label_mm3=dict.fromkeys(labels.numbers, 10_000.0),
        label_places=dict.fromkeys(labels.numbers, everywhere),
        label_pieces=dict.fromkeys(labels.numbers, 1),
        label_cut=(),
        channels=(channel,) * len(task["modality"]),
        nonzero_share=1,
        image_hash="",
    )
    intensities = tuple(
        Intensities(
            channel=c,
            mean=(low + high) / 2,
            std=(high - low) / 5,
            percentile_00_5=low,
            percentile_99_5=high,
            minimum=low,
            maximum=high,
        )
        for c in task["modality"]
    )
    cases = tuple(case.model_copy(update={"id": f"c{n}", "image_hash": str(n)}) for n in range(task["training_cases"]))
    return Fingerprint(task=name, cases=cases, intensities=intensities), labels


def plans(reference: Path, target: Target) -> dict[str, Plan]:
    """A plan for each task."""
    tasks = json.loads(reference.read_text())["tasks"]
    return {name: plan(*published(name, task), target) for name, task in tasks.items()}


def size(values: Any) -> str:
    """Numbers with crosses between them."""
    return "x".join(f"{v:.3g}" for v in values)


def cell(c: Configuration) -> str:
    """Patch, batch, first features; what it takes."""
    assert c.cost
    assert c.steps
    networks = f"{c.members.value} x " if c.members else ""
    return (
        f"{size(c.patch.value)}, {c.batch.value}, {c.network.value.features[0]}; "
        f"{c.cost.memory_bytes / GIB:.1f} GiB, {networks}{c.steps.value:,} x {c.cost.seconds_per_step:.2g} s"
    )


def main() -> None:
    """Print two Markdown tables: full resolution, and low."""
    reference = Path(sys.argv[1])
    tasks = json.loads(reference.read_text())["tasks"]
    made = {name: plans(reference, target) for name, target in TARGETS.items()}
    print("| task | typical voxels | spacing (mm) | nnU-Net: patch, batch |", " | ".join(made), "|")
    print("| --- |", " | ".join(["---"] * (3 + len(made))), "|")
    for name, task in tasks.items():
        usual = task["reference_plan"]
        c = [made[target][name].configurations["3d"] for target in made]
        assert np.allclose(c[0].spacing.value, usual["spacing_mm"])
        print(
            f"| {name} | {size(SHAPES[name])} | {size(c[0].spacing.value)} |",
            f"{size(usual['patch'])}, {usual['batch']} |",
            " | ".join(map(cell, c)),
            "|",
        )
    print("\n| task | 3d-low: spacing (mm) and patch for a GPU of 8 GiB |\n| --- | --- |")
    for name in tasks:
        low = made["GPU 8 GiB"][name].configurations.get("3d-low")
        print(f"| {name} | {f'{size(low.spacing.value)}; {size(low.patch.value)}' if low else 'none'} |")


if __name__ == "__main__":
    main()
