"""Time training steps of a preprocessed run, one by one.

    python benchmarks/train/step.py RUN 3d
    OMP_WAIT_POLICY=PASSIVE python benchmarks/train/step.py RUN 3d

RUN is a folder that `medseg plan` and `medseg preprocess` made. Start it twice at once to see what two
programs on the same cores cost each other.
"""

import statistics
import sys
import time
from pathlib import Path

import torch

from medseg.cli.common import RunFolder, available_cores
from medseg.io.store import CaseStore
from medseg.models.build import build
from medseg.train.batches import Batches
from medseg.train.loop import train_step


def main() -> None:
    """Print the median and the extremes of eight steps, after two to warm up."""
    run, configuration = RunFolder(Path(sys.argv[1])), sys.argv[2]
    torch.set_num_threads(available_cores())
    plan, store = run.plan(), CaseStore(run.store(configuration))
    chosen = plan.configuration(configuration)
    cases = [store.read(case) for case in run.folds(run.task())[0].train]
    batches = Batches(plan, chosen, cases, 0, torch.device("cpu"))
    network = build(chosen, len(plan.channels), len(plan.labels) + 1)
    optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
    seconds = []
    for step in range(10):
        images, targets = batches(step)
        before = time.perf_counter()
        train_step(network, optimiser, images, targets)
        seconds.append(time.perf_counter() - before)
    seconds = seconds[2:]
    print(f"median {statistics.median(seconds):.3f} s, {min(seconds):.3f} to {max(seconds):.3f} s")


if __name__ == "__main__":
    main()
