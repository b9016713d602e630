"""Many scans through the workflow: a job a shard, whatever becomes of single scans."""

import json
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


def snakemake(*arguments, folder, expect=0):
    command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--cores", "2", *arguments]
    done = subprocess.run(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == expect, done.stdout[-6000:]
    return done.stdout


@pytest.fixture
def scans(tmp_path):
    """Three made-up scans for the shipped model, and one that is none."""
    (tmp_path / "in").mkdir()
    x, y, z = np.ogrid[:24, :44, :28]
    ball = ((x - 12) / 8) ** 2 + ((y - 22) / 16) ** 2 + ((z - 14) / 8) ** 2 < 1
    noise = np.random.default_rng(0).normal(0, 20, ball.shape)
    for name in "abc":
        nib.save(
            nib.Nifti1Image((200 * ball + 300 + noise).astype(np.int16), np.eye(4)), tmp_path / f"in/{name}.nii.gz"
        )
    (tmp_path / "in" / "broken.nii.gz").write_bytes(b"no scan")
    (tmp_path / "scans.txt").write_text("".join(f"in/{n}.nii.gz\n" for n in ("a", "b", "c", "broken")))
    return tmp_path


@pytest.mark.slow
def test_an_archive_goes_through_although_a_scan_is_broken(scans):
    given = ("archive", "--config", "archive=scans.txt", "model=hippocampus", "shards=2", "archive_options=--quick")
    said = snakemake(*given, folder=scans)
    assert "report: results/archive/report.html" in said
    assert "Phantom" not in said
    told = json.loads((scans / "results" / "archive" / "report.json").read_text())
    assert told["scans"] == {
        "all": 4,
        "flagged": told["scans"]["flagged"],
        "done": 3,
        "failed": 1,
        "not done": 0,
        "lost": 0,
    }
    assert told["shards"] == {"all": 2, "begun": 2}
    assert "Nothing to be done" in snakemake(*given, folder=scans)
    # A shard whose end was not told is gone on with: nothing of it is computed again.
    results = sorted((scans / "results" / "archive" / "results").rglob("*_seg.nii.gz"))
    stamps = [path.stat().st_mtime_ns for path in results]
    for name in ("shards/00002.json", "report.html"):
        (scans / "results" / "archive" / name).unlink()
    assert "archive_shard" in snakemake(*given, folder=scans)
    assert [path.stat().st_mtime_ns for path in results] == stamps


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ([], "Say --config archive=scans.txt model=NAME"),
        (["archive=no.txt", "model=m"], "no.txt is no list of scans"),
        (["archive=scans.txt"], "Say model=NAME"),
        (["archive=scans.txt", "model=m", "shards=0"], "Give a number of jobs"),
        (["archive=scans.txt", "model=m", "archive_options=--quick; ls"], "Give one option of"),
    ],
)
def test_what_is_missing_is_told_before_anything_runs(scans, settings, named):
    given = ("--config", *settings) if settings else ()
    assert named in snakemake("archive", *given, folder=scans, expect=1)
    assert not (scans / "results").exists()


def test_nothing_of_it_is_planned_unless_asked_for(scans):
    given = ("--config", "archive=scans.txt", "model=m", "shards=3")
    said = snakemake("--dry-run", "results/checks/Phantom_Brain.json", *given, folder=scans)
    assert "rule check" in said
    assert "archive_" not in said
    said = snakemake("--dry-run", "archive", *given, folder=scans)
    assert "archive_shard 3" in " ".join(said.split())
    said = snakemake("--dry-run", "archive", *given[:-1], folder=scans)
    assert "archive_shard 1" in " ".join(said.split())
    assert "Phantom" not in said
