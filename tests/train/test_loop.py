from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.errors import InputError, MedsegError
from medseg.core.resample import resample
from medseg.dataset.task import Task, load_case, load_task
from medseg.infer.predict import Predictor, Segmentation
from medseg.infer.stream import Tally
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.models.build import build
from medseg.plan.plan import Decision, Plan, Watching
from medseg.preprocess.regrid import preprocess
from medseg.train import loop
from medseg.train.batches import Batches
from medseg.train.loop import (
    Progress,
    Setup,
    StoppedError,
    fitting,
    schedule,
    train,
    train_step,
    validate,
)

CPU = torch.device("cpu")


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
        self.store.finish(tuple(c.id for c in task.cases), plan.preparation(self.name), self.name)
        ids = [case.id for case in task.cases]
        self.train_ids, self.held_out = tuple(ids[:-1]), tuple(ids[-1:])

    def setup(self, **options: Any) -> Setup:
        return Setup(self.name, 0, self.train_ids, self.held_out, device="cpu", threads=1, **options)

    def lasting(self, steps: int) -> Plan:
        """The plan with another number of steps."""
        return lasting(self.plan, steps)

    def run(self, log: str = "log", *, steps: int = 5, validate: bool = False, **options: Any) -> Any:
        cases = [(c, *load_case(self.task, self.task.case(c))) for c in self.held_out] if validate else []
        asked = {name: options.pop(name) for name in ("progress", "stop", "start") if name in options}
        return train(
            self.lasting(steps), self.setup(**options), self.store, RunLog(self.folder / log), validation=cases, **asked
        )


def lasting(plan: Plan, steps: int) -> Plan:
    """A plan of which every configuration takes so many steps."""
    changed = {n: c.model_copy(update={"steps": Decision(value=steps)}) for n, c in plan.configurations.items()}
    return plan.model_copy(update={"configurations": changed})


@pytest.fixture
def bench(small_plan: Any, task: Task, tmp_path: Path) -> Bench:
    return Bench(small_plan(), task, tmp_path)


# ---- it learns ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "steps"),
    [
        ({"patch": (16, 16, 16)}, 160),
        ({"dimensions": 2, "slice_axis": 2, "patch": (16, 16, 1), "batch": 8}, 240),
        ({"patch": (16, 16, 8), "labels": {3: "left blob", 7: "right blob"}}, 160),
    ],
    ids=["3d", "2d", "numbers with gaps"],
)
def test_a_bright_ball_is_learnt_in_seconds(
    small_plan: Any, task: Task, tmp_path: Path, arguments: Any, steps: int
) -> None:
    if "labels" in arguments:
        task = renumbered(task, tmp_path / "Task00_blobs", {1: 3, 2: 7})
    plan = small_plan(**arguments, steps_per_epoch=10, learning_rate=1e-2)
    bench = Bench(plan, task, tmp_path)
    package, records = bench.run(steps=steps, validate=True)
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


def test_the_same_seed_gives_the_same_weights_bit_by_bit(bench: Bench, same: Any) -> None:
    first, _ = bench.run("one", steps=10)
    second, _ = bench.run("two", steps=10)
    other, _ = bench.run("three", steps=10, seed=1)
    assert same(first, second)
    assert not same(first, other)
    assert first.digest() == second.digest()


def stop_at(step: int) -> Callable[[Progress], None]:
    """As by ctrl-C."""

    def progress(now: Progress) -> None:
        if now.step == step:
            raise KeyboardInterrupt

    return progress


def averaged(plan: Plan, members: int) -> Plan:
    """A plan of which every configuration trains so many networks."""
    changed = {n: c.model_copy(update={"members": Decision(value=members)}) for n, c in plan.configurations.items()}
    return plan.model_copy(update={"configurations": changed})


def test_members_differ_and_the_second_is_taken_up_where_it_was_stopped(bench: Bench, same: Any) -> None:
    alone, told = bench.run("alone", steps=8)
    bench.plan = averaged(bench.plan, 2)
    whole, records = bench.run("whole", steps=8)
    first, second = whole.members
    # A member that is asked for later is trained alone.
    begun: list[str] = []
    assert same(whole, bench.run("alone", steps=8, progress=lambda now: begun.append(now.phase))[0])
    assert set(begun) == {"training 2 of 2"}
    assert all(torch.equal(first[name], tensor) for name, tensor in alone.members[0].items())
    assert not all(torch.equal(first[name], second[name]) for name in first)
    assert [r["step"] for r in records] == 2 * [r["step"] for r in told]
    assert sorted(r["seconds"] for r in records) == [r["seconds"] for r in records]

    seen: list[str] = []

    def stop_in_the_second(now: Progress) -> None:
        seen.append(now.phase)
        if len(seen) == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.run("stopped", steps=8, progress=stop_in_the_second)
    assert seen == 8 * ["training 1 of 2"] + 4 * ["training 2 of 2"]
    assert same(whole, bench.run("stopped", steps=8)[0])


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["checkpoints", "at validations"])
def test_interrupted_and_taken_up_again_it_ends_the_same(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, every: float, same: Any
) -> None:
    whole, records = bench.run("whole", steps=15, validate=True)
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", every)
    for step in (4, 5, 11) if every == 0 else (7,):
        with pytest.raises(KeyboardInterrupt):
            bench.run("parts", steps=15, validate=True, progress=stop_at(step))
    seen: list[int] = []
    parts, again = bench.run("parts", steps=15, validate=True, progress=lambda now: seen.append(now.step))
    assert seen[0] == (12 if every == 0 else 6)  # the validation at step 5 left a checkpoint
    assert same(whole, parts)
    assert [r["step"] for r in again] == [r["step"] for r in records] == [5, 10, 15]
    assert [(r["learning_rate"], r["loss"]) for r in again] == [(r["learning_rate"], r["loss"]) for r in records]
    assert again[-1]["dice"] == records[-1]["dice"]
    assert parts.provenance["steps"] == 15


def test_killed_and_taken_up_again_it_ends_the_same(bench: Bench, tmp_path: Path, same: Any) -> None:
    """kill -9, in the middle of whatever it is doing."""
    (tmp_path / "plan.json").write_text(bench.lasting(50).model_dump_json())
    script = (
        "import sys, torch; from pathlib import Path\n"
        "from medseg.io.runlog import RunLog; from medseg.io.store import CaseStore\n"
        "from medseg.plan.plan import read_plan; from medseg.train import loop\n"
        "loop._CHECKPOINT_SECONDS = 0\n"
        f"setup = loop.Setup({bench.name!r}, 0, {bench.train_ids!r}, {bench.held_out!r}, device='cpu')\n"
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
    resumed, records = bench.run("killed", steps=50, progress=lambda now: seen.append(now.step))
    assert 23 <= seen[0] <= 50
    whole, _ = bench.run("whole", steps=50)
    assert same(whole, resumed)
    assert [r["step"] for r in records] == list(range(5, 51, 5))


def test_a_run_that_has_ended_is_not_run_again(bench: Bench, same: Any) -> None:
    first, records = bench.run()
    seen: list[Progress] = []
    second, again = bench.run(progress=seen.append)
    assert seen == []
    assert same(first, second)
    assert again == records


def test_runs_that_differ_do_not_take_up_each_others_checkpoints(small_plan: Any, task: Task, tmp_path: Path) -> None:
    bench = Bench(small_plan(), task, tmp_path)
    starts = []
    for options in ({"steps": 5}, {"steps": 10}, {"steps": 5, "seed": 1}):
        seen: list[int] = []
        bench.run("all", progress=lambda now, seen=seen: seen.append(now.step), **options)
        starts.append(seen[0])
    other = Bench(small_plan(learning_rate=1e-3), task, tmp_path)
    seen = []
    other.run("all", progress=lambda now: seen.append(now.step))
    assert [*starts, seen[0]] == [1] * 4
    assert len(list((tmp_path / "all").iterdir())) == 4


def test_after_a_broken_checkpoint_the_earlier_one_and_after_that_none(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, same: Any
) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0)
    whole, _ = bench.run()
    (last,) = (bench.folder / "log").glob("*/checkpoint.safetensors")
    (earlier,) = (bench.folder / "log").glob("*/checkpoint.earlier.safetensors")
    last.write_bytes(last.read_bytes()[:-10])
    seen: list[int] = []
    again, _ = bench.run(progress=lambda now: seen.append(now.step))
    assert seen == [5]
    assert same(whole, again)
    last.unlink()  # as where the machine stopped between two renames
    seen.clear()
    bench.run(progress=lambda now: seen.append(now.step))
    assert seen == [5]
    for path in (last, earlier):
        path.write_bytes(b"broken")
    with pytest.raises(InputError, match=r"checkpoint.safetensors cannot be read .* Delete it"):
        bench.run()


def test_a_checkpoint_of_another_run_is_refused(bench: Bench) -> None:
    bench.run()
    bench.run(seed=1)
    first, second = (bench.folder / "log").glob("*/checkpoint.safetensors")
    both = first.read_bytes(), second.read_bytes()
    first.write_bytes(both[1])
    second.write_bytes(both[0])
    with pytest.raises(InputError, match="is of another run"):
        bench.run()


def test_two_runs_in_one_folder_are_one_too_many(bench: Bench) -> None:
    def another(now: Progress) -> None:
        with pytest.raises(MedsegError, match=r"another training is at work in .* \(process \d+ on "):
            bench.run()

    bench.run(progress=another)
    bench.run()


def test_sgd_learns_and_is_taken_up_again_too(small_plan: Any, task: Task, tmp_path: Path, same: Any) -> None:
    usual = small_plan(learning_rate=1e-2)
    plan = usual.model_copy(update={"training": usual.training.model_copy(update={"optimiser": "sgd"})})
    assert plan.digest() != usual.digest()
    bench = Bench(plan, task, tmp_path)
    whole, records = bench.run("whole", steps=40)
    assert records[-1]["loss"] < 0.9 * records[0]["loss"]
    with pytest.raises(StoppedError):
        bench.run("parts", steps=40, stop=lambda: True)
    parts, _ = bench.run("parts", steps=40)
    assert same(whole, parts)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")  # of torch's own use of it
@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_compiled_it_trains_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.train.loop.torch_precision", lambda device: "f32")
    plain, _ = bench.run("plain", steps=4)
    training = bench.plan.training.model_copy(update={"compile": True})
    bench.plan = bench.plan.model_copy(update={"training": training})
    compiled, _ = bench.run("compiled", steps=4)
    (mine,), (others,) = compiled.members, plain.members
    assert all(torch.allclose(mine[name], others[name], atol=1e-2) for name in mine)


def test_asked_to_stop_it_saves_and_says_so(bench: Bench, same: Any) -> None:
    whole, _ = bench.run("whole", steps=20)
    asked = iter([False] * 6 + [True])
    with pytest.raises(StoppedError, match=r"stopped at step 7 of 20.*goes on") as caught:
        bench.run("parts", steps=20, stop=lambda: next(asked))
    assert caught.value.exit_status == 75
    seen: list[int] = []
    parts, _ = bench.run("parts", steps=20, progress=lambda now: seen.append(now.step))
    assert seen[0] == 8
    assert same(whole, parts)


def test_how_a_plan_trains_may_change_without_preprocessing_anew(small_plan: Any, bench: Bench) -> None:
    bench.plan = small_plan(learning_rate=1e-4, batch=3, features=(4, 8))
    bench.run()
    bench.plan = small_plan(spacing=(1.0, 1.0, 1.0))
    with pytest.raises(InputError, match="was preprocessed by another plan"):
        bench.run()


# ---- from another model -------------------------------------------------------------------------


def test_it_starts_from_what_fits_of_another_model(small_plan: Any, bench: Bench, same: Any) -> None:
    first, _ = bench.run("first", steps=10)
    again, _ = bench.run("again", steps=1, start=first)
    scratch, _ = bench.run("scratch", steps=1)
    (one,), (other,), (begun,) = again.members, scratch.members, first.members

    def apart(a: Any, b: Any) -> float:
        return sum(float((a[name] - b[name]).abs().sum()) for name in a)

    assert apart(one, begun) < 0.2 * apart(other, begun)
    assert again.provenance["start"] == first.digest()
    assert not same(again, scratch)
    # A label more: all but the last layers fit.
    more = small_plan(labels={1: "left blob", 2: "right blob", 3: "nothing"})
    network = build(more.configuration("3d"), 1, 4)
    found, missing = fitting(first, network)
    assert set(found) | set(missing) == set(network.state_dict())
    assert missing
    assert all("output" in name or "supervision" in name for name in missing)


def test_a_model_of_which_nothing_fits_is_refused(small_plan: Any, bench: Bench) -> None:
    first, _ = bench.run()
    bench.plan = small_plan(features=(5, 7, 9))
    with pytest.raises(InputError, match="hardly a layer of Task00_blobs 3d has the name and shape"):
        bench.run(start=first)


# ---- it says what goes wrong --------------------------------------------------------------------


class Spoiling:
    """Training steps of which some, counted from 1, give a loss that is no number and spoil the weights."""

    def __init__(self, *bad: int) -> None:
        self.bad, self.count = bad, 0

    def __call__(self, network: torch.nn.Module, *arguments: Any) -> torch.Tensor:
        loss = train_step(network, *arguments)
        self.count += 1
        if self.count not in self.bad:
            return loss
        with torch.no_grad():
            next(network.parameters()).fill_(math.nan)
        return torch.tensor(math.nan)


@pytest.mark.parametrize("every", [0.0, 1e9], ids=["checkpoints", "none yet"])
def test_after_a_loss_that_is_no_number_it_goes_back_once(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, every: float
) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", every)
    monkeypatch.setattr(loop, "train_step", Spoiling(3))
    seen: list[int] = []
    package, records = bench.run(steps=10, progress=lambda now: seen.append(now.step))
    assert seen == [1, 2, *range(1, 11)]  # to the beginning, as no part of the run was done
    assert package.provenance["setbacks"] == 1
    assert [r["step"] for r in records] == [5, 10]
    assert all(torch.isfinite(tensor).all() for tensor in package.members[0].values())
    calm, usual = records[0]["learning_rate"], bench.run("usual", steps=10)[1][0]["learning_rate"]
    assert calm == pytest.approx(usual / 2)


def test_the_second_time_it_stops(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "train_step", Spoiling(3, 5))
    with pytest.raises(MedsegError, match=r"the loss is nan at step 2, for the second time .*Lower the learning rate"):
        bench.run()
    (found,) = (bench.folder / "log").iterdir()
    kept = RunLog(found).load()
    assert kept is not None
    assert kept[1]["step"] == 1
    assert all(torch.isfinite(tensor).all() for tensor in kept[0].values())


def test_killed_after_a_setback_it_ends_the_same(bench: Bench, monkeypatch: pytest.MonkeyPatch, same: Any) -> None:
    """The same loss being no number again."""
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0)
    monkeypatch.setattr(loop, "train_step", Spoiling(3))
    whole, _ = bench.run("whole", steps=10)
    for after, spoiling in ((2, Spoiling(3)), (7, Spoiling(1)), (9, Spoiling())):
        monkeypatch.setattr(loop, "train_step", spoiling)
        with pytest.raises(KeyboardInterrupt):
            bench.run("parts", steps=10, progress=stop_at(after))
    monkeypatch.setattr(loop, "train_step", Spoiling())
    parts, _ = bench.run("parts", steps=10)
    assert same(whole, parts)


@pytest.mark.parametrize("stopped", [6, 7])
def test_where_it_goes_back_to_is_not_where_it_was_stopped(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, same: Any, stopped: int
) -> None:
    """Nor where the clock had it write a checkpoint."""
    monkeypatch.setattr(loop, "train_step", Spoiling(8))
    seen: list[int] = []
    whole, records = bench.run("whole", steps=15, progress=lambda now: seen.append(now.step))
    assert seen == [*range(1, 8), *range(6, 16)]
    monkeypatch.setattr(loop, "train_step", train_step)
    asked = iter([False] * (stopped - 1) + [True])
    with pytest.raises(StoppedError):
        bench.run("parts", steps=15, stop=lambda: next(asked))
    monkeypatch.setattr(loop, "train_step", Spoiling(8 - stopped))
    parts, again = bench.run("parts", steps=15)
    assert same(whole, parts)
    assert parts.provenance["setbacks"] == whole.provenance["setbacks"] == 1
    assert [r["loss"] for r in again] == [r["loss"] for r in records]


def test_stopped_just_after_it_went_back_it_knows_of_that(
    bench: Bench, monkeypatch: pytest.MonkeyPatch, same: Any
) -> None:
    monkeypatch.setattr(loop, "train_step", Spoiling(8))
    whole, _ = bench.run("whole", steps=15)
    monkeypatch.setattr(loop, "train_step", Spoiling(8))
    with pytest.raises(KeyboardInterrupt):
        bench.run("parts", steps=15, progress=Twice(6))
    monkeypatch.setattr(loop, "train_step", train_step)
    parts, _ = bench.run("parts", steps=15)
    assert same(whole, parts)


class Twice:
    """As by ctrl-C, when a step is done for the second time."""

    def __init__(self, step: int) -> None:
        self.step, self.count = step, 0

    def __call__(self, now: Progress) -> None:
        self.count += now.step == self.step
        if self.count == 2:
            raise KeyboardInterrupt


def test_a_gradient_that_is_no_number_makes_such_a_loss() -> None:
    network = torch.nn.Conv3d(1, 2, 1)
    network.weight.register_hook(lambda gradient: gradient * math.inf)
    optimiser = torch.optim.SGD(network.parameters(), lr=0.1)
    images, targets = torch.ones(1, 1, 4, 4, 4), torch.zeros(1, 4, 4, 4, dtype=torch.int64)
    assert math.isnan(float(train_step(network, optimiser, images, targets)))


def test_a_case_of_infinite_values_makes_such_a_loss(bench: Bench) -> None:
    for name in bench.train_ids:
        case = bench.store.read(name)
        image = np.array(case.image)
        image[...] = np.inf
        bench.store.write(name, image, case.labels, case.places)
    with pytest.raises(MedsegError, match="at step 1, for the second time"):
        bench.run()


def test_a_plan_that_does_not_say_how_long_is_refused(small_plan: Any, bench: Bench) -> None:
    bench.plan = small_plan(steps=None)
    with pytest.raises(InputError, match="does not say how many steps"):
        train(bench.plan, bench.setup(), bench.store, RunLog(bench.folder / "log"))


def test_a_network_that_cannot_fit_is_refused_before_it_starts(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loop, "free_memory", lambda: 2**20)
    with pytest.raises(InputError, match=r"patch 16x16x16 with batch 2 takes .* to train, there are "):
        bench.run()


def test_a_case_too_large_to_validate_on_is_named_before_it_starts(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "free_memory", lambda: 300 * 2**20)
    seen: list[Progress] = []
    with pytest.raises(InputError, match=rf"case {bench.held_out[0]}: it is predicted whole .* than the 0\.2"):
        bench.run(validate=True, progress=seen.append)
    assert seen == []
    bench.run()


def test_what_is_free_later_does_not_end_a_run_in_the_middle(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    def less(now: Progress) -> None:
        monkeypatch.setattr("medseg.infer.budget.free_memory", lambda: 2**20)

    _, records = bench.run(validate=True, progress=less)
    assert "dice" in records[-1]


def test_a_fold_without_cases_is_refused(bench: Bench) -> None:
    bench.train_ids = ()
    with pytest.raises(InputError, match="has no case to train on"):
        bench.run()


# ---- its schedule -------------------------------------------------------------------------------


def test_the_learning_rate_rises_and_then_falls_to_zero() -> None:
    rates = [schedule(step / 1000) for step in range(1001)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[50] == 1
    assert rates[525] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0)
    assert rates[:51] == sorted(rates[:51])
    assert rates[50:] == sorted(rates[50:], reverse=True)


# ---- what it leaves -----------------------------------------------------------------------------


def test_records_and_provenance(bench: Bench) -> None:
    shown: list[Progress] = []
    package, records = bench.run(steps=20, validate=True, progress=shown.append)
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
    assert (folder / "validation.png").read_bytes().startswith(b"\x89PNG")
    assert shown[-1].seconds_left == 0 < shown[0].seconds_left
    assert package.trained_on == bench.train_ids
    assert package.held_out == bench.held_out
    done = package.provenance
    assert (done["seed"], done["fold"], done["device"], done["threads"]) == (0, 0, "cpu", 1)
    assert (done["steps"], done["setbacks"], done["ranks"]) == (20, 0, 1)
    assert done["plan"] == bench.lasting(20).digest()
    assert {"medseg", "python", "torch", "numpy"} <= set(done["versions"])
    json.dumps(done, allow_nan=False)


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


@pytest.mark.parametrize(("times", "at"), [(0, []), (1, [15]), (2, [10, 15])])
def test_a_plan_says_how_often_a_run_validates(bench: Bench, times: int, at: list[int]) -> None:
    watching = Decision(value=Watching(times=times, cases=min(1, times)), reason="a try")
    configuration = bench.plan.configuration(bench.name).model_copy(update={"watching": watching})
    bench.plan = bench.plan.model_copy(update={"configurations": {bench.name: configuration}})
    _, records = bench.run(steps=15, validate=True)
    assert [r["step"] for r in records if "dice" in r] == at
    assert len(records) == 3


def test_validation_means_by_hand(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two cases, one of them without the second label: that label counts where it is."""
    pairs = [(c, *load_case(bench.task, bench.task.case(c))) for c in bench.train_ids[:2]]
    first, second = (labels for _, _, labels in pairs)
    without = type(second)(np.where(second.values == 2, 0, second.values).astype(np.uint8), second.grid, second.labels)
    answers = iter([first, type(first)(np.zeros_like(second.values), second.grid, second.labels)])
    monkeypatch.setattr(loop, "segment", lambda *_, **__: Segmentation(next(answers), Tally.empty(3, 1.0), None))
    cases = [pairs[0], (pairs[1][0], pairs[1][1], without)]
    found, image = validate(torch.nn.Identity(), cases, bench.plan, bench.name, CPU)
    assert image.dtype == np.uint8
    assert image.shape[2] == 3
    assert found == {"dice": 0.75, "dice_by_label": {"left blob": 0.5, "right blob": 1.0}}
