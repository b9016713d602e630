"""`medseg record`, and `medseg verify` of what was recorded: as it is, and spoilt in each way."""

from __future__ import annotations

import getpass
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest

from medseg.io.clone import commit_of, departures


@pytest.fixture(scope="module")
def recorded(made: Any, medseg: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A copy of the run with its results.json."""
    mine = made.copy(tmp_path_factory.mktemp("recorded"))
    outcome = medseg("record", mine.run)
    assert outcome.status == 0, outcome
    return mine


@pytest.fixture
def mine(recorded: Any, tmp_path: Path) -> Any:
    return recorded.copy(tmp_path)


def of(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "results.json").read_text())
    return found


def edit(run: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = of(run)
    change(document)
    (run / "results.json").write_text(json.dumps(document))


def findings(outcome: Any, verdict: str = "different") -> list[tuple[str, str, str]]:
    document = json.loads(outcome.out)
    return [(f["part"], f["where"], f["what"]) for f in document["findings"] if f["verdict"] == verdict]


# ---- record ------------------------------------------------------------------------------------


def test_results_hold_what_is_needed_to_repeat_them(recorded: Any) -> None:
    document = of(recorded.run)
    (one,) = document["tasks"]
    (fit,) = one["fits"]
    assert (one["task"], one["run"], one["plan"]["path"]) == ("Task00_blobs", ".", "plan.json")
    paths = {file["path"] for file in one["data"]["files"]}
    assert {"dataset.json", "imagesTr/blob_000.nii.gz", "labelsTr/blob_005.nii.gz", "imagesTs/blob_006.nii.gz"} <= paths
    assert (fit["configuration"], fit["fold"], fit["seed"], fit["steps"], fit["device"]) == ("3d", 0, 0, 160, "cpu")
    assert set(fit["weights"]) == {"model/member0.safetensors"}
    assert fit["ended"].endswith("+00:00")
    assert fit["peak_memory_bytes"] > 0
    metrics = json.loads((recorded.fold / "metrics.json").read_text())
    assert list(fit["rows"]) == metrics["rows"]
    assert [organ["dice"] for organ in fit["organs"]] == [row["dice_mean"] for row in metrics["summary"]]
    assert "medseg train RUN -c 3d --fold 0 --seed 0" in one["commands"]
    assert document["software"]["constraints"]
    assert document["protocol"] is None
    assert document["tolerance"] == {"dice": 0.005}


def test_results_and_crate_name_no_place_no_machine_and_no_user(recorded: Any) -> None:
    for name in ("results.json", "ro-crate-metadata.json"):
        text = (recorded.run / name).read_text()
        assert str(recorded.run.parent) not in text
        assert socket.gethostname() not in text
        assert f"/{getpass.getuser()}" not in text
        assert '"/' not in text


def test_the_same_run_gives_the_same_results(recorded: Any, mine: Any, medseg: Any) -> None:
    assert medseg("record", mine.run, "-o", mine.run / "results.json").status == 0
    assert (mine.run / "results.json").read_bytes() == (recorded.run / "results.json").read_bytes()


def test_what_cannot_be_recorded_is_refused(recorded: Any, mine: Any, medseg: Any, tmp_path: Path) -> None:
    medseg("record", mine.run, "-o", tmp_path / "elsewhere" / "results.json").refused("is not within", "with -o")
    (mine.fold / "metrics.json").rename(mine.fold / "aside.json")
    medseg("record", mine.run).refused("was scored", "medseg evaluate")
    (mine.fold / "aside.json").rename(mine.fold / "metrics.json")
    next((mine.fold / "predictions").glob("*_seg.nii.gz")).unlink()
    medseg("record", mine.run).refused("its prediction is missing")
    package = json.loads((mine.model / "package.json").read_text())
    (mine.model / "package.json").write_text(json.dumps(package | {"provenance": {}}))
    shutil.copytree(recorded.fold / "predictions", mine.fold / "predictions", dirs_exist_ok=True)
    medseg("record", mine.run).refused("does not tell its seed")
    package["provenance"]["steps"] = -1
    (mine.model / "package.json").write_text(json.dumps(package))
    medseg("record", mine.run).refused("cannot be recorded: steps")
    shutil.rmtree(mine.model)
    medseg("record", mine.run).refused("has scores and no model")


PROTOCOL = {
    "name": "blobs", "version": 1, "configurations": ["3d"], "folds": [0], "of_folds": 3, "seeds": [0], "steps": 160,
    "tolerance": {"dice": 0.01},
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"steps": 100}, "for 160 steps by seed 0, which is not the protocol blobs 1"),
        ({"folds": [0, 1]}, "has 3d fold 0, which is not"),
        ({"seeds": [0, 1]}, "no run of seed 1"),
        ({"folds": [3]}, "fold 3 of 3"),
        ({"seeds": [0, 0]}, "names one twice"),
        ({"stepz": 3}, "stepz"),
    ],
)
def test_a_protocol_that_was_not_followed_is_not_recorded(
    mine: Any, medseg: Any, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    file = tmp_path / "protocol.json"
    file.write_text(json.dumps(PROTOCOL))
    assert medseg("record", mine.run, "--protocol", file).status == 0
    assert of(mine.run)["protocol"]["version"] == 1
    assert of(mine.run)["tolerance"] == {"dice": 0.01}
    assert medseg("verify", mine.run / "results.json").status == 0
    file.write_text(json.dumps(PROTOCOL | change))
    medseg("record", mine.run, "--protocol", file).refused(words)


# ---- verify ------------------------------------------------------------------------------------


def test_what_is_as_recorded_is_equal(mine: Any, medseg: Any) -> None:
    outcome = medseg("verify", mine.run / "results.json")
    assert outcome.status == 0, outcome
    for part in ("data", "plan", "folds", "weights", "model", "predictions", "scores", "means"):
        assert f"\n{part} " in outcome.out
    assert "0 different." in outcome.out
    assert "scored anew, 2 cases" in outcome.out
    moved = mine.run.parent / "moved"
    moved.mkdir()
    shutil.copy(mine.run / "results.json", moved)
    medseg("verify", moved / "results.json", "--run", mine.task).refused("run.json is missing")
    assert medseg("verify", moved / "results.json", "--run", mine.run).status == 0


def test_what_is_not_there_is_said_and_nothing_at_all_is_refused(mine: Any, medseg: Any) -> None:
    file = mine.run.parent / "results.json"
    (mine.run / "results.json").rename(file)
    shutil.rmtree(mine.run)
    medseg("verify", file).refused("none of the runs and data", "--run")
    outcome = medseg("verify", file, "--data", mine.task.parent)
    assert outcome.status == 0, outcome
    assert "run " in outcome.out
    assert "not there" in outcome.out
    assert "What is not there was not checked." in outcome.out


def spoil_score(mine: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        fit = document["tasks"][0]["fits"][0]
        fit["rows"][1]["dice"] += 0.001

    edit(mine.run, change)


def spoil_mean(mine: Any) -> None:
    def change(document: dict[str, Any]) -> None:
        document["tasks"][0]["fits"][0]["organs"][0]["dice"] += 0.001

    edit(mine.run, change)


def held_out(mine: Any) -> list[str]:
    found: list[str] = json.loads((mine.run / "folds.json").read_text())["folds"][0]["validation"]
    return found


def drop_case(mine: Any) -> None:
    case = held_out(mine)[0]

    def change(document: dict[str, Any]) -> None:
        fit = document["tasks"][0]["fits"][0]
        fit["rows"] = [row for row in fit["rows"] if row["case"] != case]
        fit["predictions"] = [one for one in fit["predictions"] if one["case"] != case]

    edit(mine.run, change)


def swap_labels(mine: Any) -> None:
    first, second = (mine.task / "labelsTr" / f"{case}.nii.gz" for case in held_out(mine))
    a, b = nib.load(first), nib.load(second)
    for path, one in ((first, a), (second, b)):
        values = np.asarray(one.dataobj)
        nib.save(nib.Nifti1Image(np.where(values, 3 - values, 0).astype(np.uint8), one.affine), path)


def change_weight(mine: Any) -> None:
    path = mine.model / "member0.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def lose_prediction(mine: Any) -> None:
    (mine.fold / "predictions" / f"{held_out(mine)[0]}_seg.nii.gz").unlink()


def change_prediction(mine: Any) -> None:
    path = mine.fold / "predictions" / f"{held_out(mine)[1]}_seg.nii.gz"
    one = nib.load(path)
    values = np.asarray(one.dataobj).copy()
    values[:3, :3, :3] = 1
    nib.save(nib.Nifti1Image(values, one.affine), path)


def lose_image(mine: Any) -> None:
    (mine.task / "imagesTr" / "blob_000.nii.gz").unlink()


def edit_plan(mine: Any) -> None:
    path = mine.run / "plan.json"
    path.write_text(path.read_text().replace('"value": 0.01', '"value": 0.003', 1))


def edit_folds(mine: Any) -> None:
    folds = json.loads((mine.run / "folds.json").read_text())
    folds["folds"].reverse()
    (mine.run / "folds.json").write_text(json.dumps(folds))


def edit_metrics(mine: Any) -> None:
    path = mine.fold / "metrics.json"
    document = json.loads(path.read_text())
    document["rows"][0]["nsd"] = 0.123456
    path.write_text(json.dumps(document))


def edit_package(mine: Any) -> None:
    path = mine.model / "package.json"
    path.write_text(path.read_text().replace('"steps": 160', '"steps": 170'))


@pytest.mark.parametrize(
    ("spoil", "part", "where", "what"),
    [
        (spoil_score, "scores", "case {0}, right blob", "dice is"),
        (spoil_mean, "means", "left blob", "dice is"),
        (drop_case, "scores", "case {0}", "no prediction of it was recorded"),
        (swap_labels, "data", "labelsTr/{0}.nii.gz", "SHA-256"),
        (swap_labels, "scores", "case {1}, left blob", "dice is"),
        (change_weight, "weights", "model/member0.safetensors", "SHA-256"),
        (change_weight, "model", "3d fold 0", "was changed after it was written"),
        (lose_prediction, "predictions", "predictions/{0}_seg.nii.gz", "missing"),
        (lose_prediction, "scores", "case {0}", "missing"),
        (change_prediction, "predictions", "predictions/{1}_seg.nii.gz", "SHA-256"),
        (change_prediction, "scores", "case {1}, left blob", "dice is"),
        (lose_image, "data", "imagesTr/blob_000.nii.gz", "missing"),
        (edit_plan, "plan's decisions", "Task00_blobs", "recorded is"),
        (edit_folds, "folds", "Task00_blobs", "recorded is"),
        (edit_metrics, "metrics.json", "left blob", "nsd is 0.123456"),
        (edit_package, "steps", "3d fold 0", "170, recorded is 160"),
    ],
)
def test_what_was_tampered_with_is_found_and_named(
    mine: Any, medseg: Any, spoil: Callable[[Any], None], part: str, where: str, what: str
) -> None:
    spoil(mine)
    outcome = medseg("verify", mine.run / "results.json", "--json")
    assert outcome.status == 1, outcome
    wanted = where.format(*held_out(mine))
    found = findings(outcome)
    assert [one for one in found if one[0] == part and wanted in one[1] and what in one[2]], found
    shown = medseg("verify", mine.run / "results.json")
    assert shown.status == 1
    assert "different" in shown.out


def put(*keys: Any, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(document: Any) -> None:
        *inner, last = keys
        for key in inner:
            document = document[key]
        document[last] = value

    return change


FIT = ("tasks", 0, "fits", 0)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (put("format", value=2), "format"),
        (put("surprise", value=1), "surprise"),
        (put("tasks", value=[]), "tasks"),
        (put("tasks", 0, "run", value="../elsewhere"), "leads out of its folder"),
        (put("tasks", 0, "run", value="/etc"), "leads out of its folder"),
        (put("tasks", 0, "task", value="../x"), "tasks.0.task"),
        (put("tasks", 0, "data", "files", 0, "path", value="../../etc/passwd"), "leads out of its folder"),
        (put("tasks", 0, "data", "files", 0, "sha256", value="0" * 64), "is not that of its files"),
        (put(*FIT, "configuration", value="../3d"), "configuration"),
        (put(*FIT, "predictions", 0, "path", value="..\\x"), "leads out of its folder"),
        (put(*FIT, "predictions", 0, "case", value="a\u001b[2J"), "control characters"),
        (put(*FIT, "rows", 0, "name", value="a\u001b[2J"), "control characters"),
        (put(*FIT, "rows", 0, "dice", value="high"), "dice"),
        (put(*FIT, "rows", 0, value={}), "missing"),
        (put(*FIT, "weights", value={}), "weights"),
        (put(*FIT, "steps", value=True), "steps"),
        (put(*FIT, "seconds", value=-1), "seconds"),
        (put("tolerance", "dice", value=7), "tolerance.dice"),
    ],
)
def test_results_that_are_not_sound_are_refused(mine: Any, medseg: Any, change: Any, word: str) -> None:
    edit(mine.run, change)
    medseg("verify", mine.run / "results.json").refused("results.json", word)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"format": NaN}', "[" * 100_000, '"\\ud800"', "\x00"])
def test_what_is_no_json_of_ours_is_refused(medseg: Any, tmp_path: Path, text: str) -> None:
    (tmp_path / "results.json").write_text(text)
    medseg("verify", tmp_path / "results.json").refused("results.json")


def test_options_that_do_not_go_together_are_refused(mine: Any, medseg: Any, tmp_path: Path) -> None:
    file = mine.run / "results.json"
    medseg("verify", file, "--again").refused("--again needs -o WORK")
    medseg("verify", file, "-o", tmp_path / "work").refused("-o goes with --again")
    medseg("verify", file, "--device", "cpu").refused("--device goes with --again")
    medseg("verify", file, "--again", "-o", mine.run).refused("is the run itself")
    medseg("verify", file, "--data", tmp_path / "nowhere").refused("is no folder")


# ---- again -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def again(recorded: Any, medseg: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    work = tmp_path_factory.mktemp("again")
    return work, medseg("verify", recorded.run / "results.json", "--again", "-o", work, "--json")


def test_trained_again_it_is_equal_to_the_bit(again: tuple[Path, Any], recorded: Any) -> None:
    work, outcome = again
    assert outcome.status == 0, outcome
    document = json.loads(outcome.out)
    said = {f["part"]: (f["verdict"], f["what"]) for f in document["findings"] if f["where"].endswith("again")}
    assert said["weights"] == ("equal", "to the bit")
    assert said["predictions"] == ("equal", "to the bit, 2 cases")
    assert said["scores"][0] == "equal"
    weights = "3d/fold0/model/member0.safetensors"
    assert (work / weights).read_bytes() == (recorded.run / weights).read_bytes()


@pytest.fixture(scope="module")
def others(again: tuple[Path, Any], medseg: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for --again in which the weights are those of another seed, which stands for another machine."""
    work = tmp_path_factory.mktemp("others") / "work"
    shutil.copytree(again[0], work)
    shutil.rmtree(work / "3d" / "fold0")
    assert medseg("train", work, "--seed", 1, "--threads", 1, "--device", "cpu").status == 0
    package = work / "3d" / "fold0" / "model" / "package.json"
    package.write_text(package.read_text().replace('"seed": 1', '"seed": 0'))
    return work


@pytest.mark.parametrize(("tolerance", "status"), [(1.0, 0), (0.0, 1)])
def test_other_weights_are_judged_by_the_tolerance_that_is_stated(
    others: Path, mine: Any, medseg: Any, tolerance: float, status: int
) -> None:
    edit(mine.run, put("tolerance", "dice", value=tolerance))
    outcome = medseg("verify", mine.run / "results.json", "--again", "-o", others)
    assert outcome.status == status, outcome
    assert "within tolerance" in outcome.out if status == 0 else "apart" in outcome.out
    assert "other weights (on the same hardware and versions)" in outcome.out


# ---- the crate ---------------------------------------------------------------------------------


def test_the_crate_says_what_made_what(recorded: Any) -> None:
    graph = json.loads((recorded.run / "ro-crate-metadata.json").read_text())["@graph"]
    known = {entity["@id"]: entity for entity in graph}
    assert len(known) == len(graph)

    def named(value: Any) -> list[str]:
        if isinstance(value, dict):
            return [value["@id"]] if set(value) == {"@id"} else [n for v in value.values() for n in named(v)]
        return [n for v in value for n in named(v)] if isinstance(value, list) else []

    outside = {name for entity in graph for name in named(entity)} - set(known)
    assert outside == {"https://w3id.org/ro/crate/1.1"}
    for entity in graph:
        if entity["@type"] == "File":
            assert (recorded.run / entity["@id"]).is_file(), entity
    train = next(e for e in graph if e["@type"] == "CreateAction" and e["name"].startswith("medseg train"))
    assert "3d/fold0/model/member0.safetensors" in named(train["result"])
    assert any(name.startswith("#data/Task00_blobs/") for name in named(train["object"]))
    assert "medseg train RUN -c 3d --fold 0" in train["description"]
    assert train["endTime"]


# What the crate uses of the vocabularies that its context names, which a validator would fetch from the network.
SCHEMA_ORG = (
    "about", "contentSize", "datePublished", "description", "encodingFormat", "endTime", "hasPart", "identifier",
    "instrument", "license", "mainEntity", "mentions", "name", "object", "result", "softwareRequirements",
    "softwareVersion", "unitText", "url", "value", "version",
    "Collection", "CreateAction", "CreativeWork", "Dataset", "PropertyValue", "SoftwareApplication",
)  # fmt: skip
OTHERS = {
    "File": "http://schema.org/MediaObject",
    "conformsTo": "http://purl.org/dc/terms/conformsTo",
    "sha256": "https://w3id.org/ro/terms/workflow-run#sha256",
    "resourceUsage": "https://w3id.org/ro/terms/workflow-run#resourceUsage",
}


def validator() -> str:
    """roc-validator's program, in this environment or on the path."""
    found = shutil.which("rocrate-validator", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if found is None:
        pytest.skip("no rocrate-validator (pip install roc-validator)")
    return found


@pytest.mark.parametrize("profile", ["ro-crate-1.1", "process-run-crate-0.5"])
def test_the_crate_is_valid(mine: Any, profile: str) -> None:
    file = mine.run / "ro-crate-metadata.json"
    document = json.loads(file.read_text())
    document["@context"] = {name: f"http://schema.org/{name}" for name in SCHEMA_ORG} | OTHERS
    file.write_text(json.dumps(document))
    command = [validator(), "--no-interactive", "--disable-color", "validate", "-np", "-p", profile, "--no-paging"]
    done = subprocess.run([*command, mine.run], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    # It finds what is wrong.
    root = next(entity for entity in document["@graph"] if entity["@id"] == "./")
    del root["datePublished"], root["conformsTo"]
    file.write_text(json.dumps(document))
    assert subprocess.run([*command, mine.run], capture_output=True, timeout=120).returncode == 1


# ---- which medseg ------------------------------------------------------------------------------


def test_a_commit_is_told_with_and_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if shutil.which("git") is None:
        pytest.skip("no git")

    def git(*arguments: str) -> None:
        names = ("-c", "user.name=a", "-c", "user.email=a@example.org")
        subprocess.run(["git", "-C", tmp_path, *names, *arguments], check=True, capture_output=True)

    git("init")
    (tmp_path / "a.txt").write_text("one")
    git("add", "a.txt")
    git("commit", "-m", "one")
    clean = commit_of(tmp_path)
    assert clean is not None
    assert clean.dirty is False
    (tmp_path / "a.txt").write_text("two")
    changed = commit_of(tmp_path)
    assert changed is not None
    assert (changed.sha, changed.dirty) == (clean.sha, True)
    monkeypatch.setattr("medseg.io.clone.shutil.which", lambda _: None)
    read = commit_of(tmp_path)
    assert read is not None
    assert (read.sha, read.dirty) == (clean.sha, None)
    (tmp_path / ".git" / "HEAD").write_text("ref: refs/heads/none")
    assert commit_of(tmp_path) is None


def test_what_departs_from_the_pins_is_told(tmp_path: Path) -> None:
    file = tmp_path / "constraints.txt"
    file.write_text(f"# pins\nnumpy==0.1\nno-such-package-here==1\nnibabel=={nib.__version__}  # as it is\n")
    assert departures(file) == (f"numpy {np.__version__}, not 0.1",)
