"""The images' recipes: what a linter says, and that both take the same files."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "profiles" / "containers"


def test_the_linter_finds_nothing():
    program = shutil.which("hadolint") or shutil.which("hadolint", path=Path(sys.executable).parent)
    if program is None:
        pytest.skip("there is no hadolint")
    done = subprocess.run(
        [program, "--failure-threshold", "warning", FOLDER / "Dockerfile"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


def test_both_take_what_the_package_is_built_of_and_it_is_there():
    docker = (FOLDER / "Dockerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(.+) /\S+$", docker, re.MULTILINE)
    taken = {name for line in copied for name in line.split()}
    apptainer = re.findall(r"^    (\S+) /src/\S+$", (FOLDER / "medseg.def").read_text(), re.MULTILINE)
    assert taken == set(apptainer)
    assert all((ROOT / name).exists() for name in taken)
    let_in = {line[1:] for line in (FOLDER / "Dockerfile.dockerignore").read_text().split() if line.startswith("!")}
    assert let_in == taken


def test_both_install_the_pinned_torch_from_the_index_that_is_asked_for():
    for name in ("Dockerfile", "medseg.def"):
        assert "grep '^torch==' /src/constraints.txt" in (FOLDER / name).read_text()
    assert re.search(r"^torch==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
