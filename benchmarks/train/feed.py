"""Time what feeds a training step.

    python benchmarks/train/feed.py RUN 3d
    python benchmarks/train/feed.py RUN 3d --lively
    python benchmarks/train/feed.py RUN 3d --patch 40x56x40 --batch 2 --steps 10

RUN is a folder that `medseg plan` and `medseg preprocess` made. Times are of one thread's CPU, so that
other programs disturb them little: of a batch, of its parts, and, with --steps, of training steps beside it.
"""

import argparse
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from medseg.cli.common import RunFolder
from medseg.io.store import CaseStore
from medseg.models.build import build
from medseg.plan.plan import Augmentation, Decision
from medseg.train import batches as module
from medseg.train.batches import Batches
from medseg.train.loss import loss_of

CPU = torch.device("cpu")
LIVELY = {
    "elastic_share": 0.3, "contrast": 0.25, "blur_share": 0.2, "low_resolution_share": 0.25, "mirror": (0, 1, 2),
}  # fmt: skip


def main() -> None:
    """Print the table's row."""
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("configuration")
    parser.add_argument("--patch")
    parser.add_argument("--batch", type=int)
    parser.add_argument("--lively", action="store_true", help="every kind of augmentation, in nnU-Net's shares")
    parser.add_argument("--strong", action="store_true", help="domain randomisation")
    parser.add_argument("--uncached", action="store_true", help="read each patch from disk")
    parser.add_argument("--steps", type=int, default=0, help="training steps to time beside it")
    given = parser.parse_args()
    torch.set_num_threads(1)
    run = RunFolder(given.run)
    plan, store = run.plan(), CaseStore(run.store(given.configuration))
    chosen = plan.configuration(given.configuration)
    if given.patch:
        chosen = chosen.model_copy(update={"patch": Decision(value=tuple(int(n) for n in given.patch.split("x")))})
    if given.batch:
        chosen = chosen.model_copy(update={"batch": Decision(value=given.batch)})
    if given.lively or given.strong:
        settings = Augmentation(**LIVELY) if given.lively else Augmentation(domain_randomisation=True)
        training = plan.training.model_copy(update={"augmentation": Decision(value=settings)})
        plan = plan.model_copy(update={"training": training})
    cases = [store.read(case) for case in run.folds(run.task())[0].train]
    if given.uncached:
        module.free_memory = lambda: 0  # type: ignore[assignment]
    batches = Batches(plan, chosen, cases, 0, CPU)
    for step in range(2 * len(cases) // chosen.batch.value):
        batches(step)  # every case is read once
    feeding = timed(batches, 200)
    print(f"batch: median {feeding[0]:.1f} ms, mean {feeding[1]:.1f} ms")
    if given.steps:
        training_step = timed(Stepper(plan, chosen, batches), given.steps)
        print(f"step: median {training_step[0]:.0f} ms; feeding is {feeding[1] / training_step[0]:.1%} of it")


def timed(call: object, times: int) -> tuple[float, float]:
    """Median and mean of a call's CPU milliseconds."""
    seconds = []
    for number in range(times):
        before = time.process_time()
        call(number)  # type: ignore[operator]
        seconds.append(1e3 * (time.process_time() - before))
    return statistics.median(seconds), float(np.mean(seconds))


class Stepper:
    """Training steps on one batch."""

    def __init__(self, plan, chosen, batches) -> None:  # type: ignore[no-untyped-def]
        self.network, self.loss = build(chosen, len(plan.channels), plan.outputs), loss_of(plan)
        self.optimiser = torch.optim.AdamW(self.network.parameters(), lr=1e-3)
        self.images, self.targets = batches(0)

    def __call__(self, _: int) -> None:
        self.optimiser.zero_grad()
        self.loss(self.network(self.images), self.targets).backward()
        self.optimiser.step()


if __name__ == "__main__":
    main()
