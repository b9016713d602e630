"""`medseg run`, through Snakemake itself."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from medseg.cli import run as module
from medseg.cli.run import Folds, _entry, workflow

ROOT = Path(__file__).parents[2]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder that has a blank in its name."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


@pytest.fixture
def task(here: Path, tiny_task: Callable[..., Path]) -> Path:
    return tiny_task(here / "Task98_Tiny", cases=6)


def steps(out: str) -> dict[str, int]:
    rows = (line.split() for line in out.splitlines()[2:-1])
    return {row[0]: int(row[1]) for row in rows}


# ---- dry runs -----------------------------------------------------------------------------------


def test_without_a_task_the_phantoms_would_be_made(medseg: Any, here: Path) -> None:
    outcome = medseg("run", "--dry-run", "--budget", "2m")
    assert outcome.status == 0, outcome
    found = steps(outcome.out)
    assert found["phantom"] == 3
    assert found["train"] == 6
    assert outcome.out.splitlines()[-1] == f"{sum(found.values())} steps would be done"
    assert outcome.err == ""
    assert not (here / "results").exists()


def test_options_become_settings(medseg: Any, task: Path) -> None:
    options = ["-c", "3d", "--folds", "all", "--of-folds", "3", "-o", "2024", "--device", "cpu", "--family", "resunet"]
    outcome = medseg("run", task, "-n", *options)
    assert outcome.status == 0, outcome
    assert steps(outcome.out) == {
        "check": 1, "plan": 1, "preprocess": 1, "train": 3, "predict": 3, "evaluate": 3, "choose": 1, "report": 1
    }  # fmt: skip


def test_a_profile_of_ones_own(medseg: Any, task: Path) -> None:
    profile = task.parent / "mine"
    profile.mkdir()
    medseg("run", task, "-n", "--profile", "mine").refused("no profile mine", "default")
    (profile / "config.yaml").write_text("cores: 1\n")
    outcome = medseg("run", task, "-n", "--profile", "mine")
    assert outcome.status == 0, outcome
    (profile / "config.yaml").write_text("coers: 1\n")
    outcome = medseg("run", task, "-n", "--profile", "mine")
    assert outcome.status != 0
    assert "coers" in outcome.err
    assert outcome.err.splitlines()[-1].startswith("medseg: Snakemake cannot start the workflow")


# ---- what is refused ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], ["nowhere is no Decathlon task", "data/README.md"]),
        (["--family", "vnet"], ["'vnet'", "unet-classic"]),
        (["--budget", "soon"], ["'soon' is no duration", "90s"]),
        (["--folds", "1;2"], ["'1;2' are no folds", "0-4, or all"]),
        (["--folds", "3-1"], ["lower one first"]),
        (["--folds", "7"], ["fold 7 of 5", "0 to 4"]),
        (["-c", "4d"], ["'4d'", "3d-low"]),
        (["-c", "3d", "-c", "3d-cascade"], ["Add 3d-low"]),
        (["--cores", "0"], ["--cores"]),
        (["--profile", "moon"], ["no profile moon", "default"]),
        (["--budgte", "3m"], ["No such option '--budgte'", "--budget"]),
        (["-o", "my results"], ["'my results'", "no blanks"]),
        (["-o", "{x}"], ["'{x}'"]),
    ],
)
def test_wrong_options_end_in_one_line(medseg: Any, here: Path, arguments: list[str], words: list[str]) -> None:
    medseg("run", *arguments).refused(*words)
    assert not (here / "results").exists()


def test_two_tasks_of_one_name_are_refused(medseg: Any, task: Path, tiny_task: Callable[..., Path]) -> None:
    other = tiny_task(task.parent / "more" / task.name, cases=5)
    medseg("run", task, other).refused("two tasks are called Task98_Tiny", "Rename one")


def test_without_snakemake_it_says_how_to_get_it(medseg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "snakemake", None)
    monkeypatch.delitem(sys.modules, "snakemake")
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    medseg("run", "-n").refused('pip install "medseg[workflow]"')


def test_a_locked_folder_is_explained_and_unlocked(medseg: Any, task: Path) -> None:
    assert medseg("run", task, "-n", "-c", "3d").status == 0
    locks = task.parent / ".snakemake" / "locks"
    locks.mkdir(parents=True, exist_ok=True)
    (locks / "0.output.lock").write_text("results/checks/Task98_Tiny.json\n")
    (locks / "0.input.lock").write_text("")
    medseg("run", task, "-c", "3d", "--of-folds", "3", "--cores", 1).refused("another run is at work", "--unlock")
    outcome = medseg("run", task, "-c", "3d", "--unlock")
    assert outcome.status == 0, outcome
    assert not locks.exists()


# ---- words --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "folds"), [("0", [0]), ("2,0,2", [0, 2]), ("0-4", [0, 1, 2, 3, 4]), ("0,3-4", [0, 3, 4])]
)
def test_folds(text: str, folds: list[int]) -> None:
    assert json.loads(Folds().convert(text, None, None)) == folds


@pytest.mark.parametrize("value", ["2024", "1e3", "True", "[a]", "a: b", 'it\'s "so"', "é", "'", "a b"])
def test_snakemake_reads_a_word_as_that_word(value: str) -> None:
    from snakemake.cli import parse_config

    assert parse_config([_entry("results", value), _entry("tasks", [value, "b"]), _entry("seed", 3)]) == {
        "results": value,
        "tasks": [value, "b"],
        "seed": 3,
    }


# ---- really -------------------------------------------------------------------------------------


def test_a_step_that_fails_shows_why(medseg: Any, task: Path) -> None:
    image = sorted((task / "imagesTr").iterdir())[0]
    image.write_bytes(image.read_bytes()[:100])
    outcome = medseg("run", task.name, "-c", "3d", "--cores", 1)
    assert outcome.status == 1
    assert "truncated" in outcome.err
    assert "Traceback" not in outcome.err
    assert outcome.err.splitlines()[-1].startswith("medseg: a step failed")


def test_what_the_preflight_says_is_handed_on_and_nothing_is_started(medseg: Any, here: Path) -> None:
    (here / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", here / "small"], check=False).returncode:
        pytest.skip("only root can mount")
    try:
        outcome = medseg("run", "-o", "small/results", "--cores", 1)
    finally:
        subprocess.run(["umount", "--lazy", here / "small"], check=True)
    assert outcome.status == 2
    said = outcome.err.splitlines()
    assert said[-1] == "medseg: nothing was started; why stands above."
    assert "results cannot be written to small/results: No space left on device" in said[-2]


def test_a_wheel_carries_the_workflow(tmp_path: Path) -> None:
    pytest.importorskip("hatchling")
    command = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(tmp_path)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    script = (
        "import sys; sys.path.insert(0, sys.argv.pop(1))\n"
        "from medseg.cli.run import workflow; print(workflow())\n"
        "from medseg.cli.main import cli; cli(['run', '-n'], standalone_mode=False)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path / "site")], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where, *told = done.stdout.splitlines()
    assert where == str(tmp_path / "site" / "medseg" / "workflow")
    assert told[-1] == "37 steps would be done"
    for name in ("pipelines", "profiles"):
        there = {p.relative_to(ROOT).as_posix() for p in (ROOT / name).rglob("*") if p.is_file()}
        assert {p.relative_to(where).as_posix() for p in (Path(where) / name).rglob("*") if p.is_file()} == there


def test_in_a_clone_it_is_the_clones() -> None:
    assert workflow() == ROOT


@pytest.mark.slow
def test_it_is_stopped_goes_on_and_ends_with_a_report(medseg: Any, task: Path) -> None:
    options = ["run", task.name, "-c", "3d", "--of-folds", "3", "--budget", "30s", "--cores", "2"]
    child = subprocess.Popen([sys.executable, "-m", "medseg", *options], stderr=subprocess.PIPE, text=True)
    checkpoints = task.parent / "results" / task.name / "checkpoints"
    for _ in range(3000):
        # Its first record, so that it is among its steps however busy the machine is.
        if any(path.stat().st_size for path in checkpoints.rglob("log.jsonl")) or child.poll() is not None:
            break
        time.sleep(0.1)
    child.send_signal(signal.SIGTERM)
    _, said = child.communicate(timeout=120)
    assert child.returncode == 1, said
    assert said.splitlines()[-1] == "medseg: stopped. The same command goes on from what is done."
    assert list(checkpoints.rglob("checkpoint.safetensors"))
    with pytest.raises(ProcessLookupError):
        os.killpg(child.pid, 0)
    outcome = medseg(*options)
    assert outcome.status == 0, outcome
    assert outcome.out == f"report: results/{task.name}/report.html\n"
    assert (task.parent / "results" / task.name / "report.html").exists()
    again = medseg(*options)
    assert again.status == 0
    assert again.out == "nothing to be done: all is in results\n"
