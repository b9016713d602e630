"""What scans without labels are worth where few are labelled.

    python benchmarks/train/few_labels.py ../shared/data/Task04_Hippocampus WORK
    python benchmarks/train/few_labels.py TASK WORK --labels 5 --steps 200 --features 8 --device cpu --threads 1

Of TASK's first fold of five (by subject), 5, 10 and 20 training cases keep their labels, the fewer among the more,
and the others are scans without. The held-out cases are predicted in the end, and nothing sees them before. Every arm
takes as many supervised steps of the same network. One arm after the other; each is added to WORK/results.jsonl and
not done again; one that was killed goes on from its checkpoint. Where --from
names a model, there is an arm "fine-tuned".
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np

from medseg.cli.common import RunFolder
from medseg.cli.main import cli
from medseg.dataset.split import make_folds
from medseg.dataset.task import Case, Task, load_case, load_task
from medseg.evaluate.overlap import dice
from medseg.evaluate.statistics import bootstrap
from medseg.infer.predict import Predictor
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.models.package import ModelPackage, load_package
from medseg.train.loop import Progress, Setup, train
from medseg.train.pretrain import pretrain

ARMS: dict[str, tuple[str, ...]] = {
    "from nothing": (),
    "fine-tuned": (),
    "pretrained": ("pretrain",),
    "mean teacher": ("teacher",),
    "both": ("pretrain", "teacher"),
}


def main() -> None:
    """Run what has not been run, then print the table."""
    parser = argparse.ArgumentParser(formatter_class=argparse.RawDescriptionHelpFormatter, description=__doc__)
    parser.add_argument("task", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--labels", type=int, nargs="+", default=[5, 10, 20])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS))
    parser.add_argument("--from", dest="start", type=Path, help="a model of another task, for the arm fine-tuned")
    parser.add_argument("--steps", type=int, default=1000, help="supervised steps of every arm")
    parser.add_argument("--features", type=int, help="of the network's first stage, doubled stage by stage")
    parser.add_argument("--pretraining", type=float, help="in place of the plan's own")
    parser.add_argument("--consistency", type=float, help="in place of the plan's own")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--held-out", type=int, help="predict so many of the held-out cases only")
    given = parser.parse_args()
    given.arms = given.arms or [arm for arm in ARMS if arm != "fine-tuned" or given.start]
    given.work.mkdir(parents=True, exist_ok=True)
    source = load_task(given.task)
    fold = make_folds(source, 5, seed=0)[0]
    results = given.work / "results.jsonl"
    for seed in given.seeds:
        for labels in given.labels:
            for arm in given.arms:
                key = key_of(given, labels, arm, seed)
                if key not in [row["key"] for row in rows(results)]:
                    print(f"{labels} labelled, {arm}, seed {seed}", file=sys.stderr, flush=True)
                    row = {"key": key, **measured(given, source, fold, labels, arm, seed)}
                    with results.open("a") as file:
                        file.write(json.dumps(row) + "\n")
    print(table(given, source, rows(results)))
    print(f"\n`python {' '.join(sys.argv)}`")


def key_of(given: argparse.Namespace, labels: int, arm: str, seed: int) -> dict[str, object]:
    """What an arm's result follows from; what an arm has nothing to do with is None."""
    return {
        "labels": labels,
        "arm": arm,
        "seed": seed,
        "steps": given.steps,
        "features": given.features,
        "pretraining": given.pretraining if "pretrain" in ARMS[arm] else None,
        "consistency": given.consistency if "teacher" in ARMS[arm] else None,
        "from": str(given.start) if arm == "fine-tuned" else None,
        "held out": given.held_out,
    }


def rows(results: Path) -> list[dict]:
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def measured(given, source: Task, fold, labels: int, arm: str, seed: int) -> dict:  # type: ignore[no-untyped-def]
    """Dice of every held-out case and label, and how long it took."""
    chosen = few(source, fold.train, labels)
    others = [case for case in fold.train if case not in chosen]
    folder = few_task(given.work / f"{labels}" / source.name, source, chosen, others)
    run = RunFolder(given.work / f"{labels}" / f"{arm.replace(' ', '-')}-{given.steps}")
    wishes = [part for wish in ARMS[arm] for part in ("--unlabelled", wish)]
    medseg("plan", folder, "-o", run.path, "--machine", "cpu", "--no-measure", "--steps", given.steps, *wishes)
    edit(run.plan_file, given)
    medseg("preprocess", run.path, "--threads", given.threads)
    begun = time.perf_counter()
    package = trained(given, run, arm, chosen, others, seed)
    seconds = time.perf_counter() - begun
    predictor = Predictor(package, "torch-cuda" if given.device == "cuda" else "torch-cpu", threads=given.threads)
    found = {}
    for case in fold.validation[: given.held_out]:
        volume, truth = load_case(source, source.case(case))
        made = predictor.predict(volume).label_map.values
        found[case] = [dice(made == n, truth.values == n) for n in source.labels.numbers]
    return {"dice": found, "seconds": round(seconds, 1), "labelled": chosen, "unlabelled": len(others)}


def trained(given, run: RunFolder, arm: str, chosen, others, seed: int) -> ModelPackage:  # type: ignore[no-untyped-def]
    plan = run.plan()
    setup = Setup("3d", 0, tuple(chosen), (), seed=seed, device=given.device, threads=given.threads)
    # In one place, so that both arms that pretrain do so once.
    store, log = CaseStore(run.store("3d")), RunLog(run.path.parent / "checkpoints")
    scans = CaseStore(run.unlabelled("3d"))
    pool = [scans.read(case) for case in others] if plan.training.wants_unlabelled else []
    start = load_package(given.start) if arm == "fine-tuned" else None
    if plan.training.pretraining:
        start = pretrain(plan, setup, store, log, pool, progress=show)
    return train(plan, setup, store, log, unlabelled=pool, start=start, progress=show)[0]


def show(now: Progress) -> None:
    if now.step % 50 == 0 or now.step == now.steps:
        text = f"  {now.phase} {now.step}/{now.steps} loss {now.loss:.3f}, {now.seconds_left:.0f} s left"
        print(text, file=sys.stderr, flush=True)


def few(source: Task, train: tuple[str, ...], labels: int) -> list[str]:
    """So many of the training cases, subject by subject in an order of its own."""
    subjects = sorted({source.case(case).subject for case in train})
    order = [subjects[i] for i in np.random.default_rng(0).permutation(len(subjects))]
    return sorted([case for subject in order for case in train if source.case(case).subject == subject][:labels])


def few_task(folder: Path, source: Task, labelled: list[str], others: list[str]) -> Path:
    """A task of links to the source's files."""
    described = json.loads((source.folder / "dataset.json").read_text())
    described["training"], described["test"] = [], []

    def link(place: str, path: Path) -> str:
        (folder / place).mkdir(parents=True, exist_ok=True)
        target = folder / place / path.name
        target.unlink(missing_ok=True)
        target.symlink_to(path.resolve())
        return f"./{place}/{path.name}"

    def image(case: Case, place: str) -> str:
        return link(place, case.image)

    for name in labelled:
        case = source.case(name)
        assert case.label is not None
        described["training"].append({"image": image(case, "imagesTr"), "label": link("labelsTr", case.label)})
    described["test"] = [image(source.case(name), "imagesTs") for name in others]
    described["numTraining"], described["numTest"] = len(labelled), len(others)
    (folder / "dataset.json").write_text(json.dumps(described, indent=1))
    return folder


def edit(path: Path, given: argparse.Namespace) -> None:
    """Put into the plan what was given in place of its own."""
    plan = json.loads(path.read_text())
    network = plan["configurations"]["3d"]["network"]["value"]
    if given.features:
        network["features"] = [min(given.features * 2**i, 8 * given.features) for i in range(len(network["features"]))]
    for name in ("pretraining", "consistency"):
        if getattr(given, name) and name in plan["training"]:
            plan["training"][name]["value"] = getattr(given, name)
    path.write_text(json.dumps(plan))


def medseg(*arguments: object) -> None:
    cli.main([str(a) for a in arguments], prog_name="medseg", standalone_mode=False)


def table(given: argparse.Namespace, source: Task, found: list[dict]) -> str:
    """Mean Dice over cases, labels and seeds; what an arm gains over nothing, with its 95 % interval over subjects."""
    lines = ["| labelled | " + " | ".join(given.arms) + " |", "| ---: |" + " ---: |" * len(given.arms)]
    for labels in given.labels:
        cells = [cell(given, source, found, labels, arm) for arm in given.arms]
        lines.append(f"| {labels} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def cell(given: argparse.Namespace, source: Task, found: list[dict], labels: int, arm: str) -> str:
    def values(of: str) -> np.ndarray:
        keys = [key_of(given, labels, of, seed) for seed in given.seeds]
        each = [np.array(list(row["dice"].values())) for row in found if row["key"] in keys]
        return np.mean(each, axis=0)

    cases = next(row for row in found if row["key"] == key_of(given, labels, arm, given.seeds[0]))["dice"]
    mean = f"{values(arm).mean():.3f}"
    if arm == "from nothing" or "from nothing" not in given.arms:
        return mean
    gain = bootstrap(values(arm) - values("from nothing"), [source.case(case).subject for case in cases])
    return f"{mean} ({gain.mean:+.3f}; {gain.low:+.3f} to {gain.high:+.3f})" if gain else mean


if __name__ == "__main__":
    main()
