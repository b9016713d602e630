"""What a GPU is promised to do; skipped where there is none."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.dataset.task import load_case, load_task
from medseg.infer.predict import Predictor
from medseg.models.build import build
from medseg.models.unet_classic import largest_of_windows
from medseg.plan.families import FAMILIES, TRAINED
from medseg.plan.planner import sketch
from medseg.train.batches import Batches
from medseg.train.loop import Progress, train_step
from medseg.train.loss import by_family, dice_cross_entropy

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU")


@pytest.fixture
def repeatable(monkeypatch: pytest.MonkeyPatch) -> Any:
    """As `medseg train --deterministic` sets it."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("patch", [(32, 48, 32), (64, 48)], ids=["3D", "2D"])
@pytest.mark.parametrize("family", [name for name in TRAINED if not FAMILIES[name].counts])
def test_steps_repeat_bit_by_bit(repeatable: None, family: str, patch: tuple[int, ...]) -> None:
    configuration = sketch(family, patch, 4, 32)
    ends = set()
    for _ in range(2):
        torch.manual_seed(0)
        network = build(configuration, 1, 3).cuda()
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
        shape = [n for axis, n in enumerate(configuration.patch.value) if axis != configuration.slice_axis]
        for _ in range(2):
            images, classes = torch.randn((2, 1, *shape)).cuda(), torch.randint(0, 3, (2, *shape)).cuda()
            train_step(network, optimiser, images, classes, by_family(configuration, dice_cross_entropy))
        ends.add(hashlib.sha256(b"".join(p.detach().cpu().numpy().tobytes() for p in network.parameters())).digest())
    assert len(ends) == 1


def test_pooling_that_repeats_itself_pools_alike() -> None:
    x = torch.rand((2, 3, 9, 8, 6), device="cuda")
    assert torch.equal(torch.nn.functional.max_pool3d(x, (2, 2, 3)), largest_of_windows(x, (2, 2, 3)))


def on_gpu(made: Any, **options: Any) -> Any:
    made.setup = replace(made.setup, device="cuda", **options)
    return made


def test_a_gpu_gives_the_labels_of_a_processor(few: Any, tmp_path: Path) -> None:
    package = on_gpu(few(steps=150, learning_rate=1e-2)).train(unlabelled=())
    task = load_task(tmp_path / "Task00_blobs")
    volume, _ = load_case(task, task.cases[-1])
    labels = [Predictor(package, engine).predict(volume).label_map.values for engine in ("torch-cuda", "torch-cpu")]
    either = (labels[0] > 0) | (labels[1] > 0)
    assert either.any()
    assert np.mean((labels[0] == labels[1])[either]) > 0.97


def test_stopped_and_gone_on_with_it_ends_the_same(repeatable: None, few: Any, same: Any) -> None:
    def stop(now: Progress) -> None:
        if now.step == 20:
            raise KeyboardInterrupt

    made = on_gpu(few(steps=40), deterministic=True)
    whole = made.train("whole", unlabelled=())
    with pytest.raises(KeyboardInterrupt):
        made.train("parts", unlabelled=(), progress=stop)
    assert same(made.train("parts", unlabelled=()), whole)


def test_cases_kept_on_the_gpu_give_the_batches_of_those_that_are_not(few: Any) -> None:
    made = few()
    cases = [made.store.read(case) for case in made.setup.train]
    kept, read = (
        Batches(made.plan, made.plan.configuration("3d"), cases, 0, torch.device("cuda"), room=room) for room in (1, 0)
    )
    for step in range(3):
        for one, other in zip(kept(step), read(step), strict=True):
            torch.testing.assert_close(one, other)
