"""What the doctor says of machines that we have not, and of this one."""

from __future__ import annotations

import dataclasses
import getpass
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from packaging.specifiers import SpecifierSet

from medseg.core.finding import Finding, fit
from medseg.core.gpu import Device, Gpus, judge_gpus
from medseg.core.installation import (
    _MODULES,
    Installation,
    Package,
    _import,
    _parsed,
    judge_installation,
    satisfies,
)
from medseg.core.machine import Machine, Surroundings, judge_machine, judge_surroundings
from medseg.core.words import discreet
from medseg.infer.golden import Golden, golden_scan, judge_golden, try_golden
from medseg.io.disk import Disk, judge_disk, look_at_disk

GIB = 2**30
GOOD = Machine(
    "Linux 6.1", "3.12.3", "x86_64", "A processor", frozenset({"AVX2"}), 8, 8, None, 32 * GIB, 32 * GIB, 20 * GIB
)
AROUND = Surroundings(True, 50 * GIB, 10 * GIB, 1024, -1000.0)
DISK = Disk("ext4", "", 100 * GIB, 1_000_000, True, True, 0.0, 500.0, 900.0, 300.0)
TORCH, MONAI = Package("torch", ">=2.10", "2.13.0+cpu"), Package("monai", ">=1.6", "1.6.1")
SOUND = Installation("1.0", "1.0", "3.12.3", ">=3.11,<3.13", (TORCH, MONAI), snakemake="9.20", openmp=("GNU's",))
NO_GPU = Gpus(False, "", "2.13.0", "", ())
H100 = Device("NVIDIA H100", 80 * GIB, 79 * GIB)


def only(findings: list[Finding]) -> Finding:
    """The one that is not ok."""
    (found,) = [one for one in findings if one.verdict != "ok"]
    assert found.remedy
    return found


def test_sound_facts_are_fit() -> None:
    findings = [
        *judge_machine(GOOD),
        *judge_surroundings(AROUND),
        *judge_disk(DISK, "here"),
        *judge_installation(SOUND),
        *judge_gpus(NO_GPU),
        judge_golden(Golden("openvino", "f32", 1.0, {"a": 1.0, "b": 0.995})),
    ]
    assert fit(findings)
    assert {one.verdict for one in findings} == {"ok"}


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"system": "Darwin 23"}, "problem", "WSL"),
        ({"instructions": frozenset()}, "note", "AVX2"),
        ({"cores": 8, "machine_cores": 64, "quota": 2.0}, "note", "--threads 2"),
        ({"memory_limit": 2 * GIB, "memory_free": GIB // 2}, "problem", "control group"),
        ({"memory_free": 2 * GIB}, "note", "small scans"),
    ],
)
def test_machines(change: dict[str, Any], verdict: str, words: str) -> None:
    found = only(judge_machine(dataclasses.replace(GOOD, **change)))
    assert found.verdict == verdict
    assert words in str(found)


def test_a_processor_without_avx2_that_never_had_any_is_fine() -> None:
    arm = dataclasses.replace(GOOD, architecture="aarch64", instructions=frozenset())
    assert {one.verdict for one in judge_machine(arm)} == {"ok"}


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"home_writable": False}, "note", "--models-dir"),
        ({"home_writable": None}, "note", "no home folder"),
        ({"temporary_free": None}, "problem", "TMPDIR"),
        ({"temporary_free": 2**20}, "problem", "1 MiB"),
        ({"temporary_free": GIB // 2}, "note", "TMPDIR"),
        ({"shared_free": None}, "problem", "/dev/shm"),
        ({"shared_free": 32 * 2**20}, "note", "--shm-size"),
        ({"open_files": 64}, "problem", "ulimit"),
        ({"open_files": 256}, "note", "ulimit"),
        ({"clock_behind": 86400 * 400.0}, "problem", "400 days"),
    ],
)
def test_surroundings(change: dict[str, Any], verdict: str, words: str) -> None:
    found = only(judge_surroundings(dataclasses.replace(AROUND, **change)))
    assert found.verdict == verdict
    assert words in str(found)


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"fault": "read-only file system"}, "problem", "read-only"),
        ({"free": GIB // 2}, "problem", "quota"),
        ({"free": 5 * GIB}, "note", "5 GiB"),
        ({"entries": 12}, "note", "12 more files"),
        ({"renames": False}, "problem", "half written"),
        ({"locks": False, "kind": "lustre"}, "problem", "-o flock"),
        ({"skew": 7.0}, "note", "7 s ahead"),
        ({"skew": -700.0}, "problem", "700 s behind"),
        ({"write": 3.0}, "note", "slow"),
        ({"small": 4.0}, "note", "slow"),
    ],
)
def test_disks(change: dict[str, Any], verdict: str, words: str) -> None:
    found = only(judge_disk(dataclasses.replace(DISK, **change), "the folder"))
    assert found.verdict == verdict
    assert words in str(found)


@pytest.mark.parametrize(
    ("gpus", "verdict", "words"),
    [
        (NO_GPU, "ok", "no GPU"),
        (Gpus(False, "", "2.13.0+cu130", "CUDA 13.0", ()), "ok", "does no harm"),
        (Gpus(True, "580.1", "2.13.0", "CUDA 13.0", (H100,)), "ok", "NVIDIA H100, 79 of 80 GiB free, driver 580.1"),
        (Gpus(True, "580.1", "2.13.0+cpu", "", ()), "problem", "for processors only"),
        (
            Gpus(True, "470.22", "2.13.0", "CUDA 13.0", (), "The driver is too old."),
            "problem",
            "The driver is too old.",
        ),
        (Gpus(True, "", "2.13.0", "CUDA 13.0", ()), "problem", "does not say why"),
        (Gpus(True, "580.1", "2.13.0", "CUDA 13.0", (), hidden=True), "note", "CUDA_VISIBLE_DEVICES"),
    ],
)
def test_gpus(gpus: Gpus, verdict: str, words: str) -> None:
    (found,) = judge_gpus(gpus)
    assert found.verdict == verdict
    assert words in str(found)
    assert ".." not in str(found)


def test_what_torch_says_of_a_gpu_that_it_sees_is_passed_on() -> None:
    found = judge_gpus(Gpus(True, "580.1", "2.13.0", "CUDA 13.0", (H100,), "sm_37 is too old"))
    assert [one.verdict for one in found] == ["ok", "note"]
    assert "sm_37" in found[1].text


@pytest.mark.parametrize(
    ("change", "verdict", "words"),
    [
        ({"packages": (TORCH, Package("monai", ">=1.6", None))}, "problem", 'pip install "monai>=1.6"'),
        ({"packages": (TORCH, Package("monai", ">=1.6", "1.3.0"))}, "problem", "monai 1.3.0, but medseg needs >=1.6"),
        ({"packages": (Package("monai", ">=1.6", "1.6.1", "ImportError: no"),)}, "problem", "ImportError: no"),
        ({"packages": (TORCH, Package("openvino", "", None))}, "note", "in torch then"),
        ({"python": "3.10.2"}, "problem", "Python 3.10.2"),
        ({"recorded": None, "packages": ()}, "note", "not installed"),
        ({"recorded": "0.9"}, "note", "0.9"),
        ({"snakemake": None}, "note", "medseg[workflow]"),
        ({"openmp": ("GNU's", "Intel's")}, "note", "2 OpenMP runtimes"),
        ({"torchvision": "0.20.1", "torchvision_wants": "==2.5.1"}, "note", "torchvision::nms"),
        ({"torchvision": "0.28.0+cu126", "torchvision_wants": "==2.13.0"}, "note", "0.28.0+cu126"),
    ],
)
def test_installations(change: dict[str, Any], verdict: str, words: str) -> None:
    found = only(judge_installation(dataclasses.replace(SOUND, **change)))
    assert found.verdict == verdict
    assert words in str(found)


def test_a_torchvision_that_breaks_something_is_a_problem() -> None:
    broken = Package("monai", ">=1.6", "1.6.1", "RuntimeError: operator torchvision::nms does not exist")
    found = judge_installation(
        dataclasses.replace(SOUND, packages=(TORCH, broken), torchvision="0.20.1", torchvision_wants="==2.5.1")
    )
    problems = [one for one in found if one.verdict == "problem"]
    assert len(problems) == 2
    assert "pip uninstall torchvision" in problems[1].remedy


def test_one_that_fits_is_not_mentioned() -> None:
    fits = dataclasses.replace(SOUND, torchvision="0.28.0+cpu", torchvision_wants="==2.13.0")
    assert {one.verdict for one in judge_installation(fits)} == {"ok"}


# ---- versions and imports -----------------------------------------------------------------------

NUMBERS = st.lists(st.integers(0, 12), min_size=1, max_size=3).map(lambda parts: ".".join(map(str, parts)))
WANTED = st.lists(st.tuples(st.sampled_from([">=", "<=", "==", "!=", ">", "<"]), NUMBERS), max_size=3)


@given(NUMBERS, WANTED)
def test_versions_are_compared_as_packaging_does(version: str, wanted: list[tuple[str, str]]) -> None:
    text = ",".join(sign + bound for sign, bound in wanted)
    assert satisfies(version, text) == SpecifierSet(text).contains(version)


@pytest.mark.parametrize(
    ("version", "wanted", "fine"),
    [
        ("2.13.0+cu126", "==2.13.0", True),
        ("2.13.0a0+git", ">=2.13", True),
        ("2.5.9", "==2.5.*", True),
        ("2.6", "==2.5.*", False),
        ("1", "", True),
        ("1", "~=7", True),
    ],
)
def test_versions(version: str, wanted: str, fine: bool) -> None:
    assert satisfies(version, wanted) == fine


@pytest.mark.parametrize(
    ("line", "parsed"),
    [
        ("torch>=2.10", ("torch", ">=2.10")),
        ("torch (==2.5.1) ; extra == 'x'", ("torch", "==2.5.1")),
        ("Snake_Make[all]>=9.20,<10", ("snake-make", ">=9.20,<10")),
    ],
)
def test_requirements_are_read(line: str, parsed: tuple[str, str]) -> None:
    assert _parsed(line) == parsed


def test_every_dependency_is_imported_under_its_name() -> None:
    asked = [line for line in importlib.metadata.requires("medseg") or [] if "extra ==" not in line]
    assert len(asked) > 20
    for name, _ in map(_parsed, asked):
        assert importlib.util.find_spec(_MODULES.get(name, name)), name


def test_what_cannot_be_imported_says_why_and_the_rest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "aa_raises.py").write_text("raise RuntimeError('no /home/jane/libx.so here')")
    (tmp_path / "bb_dies.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGILL)")
    (tmp_path / "cc_prints.py").write_text('print(\'{"error": "no"}\')')
    (tmp_path / "dd_exits.py").write_text("raise SystemExit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    found = _import(["aa_raises", "bb_dies", "cc_prints", "dd_exits", "json"])
    assert sorted(found.errors) == ["aa_raises", "bb_dies", "dd_exits"]
    assert found.errors["aa_raises"] == "RuntimeError: no libx.so here"
    assert "SIGILL: it is built for instructions" in found.errors["bb_dies"]


def test_the_current_folder_is_no_place_for_libraries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "click.py").write_text("raise RuntimeError('somebody else')")
    monkeypatch.chdir(tmp_path)
    assert _import(["click"]).errors == {}


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("cannot open /home/jane/.venv/lib/libx.so:\n no", "cannot open libx.so: no"),
        ("see https://pytorch.org/get-started/locally", "see https://pytorch.org/get-started/locally"),
        ("No module 'a.b' (/root/a/b.py)", "No module 'a.b' (b.py)"),
        ("1/2 of it", "1/2 of it"),
    ],
)
def test_paths_are_not_told(text: str, told: str) -> None:
    assert discreet(text) == told


# ---- disks, really ------------------------------------------------------------------------------


def test_a_real_folder_is_tried_and_left_as_it_was(tmp_path: Path) -> None:
    disk = look_at_disk(tmp_path)
    assert disk.fault == ""
    assert disk.renames
    assert disk.locks
    assert abs(disk.skew) < 2
    assert min(disk.write or 0, disk.read or 0, disk.small or 0) > 0
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_takes_no_files() -> None:
    disk = look_at_disk(Path("/proc"))
    assert disk.fault
    assert not fit(judge_disk(disk, "the folder"))


# ---- the golden case ----------------------------------------------------------------------------


def test_the_scan_is_the_same_on_every_machine() -> None:
    values = golden_scan().values
    assert values.shape == (1, 36, 50, 36)
    assert np.array_equal(values, np.round(values))
    assert hashlib.sha256(values.astype("<i2").tobytes()).hexdigest() == (
        "9a05f881c9cae675d5ae1c4bee19858b4840e976502c192c67f16006233aba1c"
    )


@pytest.mark.parametrize("engine", ["openvino", "torch-cpu"])
def test_the_golden_case_here(engine: str, tmp_path: Path) -> None:
    golden = try_golden(engine, tmp_path, 1)
    assert golden.error == ""
    assert golden.dice is not None
    assert min(golden.dice.values()) >= 0.998
    assert judge_golden(golden).verdict == "ok"


def test_an_engine_that_cannot_is_a_finding(tmp_path: Path) -> None:
    golden = try_golden("abacus", tmp_path)
    found = judge_golden(golden)
    assert found.verdict == "problem"
    assert "no engine is called 'abacus'" in found.text


def test_labels_that_differ_are_a_problem() -> None:
    found = judge_golden(Golden("openvino", "f32", 1.0, {"Anterior": 1.0, "Posterior": 0.97}))
    assert found.verdict == "problem"
    assert "Posterior 0.9700" in found.text
    assert "--engine torch-cpu" in found.remedy


# ---- the verb -----------------------------------------------------------------------------------


def test_this_machine_quickly(medseg: Any, tmp_path: Path) -> None:
    outcome = medseg("doctor", "--quick", "--json", tmp_path)
    told = json.loads(outcome.out)
    assert outcome.status == (0 if told["fit"] else 1)
    assert told["format"] == 1
    assert {one["section"] for one in told["findings"]} >= {"machine", "surroundings", "disk", "installation"}
    assert told["facts"]["machine"]["cores"] == len(os.sched_getaffinity(0))
    assert told["facts"]["disks"][0]["write"] is None
    assert "golden" not in told["facts"]
    assert list(tmp_path.iterdir()) == []
    for name in (socket.gethostname(), getpass.getuser(), Path.home().name, tmp_path.name):
        assert not re.search(rf"\b{re.escape(name)}\b", outcome.out), name


def test_a_bad_folder_makes_it_unfit_and_says_so(medseg: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.core.installation._import", lambda modules: _import([]))
    outcome = medseg("doctor", "--quick", "/proc", ".")
    assert outcome.status == 1
    assert "  PROBLEM  folder 1 cannot be used" in outcome.out
    last = outcome.out.splitlines()[-1]
    assert last.startswith("This machine is not fit for medseg: ")


def test_what_is_no_folder_is_refused(medseg: Any, tmp_path: Path) -> None:
    medseg("doctor", tmp_path / "nowhere").refused("is no folder")


def test_stopped_it_leaves_nothing(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-m", "medseg", "doctor", str(tmp_path)], stdout=subprocess.DEVNULL)
    for _ in range(400):
        if list(tmp_path.iterdir()) or child.poll() is not None:
            break
        time.sleep(0.01)
    child.send_signal(signal.SIGTERM)
    assert child.wait(20) == 143
    assert list(tmp_path.iterdir()) == []
