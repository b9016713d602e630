from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError, MedsegError
from medseg.core.resample import resample
from medseg.dataset.task import Task, load_case, load_task
from medseg.infer.predict import Predictor, Segmentation
from medseg.infer.stream import Tally
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.models.package import ModelPackage
from medseg.plan.plan import Plan
from medseg.preprocess.regrid import preprocess
from medseg.train import loop
from medseg.train.loop import Batches, Length, Progress, Setup, schedule, train, train_step, validate

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def task(tiny_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Task:
    return load_task(tiny_task(tmp_path_factory.mktemp("tasks") / "Task00_blobs", 5))


class Bench:
    """A plan, its preprocessed cases and where runs keep their logs."""

    def __init__(self, plan: Plan, task: Task, folder: Path) -> None:
        self.plan, self.task, self.folder = plan, task, folder
        (self.name,) = plan.configurations
        self.store = CaseStore(folder / "store")
        for case in task.cases:
            volume, labels = load_case(task, case)
            prepared = preprocess(volume, plan, plan.configuration(self.name))
            values = resample(labels, onto=prepared.grid).values
            places = {n: np.flatnonzero(values == n) for n in plan.label_set.numbers}
            self.store.write(case.id, prepared.values, values, places)
        self.store.finish(tuple(c.id for c in task.cases), plan.digest(), self.name)
        ids = [case.id for case in task.cases]
        self.train_ids, self.held_out = tuple(ids[:-1]), tuple(ids[-1:])

    def setup(self, **options: Any) -> Setup:
        return Setup(self.name, 0, self.train_ids, self.held_out, device="cpu", threads=1, **options)

    def run(self, log: str = "log", *, validate: bool = False, progress: Any = None, **options: Any) -> Any:
        cases = [(c, *load_case(self.task, self.task.case(c))) for c in self.held_out] if validate else []
        return train(
            self.plan,
            self.setup(**options),
            self.store,
            RunLog(self.folder / log),
            validation=cases,
            progress=progress,
        )


@pytest.fixture
def bench(small_plan: Any, task: Task, tmp_path: Path) -> Bench:
    return Bench(small_plan(), task, tmp_path)


def same(one: ModelPackage, other: ModelPackage) -> bool:
    (a,), (b,) = one.members, other.members
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# ---- it learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"patch": (16, 16, 16)},
        {"dimensions": 2, "slice_axis": 2, "patch": (16, 16, 1), "batch": 8},
        {"patch": (16, 16, 8), "labels": {3: "left blob", 7: "right blob"}},
    ],
    ids=["3d", "2d", "numbers with gaps"],
)
def test_a_bright_ball_is_learnt_in_seconds(small_plan: Any, task: Task, tmp_path: Path, arguments: Any) -> None:
    if "labels" in arguments:
        task = renumbered(task, tmp_path / "Task00_blobs", {1: 3, 2: 7})
    plan = small_plan(**arguments, steps_per_epoch=10, learning_rate=1e-2)
    bench = Bench(plan, task, tmp_path)
    package, records = bench.run(epochs=14, validate=True)
    assert records[-1]["dice"] >= 0.8
    assert records[-1]["loss"] < records[0]["loss"]
    # What the package predicts is what validation saw.
    volume, reference = load_case(task, task.case(bench.held_out[0]))
    made = Predictor(package, "torch-cpu").predict(volume)
    scores = []
    for number in plan.label_set.numbers:
        found, true = made.label_map.values == number, reference.values == number
        scores.append(2 * (found & true).sum() / (found.sum() + true.sum()))
    assert np.mean(scores) == pytest.approx(records[-1]["dice"], abs=1e-6)
    assert records[-1]["dice_by_label"] == pytest.approx(dict(zip(plan.label_set.names, scores, strict=True)), abs=1e-6)


def renumbered(task: Task, folder: Path, numbers: dict[int, int]) -> Task:
    """The same task with other label numbers."""
    import shutil

    import nibabel as nib

    shutil.copytree(task.folder, folder)
    described = json.loads((folder / "dataset.json").read_text())
    described["labels"] = {str(numbers.get(int(n), 0)): name for n, name in described["labels"].items()}
    (folder / "dataset.json").write_text(json.dumps(described))
    for path in (folder / "labelsTr").iterdir():
        image = nib.load(path)
        values = np.zeros(image.shape, dtype=np.uint8)
        for old, new in numbers.items():
            values[np.asarray(image.dataobj) == old] = new
        nib.save(nib.Nifti1Image(values, image.affine, image.header), path)
    return load_task(folder)


# ---- it repeats itself --------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights_bit_by_bit(bench: Bench) -> None:
    first, _ = bench.run("one", epochs=2)
    second, _ = bench.run("two", epochs=2)
    other, _ = bench.run("three", epochs=2, seed=1)
    assert same(first, second)
    assert not same(first, other)
    assert first.digest() == second.digest()


def stop_at(step: int) -> Callable[[Progress], None]:
    """As by ctrl-C."""

    def progress(now: Progress) -> None:
        if now.step == step:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["checkpoints", "none yet"])
def test_interrupted_and_taken_up_again_it_ends_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    whole, records = bench.run("whole", epochs=3, validate=True)
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", every)
    for step in (4, 5, 11) if every == 0 else (7,):
        with pytest.raises(KeyboardInterrupt):
            bench.run("parts", epochs=3, validate=True, progress=stop_at(step))
    seen: list[int] = []
    parts, again = bench.run("parts", epochs=3, validate=True, progress=lambda now: seen.append(now.step))
    assert seen[0] == (12 if every == 0 else 1)
    assert same(whole, parts)
    assert [r["step"] for r in again] == [r["step"] for r in records] == [5, 10, 15]
    assert [r["learning_rate"] for r in again] == [r["learning_rate"] for r in records]
    assert again[-1]["dice"] == records[-1]["dice"]
    assert parts.provenance["steps"] == 15


def test_killed_and_taken_up_again_it_ends_the_same(bench: Bench, tmp_path: Path) -> None:
    """kill -9, in the middle of whatever it is doing."""
    (tmp_path / "plan.json").write_text(bench.plan.model_dump_json())
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from medseg.io.runlog import RunLog; from medseg.io.store import CaseStore\n"
        "from medseg.plan.plan import read_plan; from medseg.train import loop\n"
        "loop._CHECKPOINT_SECONDS = 0\n"
        f"setup = loop.Setup({bench.name!r}, 0, {bench.train_ids!r}, {bench.held_out!r}, device='cpu', epochs=10)\n"
        f"folder = Path({str(tmp_path)!r})\n"
        "loop.train(read_plan(folder / 'plan.json'), setup, CaseStore(folder / 'store'), RunLog(folder / 'killed'),\n"
        "    progress=lambda now: print(now.step, flush=True))\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout is not None
    for line in child.stdout:
        if int(line) == 23:
            child.send_signal(signal.SIGKILL)
            break
    child.stdout.close()
    assert child.wait() == -signal.SIGKILL
    seen: list[int] = []
    resumed, records = bench.run("killed", epochs=10, progress=lambda now: seen.append(now.step))
    assert 23 <= seen[0] <= 50
    whole, _ = bench.run("whole", epochs=10)
    assert same(whole, resumed)
    assert [r["step"] for r in records] == list(range(5, 51, 5))


def test_a_run_that_has_ended_is_not_run_again(bench: Bench) -> None:
    first, records = bench.run(epochs=1)
    seen: list[Progress] = []
    second, again = bench.run(epochs=1, progress=seen.append)
    assert seen == []
    assert same(first, second)
    assert again == records


def test_runs_that_differ_do_not_take_up_each_others_checkpoints(small_plan: Any, task: Task, tmp_path: Path) -> None:
    bench = Bench(small_plan(), task, tmp_path)
    starts = []
    for options in ({"epochs": 1}, {"epochs": 2}, {"epochs": 1, "seed": 1}, {"budget_seconds": 0.5}):
        seen: list[int] = []
        bench.run("all", progress=lambda now, seen=seen: seen.append(now.step), **options)
        starts.append(seen[0])
    other = Bench(small_plan(learning_rate=1e-3), task, tmp_path)
    seen = []
    other.run("all", epochs=1, progress=lambda now: seen.append(now.step))
    assert [*starts, seen[0]] == [1] * 5
    assert len(list((tmp_path / "all").iterdir())) == 5


def test_a_broken_checkpoint_is_named(bench: Bench) -> None:
    bench.run(epochs=1)
    (path,) = (bench.folder / "log").glob("*/checkpoint.safetensors")
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(InputError, match=r"checkpoint.safetensors cannot be read .* Delete it"):
        bench.run(epochs=1)


# ---- it says what goes wrong --------------------------------------------------------------------


def test_a_loss_that_is_no_number_stops_the_run(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0)
    losses = iter([1.0, 1.0, math.nan])

    def no_number(*arguments: Any) -> float:
        train_step(*arguments)
        return next(losses)

    monkeypatch.setattr(loop, "train_step", no_number)
    with pytest.raises(MedsegError, match="the loss is nan at step 3"):
        bench.run(epochs=1)
    (found,) = (bench.folder / "log").iterdir()
    kept = RunLog(found).load()
    assert kept is not None
    assert kept[1]["step"] == 2


def test_a_case_of_infinite_values_makes_such_a_loss(bench: Bench) -> None:
    for name in bench.train_ids:
        case = bench.store.read(name)
        image = np.array(case.image)
        image[...] = np.inf
        bench.store.write(name, image, case.labels, case.places)
    with pytest.raises(MedsegError, match="at step 1"):
        bench.run(epochs=1)


def test_a_store_of_another_plan_is_refused(small_plan: Any, bench: Bench) -> None:
    bench.plan = small_plan(learning_rate=1e-4)
    with pytest.raises(InputError, match="was preprocessed by another plan"):
        bench.run(epochs=1)


def test_a_fold_without_cases_is_refused(bench: Bench) -> None:
    bench.train_ids = ()
    with pytest.raises(InputError, match="has no case to train on"):
        bench.run(epochs=1)


# ---- how long it takes --------------------------------------------------------------------------


def test_a_budget_is_kept_and_the_schedule_fitted_to_it(bench: Bench) -> None:
    started = time.perf_counter()
    package, records = bench.run(budget_seconds=4.0, validate=True)
    spent = time.perf_counter() - started
    done = package.provenance
    assert spent < 1.5 * 4.0 + 2
    assert done["steps"] == done["length"][-1][1] > 10
    assert records[-1]["step"] == done["steps"]
    assert "dice" in records[-1]
    assert Length([(a, b) for a, b in done["length"]]).progress(done["steps"]) == pytest.approx(1)
    assert spent > 0.3 * 4.0


def test_a_run_that_its_budget_has_ended_is_not_run_again(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the machine became slower than it was when it was timed."""
    monkeypatch.setattr(loop, "_steps", lambda *_: 10**6)
    first, records = bench.run(budget_seconds=1.0)
    assert first.provenance["steps"] < 10**6
    second, again = bench.run(budget_seconds=1.0)
    assert same(first, second)
    assert again == records


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    rates = [schedule(step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[50] == 1
    assert rates[525] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0)
    assert rates[:51] == sorted(rates[:51])
    assert rates[50:] == sorted(rates[50:], reverse=True)


def test_progress_is_even_until_the_length_is_corrected() -> None:
    length = Length([(0, 100)])
    assert [length.progress(step) for step in (0, 25, 100)] == [0, 0.25, 1]
    shorter = length.corrected(20, 60)
    assert shorter.steps == 60
    assert [shorter.progress(step) for step in (10, 20, 40, 60)] == pytest.approx([0.1, 0.2, 0.6, 1])
    again = shorter.corrected(40, 80)
    assert [again.progress(step) for step in (20, 40, 60, 80)] == pytest.approx([0.2, 0.6, 0.8, 1])
    assert length.corrected(20, 105) is length


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 300)), max_size=5), st.integers(2, 300))
def test_progress_never_falls_and_ends_at_one(corrections: list[tuple[int, int]], steps: int) -> None:
    length, at = Length([(0, steps)]), 0
    for after, left in corrections:
        at = min(at + after, length.steps - 1)
        length = length.corrected(at, at + left)
    line = [length.progress(step) for step in range(length.steps + 1)]
    assert line == sorted(line)
    assert line[-1] == pytest.approx(1)


# ---- what it leaves -----------------------------------------------------------------------------


def test_records_and_provenance(bench: Bench) -> None:
    shown: list[Progress] = []
    package, records = bench.run(epochs=4, validate=True, progress=shown.append)
    assert [r["step"] for r in records] == [5, 10, 15, 20]
    assert [now.step for now in shown] == list(range(1, 21))
    assert {now.steps for now in shown} == {r["steps"] for r in records} == {20}
    assert records[0]["loss"] == pytest.approx(np.mean([now.loss for now in shown[:5]]))
    assert all(0 <= r["dice"] <= 1 for r in records if "dice" in r)
    assert "dice" in records[-1]
    seconds = [r["seconds"] for r in records]
    assert seconds == sorted(seconds)
    (folder,) = (bench.folder / "log").iterdir()
    assert [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] == list(records)
    assert list((folder / "tensorboard").iterdir())
    assert package.trained_on == bench.train_ids
    assert package.held_out == bench.held_out
    done = package.provenance
    assert (done["seed"], done["fold"], done["device"], done["threads"]) == (0, 0, "cpu", 1)
    assert (done["steps"], done["length"]) == (20, [[0, 20]])
    assert done["plan"] == bench.plan.digest()
    assert {"medseg", "python", "torch", "numpy"} <= set(done["versions"])
    json.dumps(done, allow_nan=False)


def test_the_plans_own_epochs_are_the_default(small_plan: Any, task: Task, tmp_path: Path) -> None:
    package, _ = Bench(small_plan(epochs=2, steps_per_epoch=3), task, tmp_path).run()
    assert package.provenance["steps"] == 6


def test_the_average_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    network, average = torch.nn.Linear(1, 1, bias=False), torch.nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        average.weight.fill_(0)
    expected = 0.0
    for step in range(1, 30):
        with torch.no_grad():
            network.weight.fill_(step)
        loop._average(average, network, step)
        keep = min(0.999, (1 + step) / (10 + step))
        expected = keep * expected + (1 - keep) * step
    assert float(average.weight.detach()) == pytest.approx(expected, rel=1e-5)


# ---- its parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flat", [None, 0, 1, 2])
def test_a_batch_depends_on_its_number_alone(small_plan: Any, task: Task, tmp_path: Path, flat: int | None) -> None:
    patch = [1 if axis == flat else 12 for axis in range(3)]
    dimensions = 3 if flat is None else 2
    bench = Bench(small_plan(dimensions=dimensions, slice_axis=flat, patch=patch, batch=3), task, tmp_path)
    cases = [bench.store.read(c) for c in bench.train_ids]
    configuration = bench.plan.configuration(bench.name)
    one, two = (Batches(bench.plan, configuration, cases, 0, CPU) for _ in range(2))
    images, targets = one(7)
    assert images.shape == (3, 1, *[12] * dimensions)
    assert targets.shape == (3, *[12] * dimensions)
    assert targets.dtype == torch.int64
    two(3)
    again = two(7)
    assert torch.equal(images, again[0])
    assert torch.equal(targets, again[1])
    assert not torch.equal(images, one(8)[0])
    first, second = (Batches(bench.plan, configuration, cases[:1], seed, CPU)(7)[0] for seed in (0, 1))
    assert not torch.equal(first, second)


def test_numbers_with_gaps_become_consecutive_classes(small_plan: Any, task: Task, tmp_path: Path) -> None:
    task = renumbered(task, tmp_path / "Task00_blobs", {1: 3, 2: 7})
    bench = Bench(small_plan(labels={3: "left blob", 7: "right blob"}), task, tmp_path)
    cases = [bench.store.read(c) for c in bench.train_ids]
    batches = Batches(bench.plan, bench.plan.configuration(bench.name), cases, 0, CPU)
    assert {int(v) for n in range(4) for v in batches(n)[1].unique()} == {0, 1, 2}


def test_validation_means_by_hand(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases, one of them without the second label: that label counts where it is."""
    pairs = [(c, *load_case(bench.task, bench.task.case(c))) for c in bench.train_ids[:2]]
    first, second = (labels for _, _, labels in pairs)
    without = type(second)(np.where(second.values == 2, 0, second.values).astype(np.uint8), second.grid, second.labels)
    answers = iter([first, type(first)(np.zeros_like(second.values), second.grid, second.labels)])
    monkeypatch.setattr(loop, "segment", lambda *_: Segmentation(next(answers), Tally.empty(3, 1.0), None))
    cases = [pairs[0], (pairs[1][0], pairs[1][1], without)]
    found = validate(torch.nn.Identity(), cases, bench.plan, bench.name, CPU)
    assert found == {"dice": 0.75, "dice_by_label": {"left blob": 0.5, "right blob": 1.0}}
