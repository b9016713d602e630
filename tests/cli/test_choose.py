"""Every fold of a small task trained, predicted and evaluated by one command, and one model made of them."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from medseg.models.card import card
from medseg.models.evaluation import Figure
from medseg.models.package import load_package, save_package
from medseg.models.refinement import Refinement, Rule


@pytest.fixture(scope="module")
def planned(
    medseg: Any, tiny_task: Callable[..., Path], small_plan: Any, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of three folds and two configurations, whose networks learn in seconds."""
    folder = tmp_path_factory.mktemp("choose")
    task, run = tiny_task(folder / "Task00_blobs", 6), folder / "run"
    assert medseg("plan", task, "-o", run, "--folds", 3).status == 0
    plan = json.loads((run / "plan.json").read_text())
    three = json.loads(small_plan(steps=120, steps_per_epoch=60, learning_rate=1e-2).model_dump_json())
    two = small_plan(dimensions=2, slice_axis=2, patch=(16, 16, 1), steps=30)
    plan["training"] = three["training"]
    plan["configurations"] = {**three["configurations"], **json.loads(two.model_dump_json())["configurations"]}
    (run / "plan.json").write_text(json.dumps(plan))
    return run


@pytest.fixture(scope="module")
def chosen(medseg: Any, planned: Path) -> tuple[Path, Any]:
    """The run with all done, and what was said."""
    said = medseg("train", planned, "--all-folds", "--threads", 1, "--device", "cpu", "--seed", 3)
    assert said.status == 0, said
    return planned, said


def test_one_command_does_the_whole(medseg: Any, chosen: tuple[Path, Any]) -> None:
    run, said = chosen
    for name in ("3d", "2d"):
        for fold in range(3):
            assert (run / name / f"fold{fold}" / "metrics.csv").exists()
    package = load_package(run / "model")
    known = package.evaluation
    assert known is not None
    assert len(package.members) == 3
    assert sorted(package.trained_on) == [f"blob_{n:03d}" for n in range(6)]
    assert {one.configuration for one in known.compared} == {"3d", "2d"}
    assert known.compared[0].configuration == package.configuration_name == "3d"
    assert known.dice.mean > 0.3
    assert f"{package.name}: 3 networks, Dice {known.dice} out of fold" in said.out
    # Six subjects decide on no post-processing.
    assert package.refinement is None
    assert package.engines.keys() >= {"openvino-f32"}
    assert package.provenance["seed"] == 3
    # What stands in the card is what `medseg evaluate` found.
    rows = [
        row
        for fold in range(3)
        for row in json.loads((run / "3d" / f"fold{fold}" / "metrics.json").read_text())["rows"]
    ]
    for one in known.structures:
        dices = [row["dice"] for row in rows if row["label"] == one.number]
        assert one.dice is not None
        assert one.dice.mean == pytest.approx(sum(dices) / len(dices))
    text = (run / "model" / "README.md").read_text()
    assert text == card(package)
    assert "medseg train RUN --all-folds -c 3d -c 2d --seed 3" in text


def test_what_is_done_is_not_done_again(medseg: Any, chosen: tuple[Path, Any]) -> None:
    run, _ = chosen
    files = [run / name / "fold1" / part for name in ("3d", "2d") for part in ("log.json", "metrics.json")]
    before = [path.stat().st_mtime_ns for path in files]
    digest = load_package(run / "model").digest()
    (run / "2d" / "fold0" / "metrics.json").unlink()
    said = medseg("train", run, "--all-folds", "--threads", 1, "--device", "cpu", "--seed", 3)
    assert said.status == 0, said
    assert [path.stat().st_mtime_ns for path in files] == before
    assert (run / "2d" / "fold0" / "metrics.json").exists()
    assert load_package(run / "model").digest() == digest


def test_the_model_is_described_predicts_and_is_passed_on(
    medseg: Any, chosen: tuple[Path, Any], tmp_path: Path
) -> None:
    run, _ = chosen
    facts = json.loads(medseg("models", "info", run / "model", "--json").out)
    assert facts["post_processing"] == ["none"]
    assert facts["networks"] == 3
    assert facts["out_of_fold_cases"] == 6
    said = medseg("models", "info", run / "model")
    assert "out of fold dice" in said.out
    scan = sorted((run.parent / "Task00_blobs" / "imagesTr").iterdir())[0]
    assert medseg("predict", scan, "-m", run / "model", "-o", tmp_path, "--threads", 1).status == 0
    assert medseg("models", "export", run / "model", "-o", tmp_path / "model.zip").status == 0
    assert medseg("models", "install", tmp_path / "model.zip", "--models-dir", tmp_path / "shelf").status == 0
    (installed,) = (tmp_path / "shelf").iterdir()
    assert load_package(installed).evaluation == load_package(run / "model").evaluation


@pytest.fixture
def mine(chosen: tuple[Path, Any], tmp_path: Path) -> Path:
    """A copy to spoil."""
    shutil.copytree(chosen[0], tmp_path / "run")
    return tmp_path / "run"


def test_what_a_fold_lacks_is_said_with_the_command_that_makes_it(medseg: Any, mine: Path) -> None:
    shutil.rmtree(mine / "3d" / "fold1" / "predictions")
    fold = mine / "3d" / "fold1"
    medseg("choose", mine, "--threads", 1).refused(
        "3d fold 1 lacks its predictions. Run `medseg predict",
        f"--held-out -m {fold / 'model'} -o {fold / 'predictions'}",
        "--partial",
    )
    shutil.rmtree(mine / "3d" / "fold1" / "model")
    said = medseg("choose", mine, "--threads", 1)
    said.refused("3d fold 1 has no model. Run `medseg train", "-c 3d --fold 1`")
    # Another configuration is whole.
    assert medseg("choose", mine, "-c", "2d", "-o", mine / "two", "--threads", 1).status == 0
    assert load_package(mine / "two").configuration_name == "2d"
    said = medseg("choose", mine, "--partial", "--threads", 1, "-o", mine / "part")
    assert said.status == 0
    assert "left out: 3d fold 1 has no model" in said.err
    package = load_package(mine / "part")
    assert package.evaluation is not None
    assert package.evaluation.folds == (0, 2)
    assert package.evaluation.cases == 4
    # Each case was in the training of one of the two, or more.
    assert package.held_out == ()
    assert "(2 of 3 folds)" in (mine / "part" / "README.md").read_text()


def test_predictions_of_another_model_or_another_kind_are_no_grounds(medseg: Any, mine: Path) -> None:
    side = sorted((mine / "3d" / "fold0" / "predictions").glob("blob*_seg.json"))[0]
    record = json.loads(side.read_text())
    case = side.name.removesuffix("_seg.json")
    side.write_text(json.dumps({**record, "model_sha256": "0" * 64}))
    medseg("choose", mine, "--threads", 1).refused(f"the prediction of case {case} in 3d fold 0 is another model's")
    side.write_text(json.dumps({**record, "wishes": {**record["wishes"], "smallest_mm3": 5.0}}))
    medseg("choose", mine, "--threads", 1).refused(f"the prediction of case {case} in 3d fold 0 is not whole")
    side.unlink()
    medseg("choose", mine, "--threads", 1).refused(f"3d fold 0 lacks the prediction of case {case}")


def test_folds_that_were_edited_since_are_noticed(medseg: Any, mine: Path) -> None:
    folds = json.loads((mine / "folds.json").read_text())
    folds["folds"][0], folds["folds"][1] = folds["folds"][1], folds["folds"][0]
    (mine / "folds.json").write_text(json.dumps(folds))
    medseg("choose", mine, "--threads", 1).refused("3d fold 0 was trained on other cases than", "folds.json says")


def test_moving_borders_is_tried_on_request(medseg: Any, mine: Path) -> None:
    said = medseg("choose", mine, "-c", "3d", "--crf", "-o", mine / "moved", "--threads", 1)
    assert said.status == 0, said
    assert "tried: borders moved to edges within 4 mm (CRF, appearance 2); Dice " in said.out
    assert "not kept" in said.out  # by six subjects nothing is decided
    package = load_package(mine / "moved")
    assert package.refinement is None
    assert package.evaluation is not None
    assert package.evaluation.with_crf
    assert "| all | borders moved to edges within 4 mm" in (mine / "moved" / "README.md").read_text()


def test_rules_are_shown_where_a_package_has_some(medseg: Any, chosen: tuple[Path, Any], tmp_path: Path) -> None:
    rules = (
        Rule(name="left blob", number=1, largest=True),
        Rule(name="right blob", number=2, smallest_mm3=12.5),
    )
    save_package(tmp_path / "p", replace(load_package(chosen[0] / "model"), refinement=Refinement(rules=rules)))
    facts = json.loads(medseg("models", "info", tmp_path / "p", "--json").out)
    assert facts["post_processing"] == ["left blob: its largest piece alone", "right blob: no piece below 12.5 mm3"]


def test_all_folds_are_one_process(medseg: Any, planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.distributed.is_torchelastic_launched", lambda: True)
    medseg("train", planned, "--all-folds", "--threads", 1).refused("--all-folds is one process", "torchrun")


def test_what_one_fold_is_told_all_are_told(
    medseg: Any, chosen: tuple[Path, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And a fold that began otherwise is trained anew."""
    run, _ = chosen
    called: list[tuple[str, ...]] = []
    monkeypatch.setattr("medseg.cli.folds.run_verb", lambda *words: called.append(words))
    assert medseg("train", run, "--all-folds", "--threads", 1, "--seed", 3).status == 0
    assert [words[0] for words in called] == ["choose"]
    called.clear()
    # A fold's model has seen what another one holds out.
    mine = run / "3d" / "fold0" / "model"
    medseg("train", run, "--all-folds", "--threads", 1, "--seed", 3, "--from", mine).refused("to start from has learnt")
    assert not called
    other = load_package(mine)
    save_package(tmp_path / "other", replace(other, plan=other.plan.model_copy(update={"task": "Task01_other"})))
    how = ("--from", str(tmp_path / "other"), "--mlflow", "http://localhost:1")
    assert medseg("train", run, "--all-folds", "--threads", 1, "--seed", 3, *how).status == 0
    trained = [" ".join(words) for words in called if words[0] == "train"]
    assert len(trained) == 6
    assert all(" ".join(how) in words for words in trained)
    medseg("train", run, "--all-folds", "--fold", 1).refused("--fold trains one fold, --all-folds every one")


def test_stopped_between_the_verbs_it_can_be_taken_up(
    medseg: Any, planned: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    shutil.copytree(planned, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "2d", ignore_errors=True)
    command = ("train", tmp_path / "run", "--all-folds", "-c", "2d", "--threads", 1, "--device", "cpu", "--seed", 3)
    places = ("medseg.cli.preprocess._fill", "medseg.cli.predict._computed", "medseg.evaluate.score.score")
    for place, number in zip(places, (signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM), strict=True):
        with monkeypatch.context() as patched:
            patched.setattr(place, lambda *_, number=number, **__: signal.raise_signal(number))
            medseg(*command).refused("the same command goes on from what is done", status=75)
    assert (tmp_path / "run" / "2d" / "fold0" / "predictions" / "predictions.json").exists()
    assert not (tmp_path / "run" / "2d" / "fold0" / "metrics.json").exists()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_run_with_nothing_to_choose_from(medseg: Any, planned: Path, tmp_path: Path) -> None:
    for name in ("run.json", "plan.json", "folds.json", "fingerprint.json"):
        (tmp_path / name).write_bytes((planned / name).read_bytes())
    medseg("choose", tmp_path).refused("has no fold with a model and its predictions")
    medseg("choose", tmp_path, "-c", "4d").refused("no configuration '4d'")
    medseg("train", tmp_path, "-c", "3d", "-c", "2d").refused("--all-folds")


def test_the_report_tells_of_the_model(medseg: Any, chosen: tuple[Path, Any], tmp_path: Path) -> None:
    run, _ = chosen
    assert medseg("report", run, "-o", tmp_path / "report.html").status == 0
    page = (tmp_path / "report.html").read_text()
    assert "the average of 3 networks" in page
    assert "medseg choose RUN -c 3d -c 2d\n" in page
    # By plan and folds as they are, whatever options these were made with.
    commands = page[page.index("medseg plan TASK -o RUN --no-measure") :].split("\n")
    assert commands[2] == "cp THIS/plan.json THIS/folds.json RUN/"
    assert "medseg evaluate RUN/3d/fold0/predictions TASK -o RUN/3d/fold0 --tolerance 2" in commands


def test_the_report_says_which_dice_is_with_post_processing(medseg: Any, mine: Path, tmp_path: Path) -> None:
    package = load_package(mine / "model")
    assert package.evaluation is not None
    rule = Rule(name="left blob", number=1, largest=True)
    better = package.evaluation.model_copy(update={"dice": Figure(mean=0.987)})
    refined = replace(package, evaluation=better, refinement=Refinement(rules=(rule,)))
    save_package(tmp_path / "refined", refined)
    shutil.rmtree(mine / "model")
    shutil.copytree(tmp_path / "refined", mine / "model")
    assert medseg("report", mine, "-o", tmp_path / "report.html").status == 0
    page = (tmp_path / "report.html").read_text()
    first = package.evaluation.compared[0]
    assert f"the best mean Dice out of fold: {first.dice}, on 6 cases; 0.987 with the post-processing below" in page
