"""Many scans, and what else may be asked of each."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.cli.common import Memory
from medseg.cli.jobs import Job, Shard
from medseg.core.errors import InputError
from medseg.core.labels import LabelSet
from medseg.io.files import alone
from medseg.io.nifti import read_labels, read_volume

LABELS = LabelSet.from_names(["left blob", "right blob"])
QUICK = ("--threads", 1)


@pytest.fixture
def scans(made: Any, tmp_path: Path) -> Path:
    folder = tmp_path / "scans"
    folder.mkdir()
    for name in "abcde":
        shutil.copy(made.task / "imagesTs" / "blob_006.nii.gz", folder / f"{name}.nii.gz")
    return folder


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir() if not p.name.startswith("."))


# ---- shards, lists, going on --------------------------------------------------------------------


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=40), st.integers(1, 9))
def test_every_scan_is_in_one_shard_and_shards_weigh_alike(tmp_path_factory: Any, sizes: list[int], count: int) -> None:
    folder = tmp_path_factory.mktemp("sizes")
    jobs = []
    for number, size in enumerate(sizes):
        path = folder / f"{number:02d}"
        path.touch()
        os.truncate(path, size)
        jobs.append(Job(path.name, path, path))
    parts = [Shard(number, count).of(jobs) for number in range(1, count + 1)]
    assert sorted(job.name for part in parts for job in part) == [job.name for job in jobs]
    weights = [sum(max(1, job.scan.stat().st_size) for job in part) for part in parts]
    # No part outweighs another by more than one scan.
    assert max(weights) - min(weights) <= max(1, max(sizes))


@pytest.mark.parametrize("text", ["", "3", "0/2", "3/2", "1/0", "a/b", "-1/2", "1/2/3", "²/3"])
def test_shards_that_are_none(text: str) -> None:
    with pytest.raises(InputError, match="is no shard"):
        Shard.parse(text)


def test_an_array_of_jobs_and_one_index_at_the_end(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    command = ["predict", scans, "-m", made.model, "-o", tmp_path / "out", *QUICK]
    for part in ("1/2", "2/2"):
        assert medseg(*command, "--shard", part).status == 0
    segs = [f"{name}_seg.{ending}" for name in "abcde" for ending in ("json", "nii.gz")]
    assert names(tmp_path / "out") == sorted([*segs, "predictions.1-of-2.json", "predictions.2-of-2.json"])
    listed = [json.loads((tmp_path / "out" / f"predictions.{n}-of-2.json").read_text())["cases"] for n in (1, 2)]
    assert set(listed[0]) | set(listed[1]) == set("abcde")
    assert not set(listed[0]) & set(listed[1])
    last = medseg(*command, "--skip-done")
    assert "5 of 5 scans were done before" in last.out
    assert set(json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]) == set("abcde")


def test_what_is_done_is_skipped_unless_it_was_asked_for_otherwise(made: Any, medseg: Any, scans: Path) -> None:
    command = ["predict", scans, "-m", made.model, "--skip-done", *QUICK]
    assert medseg(*command).out.count("left blob") == 5
    (scans / "b_seg.nii.gz").unlink()
    (scans / "d_seg.json").write_text("{")
    stamp = (scans / "a_seg.nii.gz").stat().st_mtime_ns
    outcome = medseg(*command)
    assert "d_seg.json is there already and was not made by medseg" in outcome.err
    (scans / "d_seg.json").unlink()
    (scans / "d_seg.nii.gz").unlink()
    again = medseg(*command)
    assert "4 of 5 scans were done before" in again.out
    assert (scans / "a_seg.nii.gz").stat().st_mtime_ns == stamp
    other = medseg(*command, "--only", "left blob")
    assert "done before" not in other.out
    assert not (read_labels(scans / "a_seg.nii.gz", LABELS).values == 2).any()


def test_two_at_once_in_one_folder_take_turns(made: Any, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "medseg", "predict", scans, "-m", made.model, "-o", out, "--skip-done", *QUICK]
    command = [str(word) for word in command]
    out.mkdir()
    with alone(out / ".predictions.json", "predict"):
        both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) for _ in "ab"]
        assert "; waiting for its end" in str(both[0].stdout and both[0].stdout.readline())
        assert "; waiting for its end" in str(both[1].stdout and both[1].stdout.readline())
        assert names(out) == []
    said = [one.communicate(timeout=60)[0] for one in both]
    assert [one.returncode for one in both] == [0, 0]
    # The second finds what the first has done.
    assert sum("5 of 5 scans were done before" in text for text in said) == 1
    assert sorted(json.loads((out / "predictions.json").read_text())["cases"]) == list("abcde")


def test_a_result_that_was_taken_away_meanwhile_is_not_listed_as_done(
    made: Any, medseg: Any, scans: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from medseg.cli import predict

    out, outcome = tmp_path / "out", predict._outcome

    def taken(job: Any, writing: Any) -> Any:
        found = outcome(job, writing)
        if job.name == "b":
            job.output.unlink()
        return found

    monkeypatch.setattr(predict, "_outcome", taken)
    done = medseg("predict", scans, "-m", made.model, "-o", out, *QUICK)
    assert done.status == 1
    assert "b_seg.nii.gz is not there any more" in done.err
    assert "1 of 5 scans failed: b.nii.gz" in done.err
    index = json.loads((out / "predictions.json").read_text())
    assert sorted(index["cases"]) == list("acde")
    assert "b" in index["failed"]


def test_a_list_of_scans(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("scans/b.nii.gz\n\nscans/d.nii.gz\n")
    outcome = medseg("predict", "--list", tmp_path / "list.txt", "-m", made.model, "-o", tmp_path / "out", *QUICK)
    assert outcome.status == 0, outcome
    assert set(json.loads((tmp_path / "out" / "predictions.json").read_text())["cases"]) == {"b", "d"}
    (tmp_path / "none.txt").write_text("\n")
    medseg("predict", "--list", tmp_path / "none.txt", "-m", made.model).refused("names no scan")
    medseg("predict", "--list", tmp_path / "no.txt", "-m", made.model).refused("cannot be read as a list")


def test_terminated_it_leaves_nothing_half_written_and_goes_on(
    made: Any, medseg: Any, scans: Path, tmp_path: Path
) -> None:
    for number in range(60):
        shutil.copy(scans / "a.nii.gz", scans / f"x{number:02d}.nii.gz")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "medseg", "predict", scans, "-m", made.model, "-o", out, "--save-uncertainty"]
    program = [*map(str, command), "--threads", "1"]
    with subprocess.Popen(program, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while not list(out.glob("*_seg.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        child.send_signal(signal.SIGTERM)
        _, said = child.communicate(timeout=60)
    assert child.returncode == 128 + signal.SIGTERM, said
    assert b"Traceback" not in said
    hidden = [p.name for p in out.iterdir() if p.name.startswith(".")]
    assert hidden == [".predictions.json"]
    written = {p.name.removesuffix("_seg.json") for p in out.glob("*_seg.json")}
    assert written
    for name in written:
        read_labels(out / f"{name}_seg.nii.gz", LABELS)
    assert not (out / "predictions.json").exists()
    outcome = medseg(*command[3:], "--skip-done", *QUICK)
    assert outcome.status == 0
    assert set(json.loads((out / "predictions.json").read_text())["cases"]) == {
        p.name.removesuffix(".nii.gz") for p in scans.iterdir()
    }


# ---- what may be asked of a scan ----------------------------------------------------------------


def test_masks_probabilities_and_uncertainty(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    scan = scans / "a.nii.gz"
    options = ["--split", "--save-probabilities", "--save-uncertainty", "--json"]
    outcome = medseg("predict", scan, "-m", made.model, "-o", tmp_path / "a.nii.gz", *options, *QUICK)
    assert outcome.status == 0, outcome
    (record,) = json.loads(outcome.out)["predictions"]
    assert record == json.loads((tmp_path / "a.json").read_text())
    labels = read_labels(tmp_path / "a.nii.gz", LABELS)
    assert record["masks"] == {"left blob": "a/001_left_blob.nii.gz", "right blob": "a/002_right_blob.nii.gz"}
    for number, name in ((1, "left blob"), (2, "right blob")):
        mask = read_volume(tmp_path / record["masks"][name])
        assert np.array_equal(mask.values[0], labels.values == number)
        assert mask.grid.matches(labels.grid)
    shares = read_volume(tmp_path / record["probabilities"])
    assert shares.values.shape == (3, *labels.grid.shape)
    assert shares.grid.matches(labels.grid)
    assert np.abs(shares.values.sum(axis=0) - 1).max() < 1e-4
    # Labels are where a probability is largest, but for what rounding cannot tell apart.
    ranked = np.sort(shares.values, axis=0)
    clear = ranked[-1] - ranked[-2] > 1e-4
    assert clear.mean() > 0.99
    assert np.array_equal(shares.values.argmax(axis=0)[clear], labels.values[clear])
    unsure = read_volume(tmp_path / record["uncertainty"]).values[0]
    assert unsure.min() >= 0
    assert unsure.max() <= 2 / 3 + 1e-3
    # Surest of all are not the borders between structures.
    inner = labels.values[1:-1, 1:-1, 1:-1]
    border = (labels.values[2:, 1:-1, 1:-1] != inner) | (labels.values[1:-1, 1:-1, 2:] != inner)
    assert unsure[1:-1, 1:-1, 1:-1][border].mean() > 2 * unsure[1:-1, 1:-1, 1:-1][~border].mean()
    assert nib.load(tmp_path / record["uncertainty"]).get_data_dtype() == np.uint16
    assert names(tmp_path) == ["a", "a.json", "a.nii.gz", "a_prob.nii.gz", "a_uncertainty.nii.gz", "scans"]


@pytest.mark.parametrize(
    ("option", "name"),
    [("--save-probabilities", "a_prob.nii.gz"), ("--save-uncertainty", "a_uncertainty.nii.gz"), ("--split", "a_seg")],
)
def test_what_someone_else_wrote_beside_the_scan_is_kept(
    made: Any, medseg: Any, scans: Path, option: str, name: str
) -> None:
    (scans / name).mkdir() if option == "--split" else (scans / name).write_bytes(b"by hand")
    command = ["predict", scans / "a.nii.gz", "-m", made.model, option, *QUICK]
    medseg(*command).refused(f"{name} is there already and was not made by medseg")
    assert not (scans / "a_seg.nii.gz").exists()
    assert option == "--split" or (scans / name).read_bytes() == b"by hand"
    (scans / name).rmdir() if option == "--split" else (scans / name).unlink()
    assert medseg(*command).status == 0
    assert medseg(*command).status == 0  # over its own


def test_chosen_structures_without_crumbs(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    scan, plain, some = scans / "a.nii.gz", tmp_path / "plain.nii.gz", tmp_path / "some.nii.gz"
    assert medseg("predict", scan, "-m", made.model, "-o", plain, *QUICK).status == 0
    outcome = medseg("predict", scan, "-m", made.model, "-o", some, "--only", "Right Blob", *QUICK)
    assert outcome.status == 0, outcome
    assert "left blob" not in outcome.out
    whole, part = (read_labels(p, LABELS).values for p in (plain, some))
    assert np.array_equal(part, np.where(whole == 2, 2, 0))
    assert json.loads((tmp_path / "some.json").read_text())["wishes"]["only"] == ["Right Blob"]
    medseg("predict", scan, "-m", made.model, "--only", "spleen", *QUICK).refused(
        "knows no structure 'spleen'", "left blob"
    )
    gone = medseg("predict", scan, "-m", made.model, "-o", tmp_path / "gone.nii.gz", "--smallest", 1e9, *QUICK)
    assert gone.status == 0
    assert not read_labels(tmp_path / "gone.nii.gz", LABELS).values.any()
    assert "nothing was found" in gone.out


def test_memory_that_is_too_little_is_told_before_anything_starts(made: Any, medseg: Any, scans: Path) -> None:
    command = ["predict", scans / "a.nii.gz", "-m", made.model, *QUICK]
    outcome = medseg(*command, "--memory", "100MiB")
    assert outcome.status == 2
    assert "this scan needs 0." in outcome.err
    assert "--memory allows 0.1" in outcome.err
    assert names(scans) == [f"{n}.nii.gz" for n in "abcde"]
    assert medseg(*command, "--memory", "2GiB").status == 0
    medseg(*command, "--memory", "much").refused("is no size; write 4GiB or 500MiB")


def test_sizes() -> None:
    sizes = {"4GiB": 4 * 2**30, "500 MiB": 500 * 2**20, "4GB": 4 * 10**9, "1.5g": 3 * 2**29, "8000MB": 8 * 10**9}
    for text, size in sizes.items():
        assert Memory().convert(text, None, None) == size
