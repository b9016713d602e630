"""Time one tile in each engine, and the way from nothing to the first result.

    python benchmarks/predict/engines.py --f32                 # nnU-Net's default 3D network, 128^3, 25 classes
    python benchmarks/predict/engines.py --network hippocampus # a network of Task04's size
    python benchmarks/predict/engines.py --network small --batch 1 2 6     # small tiles, several at once

Weights are random: they cost what trained ones cost. Each engine runs in a process of its own, round
robin, so that whatever else runs meets them all alike; the least of the repeats is shown. CPU seconds
are those of all threads, and are disturbed far less by others than the clock is. Memory is the
process's peak.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

NETWORKS = {
    "default": {"features": [32, 64, 128, 256, 320, 320], "patch": [128, 128, 128], "classes": 25},
    "hippocampus": {"features": [16, 32, 64, 128], "patch": [40, 56, 40], "classes": 3},
    "small": {"features": [16, 32, 64], "patch": [24, 56, 32], "classes": 3},
    "slices": {"features": [16, 32, 64, 128], "patch": [64, 64, 1], "classes": 3},
}
ENGINES = (("torch-cpu", "f32"), ("torch-cpu", "bf16"), ("openvino", "f32"))


def save(folder: Path, features: list[int], patch: list[int], classes: int) -> None:
    """A package with random weights."""
    from medseg.models.build import build
    from medseg.models.package import ModelPackage, save_package
    from medseg.plan.plan import parse_plan

    stages, flat = len(features), patch[2] == 1
    network = {
        "features": features,
        "kernels": [[3, 3, 1 if flat else 3]] * stages,
        "strides": [[1, 1, 1]] + [[2, 2, 1 if flat else 2]] * (stages - 1),
    }
    configuration = {
        "dimensions": 2 if flat else 3,
        **({"slice_axis": 2} if flat else {}),
        "spacing": {"value": [1.5, 1.5, 1.5]},
        "patch": {"value": patch},
        "batch": {"value": 2},
        "network": {"value": network},
    }
    training = {"learning_rate": 0.01, "weight_decay": 0.01, "foreground_share": 0.5, "augmentation": {}}
    plan = parse_plan(
        {
            "task": "Task00_Random",
            "channels": ["MR"],
            "labels": [{"name": f"organ {n}", "number": n} for n in range(1, classes)],
            "normalisation": {"value": [{"channel": "MR", "kind": "zscore"}]},
            "configurations": {"it": configuration},
            "training": {key: {"value": value} for key, value in training.items()},
            "fingerprint": "",
        },
        "it",
    )
    weights = dict(build(plan.configuration("it"), 1, classes).state_dict())
    save_package(folder, ModelPackage(plan, "it", (weights,), ("a",), (), {}))


def one(folder: Path, name: str, precision: str, threads: int, tiles: int, batch: int) -> dict[str, float]:
    """In this process: seconds from nothing to the first result, seconds of the best tile, peak MiB. So many tiles in a
    ``batch``, whose time is that of one of them."""
    started = time.perf_counter()
    import numpy as np

    from medseg.core.memory import resident_memory
    from medseg.infer.engine import open_engine
    from medseg.models.package import load_package

    package = load_package(folder)
    engine = open_engine(package, name, threads, precision=precision)
    opened = time.perf_counter()
    shape = (batch, 1, *package.configuration.patch.value)
    tile = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    clock, cpu = [], []
    for _ in range(tiles):
        before, spent = time.perf_counter(), time.process_time()
        engine.run(tile)
        clock.append((time.perf_counter() - before) / batch)
        cpu.append((time.process_time() - spent) / batch)
    return {
        "open": opened - started,
        "first": opened - started + clock[0] * batch,
        "tile": min(clock),
        "tile_cpu": min(cpu),
        "memory": resident_memory(most=True) / 2**20,
    }


def main() -> None:
    """Parse, run, print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=NETWORKS, default="default")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--tiles", type=int, default=2, help="tiles in each process")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="tiles that run together")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--f32", action="store_true", help="leave torch in bf16 out, which takes minutes without AVX-512"
    )
    parser.add_argument("--one", nargs=3, metavar=("FOLDER", "ENGINE", "PRECISION"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        folder, name, precision = options.one
        print(json.dumps(one(Path(folder), name, precision, options.threads, options.tiles, options.batch[0])))
        return
    with tempfile.TemporaryDirectory() as folder:
        save(Path(folder) / "model", **NETWORKS[options.network])
        engines = [engine for engine in ENGINES if not options.f32 or engine[1] == "f32"]
        found: dict[tuple[str, str, int], list[dict[str, float]]] = {
            (*engine, batch): [] for engine in engines for batch in options.batch
        }
        for _ in range(options.repeat):
            for (name, precision, batch), runs in found.items():
                command = [sys.executable, __file__, "--threads", str(options.threads), "--tiles", str(options.tiles)]
                command += ["--batch", str(batch), "--one", f"{folder}/model", name, precision]
                child = subprocess.run(command, capture_output=True, text=True, check=True)
                runs.append(json.loads(child.stdout))
    print("| engine | open (s) | to the first result (s) | tile (s) | tile (CPU s) | peak memory (MiB) |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for (name, precision, batch), runs in found.items():
        least = {key: min(run[key] for run in runs) for key in runs[0]}
        numbers = f"{least['open']:.2f} | {least['first']:.2f} | {least['tile']:.3f} | {least['tile_cpu']:.3f}"
        several = f", {batch} at once" if len(options.batch) > 1 else ""
        print(f"| {name} {precision}{several} | {numbers} | {max(run['memory'] for run in runs):.0f} |")


if __name__ == "__main__":
    main()
