"""The workflow through Snakemake itself, on tasks small enough to train in seconds."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest

from medseg.plan.families import TRAINED

ROOT = Path(__file__).parents[2]


def snakemake(*arguments, folder, cores=2, expect=0):
    """Run Snakemake on the project's Snakefile from another folder; its output as one text."""
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", str(cores), *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=560)
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


@pytest.fixture(scope="module")
def configured(tmp_path_factory, tiny_task):
    """A folder with a tiny task and a configuration that trains it for seconds."""
    folder = tmp_path_factory.mktemp("workflow")
    tiny_task(folder / "Task98_Tiny", cases=6)
    config = {
        "tasks": ["Task98_Tiny"],
        "configurations": ["3d", "2d"],
        "of_folds": 3,
        "folds": [0],
        "budget": "12s",
        "threads": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_tasks_go_in_and_reports_come_out_and_a_second_call_has_nothing_to_do(configured):
    use = ("--configfile", "config.json")
    snakemake(*use, folder=configured)
    results = configured / "results" / "Task98_Tiny"
    page = (results / "report.html").read_text()
    assert "Task98_Tiny" in page
    for name in ("3d", "2d"):
        fold = results / name / "fold0"
        metrics = json.loads((fold / "metrics.json").read_text())
        held_out = json.loads((results / "folds.json").read_text())["folds"][0]["validation"]
        assert sorted({row["case"] for row in metrics["rows"]}) == sorted(held_out)
        assert (fold / "metrics.csv").exists()
        assert (fold / "model" / "package.json").exists()
        # Checkpoints stand where no rule declares an output.
        assert list((results / "checkpoints" / name / "fold0").glob("*/checkpoint.safetensors"))
    assert "Nothing to be done" in snakemake(*use, folder=configured)


def test_a_run_goes_on_although_its_files_are_from_the_future(configured):
    """Of an input from the future Snakemake takes what is made from it to be older, and throws it away."""
    use = ("--configfile", "config.json")
    snakemake(*use, folder=configured)
    results = configured / "results"
    weights = {path: path.read_bytes() for path in results.rglob("*.safetensors")}
    for path in results.rglob("*"):
        os.utime(path, (time.time() + 3e8,) * 2)
    lost = results / "Task98_Tiny" / "2d" / "fold0" / "predictions" / "predictions.json"
    lost.unlink()
    (results / "Task98_Tiny" / "report.html").unlink()
    (results / "Task98_Tiny" / "2d" / "fold0" / "metrics.json").unlink()
    assert "were dated in the future, and are dated now" in snakemake(*use, folder=configured)
    assert lost.exists()
    assert weights == {path: path.read_bytes() for path in results.rglob("*.safetensors")}
    assert all(path.stat().st_mtime < time.time() + 1 for path in results.rglob("*") if path.is_file())


def test_an_edited_plan_is_trained_anew_and_the_rest_is_kept(configured):
    use = ("--configfile", "config.json")
    snakemake(*use, folder=configured)
    plan = configured / "results" / "Task98_Tiny" / "plan.json"
    time.sleep(1.1)
    plan.write_text(plan.read_text().replace('"value": 0.01', '"value": 0.003', 1))
    said = snakemake(*use, "--dry-run", folder=configured)
    counts = {line.split()[0]: line.split()[1] for line in said.splitlines() if len(line.split()) == 2}
    assert counts.get("train") == "2"
    assert "phantom" not in counts
    assert "check" not in counts
    assert "plan" not in counts


@pytest.mark.slow
def test_planning_anew_loses_no_edited_plan_and_no_edited_folds(configured):
    given = ("--config", "results=replanned")
    target = ("replanned/Task98_Tiny/plan.json", "--configfile", "config.json")
    snakemake(*target, *given, folder=configured)
    run = configured / "replanned" / "Task98_Tiny"
    edited = (run / "plan.json").read_text().replace('"value": 0.01', '"value": 0.003', 1)
    (run / "plan.json").write_text(edited)
    folds = json.loads((run / "folds.json").read_text())
    folds["folds"].reverse()
    (run / "folds.json").write_text(json.dumps(folds))
    snakemake(*target, *given, "budget=14s", folder=configured)
    assert (run / "plan.earlier.json").read_text() == edited
    assert '"value": 0.003' not in (run / "plan.json").read_text()
    assert json.loads((run / "folds.json").read_text()) == folds
    assert "Nothing to be done" in snakemake(*target, *given, "budget=14s", folder=configured)


def test_a_plan_for_a_processor_keeps_within_the_most_that_a_job_may_ask_for(tmp_path):
    said = snakemake("--dry-run", "--printshellcmds", "--config", "device=cpu", "memory_mb=3000", folder=tmp_path)
    asked = said[said.index("rule plan:") :].split("mem_mb=")[1].split(",")[0]
    told = {line.split("--memory ")[1].split()[0] for line in said.splitlines() if "medseg plan " in line}
    assert (asked, told) == ("3000", {"3000MB"})
    # What a training asks for follows from its plan, which is not there yet.
    assert said[said.index("rule train:") :].split("mem_mb=")[1].startswith("<TBD>")


def test_the_phantoms_run_where_nothing_is_configured(tmp_path):
    said = snakemake("--dry-run", folder=tmp_path)
    for name in ("Phantom_Abdomen", "Phantom_Brain", "Phantom_Prostate"):
        assert f"results/{name}/report.html" in said


def test_one_task_can_be_named_on_the_command_line(configured):
    said = snakemake("--dry-run", "--config", "tasks=Task98_Tiny", "results=elsewhere", folder=configured)
    assert "elsewhere/Task98_Tiny/report.html" in said
    assert "Phantom" not in said


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"configuratoins": ["3d"]}, "('configuratoins' was unexpected). Did you mean configurations?"),
        ({"budget": "soon"}, "Write 90s, 15m or 1h30m."),
        ({"budget": 20}, "Write 90s, 15m or 1h30m."),
        ({"folds": "0,1,2"}, "'folds=[0,1,2]'"),
        ({"folds": [0, 3], "of_folds": 3}, "fold 3 of 3: valid are 0 to 2"),
        ({"configurations": "3d,2d"}, "'configurations=[3d,2d]'"),
        ({"configurations": ["4d"]}, "4d"),
        ({"folds": [5]}, "fold 5"),
        ({"device": "tpu"}, "device"),
        ({"unlabelled": ["everything"]}, "unlabelled"),
        ({"family": "vnet"}, "family"),
        ({"tasks": ["nowhere"]}, "nowhere"),
        ({"splits": {"Task01": "splits.json"}}, "Task01"),
        ({"phantoms": {"tasks": ["heart"]}}, "heart"),
        ({"configurations": ["3d", "3d-cascade"], "folds": [0, 1, 2, 3, 4]}, "Add 3d-low"),
        ({"configurations": ["3d-low", "3d-cascade"], "folds": [0, 1]}, "all folds of 3d-low"),
        (
            {"configurations": ["3d-low", "3d-cascade"], "folds": [0, 1, 2, 3, 4], "unlabelled": ["teacher"]},
            "3d-cascade cannot learn",
        ),
    ],
)
def test_a_wrong_configuration_stops_before_anything_runs(tmp_path, settings, named):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    said = snakemake("--configfile", "config.json", folder=tmp_path, expect=1)
    wrong = [line for line in said.splitlines() if "medseg:" in line]
    assert len(wrong) == 1, said
    assert named in wrong[0]
    assert not (tmp_path / "results").exists()


def test_a_second_stage_waits_for_all_folds_of_the_first(configured):
    said = snakemake(
        "--dry-run", "--config", "tasks=Task98_Tiny", "configurations=[3d-low,3d-cascade]", "folds=[0,1,2]",
        "of_folds=3", "results=staged", folder=configured,
    )  # fmt: skip
    rules = said.split("rule preprocess:")
    (second,) = [part for part in rules if "output: staged/Task98_Tiny/3d-cascade/preprocessed" in part]
    for fold in range(3):
        assert f"staged/Task98_Tiny/3d-low/fold{fold}/predictions/predictions.json" in second[: second.index("output:")]


@pytest.mark.parametrize(("wanted", "said"), [("[]", ""), ("teacher", " --unlabelled teacher")])
def test_scans_without_labels_are_learnt_from_where_that_is_asked_for(configured, wanted, said):
    given = ("tasks=Task98_Tiny", "results=more", f"unlabelled={wanted}")
    (line,) = [
        line
        for line in snakemake("--dry-run", "--printshellcmds", "--config", *given, folder=configured).splitlines()
        if " -m medseg plan " in line
    ]
    assert line.split("--budget 15m")[1].split(" --threads")[0].rstrip() == said


def test_every_family_can_be_asked_for(configured):
    schema = json.loads((ROOT / "pipelines" / "schemas" / "config.schema.json").read_text())
    assert schema["properties"]["family"]["enum"] == list(TRAINED)
    given = ("tasks=Task98_Tiny", "results=other", "family=resunet")
    said = snakemake("--dry-run", "--printshellcmds", "--config", *given, folder=configured)
    assert " --family resunet " in next(line for line in said.splitlines() if " -m medseg plan " in line)


def test_a_job_that_fails_shows_why(tmp_path, tiny_task):
    task = tiny_task(tmp_path / "Task97_Broken", cases=5)
    image = sorted((task / "imagesTr").iterdir())[0]
    image.write_bytes(image.read_bytes()[:100])
    said = snakemake("--config", "tasks=Task97_Broken", folder=tmp_path, expect=1)
    assert "truncated" in said
    assert image.name.split(".")[0] in said
    assert not (tmp_path / "results" / "Task97_Broken" / "plan.json").exists()


def test_more_cores_than_there_are_run_no_more_trainings_at_once(tmp_path):
    here = len(os.sched_getaffinity(0))
    said = snakemake("--dry-run", "--config", f"threads={here}", folder=tmp_path, cores=4 * here)
    train = said[said.index("rule train:") :]
    assert f"threads: {4 * here}" in train[: train.index("resources:")]


def test_two_trainings_never_share_a_gpu_by_accident(tmp_path):
    """The profile beside the Snakefile holds by itself: jobs that take gpu=1 run one at a time."""
    shutil.copytree(ROOT / "profiles", tmp_path / "profiles")
    (tmp_path / "Snakefile").write_text(
        "rule all:\n    input: expand('{i}.txt', i=range(3))\n"
        "rule one:\n    output: '{i}.txt'\n    resources: gpu=1\n"
        "    shell: 'date +%s.%N > {output}; sleep 1; date +%s.%N >> {output}'\n"
    )
    command = [sys.executable, "-m", "snakemake", "--cores", "3"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    spans = sorted(tuple(map(float, (tmp_path / f"{i}.txt").read_text().split())) for i in range(3))
    assert all(first[1] <= second[0] for first, second in pairwise(spans))


@pytest.mark.parametrize("rule", ["train", "predict"])
def test_jobs_on_a_gpu_say_so(tmp_path, rule):
    said = snakemake("--dry-run", "--config", "device=cuda", folder=tmp_path)
    job = said[said.index(f"rule {rule}:") :]
    assert "gpu=1" in job[: job.index("\n\n") if "\n\n" in job else 2000][:2000]


@pytest.mark.parametrize("configurations", ["3d", "[3d,2d]"])
@pytest.mark.parametrize("folds", ["0", "[0,1,2,3,4]"])
def test_every_combination_can_be_planned(tmp_path, configurations, folds):
    said = snakemake("--dry-run", "--config", f"configurations={configurations}", f"folds={folds}", folder=tmp_path)
    wanted = 3 * (1 if configurations == "3d" else 2) * (1 if folds == "0" else 5)
    assert f"train {wanted}" in " ".join(said.split())
    assert ("choose 3" in " ".join(said.split())) == (folds != "0")


def test_no_model_of_all_folds_where_none_is_wanted(tmp_path):
    said = snakemake("--dry-run", "--config", "folds=[0,1,2,3,4]", "choose=never", folder=tmp_path)
    assert "rule train" in said
    assert "rule choose" not in said


def test_environment_modules_are_loaded_by_each_job(tmp_path):
    init = Path("/usr/share/modules/init/bash")
    if not init.exists():
        pytest.skip("there are no environment modules")
    (tmp_path / "modules" / "here").mkdir(parents=True)
    (tmp_path / "modules" / "here" / "1").write_text(f"#%Module\nsystem touch {tmp_path}/loaded\n")
    command = f"source {init}; export MODULEPATH={tmp_path}/modules; " + shlex.join(
        [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "1"]
    )
    (tmp_path / "config.json").write_text(json.dumps({"phantoms": {"cases": 5}}))
    target = ["results/phantoms/Phantom_Prostate/dataset.json", "--configfile", "config.json", "--config"]
    for name, status in (("here/1", 0), ("elsewhere/1", 1)):
        asked = [*target, f"modules=[{name}]"]
        done = subprocess.run(
            ["bash", "-c", f"{command} {shlex.join(asked)}"], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == status, done.stderr[-3000:]
        if not status:
            assert (tmp_path / "loaded").exists()
            shutil.rmtree(tmp_path / "results")


def test_a_configuration_of_another_version_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": 2}))
    said = snakemake("--dry-run", "--configfile", "config.json", folder=tmp_path, expect=1)
    assert "the configuration is wrong at format: 1 was expected. It is of another version of medseg" in said
