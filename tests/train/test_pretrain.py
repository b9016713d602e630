from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from medseg.core.errors import InputError
from medseg.io.runlog import RunLog
from medseg.models.build import build
from medseg.plan.plan import Configuration, Decision
from medseg.train import loop, pretrain
from medseg.train.batches import Batches
from medseg.train.loop import fitting
from medseg.train.pretrain import HidingBatches, heads_of, hidden, pretraining_plan, reconstruction

CPU = torch.device("cpu")


# ---- what is hidden -----------------------------------------------------------------------------


@pytest.mark.parametrize("patch", [(16, 16, 8), (40, 56, 40), (24, 16)])
def test_six_tenths_of_the_blocks_are_hidden_and_whole(patch: tuple[int, ...]) -> None:
    where = hidden(np.random.default_rng(0), patch).numpy()
    assert where.shape == patch
    blocks = where
    for axis, n in enumerate(patch):
        shape = [*blocks.shape[:axis], 8, n // 8, *blocks.shape[axis + 1 :]]
        split = blocks.reshape(shape)
        first = split.take([0], axis=axis + 1)
        assert (split == first).all()
        blocks = first.squeeze(axis + 1)
    assert blocks.sum() == round(0.6 * 8 ** len(patch))


@pytest.mark.parametrize("patch", [(12, 20, 9), (3, 5, 1)])
def test_blocks_that_do_not_fit_are_cut_off(patch: tuple[int, ...]) -> None:
    share = np.mean([hidden(np.random.default_rng(i), patch).numpy().mean() for i in range(60)])
    assert share == pytest.approx(0.6, abs=0.05)


def test_batches_hide_where_they_say_and_nothing_else(few: Any) -> None:
    bench = few(pretraining=1.0, augmentation={"noise": 0.5, "gamma": 0.5, "mirror": [0]})
    plan = pretraining_plan(bench.plan, "3d")
    whole = Batches(plan, plan.configuration("3d"), bench.unlabelled, 0, CPU)
    one, two = (HidingBatches(Batches(plan, plan.configuration("3d"), bench.unlabelled, 0, CPU)) for _ in range(2))
    for step in (3, 0):
        images, targets = one(step)
        original, where = whole(step)[0], ~targets.isnan()
        assert torch.equal(images[~where], original[~where])
        assert torch.equal(targets[where], original[where])
        assert (images[where] == 0).all()
        assert float(where.float().mean()) == pytest.approx(0.6, abs=0.001)
        assert torch.equal(images, two(step)[0])
        assert not torch.equal(where[0], where[1])


def test_nothing_but_the_place_of_a_patch_is_varied(few: Any) -> None:
    """Its values are what is to be found."""
    lively = {"noise": 0.5, "gamma": 0.5, "intensity": 0.5, "contrast": 0.4, "blur_share": 1.0, "spatial_share": 0.0}
    bench = few(pretraining=1.0, augmentation=lively)
    plan = pretraining_plan(bench.plan, "3d")
    batches = Batches(plan, plan.configuration("3d"), bench.unlabelled, 0, CPU)
    moved, _, _ = batches.moved(5)
    assert torch.allclose(batches(5)[0], moved)


# ---- what is asked ------------------------------------------------------------------------------


def test_the_loss_is_the_mean_difference_of_what_was_hidden() -> None:
    target = torch.full((1, 2, 4, 4), torch.nan)
    target[0, 0, :2], target[0, 1, 3] = 3.0, -1.0
    found = torch.ones(1, 2, 4, 4, requires_grad=True)
    loss = reconstruction(found, target)
    assert float(loss.detach()) == pytest.approx(2.0)
    loss.backward()
    assert found.grad is not None
    assert torch.equal(found.grad != 0, ~target.isnan())
    assert float(found.grad.abs().sum()) == pytest.approx(1.0)


def test_coarser_outputs_are_asked_too_with_half_the_weight() -> None:
    target = torch.full((1, 1, 4, 4), 3.0)
    fine, coarse = torch.full((1, 1, 4, 4), 3.0), torch.full((1, 1, 2, 2), 0.0)
    assert float(reconstruction([fine, coarse], target)) == pytest.approx(3 / 3)
    assert float(reconstruction([fine], torch.full((1, 1, 4, 4), torch.nan))) == 0


def test_the_heads_are_known_by_their_shape(small_plan: Any) -> None:
    four = {n: f"blob {n}" for n in (1, 2, 3)}
    plan = small_plan(labels=four, channels=["a", "b", "c", "d"])
    heads = heads_of(plan.configuration("3d"), 4)
    network = build(plan.configuration("3d"), 4, plan.outputs)
    assert heads <= set(network.state_dict())
    assert heads == {n for n in network.state_dict() if "output_block" in n or "supervision" in n}
    plain = json.loads(plan.configuration("3d").model_dump_json())
    plain["network"]["value"] |= {"family": "nnunet-plain", "blocks": [1, 1, 1], "decoder_blocks": [1, 1]}
    assert heads_of(Configuration.model_validate(plain), 4) == {"output_block.weight", "output_block.bias"}


# ---- the run ------------------------------------------------------------------------------------


def test_it_learns_and_repeats_itself_and_training_starts_from_it(few: Any, same: Any) -> None:
    bench = few(pretraining=8.0, steps=5)
    first = bench.pretrain("one")
    assert same(first, bench.pretrain("two"))
    (place,) = (bench.folder / "one").iterdir()
    records = RunLog(place).records()
    assert {r["phase"] for r in records} == {"pretraining"}
    assert [r["step"] for r in records] == list(range(5, 41, 5))
    assert records[-1]["loss"] < 0.7 * records[0]["loss"]
    network = build(bench.plan.configuration("3d"), 1, 3)
    fits, missing = fitting(first, network)
    assert set(missing) == heads_of(bench.plan.configuration("3d"), 1)
    assert len(fits) + len(missing) == len(network.state_dict())
    trained = bench.train("one", start=first)
    assert trained.provenance["start"] == first.digest()
    assert "unlabelled" not in trained.provenance
    assert first.provenance["unlabelled"] == [case.id for case in bench.unlabelled]
    assert not same(trained, bench.train("one"))


def test_it_sees_training_and_unlabelled_scans_without_a_label(few: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def spy(plan: Any, configuration: Any, cases: Any, *others: Any) -> Batches:
        seen.extend(cases)
        return Batches(plan, configuration, cases, *others)

    monkeypatch.setattr(pretrain, "Batches", spy)
    bench = few(pretraining=1.0)
    bench.pretrain()
    assert [case.id for case in seen] == [*bench.setup.train, *(case.id for case in bench.unlabelled)]
    assert not {case.id for case in seen} & set(bench.setup.held_out)
    assert all(case.labels is None and not case.places for case in seen)


def test_plans_that_differ_in_what_comes_after_share_it(few: Any) -> None:
    bench = few(pretraining=2.0, foreground_share=0.5)
    other = bench.plan.training.model_copy(
        update={"consistency": Decision(value=1.0), "foreground_share": Decision(value=1.0)}
    )
    changed = bench.plan.model_copy(update={"training": other})
    assert pretraining_plan(bench.plan, "3d").digest() == pretraining_plan(changed, "3d").digest()
    assert pretraining_plan(bench.plan, "3d").configuration("3d").steps.value == 10
    assert bench.plan.digest() != changed.digest()


def test_interrupted_and_taken_up_again_it_ends_the_same(few: Any, monkeypatch: pytest.MonkeyPatch, same: Any) -> None:
    bench = few(pretraining=2.0)
    whole = bench.pretrain("whole")
    monkeypatch.setattr(loop, "_CHECKPOINT_SECONDS", 0)

    def stop(now: Any) -> None:
        assert now.phase == "pretraining"
        if now.step == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.pretrain("parts", progress=stop)
    seen: list[int] = []
    parts = bench.pretrain("parts", progress=lambda now: seen.append(now.step))
    assert seen == list(range(5, 11))
    assert same(whole, parts)
    asked = iter([False, True])
    with pytest.raises(loop.StoppedError, match="pretraining stopped at step 2 of 10"):
        bench.pretrain("asked", stop=lambda: next(asked))
    other = bench.pretrain("parts", unlabelled=bench.unlabelled[:2])  # a run of its own
    assert not same(whole, other)


def test_killed_in_either_phase_it_ends_the_same(few: Any, tmp_path: Path, same: Any) -> None:
    """kill -9 while it pretrains, and again while it trains beside a teacher."""
    bench = few(pretraining=1.0, consistency=1.0, steps=24)
    (tmp_path / "plan.json").write_text(bench.plan.model_dump_json())
    setup = asdict(bench.setup)
    script = (
        "from pathlib import Path\n"
        "from medseg.io.runlog import RunLog; from medseg.io.store import CaseStore\n"
        "from medseg.plan.plan import read_plan; from medseg.train import loop, pretrain\n"
        "loop._CHECKPOINT_SECONDS = 0\n"
        f"folder, setup = Path({str(tmp_path)!r}), loop.Setup(**{setup!r})\n"
        "plan, store = read_plan(folder / 'plan.json'), CaseStore(folder / 'store')\n"
        f"scans = [store.read(c) for c in {[c.id for c in bench.unlabelled]!r}]\n"
        "show = lambda now: print(now.phase, now.step, flush=True)\n"
        "first = pretrain.pretrain(plan, setup, store, RunLog(folder / 'killed'), scans, progress=show)\n"
        "loop.train(plan, setup, store, RunLog(folder / 'killed'), unlabelled=scans, progress=show, start=first)\n"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for phase, step in (("pretraining", 9), ("training", 6)):
        child = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env=environment)
        assert child.stdout is not None
        for line in child.stdout:
            if line.split() == [phase, str(step)]:
                child.send_signal(signal.SIGKILL)
                break
        child.stdout.close()
        assert child.wait() == -signal.SIGKILL
    seen: list[str] = []
    ended = bench.train("killed", start=bench.pretrain("killed"), progress=lambda now: seen.append(now.phase))
    assert 0 < len(seen) <= 18
    assert set(seen) == {"training"}
    whole = bench.train("whole", start=bench.pretrain("whole"))
    assert same(whole, ended)


def test_without_scans_it_is_refused(few: Any) -> None:
    bench = few(pretraining=1.0)
    with pytest.raises(InputError, match=r"pretrains on unlabelled cases, and there are none.*medseg preprocess"):
        bench.pretrain(unlabelled=())
    with pytest.raises(InputError, match="does not say how long 3d is pretrained"):
        pretraining_plan(few().plan, "3d")
