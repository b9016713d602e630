"""What a second stage is told by the first: moved with the labels, never brightened, and full of mistakes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.errors import InputError
from medseg.core.resample import resample
from medseg.dataset.task import Task, load_case, load_task
from medseg.infer.predict import Predictor
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.models.build import build
from medseg.models.package import ModelPackage, load_package, save_package
from medseg.plan.cost import estimate
from medseg.plan.plan import Configuration, Plan
from medseg.preprocess.regrid import preprocess
from medseg.train import augment, loop
from medseg.train.augment import Mistakes, draw, mistaken
from medseg.train.batches import Batches
from medseg.train.loop import Before, Setup, train

CPU = torch.device("cpu")
AS_IT_IS, GROWN, SHRUNK, OPENED, CLOSED = range(5)
LIVELY = {
    "elastic_share": 0.5, "spatial_share": 1.0, "mirror": [0], "gamma": 0.9, "intensity": 0.9, "noise": 1.0,
    "contrast": 0.9, "blur_share": 1.0, "low_resolution_share": 1.0, "domain_randomisation": True,
}  # fmt: skip


def staged(small_plan: Any, **options: Any) -> Plan:
    """A plan whose configuration comes after "3d-low", which it has too."""
    plan: Plan = small_plan(**options)
    ((name, own),) = plan.configurations.items()
    second = own.model_copy(update={"previous": "3d-low"})
    return plan.model_copy(update={"configurations": {name: second, "3d-low": own}})


# ---- mistakes, by hand --------------------------------------------------------------------------


def mistakes(kinds: Any, side: Any = 1, order: Any = None, lost: Any = None) -> Mistakes:
    count = len(kinds)
    return Mistakes(
        order=np.arange(count) if order is None else np.array(order),
        kind=np.array(kinds),
        voxels=np.broadcast_to(side, (count, 3)).astype(np.int64),
        lost=np.array([np.nan] * count if lost is None else lost),
    )


def masks(*boxes: tuple[slice, ...], shape: tuple[int, ...] = (12, 11, 10)) -> torch.Tensor:
    found = torch.zeros((len(boxes), *shape))
    for mask, box in zip(found, boxes, strict=True):
        mask[box] = 1
    return found


def cube(low: int, high: int) -> tuple[slice, ...]:
    return (slice(low, high),) * 3


@pytest.fixture
def configuration(small_plan: Any) -> Configuration:
    return staged(small_plan).configuration("3d")


def test_a_mask_grows_and_shrinks_by_so_many_voxels(configuration: Configuration) -> None:
    for kind, expected in ((AS_IT_IS, cube(4, 7)), (GROWN, cube(2, 9)), (CLOSED, cube(4, 7)), (OPENED, cube(4, 7))):
        assert torch.equal(mistaken(masks(cube(4, 7)), mistakes([kind], 2 if kind == GROWN else 1), configuration),
                           masks(expected))  # fmt: skip
    assert torch.equal(mistaken(masks(cube(3, 8)), mistakes([SHRUNK], 2), configuration), masks(cube(5, 6)))
    assert not mistaken(masks(cube(3, 8)), mistakes([SHRUNK], 3), configuration).any()
    uneven = mistaken(masks(cube(4, 7)), mistakes([GROWN], (1, 0, 2)), configuration)
    assert torch.equal(uneven, masks((slice(3, 8), slice(4, 7), slice(2, 9))))


def test_thin_parts_are_opened_away_and_gaps_closed(configuration: Configuration) -> None:
    bridge = masks(cube(2, 6))
    bridge[0, 6:12, 3, 3] = 1
    assert torch.equal(mistaken(bridge, mistakes([OPENED]), configuration), masks(cube(2, 6)))
    hole = masks(cube(2, 7))
    hole[0, 4, 4, 4] = 0
    assert torch.equal(mistaken(hole, mistakes([CLOSED]), configuration), masks(cube(2, 7)))


def test_at_the_rim_of_a_patch_a_structure_goes_on(configuration: Configuration) -> None:
    found = mistaken(masks(cube(0, 5)), mistakes([SHRUNK]), configuration)
    assert torch.equal(found, masks(cube(0, 4)))


def test_what_one_grows_over_is_no_others_and_the_order_decides(configuration: Configuration) -> None:
    left, right = (slice(2, 5), slice(2, 8), slice(2, 8)), (slice(5, 8), slice(2, 8), slice(2, 8))
    wide = slice(1, 9)
    for order in ((0, 1), (1, 0)):
        found = mistaken(masks(left, right), mistakes([GROWN, GROWN], order=order), configuration)
        assert (found.sum(0) <= 1).all()
        # The later one takes a voxel of the other's, grown or not.
        last, first = found[order[1]], found[order[0]]
        expected = masks((slice(1, 6), wide, wide), (slice(4, 9), wide, wide))
        if order == (0, 1):  # the first had grown to 6, so that of the second 6 and 7 were left
            expected[1] = masks((slice(5, 9), wide, wide))[0]
        else:
            expected[0] = masks((slice(1, 5), wide, wide))[0]
        assert torch.equal(last, expected[order[1]])
        assert not (first * last).any()


def test_one_small_piece_is_missing(configuration: Configuration) -> None:
    found = masks(cube(0, 1))
    found[0, 4:6, 4, 4] = 1
    found[0, 8, 8, 8] = found[0, 9, 9, 9] = 1  # corners touch
    for where, gone in ((0.0, cube(0, 1)), (0.34, (slice(4, 6), 4, 4)), (0.99, cube(8, 10))):
        expected = found.clone()
        expected[0][gone] = 0
        assert torch.equal(mistaken(found.clone(), mistakes([AS_IT_IS], lost=[where]), configuration), expected)
    # What fills much of a patch is never lost, and of nothing nothing is.
    large = masks(cube(1, 9))
    assert torch.equal(mistaken(large.clone(), mistakes([AS_IT_IS], lost=[0.5]), configuration), large)
    assert not mistaken(torch.zeros_like(large), mistakes([GROWN], lost=[0.5]), configuration).any()


def test_in_two_dimensions_the_slice_axis_is_left_out(small_plan: Any) -> None:
    flat = staged(small_plan, dimensions=2, slice_axis=1, patch=(16, 1, 16)).configuration("2d")
    found = masks((slice(4, 6), slice(4, 6)), shape=(10, 12))
    made = mistaken(found, mistakes([GROWN], (1, 5, 2)), flat)
    assert torch.equal(made, masks((slice(3, 7), slice(2, 8)), shape=(10, 12)))


def test_how_often_and_how_far(small_plan: Any) -> None:
    plan = staged(small_plan, spacing=(1.0, 1.0, 4.0))
    rng = np.random.default_rng(0)
    drawn = [draw(rng, plan, plan.configuration("3d")).mistakes for _ in range(2000)]
    some = [one for one in drawn if one is not None]
    assert len(some) == 2000
    off = np.array([one.kind for one in some])
    assert np.mean((off > 0).any(axis=1)) == pytest.approx(0.4, abs=0.04)
    assert set(np.unique(off)) == {0, 1, 2, 3, 4}
    assert np.mean([not np.isnan(one.lost).any() for one in some]) == pytest.approx(0.2, abs=0.04)
    voxels = np.concatenate([one.voxels for one in some])
    assert (voxels.min(axis=0) >= (1, 1, 0)).all()
    assert (voxels.max(axis=0) <= (6, 6, 2)).all()
    assert draw(rng, plan, plan.configuration("3d-low")).mistakes is None


# ---- batches ------------------------------------------------------------------------------------


@pytest.fixture
def told(small_plan: Any, tmp_path: Path) -> Callable[..., Batches]:
    """Batches of cases of which the first stage found what is true."""
    rng, store = np.random.default_rng(0), CaseStore(tmp_path / "told")
    cases = []
    for i, shape in enumerate([(30, 36, 24), (24, 20, 20)]):
        labels = np.zeros(shape, dtype=np.uint8)
        labels[4:14, 4:16, 4:15], labels[14:22, 6:12, 3:12] = 1, 2
        image = np.concatenate([rng.normal(size=(1, *shape)), np.stack([labels == 1, labels == 2])])
        store.write(f"case{i}", image, labels, {n: np.flatnonzero(labels == n) for n in (1, 2)})
        cases.append(store.read(f"case{i}"))

    def make(**options: Any) -> Batches:
        plan = staged(small_plan, batch=4, **options)
        name = next(iter(plan.configurations))
        return Batches(plan, plan.configuration(name), cases, 0, CPU)

    return make


@pytest.mark.parametrize("flat", [None, 2])
def test_they_are_moved_with_the_classes_and_keep_their_values(
    told: Any, flat: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(augment, "_OFF_SHARE", 0.0)
    monkeypatch.setattr(augment, "_LOST_SHARE", 0.0)
    patch = [1 if axis == flat else 16 for axis in range(3)]
    batches = told(dimensions=2 if flat else 3, slice_axis=flat, patch=patch, augmentation=LIVELY)
    for step in range(6):
        images, classes = batches(step)
        assert images.shape[1] == 3
        for number in (1, 2):
            assert torch.equal(images[:, number], (classes == number).float())
    assert (images[:, 0].unique().numel()) > 1000


def test_with_mistakes_they_differ_from_the_classes_and_are_masks(told: Any) -> None:
    batches, plain = told(augmentation=LIVELY), told(augmentation=LIVELY)
    differ = 0
    for step in range(8):
        images, classes = batches(step)
        assert set(images[:, 1:].unique().tolist()) <= {0.0, 1.0}
        assert (images[:, 1:].sum(1) <= 1).all()
        truth = torch.stack([classes == 1, classes == 2], 1).float()
        differ += int((images[:, 1:] != truth).flatten(1).any(1).sum())
        again, same_classes = plain(step)
        assert torch.equal(images, again)
        assert torch.equal(classes, same_classes)
    # Of 32 patches 0.4 + 0.6 * 0.2 are spoiled, as far as they show something.
    assert 5 <= differ <= 25


# ---- a run --------------------------------------------------------------------------------------


class Bench:
    """A second stage of a task of four cases, the last held out, of which the first found what is true."""

    def __init__(self, plan: Plan, task: Task, folder: Path) -> None:
        self.plan, self.task, self.folder, self.store = plan, task, folder, CaseStore(folder / "store")
        ids = tuple(case.id for case in task.cases)
        low = plan.configuration("3d-low")
        torch.manual_seed(0)
        weights = build(low, 1, plan.outputs).state_dict()
        self.first = ModelPackage(plan, "3d-low", (weights,), ids[:-1], ids[-1:], {})
        for case in task.cases:
            volume, labels = load_case(task, case)
            prepared = preprocess(volume, plan, plan.configuration("3d"), labels)
            values = resample(labels, onto=prepared.grid).values
            self.store.write(case.id, prepared.values, values, {n: np.flatnonzero(values == n) for n in (1, 2)})
        self.store.finish(ids, plan.preparation("3d"), "3d", (self.first.digest(),))
        self.setup = Setup("3d", 0, ids[:-1], ids[-1:], (self.first.digest(),), device="cpu")
        self.held_out = [(ids[-1], *load_case(task, task.cases[-1]))]
        self.before: Before | None = Before(self.first, {case: labels for case, _, labels in self.held_out})

    def run(self, log: str = "log", **asked: Any) -> Any:
        given = {"validation": self.held_out, "before": self.before, **asked}
        return train(self.plan, self.setup, self.store, RunLog(self.folder / log), **given)


@pytest.fixture
def bench(small_plan: Any, tiny_task: Any, tmp_path: Path) -> Bench:
    task = load_task(tiny_task(tmp_path / "Task00_blobs", 4))
    return Bench(staged(small_plan, steps=12, steps_per_epoch=4, learning_rate=1e-2), task, tmp_path)


def stop_at(step: int) -> Callable[[Any], None]:
    """As by ctrl-C."""

    def progress(now: Any) -> None:
        if now.step == step:
            raise KeyboardInterrupt

    return progress


def test_interrupted_and_taken_up_again_it_ends_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, same: Any
) -> None:
    whole, records = bench.run("whole")
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0)
    for step in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            bench.run("parts", progress=stop_at(step))
    parts, again = bench.run("parts")
    assert same(whole, parts)
    assert [r["loss"] for r in again] == [r["loss"] for r in records]
    assert again[-1]["dice"] == records[-1]["dice"]
    assert whole.provenance["previous"] == [bench.first.digest()]


def test_its_package_is_read_again_and_runs_the_first_stage(bench: Bench) -> None:
    package, _ = bench.run()
    save_package(bench.folder / "model", package)
    loaded = load_package(bench.folder / "model")
    assert loaded.digest() == package.digest()
    assert loaded.previous is not None
    assert loaded.previous.digest() == bench.first.digest()
    _, volume, _ = bench.held_out[0]
    predictor = Predictor(loaded, "torch-cpu")
    told = predictor.before(volume)
    assert told is not None
    assert np.array_equal(told.values, Predictor(bench.first, "torch-cpu").predict(volume).label_map.values)
    made = predictor.predict(volume)
    assert made.label_map.grid == volume.grid


def test_another_first_stage_is_another_run(bench: Bench, same: Any) -> None:
    first, _ = bench.run()
    other = ("0" * 64, bench.first.digest())
    bench.store.finish(bench.store.cases(), bench.plan.preparation("3d"), "3d", other)
    with pytest.raises(
        InputError, match=r"what other models of the stage before found\. Run `medseg preprocess .* again"
    ):
        bench.run()
    bench.setup = replace(bench.setup, previous=other)
    seen: list[int] = []
    again, _ = bench.run(progress=lambda now: seen.append(now.step))
    assert seen[0] == 1
    assert same(first, again)  # of the same cases


def test_what_it_is_not_given_and_what_has_seen_too_much_is_refused(bench: Bench) -> None:
    before = bench.before
    assert before is not None
    with pytest.raises(InputError, match=r"3d takes the labels of 3d-low, .* Train and predict 3d-low first"):
        bench.run(before=None)
    held = bench.setup.held_out[0]
    for what in ({"held_out": ()}, {"trained_on": bench.setup.train + bench.setup.held_out}):
        leaking = replace(before, package=replace(before.package, **what))
        with pytest.raises(InputError, match=rf"{held}.*3d-low did not hold it out in fold 0"):
            bench.run(before=leaking)
    with pytest.raises(InputError, match="that is not what it is given"):
        bench.run(before=replace(before, package=replace(before.package, configuration_name="3d")))
    bench.setup = replace(bench.setup, configuration="3d-low", previous=())
    bench.store.finish(bench.store.cases(), bench.plan.preparation("3d-low"), "3d-low")
    with pytest.raises(InputError, match="3d-low takes the labels of no other model"):
        bench.run()


def test_memory_counts_what_it_is_told(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    configuration = bench.plan.configuration("3d")
    half = loop.torch_precision(CPU) != "f32"
    alone, both = (estimate(configuration, n, 3, kind="cpu", half=half).memory_bytes for n in (1, 3))
    assert both > alone
    monkeypatch.setattr(loop, "free_memory", lambda: (alone + both) / 2 / loop._RECKONING)
    loop.require_fit(bench.plan, bench.plan.configuration("3d-low"), 3, CPU, loop.ALONE)
    with pytest.raises(InputError, match="to train, there are"):
        loop.require_fit(bench.plan, configuration, 3, CPU, loop.ALONE)
