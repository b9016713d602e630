from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.errors import InputError
from medseg.infer.engine import torch_precision
from medseg.io.store import CaseStore, StoredCase
from medseg.plan.cost import estimate, feed_bytes
from medseg.plan.plan import Decision, Plan
from medseg.train import batches as module
from medseg.train.batches import Batches, Feed
from medseg.train.loss import IGNORED

CPU = torch.device("cpu")


@pytest.fixture
def store(tmp_path: Path) -> CaseStore:
    """Four cases, the last smaller than a patch; label 2 is in the first alone."""
    rng, store = np.random.default_rng(0), CaseStore(tmp_path / "store")
    for i, shape in enumerate([(40, 36, 34), (24, 33, 20), (20, 20, 20), (9, 12, 7)]):
        labels = np.zeros(shape, dtype=np.uint8)
        labels[3:6, 3:6, 3:6] = 1
        if i == 0:
            labels[30, 30, 30] = 2
        places = {n: np.flatnonzero(labels == n) for n in (1, 2)}
        store.write(f"case{i}", rng.normal(size=(1, *shape)), labels, places)
    return store


def cases_of(store: CaseStore) -> list[StoredCase]:
    return [store.read(f"case{i}") for i in range(4)]


def make(plan: Plan, cases: list[StoredCase], seed: int = 0) -> Batches:
    (configuration,) = plan.configurations.values()
    return Batches(plan, configuration, cases, seed, CPU)


LIVELY = {
    "elastic_share": 0.5, "blur_share": 0.5, "low_resolution_share": 0.5, "contrast": 0.3, "mirror": [0], "gamma": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("flat", [None, 0, 1, 2])
@pytest.mark.parametrize("settings", [{}, LIVELY, {"domain_randomisation": True}], ids=["plain", "lively", "strong"])
def test_a_batch_depends_on_seed_and_step_alone(
    small_plan: Any, store: CaseStore, flat: int | None, settings: Any
) -> None:
    patch = [1 if axis == flat else 16 for axis in range(3)]
    dimensions = 2 if flat is not None else 3
    plan = small_plan(dimensions=dimensions, slice_axis=flat, patch=patch, batch=3, augmentation=settings)
    one, two = make(plan, cases_of(store)), make(plan, cases_of(store))
    expected = [one(step) for step in range(8)]
    images, classes = expected[0]
    assert images.shape == (3, 1, *[16] * dimensions)
    assert classes.shape == (3, *[16] * dimensions)
    assert (images.dtype, classes.dtype) == (torch.float32, torch.int64)
    assert all(torch.isfinite(i).all() for i, _ in expected)
    with ThreadPoolExecutor(4) as pool:  # in another order, at once
        found = dict(zip(range(7, -1, -1), pool.map(two, range(7, -1, -1)), strict=True))
    for step, (images, classes) in enumerate(expected):
        assert torch.equal(images, found[step][0])
        assert torch.equal(classes, found[step][1])
    assert not torch.equal(expected[0][0], expected[1][0])
    assert not torch.equal(make(plan, cases_of(store), seed=1)(0)[0], expected[0][0])


@pytest.mark.parametrize("settings", [{}, LIVELY], ids=["plain", "lively"])
def test_what_is_kept_and_what_is_read_in_part_are_the_same(
    small_plan: Any, store: CaseStore, settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = small_plan(augmentation=settings)
    kept = make(plan, cases_of(store))
    monkeypatch.setattr(module, "free_memory", lambda: 0)
    read = make(plan, cases_of(store))
    for step in range(6):
        assert all(torch.equal(a, b) for a, b in zip(kept(step), read(step), strict=True))
    assert kept._kept
    assert not read._kept


def test_cases_are_kept_only_in_half_of_what_training_leaves_free(
    small_plan: Any, store: CaseStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, cases = small_plan(), cases_of(store)
    size = sum(case.image.nbytes + 2 * int(np.prod(case.shape)) for case in cases)
    c = plan.configuration("3d")
    takes = estimate(c, 1, 3, kind="cpu", half=torch_precision(torch.device("cpu")) != "f32").memory_bytes
    takes += feed_bytes(c, 1, "cpu")
    for free, kept in ((takes + 2 * size, True), (takes + 2 * size - 2, False)):
        monkeypatch.setattr(module, "free_memory", lambda free=free: free)
        assert make(plan, cases)._keep is kept


def test_without_variation_a_small_case_lies_in_the_middle_of_zeros(small_plan: Any, store: CaseStore) -> None:
    off = {"spatial_share": 0, "intensity": 0, "gamma": 0, "noise": 0}
    case = store.read("case3")
    images, classes = make(small_plan(batch=1, augmentation=off), [case])(0)
    expected = np.zeros((16, 16, 16), dtype=np.float32)
    expected[4:13, 2:14, 5:12] = np.array(case.image)[0]
    assert np.array_equal(images[0, 0], expected)
    assert int((classes == 1).sum()) == 27


def test_a_rare_class_is_seen(small_plan: Any, store: CaseStore) -> None:
    plan = small_plan(foreground_share=1.0)
    training = plan.training.model_copy(update={"class_share": 1.0})
    first = make(plan.model_copy(update={"training": training}), cases_of(store))
    seen = sum(bool((first(step)[1][i] == 2).any()) for step in range(100) for i in range(2))
    assert seen / 200 == pytest.approx(0.5, abs=0.12)


def test_mirrors_along_the_axes_that_the_plan_allows(small_plan: Any, tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    ramp = np.indices((16, 16, 16)).astype(np.float16)
    store.write("a", ramp, np.zeros((16, 16, 16), dtype=np.uint8), {})
    settings = {"spatial_share": 0, "intensity": 0, "gamma": 0, "noise": 0, "mirror": [0, 2]}
    made = make(small_plan(channels=["CT", "b", "c"], augmentation=settings), [store.read("a")])
    turned = Counter()
    for step in range(40):
        for image in made(step)[0].numpy():
            signs = tuple(int(np.sign(image[a].take(15, axis=a) - image[a].take(0, axis=a)).mean()) for a in range(3))
            turned[signs] += 1
    assert set(turned) == {(a, 1, c) for a in (1, -1) for c in (1, -1)}


def test_a_mirrored_patch_of_a_small_case_has_all_its_labels(small_plan: Any, store: CaseStore) -> None:
    """The case is 9, 12 and 7 voxels long, the patch 16: the middles of two axes are not the same."""
    mirrored = {"spatial_share": 0, "intensity": 0, "gamma": 0, "noise": 0, "mirror": [1]}
    case = store.read("case3")
    made = make(small_plan(batch=1, augmentation=mirrored), [case])
    expected = np.zeros((16, 16, 16), dtype=np.float32)
    expected[4:13, 2:14, 5:12] = np.array(case.image)[0]
    seen = [made(step)[0][0, 0].numpy() for step in range(12)]
    turned = [image for image in seen if not np.array_equal(image, expected)]
    assert 0 < len(turned) < 12
    assert all(np.allclose(image, expected[:, ::-1], atol=1e-3) for image in turned)


def test_optional_channels_are_missing_now_and_then(small_plan: Any, tmp_path: Path) -> None:
    store = CaseStore(tmp_path)
    store.write("a", np.ones((2, 16, 16, 16)), np.zeros((16, 16, 16), dtype=np.uint8), {})
    plan = small_plan(channels=["CT", "T2"], augmentation={"channel_dropout": 0.3})
    gone = {}
    for optional in ((), ("T2",)):
        made = make(plan.model_copy(update={"optional_channels": Decision(value=optional)}), [store.read("a")])
        gone[optional] = np.mean([(made(step)[0].flatten(2) == 0).all(-1).numpy() for step in range(150)], axis=(0, 1))
    assert gone[()].tolist() == [0, 0]
    assert gone["T2",][0] == 0
    assert gone["T2",][1] == pytest.approx(0.3, abs=0.08)


def test_a_label_to_ignore(small_plan: Any, store: CaseStore) -> None:
    plan = small_plan(labels={1: "a"})
    training = plan.training.model_copy(update={"ignore_label": 2, "class_share": 0.0})
    made = make(plan.model_copy(update={"training": training}), cases_of(store)[:1])
    assert {int(v) for step in range(40) for v in made(step)[1].unique()} == {IGNORED, 0, 1}


# ---- what goes wrong ----------------------------------------------------------------------------


@pytest.mark.parametrize("memory", [0, 2**40])
@pytest.mark.parametrize("fault", ["changed", "short", "gone"])
def test_a_case_that_goes_bad_is_named(
    small_plan: Any, store: CaseStore, memory: int, fault: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "free_memory", lambda: memory)
    made = make(small_plan(), cases_of(store))
    path = store.folder / "case2.image.npy"
    data = bytearray(path.read_bytes())
    data[-2000] ^= 4
    if fault == "gone":
        path.unlink()
    else:
        path.write_bytes(data if fault == "changed" else data[:300])
    with pytest.raises(InputError) as caught, Feed(made, threads=2) as feed:  # noqa: PT012
        for _ in range(40):
            next(feed)
    assert caught.value.case == "case2"
    assert "case2.image.npy" in str(caught.value)
    assert "medseg preprocess" in caught.value.remedy


@pytest.mark.parametrize("number", [5, 200])
def test_a_label_that_the_plan_does_not_know_is_named(small_plan: Any, tmp_path: Path, number: int) -> None:
    store = CaseStore(tmp_path)
    store.write("odd", np.zeros((1, 20, 20, 20)), np.full((20, 20, 20), number, dtype=np.uint8), {})
    with pytest.raises(InputError, match=f"case odd: it holds the label {number}"):
        make(small_plan(labels={1: "a", 7: "b"}), [store.read("odd")])(0)


# ---- feeding ------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_batches_come_in_order_whatever_each_takes(threads: int) -> None:
    def slow(step: int) -> int:
        time.sleep(0.01 * (step % 3))
        return step

    with Feed(slow, 5, threads=threads) as feed:
        assert [next(feed) for _ in range(20)] == list(range(5, 25))


def test_it_runs_ahead_so_far_and_no_further() -> None:
    made: list[int] = []

    def settle(count: int) -> list[int]:
        ended = time.perf_counter() + 10
        while len(made) < count and time.perf_counter() < ended:
            time.sleep(0.01)
        time.sleep(0.1)
        return sorted(made)

    with Feed(lambda step: made.append(step) or step, threads=2, ahead=3) as feed:
        assert settle(3) == [0, 1, 2]
        assert next(feed) == 0
        assert settle(4) == [0, 1, 2, 3]


def test_what_a_thread_raises_is_raised_at_its_step_and_the_feed_closes() -> None:
    def fail(step: int) -> int:
        if step == 3:
            raise InputError("it is broken", "Mend it", case="a")
        return step

    with pytest.raises(InputError, match="case a: it is broken"), Feed(fail, threads=3) as feed:  # noqa: PT012
        for step in range(3):
            assert next(feed) == step
        next(feed)
    ended = time.perf_counter() + 5
    while any(thread.name.startswith("feed") for thread in threading.enumerate()):
        assert time.perf_counter() < ended
        time.sleep(0.01)
    with pytest.raises(StopIteration):
        next(feed)
    feed.close()


def test_closing_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_PATIENCE", 0.2)
    stuck = threading.Event()
    feed = Feed(lambda _: stuck.wait(30), threads=1)
    started = time.perf_counter()
    feed.close()
    assert time.perf_counter() - started < 5
    stuck.set()


def test_what_is_fed_is_what_is_called(small_plan: Any, store: CaseStore) -> None:
    plan = small_plan(augmentation=LIVELY)
    made = make(plan, cases_of(store))
    with Feed(make(plan, cases_of(store)), 3, threads=3) as feed:
        for step in range(3, 12):
            assert all(torch.equal(a, b) for a, b in zip(next(feed), made(step), strict=True))
