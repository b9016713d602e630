"""`snakemake benchmark`: a protocol, its results, and Snakemake's own report of it."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROTOCOL = {
    "name": "tiny",
    "version": 3,
    "configurations": ["3d"],
    "folds": [1],
    "of_folds": 3,
    "seeds": [7],
    "steps": 20,
    "machine": "cpu",
    "memory": "2GiB",
}


def run(*command, folder, expect=0):
    done = subprocess.run(
        [sys.executable, "-m", *command], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


def snakemake(*arguments, folder, expect=0):
    use = ("--snakefile", str(ROOT / "Snakefile"), "--cores", "2", "--configfile", "config.json")
    return run("snakemake", *arguments, *use, folder=folder, expect=expect)


@pytest.fixture(scope="module")
def configured(tmp_path_factory, tiny_task):
    folder = tmp_path_factory.mktemp("benchmark")
    tiny_task(folder / "Task98_Tiny", cases=6)
    (folder / "protocol.json").write_text(json.dumps(PROTOCOL))
    config = {"tasks": ["Task98_Tiny"], "protocol": "protocol.json", "threads": 1, "device": "cpu", "budget": "9h"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.slow
def test_a_protocol_is_run_recorded_verified_and_reported(configured):
    snakemake("benchmark", folder=configured)
    results = json.loads((configured / "results" / "results.json").read_text())
    assert results["protocol"]["name"] == "tiny"
    assert results["tolerance"] == {"dice": 0.005}
    assert results["software"]["constraints"]
    (task,) = results["tasks"]
    (fit,) = task["fits"]
    assert task["run"] == "benchmark/seed7/Task98_Tiny"
    assert (fit["configuration"], fit["fold"], fit["seed"], fit["steps"]) == ("3d", 1, 7, 20)
    assert "Nothing to be done" in snakemake("benchmark", folder=configured)
    said = run("medseg", "verify", "results/results.json", folder=configured)
    assert "tiny 3 " in said
    assert "0 different." in said
    # It makes its file of what is there, and asks no network for anything.
    snakemake("benchmark", "--report", "report.zip", folder=configured)
    names = [Path(name).name for name in zipfile.ZipFile(configured / "report.zip").namelist()]
    for name in ("report.html", "report.pdf", "metrics.csv", "results.json"):
        assert name in names


def test_a_protocol_fixes_steps_and_plans_for_a_machine_that_it_names(configured):
    said = snakemake("benchmark", "--dry-run", "--forceall", "--printshellcmds", folder=configured)
    (plan,) = [line for line in said.splitlines() if " -m medseg plan " in line]
    assert " --machine cpu --memory 2GiB --steps 20 --no-measure " in plan
    assert " --folds 3 --seed 7 --family unet " in plan
    assert "--budget" not in plan
    (train,) = [line for line in said.splitlines() if " -m medseg train " in line]
    assert " -c 3d --fold 1 --seed 7 --device cpu " in train


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "cannot be read"),
        (json.dumps(PROTOCOL | {"stepz": 3}), "stepz"),
        (json.dumps(PROTOCOL | {"folds": [3]}), "fold 3 of 3"),
        (json.dumps(PROTOCOL | {"configurations": ["../3d"]}), "configurations.0"),
        (json.dumps(PROTOCOL | {"configurations": ["4d"]}), "4d"),
        (json.dumps(PROTOCOL | {"memory": "much"}), "much"),
        (None, "cannot be read"),
    ],
)
def test_a_protocol_that_is_not_sound_stops_before_anything_runs(tmp_path, text, words):
    (tmp_path / "config.json").write_text(json.dumps({"protocol": "protocol.json"}))
    if text is not None:
        (tmp_path / "protocol.json").write_text(text)
    said = snakemake("benchmark", folder=tmp_path, expect=1)
    wrong = [line for line in said.splitlines() if "medseg:" in line]
    assert len(wrong) == 1, said
    assert words in wrong[0]


def test_the_protocol_that_comes_with_the_workflow_can_be_planned(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    said = " ".join(snakemake("benchmark", "--dry-run", folder=tmp_path).split())
    assert "benchmark_seed0_train 12" in said
    assert "benchmark 1" in said
