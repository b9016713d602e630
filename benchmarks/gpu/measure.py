"""What medseg does on a GPU: are the planner's figures true, do weights repeat, what does a budget buy, how fast is
a step beside nnU-Net's network, does feeding keep up, how long does a large scan take.

    python benchmarks/gpu/measure.py OUT --task data/Task04_Hippocampus
    python benchmarks/gpu/measure.py OUT --only repeat families

Each part prints its table, and a part that fails says why and stops no other one; OUT/PART.json holds the figures.
The part ``peer`` wants `dynamic-network-architectures`, nnU-Net's networks, and is left out without it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import signal
import statistics
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from medseg.core.errors import MedsegError

# Read by CUDA's library of matrices when it is loaded; deterministic steps want it.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
HERE = Path(__file__).resolve().parent
MEDSEG = [sys.executable, "-m", "medseg"]
# Small and nearly cubic, anisotropic, large: voxels and millimetres.
SCANS = {
    "small": ((35, 50, 36), (1.0, 1.0, 1.0)),
    "thick": ((320, 320, 20), (0.6, 0.6, 3.6)),
    "large": ((480, 480, 300), (0.8, 0.8, 1.5)),
}
GIB = 2**30


def medseg(*words: object) -> str:
    """What a verb prints. RuntimeError with its last words where it fails."""
    ran = subprocess.run([*MEDSEG, *map(str, words)], capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"medseg {words[0]}: {ran.returncode}: {(ran.stderr or ran.stdout)[-1500:]}")
    return ran.stdout + ran.stderr


def weights(model: Path) -> str:
    """One hash of all of a model's weights."""
    files = sorted(model.glob("*.safetensors"))
    assert files, model
    return hashlib.sha256(b"".join(path.read_bytes() for path in files)).hexdigest()[:16]


def planned(family: str, size: int, scan: str) -> Any:
    """The configuration that the planner makes for scans of one kind, of one of its sizes."""
    from medseg.plan.planner import _volumes
    from medseg.plan.scale import SIZES

    shape, spacing = SCANS[scan]
    extent = np.array(shape) * spacing
    measured = SimpleNamespace(spacings=np.array([spacing]), typical_shape=lambda s: extent / np.array(s))
    return _volumes(measured, SIZES[size], family)  # type: ignore[arg-type]


def families(out: Path, task: Path | None, only: Sequence[str] = ()) -> Any:
    """Of each family's step: time by what is reckoned, memory by what is reckoned, and whether two runs of three
    steps in deterministic mode end with the same weights."""
    from medseg.plan.cost import estimate
    from medseg.plan.families import TRAINED
    from medseg.train.measure import measure_step

    rows = []
    for family in only or TRAINED:
        for scan, size in (("small", 4), ("large", 6)):
            row: dict[str, Any] = {"family": family, "scan": scan}
            try:
                configuration = planned(family, size, scan)
                row["patch"] = "x".join(map(str, configuration.patch.value)) + f", {configuration.batch.value}"
                step = measure_step(configuration, 1, 3, kind="cuda", threads=4)
                told = estimate(configuration, 1, 3, kind="gpu", half=True)
                row |= {"ms": 1e3 * step.seconds, "gib": step.memory_bytes / GIB}
                row |= {
                    "work_per_s": told.work / step.seconds,
                    "memory_by_reckoned": step.memory_bytes / told.memory_bytes,
                }
                if scan == "small":
                    row["repeats"] = repeats(configuration)
            except (RuntimeError, MedsegError) as error:
                row["failed"] = f"{type(error).__name__}: {error}"[:300]
            print(json.dumps(row), flush=True)
            rows.append(row)
    return rows


def repeats(configuration: Any) -> str:
    """Whether three deterministic steps, twice, end with the same weights."""
    try:
        return "yes" if three_steps(configuration) == three_steps(configuration) else "NO"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"[:300]
    finally:
        torch.use_deterministic_algorithms(False)


def three_steps(configuration: Any) -> str:
    """A hash of the weights after three steps."""
    from medseg.models.build import build
    from medseg.train.loop import train_step
    from medseg.train.loss import by_family, dice_cross_entropy
    from medseg.train.measure import _things

    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.manual_seed(0)
    network = build(configuration, 1, 3).cuda()
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3, fused=True)
    loss, shape, batch = (
        by_family(configuration, dice_cross_entropy),
        configuration.patch.value,
        configuration.batch.value,
    )
    for _ in range(3):
        images = torch.randn((batch, 1, *shape)).cuda()
        targets = (
            _things(3, batch, shape) if configuration.network.value.counts else torch.randint(0, 3, (batch, *shape))
        )
        train_step(network, optimiser, images, targets.cuda(), loss)
    data = b"".join(p.detach().cpu().numpy().tobytes() for p in network.parameters())
    return hashlib.sha256(data).hexdigest()


def repeat(out: Path, task: Path | None) -> Any:
    """A phantom run, deterministic twice, stopped and gone on with, killed and gone on with; and not deterministic."""
    medseg("phantom", out / "ph", "--task", "prostate", "--cases", 8)
    data, first = out / "ph" / "Phantom_Prostate", out / "repeat"
    said = medseg("plan", data, "-o", first, "--machine", "gpu", "--gpu-memory", "4GiB", "--steps", 300)
    medseg("preprocess", first, "-c", "3d")
    found: dict[str, Any] = {"plan": said.strip().splitlines()}

    def run(name: str, *options: str, stop: signal.Signals | None = None) -> str:
        folder = out / name
        if not folder.exists():
            subprocess.run(["cp", "-r", first, folder], check=True)
        command = [*MEDSEG, "train", str(folder), "-c", "3d", *options]
        if stop:
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
                assert process.stdout
                for line in process.stdout:
                    if line.startswith("step 100/"):
                        process.send_signal(stop)
            print(f"{name}: stopped with {process.returncode}", flush=True)
        before = time.perf_counter()
        medseg(*command[len(MEDSEG) :])
        found[f"{name}_seconds"] = time.perf_counter() - before
        return weights(folder / "3d" / "fold0" / "model")

    found["deterministic"] = [run("once", "--deterministic"), run("twice", "--deterministic")]
    found["stopped"] = run("stopped", "--deterministic", stop=signal.SIGTERM)
    found["killed"] = run("killed", "--deterministic", stop=signal.SIGKILL)
    found["free"] = [run("free1"), run("free2")]
    same = len({*found["deterministic"], found["stopped"], found["killed"]}) == 1
    print(f"deterministic, stopped and killed: {'the same weights' if same else 'NOT the same weights'}; {found}")
    return found | {"same": same}


def budget(out: Path, task: Path | None) -> Any:
    """What a budget buys on the task: planned and true minutes and memory, and Dice of fold 0."""
    if task is None:
        return None
    rows = []
    for minutes in ("45s", "90s"):
        run = out / f"budget-{minutes}"
        said = medseg("plan", task, "-o", run, "--machine", "gpu", "--budget", minutes).splitlines()[0]
        medseg("preprocess", run, "-c", "3d")
        before = time.perf_counter()
        medseg("train", run, "-c", "3d")
        took = time.perf_counter() - before
        fold = run / "3d" / "fold0"
        before = time.perf_counter()
        medseg("predict", task, "--held-out", "-m", fold / "model", "-o", fold / "predictions")
        predicting = time.perf_counter() - before
        medseg("evaluate", fold / "predictions", task, "-o", fold)
        rows_of = [row for row in json.loads((fold / "metrics.json").read_text())["rows"] if row["dice"] is not None]
        dice = statistics.mean(row["dice"] for row in rows_of)
        row = {"budget": minutes, "plan": said, "train_s": took, "predict_s": predicting, "dice": dice}
        print(json.dumps(row), flush=True)
        rows.append(row)
        engines(out, task, fold)
    return rows


def engines(out: Path, task: Path, fold: Path) -> None:
    """How many foreground voxels of the held-out cases the processor gives other labels, in float32."""
    from medseg.io.nifti import read_raw_labels

    chosen = (
        sorted((fold / "predictions").glob("*_seg.nii.gz"))[:8] or sorted((fold / "predictions").glob("*.nii.gz"))[:8]
    )
    scans = [task / "imagesTr" / path.name.replace("_seg.nii.gz", ".nii.gz") for path in chosen]
    for engine in ("torch-cuda", "torch-cpu"):
        medseg("predict", *scans, "-m", fold / "model", "-o", out / engine, "--engine", engine)
    same = either = 0
    for scan in scans:
        name = scan.name.replace(".nii.gz", "_seg.nii.gz")
        gpu, cpu = (read_raw_labels(out / engine / name)[0] for engine in ("torch-cuda", "torch-cpu"))
        where = (gpu > 0) | (cpu > 0)
        same, either = same + int(((gpu == cpu) & where).sum()), either + int(where.sum())
    print(
        f"GPU and processor: the same label in {same} of {either} foreground voxels ({same / either:.4%})", flush=True
    )


def timed(step: Callable[[], Any], times: int = 20) -> float:
    """Median milliseconds of a step, after some to warm up."""
    for _ in range(6):
        step()
    torch.cuda.synchronize()
    each = []
    for _ in range(times):
        before = time.perf_counter()
        step()
        torch.cuda.synchronize()
        each.append(1e3 * (time.perf_counter() - before))
    return statistics.median(each)


def peer(out: Path, task: Path | None) -> Any:
    """A training step of 2 patches of 128 x 128 x 128, six stages of 32 to 320 features: medseg's U-Net, nnU-Net's,
    each as it is and compiled, with the loss and the optimiser of medseg; the program's own precision each."""
    from medseg.models.build import build
    from medseg.train.loop import train_step

    configuration = planned("unet", 6, "large")
    network_plan, patch, batch = configuration.network.value, configuration.patch.value, configuration.batch.value
    images = torch.randn((batch, 1, *patch), device="cuda")
    targets = torch.randint(0, 3, (batch, *patch), device="cuda")
    rows: dict[str, Any] = {"patch": patch, "batch": batch, "features": network_plan.features}

    def measured(name: str, make: Callable[[], torch.nn.Module], compiled: bool) -> None:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        torch.backends.cudnn.benchmark = True
        try:
            network = make().cuda()
            optimiser = torch.optim.AdamW(network.parameters(), lr=1e-4, fused=True)
            run: Any = torch.compile(network) if compiled else network
            before = time.perf_counter()
            train_step(run, optimiser, images, targets)
            first = time.perf_counter() - before
            ms = timed(lambda: train_step(run, optimiser, images, targets))
            rows[name] = {"ms": ms, "gib": torch.cuda.max_memory_allocated() / GIB, "first_s": first}
        except (RuntimeError, MedsegError) as error:
            rows[name] = f"{type(error).__name__}: {error}"[:300]
        print(name, rows[name], flush=True)
        torch._dynamo.reset()

    measured("medseg", lambda: build(configuration, 1, 3), False)
    try:
        from dynamic_network_architectures.architectures.unet import PlainConvUNet
    except ImportError as error:
        print("no nnU-Net network:", error)
        return rows

    def theirs() -> torch.nn.Module:
        stages = len(network_plan.features)
        return PlainConvUNet(
            1, stages, list(network_plan.features), torch.nn.Conv3d, [list(k) for k in network_plan.kernels],
            [list(s) for s in network_plan.strides], 2, 3, 2, conv_bias=True, norm_op=torch.nn.InstanceNorm3d,
            norm_op_kwargs={"eps": 1e-5, "affine": True}, nonlin=torch.nn.LeakyReLU, nonlin_kwargs={"inplace": True},
            deep_supervision=True,
        )  # fmt: skip

    measured("nnunet", theirs, False)
    measured("nnunet compiled", theirs, True)
    measured("medseg compiled", lambda: build(configuration, 1, 3), True)
    return rows


def feed(out: Path, task: Path | None) -> Any:
    """Batches of 2 patches of 128 x 128 x 128 out of a CT of 512 x 512 x 1000, kept in memory or read each time, made
    for the GPU by four threads: how many milliseconds apart they come where nothing else is done."""
    from medseg.io.store import CaseStore
    from medseg.plan.plan import parse_plan
    from medseg.train import batches as module

    configuration = planned("unet", 6, "large")
    store = CaseStore(out / "store")
    rng = np.random.default_rng(0)
    shape = (512, 512, 1000)
    if not (out / "store" / "case0.json").exists():
        image = np.tile(rng.normal(size=(1, 512, 512, 100)).astype(np.float16), (1, 1, 1, 10))
        labels = np.zeros(shape, dtype=np.uint8)
        labels[200:300, 200:300, 400:600] = 1
        store.write("case0", image, labels, {})
    case = store.read("case0")
    path = out / "repeat" / "plan.json"
    if not path.exists():
        return "the part `repeat` makes the plan that this one takes"
    plan = parse_plan(json.loads(path.read_text()), str(path))
    plan = plan.model_copy(update={"channels": plan.channels[:1]})
    rows = {}
    for name, memory in (("kept", None), ("read each time", 0)):
        kept = module.free_memory
        if memory == 0:
            module.free_memory = lambda: 0  # type: ignore[assignment]
        batches = module.Batches(plan, configuration, [case], 0, torch.device("cuda"))
        batches._on_device = False
        batches._keep = memory is None
        with module.Feed(batches, 0) as stream:
            for _ in range(8):
                next(stream)
            before = time.perf_counter()
            for _ in range(60):
                next(stream)
            torch.cuda.synchronize()
            rows[name] = 1e3 * (time.perf_counter() - before) / 60
        module.free_memory = kept
        print(f"{name}: a batch every {rows[name]:.1f} ms", flush=True)
    return rows


def ct(out: Path, task: Path | None) -> Any:
    """A CT of 512 x 512 x 400 voxels with a network of 25 classes of nnU-Net's size: seconds and GiB, whole command."""
    from medseg.core.grid import Grid
    from medseg.core.volume import Volume
    from medseg.io.nifti import write_volume

    rng = np.random.default_rng(0)
    scan = out / "ct.nii.gz"
    values = np.rint(np.tile(rng.normal(0, 200, (1, 128, 128, 100)), (1, 4, 4, 4))).astype(np.int16)
    write_volume(scan, Volume(values, Grid.from_spacing((512, 512, 400), (0.8, 0.8, 1.5))))
    peer_model = HERE.parent / "predict" / "peer_model.py"
    subprocess.run([sys.executable, peer_model, out / "peer", "--classes", "25"], check=True, capture_output=True)
    trained = next((out / "peer").rglob("checkpoint_final.pth")).parents[1]
    model = out / "ct.model"
    medseg("models", "import", trained, "-o", model)
    rows = {}
    for name, options in (("usual", []), ("--quality", ["--quality"])):
        command = [*MEDSEG, "predict", scan, "-m", model, "-o", out / "ct.out", *options]
        sampler = subprocess.Popen(
            ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits", "-lms", "200"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        before = time.perf_counter()
        measured = [sys.executable, HERE.parent / "measure.py", *command]
        ran = subprocess.run([str(word) for word in measured], capture_output=True, text=True)
        seconds = time.perf_counter() - before
        sampler.terminate()
        used = max(int(line) for line in (sampler.communicate()[0] or "0").split())
        rows[name] = {"seconds": seconds, "gpu_mib": used, "said": (ran.stdout + ran.stderr)[-900:]}
        print(name, rows[name], flush=True)
    return rows


PARTS = {part.__name__: part for part in (repeat, budget, families, peer, feed, ct)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--task", type=Path)
    parser.add_argument("--family", nargs="*", default=[], help="those of the part `families`; all unless given")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    print(
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores", flush=True
    )
    for name in given.only:
        begun = time.perf_counter()
        print(f"\n== {name}", flush=True)
        try:
            more = {"only": given.family} if name == "families" else {}
            found = PARTS[name](given.out, given.task, **more)
            (given.out / f"{name}.json").write_text(json.dumps(found, indent=1))
        except Exception:  # noqa: BLE001 - the other parts are measured all the same
            traceback.print_exc()
        print(f"({time.perf_counter() - begun:.0f} s)", flush=True)


if __name__ == "__main__":
    main()
