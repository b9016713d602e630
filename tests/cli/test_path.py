"""The main path: check, plan, preprocess, train, predict, evaluate, report."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from medseg.cli.predict import _show_flagged
from medseg.core.labels import LabelSet
from medseg.infer.engine import torch_precision
from medseg.io.nifti import read_labels, read_volume
from medseg.models.package import load_package, save_package
from medseg.plan.plan import read_plan

VERBS = ["check", "plan", "preprocess", "train", "predict", "evaluate", "report"]
LABELS = LabelSet.from_names(["left blob", "right blob"])


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_ends_well(made: Any, verb: str) -> None:
    assert made.outcomes[verb].status == 0, made.outcomes[verb]
    assert made.outcomes[verb].err == ""


@pytest.mark.parametrize(
    "name",
    [
        "run.json",
        "plan.json",
        "folds.json",
        "fingerprint.json",
        "3d/preprocessed/store.json",
        "3d/fold0/model/package.json",
        "3d/fold0/model/member0.safetensors",
        "3d/fold0/model/member0.onnx",
        "3d/fold0/model/plan.json",
        "3d/fold0/model/README.md",
        "3d/fold0/model/experience.json",
        "3d/fold0/model/calibration.json",
        "3d/fold0/log.json",
        "3d/fold0/predictions/predictions.json",
        "3d/fold0/metrics.csv",
        "3d/fold0/metrics.json",
        "report.html",
        "report.md",
    ],
)
def test_every_promised_file_is_there(made: Any, name: str) -> None:
    assert (made.run / name).stat().st_size > 0


def test_the_model_says_how_far_engines_agree_on_held_out_cases(made: Any) -> None:
    package = load_package(made.model)
    found = package.engines["openvino-f32"]
    assert found.cases
    assert set(found.cases) <= set(package.held_out)
    assert found.label_agreement > 0.9999
    assert found.least_dice > 0.999


def test_nothing_is_left_half_written(made: Any) -> None:
    assert not [p for p in made.run.rglob("*") if p.name.endswith((".part", ".new"))]


def test_what_is_said(made: Any) -> None:
    said = {verb: outcome.out for verb, outcome in made.outcomes.items()}
    assert "6 cases, 6 ok" in said["check"]
    assert "Fit for use." in said["check"]
    assert "6 cases in 3 folds" in said["plan"]
    assert "6 cases in" in said["preprocess"]
    assert "160 steps" in said["train"]
    assert "2 cases predicted" in said["predict"]
    assert "left blob" in said["evaluate"]
    assert said["report"].strip() == str(made.run / "report.html")


def test_the_model_says_what_it_was_trained_on(made: Any) -> None:
    package = load_package(made.model)
    (fold, *_) = json.loads((made.run / "folds.json").read_text())["folds"]
    assert package.trained_on == tuple(fold["train"])
    assert package.held_out == tuple(fold["validation"])
    assert package.plan.digest() == read_plan(made.run / "plan.json").digest()
    log = json.loads((made.fold / "log.json").read_text())
    assert log["options"] == "--seed 0"
    assert log["records"][-1]["step"] == 160


def test_the_model_knows_what_it_saw_and_how_far_to_believe_it(made: Any) -> None:
    package = load_package(made.model)
    assert package.experience is not None
    assert package.experience.cases == len(package.trained_on)
    assert package.experience.channels[0].modality == "CT"
    assert [s.cases for s in package.experience.structures] == [len(package.trained_on)] * 2
    assert package.calibration is not None
    assert package.calibration.cases == len(package.held_out)
    assert package.calibration.dice_error < 0.3
    assert f"on {len(package.held_out)} held-out cases" in made.outcomes["train"].out
    for case in package.held_out:
        side = json.loads((made.fold / "predictions" / f"{case}_seg.json").read_text())
        assert side["calibration"]["temperature"] == package.calibration.temperature
        assert all(0 <= organ["predicted_dice"] <= 1 for organ in side["organs"])


def test_a_fingerprint_of_another_format_stops_training_before_it_starts(
    made: Any, medseg: Any, tmp_path: Path
) -> None:
    run = made.copy(tmp_path).run
    old = json.loads((run / "fingerprint.json").read_text())
    (run / "fingerprint.json").write_text(json.dumps({**old, "format": 1}))
    medseg("train", run, "--threads", 1).refused("fingerprint.json has another format. Plan anew")
    (run / "fingerprint.json").unlink()
    medseg("train", run, "--threads", 1).refused("fingerprint.json", "medseg plan")


def test_held_out_cases_are_predicted_and_no_others(made: Any) -> None:
    index = json.loads((made.fold / "predictions" / "predictions.json").read_text())
    assert set(index["cases"]) == set(load_package(made.model).held_out)
    assert index["failed"] == {}
    for case, name in index["cases"].items():
        found = read_labels(made.fold / "predictions" / name, LABELS)
        assert found.grid.matches(read_volume(made.task / "imagesTr" / f"{case}.nii.gz").grid)
        side = json.loads((made.fold / "predictions" / name.replace(".nii.gz", ".json")).read_text())
        for organ in side["organs"]:
            assert organ["volume_ml"] * 1000 == pytest.approx(found.volume_of(organ["number"]))


def test_the_scores_are_those_of_the_training_log(made: Any) -> None:
    rows = list(csv.DictReader((made.fold / "metrics.csv").read_text().splitlines()))
    assert len(rows) == 4
    dice = [float(row["dice"]) for row in rows]
    log = json.loads((made.fold / "log.json").read_text())
    # Another engine computes, and on some processors both in half precision.
    near = 1e-4 if torch_precision(torch.device("cpu")) == "f32" else 5e-3
    assert sum(dice) / 4 == pytest.approx(log["records"][-1]["dice"], abs=near)
    assert min(dice) > 0.5


def test_the_report_names_every_case_and_structure(made: Any) -> None:
    page = (made.run / "report.html").read_text()
    for word in (*load_package(made.model).held_out, "left blob", "right blob", "medseg train RUN -c 3d --fold 0"):
        assert word in page
    assert "left blob" in (made.run / "report.md").read_text()


# ---- once more ----------------------------------------------------------------------------------


def test_training_again_where_it_ended_changes_nothing(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in mine.fold.rglob("[!.]*.*")}
    outcome = medseg("train", mine.run, "--threads", 1, "--device", "cpu")
    assert outcome.status == 0, outcome
    assert "is trained already" in outcome.out
    assert {path: path.stat().st_mtime_ns for path in mine.fold.rglob("[!.]*.*")} == before


def test_a_model_that_a_workflow_took_away_is_made_anew_from_the_checkpoint(
    made: Any, medseg: Any, tmp_path: Path
) -> None:
    mine = made.copy(tmp_path)
    before = load_package(mine.model).digest()
    (mine.model / "package.json").unlink()
    (mine.fold / "log.json").unlink()
    outcome = medseg("train", mine.run, "--threads", 1, "--device", "cpu")
    assert outcome.status == 0, outcome
    assert "160 steps" in outcome.out
    assert load_package(mine.model).digest() == before


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_stopped_after_the_last_step_it_goes_on_from_there(
    made: Any, medseg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    mine = made.copy(tmp_path)
    before = load_package(mine.model).digest()
    (mine.fold / "log.json").unlink()
    with monkeypatch.context() as patched:
        patched.setattr("medseg.train.calibrate.calibration_of", lambda *_, **__: signal.raise_signal(number))
        stopped = medseg("train", mine.run, "--threads", 1, "--device", "cpu")
    stopped.refused("the same command goes on from what is done", status=75)
    outcome = medseg("train", mine.run, "--threads", 1, "--device", "cpu")
    assert outcome.status == 0, outcome
    assert "step " not in outcome.out.replace("160 steps", "")
    assert load_package(mine.model).digest() == before


def test_broken_off_before_engines_are_compared_a_fold_counts_as_not_done(
    made: Any, medseg: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = made.copy(tmp_path)
    (mine.fold / "log.json").unlink()

    def broken(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("medseg.infer.agreement.measure", broken)
    assert medseg("train", mine.run, "--threads", 1, "--device", "cpu").status == 1
    assert not load_package(mine.model).engines
    assert not (mine.fold / "log.json").exists()


def test_a_model_that_has_seen_the_held_out_cases_is_no_start(
    made: Any, medseg: Any, small_plan: Any, tmp_path: Path
) -> None:
    mine = made.copy(tmp_path)
    held_out = json.loads((mine.run / "folds.json").read_text())["folds"][1]["validation"]
    command = ("train", mine.run, "--fold", 1, "--threads", 1, "--device", "cpu", "--from")
    words = ("fold 1 holds it out, and the model ", "to start from has learnt from it", "another task")
    medseg(*command, mine.model).refused(f"case {held_out[0]}: ", *words)
    # Nor one of another task that itself began with such a model, nor one that saw another case of a subject.
    package = load_package(mine.model)
    elsewhere = package.plan.model_copy(update={"task": "Task01_other"})
    later = {**package.provenance, "learnt_before": {"Task00_blobs": [held_out[1]]}}
    save_package(tmp_path / "later", replace(package, plan=elsewhere, provenance=later))
    medseg(*command, tmp_path / "later").refused(f"case {held_out[1]}: ", *words)
    scan = {**package.provenance, "unlabelled": ["blob_006"]}
    save_package(tmp_path / "scan", replace(package, trained_on=(), provenance=scan))
    (mine.task / "subjects.json").write_text(json.dumps({"blob_006": held_out[0]}))
    medseg(*command, tmp_path / "scan").refused(f"case {held_out[0]}: ", "from blob_006, of the same subject")
    # What this fold trains on is no secret, and what a start has learnt from is handed on.
    plan = json.loads((mine.run / "plan.json").read_text())
    plan["configurations"]["3d"]["steps"]["value"] = 2
    (mine.run / "plan.json").write_text(json.dumps(plan))
    (mine.task / "subjects.json").unlink()
    said = medseg("train", mine.run, "--fold", 0, "--threads", 1, "--device", "cpu", "--from", made.model)
    assert said.status == 0, said
    assert load_package(mine.model).provenance["learnt_before"] == {"Task00_blobs": sorted(package.trained_on)}


def test_a_budget_becomes_steps_and_is_told_with_what_they_cost(made: Any, medseg: Any, tmp_path: Path) -> None:
    budgets = ("--budget", "3d=30s", "--budget", "2d=20s")
    outcome = medseg("plan", made.task, "-o", tmp_path / "run", "--machine", "cpu", *budgets, "--threads", 1)
    assert outcome.status == 0, outcome
    plan = read_plan(tmp_path / "run" / "plan.json")
    for name, seconds in (("3d", 30), ("2d", 20)):
        c = plan.configuration(name)
        assert c.steps is not None
        assert c.cost is not None
        assert c.cost.measured_on
        assert c.cost.threads == 1
        assert 0.4 * seconds < c.steps.value * c.cost.seconds_per_step < seconds
        assert f"{seconds} s" in c.steps.reason
        assert f"{c.steps.value} steps" in outcome.out
    assert "measured on" in outcome.out


def test_a_plan_for_a_gpu_elsewhere_says_that_nothing_was_measured(made: Any, medseg: Any, tmp_path: Path) -> None:
    if Path("/dev/nvidia0").exists():
        pytest.skip("there is a GPU")
    outcome = medseg("plan", made.task, "-o", tmp_path / "run", "--gpu-memory", "80GiB", "--budget", "1d")
    assert outcome.status == 0, outcome
    assert "reckoned, not measured" in outcome.out
    plan = read_plan(tmp_path / "run" / "plan.json")
    for name in ("3d", "2d"):
        c = plan.configuration(name)
        assert c.cost is not None
        assert c.cost.measured_on is None
        assert "80 GiB that the gpu may give, reckoned, not measured" in c.patch.reason.replace("about ", "")


def test_too_little_memory_is_told_before_anything_starts(made: Any, medseg: Any, tmp_path: Path) -> None:
    arguments = ("plan", made.task, "-o", tmp_path / "run", "--memory", "100MiB", "--no-measure")
    medseg(*arguments).refused("even the smallest plan, patches of", "0.10 GiB are allowed", "--memory")
    assert not (tmp_path / "run" / "plan.json").exists()


def test_a_plan_that_inherits_is_preprocessed_and_trained(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    (mine.run / "plan.json").rename(mine.run / "base.json")
    shorter = {"inherits": "base.json", "configurations": {"3d": {"steps": {"value": 3, "reason": "a try"}}}}
    (mine.run / "plan.json").write_text(json.dumps(shorter))
    assert medseg("preprocess", mine.run, "--threads", 1).status == 0
    outcome = medseg("train", mine.run, "--threads", 1, "--device", "cpu")
    assert outcome.status == 0, outcome
    assert "3 steps in" in outcome.out
    assert "inherits" not in (mine.model / "plan.json").read_text()


def test_planning_again_keeps_folds_and_puts_an_edited_plan_aside(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    edited, folds = read_plan(mine.run / "plan.json"), (mine.run / "folds.json").read_bytes()
    outcome = medseg("plan", mine.task, "-o", mine.run, "--machine", "cpu", "--no-measure")
    assert outcome.status == 0
    assert "kept" in outcome.err
    assert "plan.earlier.json" in outcome.err
    assert (mine.run / "folds.json").read_bytes() == folds
    assert read_plan(mine.run / "plan.earlier.json") == edited
    again = medseg("plan", mine.task, "-o", mine.run, "--machine", "cpu", "--no-measure")
    assert "plan.earlier" not in again.err
    assert read_plan(mine.run / "plan.earlier.json") == edited
    # A later edit goes beside the first.
    plan = json.loads((mine.run / "plan.json").read_text())
    plan["training"]["learning_rate"]["value"] = 1.5e-3
    (mine.run / "plan.json").write_text(json.dumps(plan))
    later = read_plan(mine.run / "plan.json")
    outcome = medseg("plan", mine.task, "-o", mine.run, "--machine", "cpu", "--no-measure")
    assert "plan.earlier.2.json" in outcome.err
    assert read_plan(mine.run / "plan.earlier.json") == edited
    assert read_plan(mine.run / "plan.earlier.2.json") == later
    assert (mine.run / "folds.json").read_bytes() == folds
    more = medseg("plan", mine.task, "-o", mine.run, "--folds", 2, "--machine", "cpu", "--no-measure")
    assert more.status == 0, more
    assert len(json.loads((mine.run / "folds.json").read_text())["folds"]) == 2
    assert (mine.run / "folds.earlier.json").read_bytes() == folds


def test_a_plan_without_time_for_validation_is_trained_all_the_same(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    (mine.run / "plan.json").rename(mine.run / "base.json")
    blind = {"value": {"times": 0, "cases": 0, "calibrated": 0}, "reason": "a try"}
    one = {"steps": {"value": 3, "reason": "a try"}, "watching": blind}
    (mine.run / "plan.json").write_text(json.dumps({"inherits": "base.json", "configurations": {"3d": one}}))
    outcome = medseg("train", mine.run, "--threads", 1, "--device", "cpu")
    assert outcome.status == 0, outcome
    assert "not validated" in outcome.out
    assert "no time to calibrate" in outcome.out
    package = load_package(mine.model)
    assert package.calibration is None
    assert len(package.engines["openvino-f32"].cases) == 1
    assert medseg("report", mine.run).status == 0


def test_a_run_folder_goes_with_one_task(made: Any, medseg: Any, tiny_task: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    other = tiny_task(tmp_path / "Task01_other", 4)
    before = (mine.run / "plan.json").read_bytes()
    medseg("plan", other, "-o", mine.run).refused("is a run on Task00_blobs")
    assert (mine.run / "plan.json").read_bytes() == before


def test_a_task_that_moved_is_found_after_planning_anew(made: Any, medseg: Any, tmp_path: Path) -> None:
    mine = made.copy(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    moved = mine.task.rename(tmp_path / "elsewhere" / mine.task.name)
    for command in (["preprocess"], ["train"], ["report"]):
        medseg(*command, mine.run).refused("is not at", str(mine.task), "medseg plan TASK")
    assert medseg("plan", moved, "-o", mine.run, "--no-measure").status == 0
    assert medseg("report", mine.run).status == 0


def test_other_folds_may_be_given(made: Any, medseg: Any, tmp_path: Path) -> None:
    ids = [f"blob_{n:03d}" for n in range(6)]
    splits = tmp_path / "splits_final.json"
    splits.write_text(json.dumps([{"train": ids[:4], "val": ids[4:]}]))
    assert medseg("plan", made.task, "-o", tmp_path / "run", "--splits", splits, "--no-measure").status == 0
    folds = json.loads((tmp_path / "run" / "folds.json").read_text())["folds"]
    assert folds == [{"train": ids[:4], "validation": ids[4:]}]


@pytest.mark.parametrize("verb", ["check", "evaluate"])
def test_json_for_programs(made: Any, medseg: Any, tmp_path: Path, verb: str) -> None:
    if verb == "check":
        outcome = medseg("check", made.task, "--json", "-o", tmp_path / "check.json")
        document = json.loads(outcome.out)
        assert document == json.loads((tmp_path / "check.json").read_text())
        assert document["ok"]
    else:
        outcome = medseg("evaluate", made.fold / "predictions", made.task, "-o", tmp_path, "--json")
        assert json.loads(outcome.out) == json.loads((tmp_path / "metrics.json").read_text())
    assert outcome.status == 0


def test_which_of_many_cases_to_look_at_is_told(made: Any) -> None:
    records = [json.loads(p.read_text()) for p in sorted((made.fold / "predictions").glob("*_seg.json"))]
    flagged = [record for record in records if record["review"]]
    lines = made.outcomes["predict"].out.splitlines()
    assert lines[0].startswith("2 cases predicted into")
    assert lines[1].startswith(f"{len(flagged) or 'none'} flagged for review")
    assert [line.partition(":")[0] for line in lines[2:]] == [record["scan"] for record in flagged]


def test_flagged_cases_come_with_their_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [{"reason": "it is cut", "review": True}, {"reason": "it is small", "review": False}]
    _show_flagged([{"scan": "a.nii", "review": True, "flags": flags}, {"scan": "b.nii", "review": False, "flags": []}])
    assert capsys.readouterr().out.splitlines() == ["1 flagged for review:", "a.nii: it is cut"]


def test_fewer_folds_than_asked_for_are_told(made: Any, medseg: Any, tmp_path: Path) -> None:
    command = ("plan", made.task, "-o", tmp_path / "run", "--folds", 20, "--machine", "cpu", "--no-measure")
    said = medseg(*command)
    assert said.err == "6 folds, not 20: there are no more subjects\n"
    assert "6 cases in 6 folds" in said.out
    assert " hours" not in said.out
