"""What many scans cost beside reading, computing and writing, measured here.

    python benchmarks/scale/measure.py scans WORK [TASK] [--scans 1000] [--quick] [--members 1]
    python benchmarks/scale/measure.py deal WORK [--scans 1000000]
    python benchmarks/scale/measure.py snakemake WORK

``scans`` predicts crops of a task's images (shifted and with some noise; phantoms where no TASK is given) with the
shipped model as one shard of a manifest, and tells which share of the wall time is none of reading, the network and
writing, and how memory grows. ``deal`` deals that many files and reads a shard. ``snakemake`` runs and plans jobs that
do nothing, to see what one job costs. WORK is a folder for scratch files and WORK/NAME.json, which simulate.py reads.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

Spans = list[tuple[float, float]]


def make_scans(folder: Path, task: Path | None, count: int) -> list[Path]:
    """Small scans: crops of 24 x 44 x 28 voxels and up, no two alike."""
    import nibabel as nib

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    images = sorted(p for p in (task / "imagesTr").iterdir() if not p.name.startswith(".")) if task else []
    paths = []
    for number in range(count):
        path = folder / f"crop{number:06d}.nii.gz"
        paths.append(path)
        if path.exists():
            continue
        if images:
            image = nib.load(images[number % len(images)])
            values, affine = np.asarray(image.dataobj), image.affine
        else:
            x, y, z = np.ogrid[:36, :50, :36]
            ball = ((x - 18) / 9) ** 2 + ((y - 25) / 16) ** 2 + ((z - 18) / 8) ** 2 < 1
            values, affine = (200 * ball + 300).astype(np.int16), np.eye(4)
        size = [
            min(n, int(rng.integers(low, n + 1)) if n > low else n)
            for n, low in zip(values.shape, (24, 44, 28), strict=True)
        ]
        first = [int(rng.integers(0, n - s + 1)) for n, s in zip(values.shape, size, strict=True)]
        crop = values[tuple(slice(f, f + s) for f, s in zip(first, size, strict=True))].astype(np.float32)
        crop = np.maximum(crop + rng.normal(0, 0.01 * crop.std(), crop.shape), 0)
        nib.save(nib.Nifti1Image(np.rint(crop).astype(np.int16), affine), path)
    return paths


def model(work: Path, members: int | None) -> str:
    """The shipped model, or a copy that has no more than so many of its ten networks."""
    if members is None:
        return "hippocampus"
    import shutil

    from medseg.models.shelf import find_package

    folder = work / f"model{members}"
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(find_package("hippocampus"), folder)
    index = json.loads((folder / "package.json").read_text())
    gone = index["members"][members:] + index["graphs"][members:]
    index["members"], index["graphs"] = index["members"][:members], index["graphs"][:members]
    index["checksums"] = {name: digest for name, digest in index["checksums"].items() if name not in gone}
    (folder / "package.json").write_text(json.dumps(index))
    return str(folder)


def covered(*groups: Spans) -> float:
    """Seconds in which at least one of the spans ran."""
    total, end = 0.0, -1e18
    for first, last in sorted(span for group in groups for span in group):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def timed(function: Any, spans: Spans) -> Any:
    def run(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            spans.append((started, time.perf_counter()))

    return run


def scans(work: Path, task: Path | None, count: int, quick: bool, members: int | None) -> None:
    began = time.perf_counter()
    import psutil

    from medseg.cli import archive as verbs
    from medseg.cli import predict as verb
    from medseg.cli.main import cli
    from medseg.infer.predict import Predictor

    paths = make_scans(work / "scans", task, count)
    (work / "scans.txt").write_text("".join(f"{path}\n" for path in paths))
    out = work / f"out-{int(time.time())}"
    cli(["archive", "deal", str(work / "scans.txt"), "-o", str(out), "-n", "1"], standalone_mode=False)
    read: Spans = []
    computed: Spans = []
    network: Spans = []
    wrote: Spans = []
    rss: list[int] = []
    name = model(work, members)
    process = psutil.Process()
    verb._read = timed(verb._read, read)
    verb._written = timed(verb._written, wrote)
    verb._computed = timed(verb._computed, computed)
    initialised = Predictor.__init__

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        initialised(self, *args, **kwargs)
        self.engine.run = timed(self.engine.run, network)

    Predictor.__init__ = init  # type: ignore[method-assign]
    ended = verbs._ended

    def end(*args: Any) -> Any:
        rss.append(process.memory_info().rss)
        return ended(*args)

    verbs._ended = end
    loaded = time.perf_counter() - began
    cpu = time.process_time()
    started = time.perf_counter()
    options = ["--quick"] if quick else []
    cli(["predict", "--manifest", str(out), "-m", name, *options, "--threads", "2"], standalone_mode=False)
    wall = time.perf_counter() - started
    first = min(read)[0]
    told = {
        "scans": count,
        "wall_s": wall,
        "cpu_s": time.process_time() - cpu,
        "import_and_make_s": loaded,
        "start_s": first - started,
        "share_read_network_write": covered(read, network, wrote) / wall,
        "share_with_all_of_predicting": covered(read, computed, wrote) / wall,
        "share_start": (first - started) / wall,
        "seconds_read": sum(b - a for a, b in read) / count,
        "seconds_network": sum(b - a for a, b in network) / count,
        "seconds_computed": sum(b - a for a, b in computed) / count,
        "seconds_written": sum(b - a for a, b in wrote) / count,
        "seconds_between": (wall - (first - started) - covered(read, computed, wrote)) / count,
        "rss_mib": {str(n): rss[n - 1] / 2**20 for n in (1, 10, 50, 100, 200, 500, count) if n <= len(rss)},
        "peak_rss_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "scan_seconds": np.round([b - a for a, b in computed], 3).tolist(),
        "bytes_in": float(np.mean([p.stat().st_size for p in paths])),
        "bytes_out": sum(p.stat().st_size for p in out.rglob("*_seg.*")) / count,
    }
    started = time.perf_counter()
    cli(["archive", "report", str(out)], standalone_mode=False)
    told["report_s"] = time.perf_counter() - started
    (work / "scans.json").write_text(json.dumps(told))
    print(json.dumps({k: v for k, v in told.items() if k != "scan_seconds"}, indent=1))


def deal(work: Path, count: int) -> None:
    """Paths of which a thousandth are different files, since a million files are slow to make."""
    from medseg.io.archive import Listed, look_up, read_manifest, write_manifest

    rng = np.random.default_rng(0)
    real = [work / "deal" / f"{n:04d}.nii.gz" for n in range(min(count, 1000))]
    real[0].parent.mkdir(parents=True, exist_ok=True)
    for path in real:
        path.touch()
    tell: dict[str, float] = {"scans": count}
    started = time.perf_counter()
    look_up([real[n % len(real)] for n in range(count)])
    tell["stat_local_s"] = time.perf_counter() - started
    sizes = (rng.lognormal(17, 1, count)).astype(int)
    listed = [
        Listed(f"/archive/{n // 1000:04d}/scan{n:07d}.nii.gz", int(s), f"scan{n:07d}") for n, s in enumerate(sizes)
    ]
    path = work / "deal" / "manifest.jsonl"
    path.unlink(missing_ok=True)
    started, cpu = time.perf_counter(), time.process_time()
    manifest = write_manifest(path, listed, max(1, count // 500))
    tell["deal_s"], tell["deal_cpu_s"] = time.perf_counter() - started, time.process_time() - cpu
    tell["manifest_mb"] = path.stat().st_size / 1e6
    started = time.perf_counter()
    read_manifest(path)
    tell["scans_of_a_shard"] = len(list(manifest.of(manifest.shards)))
    tell["read_a_shard_s"] = time.perf_counter() - started
    tell["peak_rss_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (work / "deal.json").write_text(json.dumps(tell))
    print(json.dumps(tell, indent=1))


SNAKEFILE = """
rule all:
    input: expand("done/{i}", i=range(int(config["jobs"])))
rule one:
    output: "done/{i}"
    shell: "touch {output}"
"""


def snakemake(work: Path) -> None:
    rows = []
    for jobs in (10, 100, 1000):
        folder = work / "snakemake" / str(jobs)
        folder.mkdir(parents=True, exist_ok=True)
        for old in (folder / "done").glob("*"):
            old.unlink()
        (folder / "Snakefile").write_text(SNAKEFILE)
        row: dict[str, float] = {"jobs": jobs}
        command = [sys.executable, "-m", "snakemake", "--cores", "2", "--quiet", "all", "--config", f"jobs={jobs}"]
        for name, more in (("plan_s", ["--dry-run"]), ("run_s", [])):
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            started = time.perf_counter()
            subprocess.run([*command, *more], cwd=folder, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            row[name] = time.perf_counter() - started
            row[name.replace("_s", "_cpu_s")] = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        rows.append(row)
        print(json.dumps(row), flush=True)
    (work / "snakemake.json").write_text(json.dumps(rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["scans", "deal", "snakemake"])
    parser.add_argument("work", type=Path)
    parser.add_argument("task", type=Path, nargs="?")
    parser.add_argument("--scans", type=int)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--members", type=int)
    given = parser.parse_args()
    work = given.work.absolute()
    work.mkdir(parents=True, exist_ok=True)
    if given.what == "scans":
        scans(work, given.task, given.scans or 1000, given.quick, given.members)
    elif given.what == "deal":
        deal(work, given.scans or 1_000_000)
    else:
        snakemake(work)


if __name__ == "__main__":
    main()
