"""Hold what a plan foretold against what a run then uses.

    python benchmarks/plan/check.py RUN 3d

RUN is a folder that `medseg plan --steps 60` and `medseg preprocess` made. Prints what the plan says, what a
measurement gives right before and right after, and what the steps of a run take that does nothing but train
(the median by the clock, and processor seconds); all with the threads that the plan was measured with.
"""

import resource
import statistics
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

from medseg.cli.common import RunFolder, use_cores
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.train.loop import Setup, train
from medseg.train.measure import measure_step


def main() -> None:
    """Measure, train, measure, print."""
    run, name = RunFolder(Path(sys.argv[1])), sys.argv[2]
    plan, fold = run.plan(), run.folds(run.task())[0]
    c = plan.configuration(name)
    assert c.cost
    assert c.steps
    threads = use_cores(c.cost.threads)

    def measured() -> float:
        return measure_step(c, len(plan.channels), len(plan.labels) + 1, kind="cpu", threads=threads).seconds

    before = measured()
    at: list[float] = []
    setup = Setup(name, 0, fold.train, fold.validation, device="cpu", threads=threads)
    with tempfile.TemporaryDirectory() as folder:
        train(
            plan,
            setup,
            CaseStore(run.store(name)),
            RunLog(Path(folder)),
            progress=lambda _: at.append(time.perf_counter()),
        )
    after = measured()
    seconds = statistics.median(b - a for a, b in pairwise(at[5:]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    disk = sum(f.stat().st_size for f in run.store(name).iterdir())
    print(f"step: plan {c.cost.seconds_per_step:.3f} s, run {seconds:.3f}")
    print(f"step on random patches: before the run {before:.3f}, after it {after:.3f}")
    print(f"process: plan {c.cost.ram_bytes / 2**20:.0f} MiB, run {peak / 2**20:.0f}")
    print(f"disk: plan {c.cost.disk_bytes / 2**20:.1f} MiB, store {disk / 2**20:.1f}")


if __name__ == "__main__":
    main()
