"""A cascade, from the folds of its first stage to a model that predicts: what the second stage is told of a case
comes from a model that had not seen it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.resample import resample
from medseg.dataset.task import load_case, load_task
from medseg.infer.predict import Predictor
from medseg.io.nifti import read_labels
from medseg.io.store import CaseStore
from medseg.models.package import load_package
from medseg.plan.plan import read_plan
from medseg.preprocess.regrid import preprocess

FOLDS, CASES = 2, 4
QUICK = ("--threads", 1, "--device", "cpu")


def configurations(small_plan: Any, steps: int = 40) -> dict[str, Any]:
    low = small_plan(spacing=(2.0, 2.0, 4.0), patch=(8, 8, 8), features=(4, 8), steps=steps)
    second = small_plan(patch=(16, 16, 8), features=(4, 8), steps=steps)
    own, after = (json.loads(one.model_dump_json())["configurations"]["3d"] for one in (low, second))
    return {"3d-cascade": {**after, "previous": "3d-low"}, "3d-low": own}


@pytest.fixture(scope="module")
def planned(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two folds, planned by hand; the second stage stands first."""
    folder = tmp_path_factory.mktemp("stages")
    task, run = tiny_task(folder / "Task00_blobs", CASES), folder / "run"
    assert medseg("plan", task, "-o", run, "--folds", FOLDS, "--no-measure", "--machine", "cpu").status == 0
    plan = json.loads((run / "plan.json").read_text())
    plan["training"] = json.loads(small_plan(learning_rate=1e-2, steps_per_epoch=20).model_dump_json())["training"]
    plan["configurations"] = configurations(small_plan)
    (run / "plan.json").write_text(json.dumps(plan))
    return run


@pytest.fixture(scope="module")
def done(medseg: Any, planned: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of it, by one command."""
    run = tmp_path_factory.mktemp("done") / "run"
    shutil.copytree(planned, run)
    said = medseg("train", run, "--all-folds", *QUICK)
    assert said.status == 0, said
    return run


@pytest.fixture
def mine(done: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(done, tmp_path / "run")
    return tmp_path / "run"


def trained(run: Path, configuration: str) -> list[Any]:
    return [load_package(run / configuration / f"fold{fold}" / "model") for fold in range(FOLDS)]


def test_each_fold_takes_the_first_stage_of_its_own(done: Path) -> None:
    firsts, seconds = trained(done, "3d-low"), trained(done, "3d-cascade")
    for first, second in zip(firsts, seconds, strict=True):
        assert second.previous is not None
        assert second.previous.digest() == first.digest()
        assert second.previous.held_out == second.held_out
        assert not {*first.trained_on} & {*second.held_out}
        assert second.provenance["previous"] == [one.digest() for one in firsts]
        assert second.calibration is not None
        assert second.engines.keys() >= {"openvino-f32"}
        assert second.channels == 3
    stored = json.loads((done / "3d-cascade" / "preprocessed" / "store.json").read_text())
    assert stored["models"] == [one.digest() for one in firsts]


def test_what_a_case_is_told_comes_from_the_model_that_held_it_out(done: Path) -> None:
    index = json.loads((done / "run.json").read_text())
    task, plan = load_task(Path(index["task"])), read_plan(done / "plan.json")
    store = CaseStore(done / "3d-cascade" / "preprocessed")
    models = trained(done, "3d-low")
    told_apart = 0
    for case in task.cases:
        volume, _ = load_case(task, case)
        image = preprocess(volume, plan, plan.configuration("3d-cascade"))
        stored = np.asarray(store.read(case.id).image)
        assert np.array_equal(stored[:1], image.values.astype(np.float16))
        says = []
        for model in models:
            found = resample(Predictor(model, threads=1).predict(volume).label_map, onto=image.grid).values
            says.append(np.stack([found == number for number in plan.label_set.numbers]))
        for model, one in zip(models, says, strict=True):
            assert (case.id in model.trained_on) != (case.id in model.held_out)
            if case.id in model.held_out:
                assert np.array_equal(stored[1:], one)
            else:
                told_apart += not np.array_equal(stored[1:], one)
    # Where both models said the same nothing would be shown.
    assert told_apart == CASES


def test_the_chosen_model_nests_all_folds_of_both_stages_and_predicts(medseg: Any, done: Path, tmp_path: Path) -> None:
    assert medseg("choose", done, "-c", "3d-cascade", "-o", tmp_path / "model", "--threads", 1).status == 0
    package = load_package(tmp_path / "model")
    assert package.configuration_name == "3d-cascade"
    assert len(package.members) == FOLDS
    assert package.previous is not None
    assert len(package.previous.members) == FOLDS
    assert package.previous.configuration_name == "3d-low"
    assert {*package.trained_on} == {*package.previous.trained_on}
    whole = load_package(done / "model").evaluation
    assert whole is not None
    assert {one.configuration for one in whole.compared} == {"3d-low", "3d-cascade"}
    text = (tmp_path / "model" / "README.md").read_text()
    assert "-c 3d-cascade" in text
    scan = sorted((Path(json.loads((done / "run.json").read_text())["task"]) / "imagesTr").iterdir())[0]
    said = medseg("predict", scan, "-m", tmp_path / "model", "-o", tmp_path / "out", "--threads", 1)
    assert said.status == 0, said
    record = json.loads(next((tmp_path / "out").glob("*_seg.json")).read_text())
    assert record["model_sha256"] == package.digest()
    made = read_labels(next((tmp_path / "out").glob("*_seg.nii.gz")), package.plan.label_set)
    assert made.values.any()
    assert medseg("report", done, "-o", tmp_path / "report.html").status == 0


def test_what_is_done_is_not_done_again_unless_the_first_stage_changed(
    medseg: Any, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr("medseg.cli.folds.run_verb", lambda *words: called.append(words))
    assert medseg("train", mine, "--all-folds", *QUICK).status == 0
    assert [words[0] for words in called] == ["choose"]
    monkeypatch.undo()
    before = load_package(mine / "3d-cascade" / "fold0" / "model").digest()
    assert medseg("train", mine, "-c", "3d-low", "--fold", 1, "--seed", 1, *QUICK).status == 0
    said = medseg("train", mine, "-c", "3d-cascade", *QUICK)
    said.refused("3d-cascade is told what 3d-low found", "in 3d-low fold 1 is another model's", "Run `medseg predict")
    fold = mine / "3d-low" / "fold1"
    task = json.loads((mine / "run.json").read_text())["task"]
    how = ("-m", fold / "model", "-o", fold / "predictions", "--threads", 1)
    assert medseg("predict", task, "--held-out", *how).status == 0
    said = medseg("train", mine, "-c", "3d-cascade", *QUICK)
    said.refused("holds what other models of the stage before found. Run `medseg preprocess", "-c 3d-cascade` again")
    assert medseg("preprocess", mine, "-c", "3d-cascade", "--threads", 1).status == 0
    assert medseg("train", mine, "-c", "3d-cascade", *QUICK).status == 0
    assert load_package(mine / "3d-cascade" / "fold0" / "model").digest() != before
    # Its other fold was told what the models before found.
    task = load_task(Path(task))
    fold = mine / "3d-cascade" / "fold0"
    how = ("-m", fold / "model", "-o", fold / "predictions", "--threads", 1)
    assert medseg("predict", task.folder, "--held-out", *how).status == 0
    said = medseg("choose", mine, "-c", "3d-cascade", "--threads", 1)
    said.refused("3d-cascade fold 1 was told what other models found than fold 0")


def test_the_first_stage_comes_first(medseg: Any, planned: Path, mine: Path) -> None:
    medseg("preprocess", planned, "-c", "3d-cascade").refused(
        "3d-cascade is told what 3d-low found in cases that it had not seen, and 3d-low fold 0 has no model",
        f"Run `medseg train {planned} -c 3d-low --fold 0`",
        f"`medseg train {planned} --all-folds -c 3d-cascade` for all",
    )
    shutil.rmtree(mine / "3d-low" / "fold1" / "predictions")
    medseg("preprocess", mine, "-c", "3d-cascade").refused("3d-low fold 1 lacks its predictions", "--held-out")
    side = sorted((mine / "3d-low" / "fold0" / "predictions").glob("*_seg.json"))[0]
    side.unlink()
    medseg("preprocess", mine, "-c", "3d-cascade").refused("3d-low fold 0 lacks the prediction of case")


def test_a_first_stage_that_is_not_named_is_made_but_not_chosen_among(
    medseg: Any, mine: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.rmtree(mine / "3d-low" / "fold1")
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr("medseg.cli.folds.run_verb", lambda *words: called.append(words))
    # Nothing is trained here, and so the fold goes on lacking its model.
    said = medseg("train", mine, "--all-folds", "-c", "3d-cascade", *QUICK)
    said.refused("3d-low fold 1 has no model")
    assert [words[:6] for words in called] == [("train", str(mine), "-c", "3d-low", "--fold", "1")]


def test_a_case_that_no_fold_holds_out_is_named(medseg: Any, mine: Path) -> None:
    folds = json.loads((mine / "folds.json").read_text())
    gone = folds["folds"][1]["validation"].pop()
    folds["folds"][1]["train"] = [case for case in folds["folds"][1]["train"] if case != gone]
    (mine / "folds.json").write_text(json.dumps(folds))
    assert medseg("train", mine, "-c", "3d-low", "--fold", 1, *QUICK).status == 0
    task, fold = json.loads((mine / "run.json").read_text())["task"], mine / "3d-low" / "fold1"
    how = ("-m", fold / "model", "-o", fold / "predictions", "--threads", 1)
    assert medseg("predict", task, "--held-out", *how).status == 0
    medseg("preprocess", mine, "-c", "3d-cascade").refused(gone, "no fold of 3d-low holds it out")


@pytest.mark.parametrize("what", ["pretraining", "consistency"])
def test_no_scans_without_labels_go_with_it(medseg: Any, planned: Path, tmp_path: Path, what: str) -> None:
    shutil.copytree(planned, tmp_path / "run")
    plan = json.loads((planned / "plan.json").read_text())
    plan["training"][what] = {"value": 1.0}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    words = ("3d-cascade is told what 3d-low found", "without --unlabelled")
    medseg("train", tmp_path / "run", "--all-folds", "-c", "3d-cascade", *QUICK).refused(*words)
    medseg("train", tmp_path / "run", "-c", "3d-cascade", *QUICK).refused(*words)


def test_a_stage_of_a_plan_that_lacks_the_first_is_refused(medseg: Any, planned: Path, tmp_path: Path) -> None:
    shutil.copytree(planned, tmp_path / "run")
    plan = json.loads((planned / "plan.json").read_text())
    first = plan["configurations"].pop("3d-low")
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    medseg("preprocess", tmp_path / "run", "-c", "3d-cascade").refused("has no configuration '3d-low'")
    plan["configurations"]["3d-low"] = {**first, "previous": "3d-cascade"}
    (tmp_path / "run" / "plan.json").write_text(json.dumps(plan))
    medseg("preprocess", tmp_path / "run", "-c", "3d-cascade").refused("two stages are enough")
