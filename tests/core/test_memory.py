"""Control groups as Linux shows them, in a folder of their own."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from medseg.core import memory
from medseg.core.memory import allow_memory, free_memory, resident_memory

MIB = 2**20


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in files.items():
        (folder / name.replace("__", ".")).write_text(f"{value}\n")


@pytest.fixture
def cgroups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(memory, "_OWN", tmp_path / "own")
    return tmp_path / "cgroup"


def test_what_is_free_is_some_of_what_there_is() -> None:
    assert 0 < free_memory() < 2**50


def test_a_job_has_what_its_own_group_leaves(cgroups: Path) -> None:
    """A limit of 100 MiB, of which 30 are taken, and 10 of these are files that can be let go of."""
    (cgroups.parent / "own").write_text("0::/slurm/job_7/step_0\n")
    group(cgroups / "slurm" / "job_7" / "step_0", memory__max="max", memory__current=MIB)
    group(
        cgroups / "slurm" / "job_7",
        memory__max=100 * MIB,
        memory__current=30 * MIB,
        memory__stat=f"anon 5\ninactive_file {10 * MIB}",
    )
    assert free_memory() == 80 * MIB


def test_likewise_in_the_first_version(cgroups: Path) -> None:
    (cgroups.parent / "own").write_text("3:cpuset:/\n4:cpu,memory:/job\n0::/\n")
    group(cgroups / "memory", memory__limit_in_bytes=2**63 - 4096, memory__usage_in_bytes=MIB)
    group(cgroups / "memory" / "job", memory__limit_in_bytes=50 * MIB, memory__usage_in_bytes=60 * MIB)
    assert free_memory() == 0
    group(cgroups / "memory" / "job", memory__stat=f"total_inactive_file {40 * MIB}")
    assert free_memory() == 30 * MIB


def test_where_there_are_no_groups_the_machine_bounds(cgroups: Path) -> None:
    assert free_memory() == pytest.approx(psutil.virtual_memory().available, rel=0.2)


def test_what_was_allowed_is_no_more_than_that(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.core.memory._allowed", [])
    allow_memory(resident_memory() + 50 * MIB)
    assert 40 * MIB < free_memory() <= 51 * MIB
    allow_memory(1)
    assert free_memory() == 0
