"""What will keep a workflow from ending is told before it begins."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def preflight(**wanted: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "medseg", "preflight"]
    return subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True)


def test_what_is_sound_is_not_spoken_of(tmp_path: Path, tiny_task: Any) -> None:
    done = preflight(results=str(tmp_path / "results"), tasks=[str(tiny_task(tmp_path / "Task00_blobs"))])
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert not list((tmp_path / "results").iterdir())


def test_each_fault_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    done = preflight(results=str(tmp_path / "file" / "results"), tasks=[str(tmp_path)])
    assert done.returncode == 2
    first, second = done.stderr.splitlines()
    assert first.startswith(f"medseg: {tmp_path} has no dataset.json")
    assert "results cannot be written to" in second


def test_a_full_disk_is_told(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", tmp_path / "small"], check=False).returncode:
        pytest.skip("only root can mount")
    try:
        done = preflight(results=str(tmp_path / "small"))
    finally:
        subprocess.run(["umount", tmp_path / "small"], check=True)
    assert done.returncode == 2
    assert "No space left on device; free space or quota" in done.stderr


@pytest.mark.parametrize("wanted", ["[]", "{}", '{"results": "x", "more": 1}', '{"results": "x", "jobs": [{"a": 1}]}'])
def test_what_is_no_list_of_jobs_is_refused(wanted: str) -> None:
    command = [sys.executable, "-m", "medseg", "preflight"]
    done = subprocess.run(command, input=wanted, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "Let the workflow call it" in done.stderr


def test_a_scratch_folder_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    if any(Path(sys.executable).is_relative_to(folder) for folder in ("/tmp", "/var/tmp", "/usr/tmp")):
        pytest.skip("Python itself lies where temporary files do")
    command = ["unshare", "--mount", "sh", "-c"]
    hidden = "for f in /tmp /var/tmp /usr/tmp; do [ ! -d $f ] || mount -t tmpfs -o ro none $f || exit 77; done; "
    hidden += f"cd /proc; exec {sys.executable} -m medseg preflight --room 1000"
    wanted = json.dumps({"results": f"/dev/shm/medseg-{tmp_path.name}"})
    done = subprocess.run([*command, hidden], input=wanted, capture_output=True, text=True)
    if done.returncode in (1, 77) and "medseg" not in done.stderr:
        pytest.skip("only root can mount")
    Path(json.loads(wanted)["results"]).rmdir()
    assert done.returncode == 2, done
    assert done.stderr == "medseg: no folder for temporary files can be written; set TMPDIR to one\n"
