"""Many scans as shards: dealt, predicted, killed, gone on with, and held against each other at the end."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medseg.cli.archive import Work, predict_shards
from medseg.cli.jobs import Job, Shard
from medseg.core.errors import InputError, MedsegError
from medseg.io.archive import Listed, Log, deal, look_up, names_of, read_log, read_manifest, write_manifest
from medseg.io.sidecar import read_index
from medseg.report.archive import Collected, Row, archive_report, csv_line

QUICK = ("--threads", 1)
ABOUT = {"manifest": "0" * 64, "shard": 1, "model": "m", "model_sha256": "1", "wishes": {}, "to": "nifti"}


@pytest.fixture
def scans(made: Any, tmp_path: Path) -> Path:
    """A list of six scans, two of one name."""
    for name in ("1/a", "1/b", "1/c", "1/d", "2/a", "2/e"):
        path = tmp_path / "in" / f"{name}.nii.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(made.task / "imagesTs" / "blob_006.nii.gz", path)
    (tmp_path / "scans.txt").write_text("".join(f"in/{n}.nii.gz\n" for n in ("1/a", "1/b", "1/c", "1/d", "2/a", "2/e")))
    return tmp_path / "scans.txt"


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def fake(folder: Path, count: int) -> list[Listed]:
    return [Listed(f"{folder}/{n}.nii.gz", 1000 * (n % 7), f"{n}") for n in range(count)]


# ---- the manifest


@given(st.lists(st.integers(0, 2**34), min_size=1, max_size=60), st.integers(1, 12))
def test_every_scan_is_dealt_once_and_no_shard_outweighs_another_by_more_than_a_scan(sizes: list[int], n: int) -> None:
    parts = deal(sizes, n)
    assert sorted(index for part in parts for index in part) == list(range(len(sizes)))
    assert parts == deal(sizes, n)
    weights = [sum(sizes[i] + 2**19 for i in part) for part in parts]
    assert max(weights) - min(weights) <= max(sizes) + 2**19
    assert all(part == sorted(part) for part in parts)


@given(
    st.lists(st.text(max_size=12) | st.sampled_from(["a", "A", "a~2", "a~3", ".a", "../a", "", "x" * 300]), max_size=30)
)
def test_names_of_results_are_safe_and_each_is_another(stems: list[str]) -> None:
    names = names_of(stems)
    assert len({name.casefold() for name in names}) == len(stems)
    for name in names:
        assert name == Path(name).name
        assert not name.startswith((".", "-", "~"))
        assert len(f".{name}_uncertainty.nii.gz.012345678901.part".encode()) < 256
    listed = [Listed(f"/{n}", 1, stem) for n, stem in enumerate(stems)]
    assert names == names_of(one.stem for one in listed)


@given(st.lists(st.text(min_size=1, max_size=40), min_size=1, max_size=20, unique=True), st.integers(1, 9))
def test_a_manifest_gives_what_was_written(tmp_path_factory: Any, stems: list[str], shards: int) -> None:
    folder = tmp_path_factory.mktemp("manifest")
    listed = [Listed(f"/{n}/{stem}", n, stem) for n, stem in enumerate(stems)]
    manifest = write_manifest(folder / "manifest.jsonl", listed, shards)
    found = [scan for shard in range(1, manifest.shards + 1) for scan in manifest.of(shard)]
    assert sorted(str(scan.path) for scan in found) == sorted(str(Path(one.path)) for one in listed)
    assert all(manifest.counts)


def test_a_hundred_thousand_scans_are_dealt_in_seconds(tmp_path: Path) -> None:
    listed = fake(tmp_path, 100_000)
    started = time.process_time()
    manifest = write_manifest(tmp_path / "manifest.jsonl", listed, 20)
    assert time.process_time() - started < 10
    assert sum(manifest.counts) == 100_000
    started = time.process_time()
    shard = list(manifest.of(20))
    assert time.process_time() - started < 2
    folders = [scan.folder for scan in shard]
    assert len(shard) == manifest.counts[-1]
    assert max(map(folders.count, set(folders))) == 1000
    assert all(folder.startswith("00020-") for folder in folders)


def test_all_missing_scans_are_told_before_anything_starts(medseg: Any, scans: Path, tmp_path: Path) -> None:
    gone = [f"in/gone{n}.nii.gz" for n in range(5)]
    scans.write_text(scans.read_text() + "".join(f"{name}\n" for name in gone))
    medseg("archive", "deal", scans, "-o", tmp_path / "out").refused("5 of 11 scans are missing", "missing.txt")
    listed = (tmp_path / "out" / "missing.txt").read_text().splitlines()
    assert listed == [str(tmp_path / name) for name in gone]
    assert not (tmp_path / "out" / "manifest.jsonl").exists()
    scans.write_text("".join(line for line in scans.read_text().splitlines(True) if "gone" not in line))
    assert medseg("archive", "deal", scans, "-o", tmp_path / "out").status == 0
    assert not (tmp_path / "out" / "missing.txt").exists()
    medseg("archive", "deal", scans, "-o", tmp_path / "more", "-n", 7).refused("7 shards for 6 scans")


def test_a_scan_that_is_listed_twice_is_refused(medseg: Any, scans: Path, tmp_path: Path) -> None:
    scans.write_text(scans.read_text() + "in/../in/1/b.nii.gz\n")
    medseg("archive", "deal", scans, "-o", tmp_path / "out").refused("listed twice (1: ", "1/b.nii.gz")


def test_folders_count_with_what_is_in_them(tmp_path: Path) -> None:
    (tmp_path / "study" / "deep").mkdir(parents=True)
    (tmp_path / "study" / "a.dcm").write_bytes(bytes(10))
    (tmp_path / "study" / "deep" / "b.dcm").write_bytes(bytes(5))
    told: list[int] = []
    assert look_up([tmp_path / "study", tmp_path / "no"], told.append) == [
        Listed(str(tmp_path / "study"), 15, "study"),
        None,
    ]
    assert told == [2]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[:-5],
        lambda data: data + b"x",
        lambda data: b"",
        lambda data: b"[]\n",
        lambda data: data.replace(b'"format": 1', b'"format": 2'),
        lambda data: data.replace(b'"0"', b'"/"'),
        lambda data: data.replace(b'"0"', b'".0'),
        lambda data: data.replace(b'["1", ', b'[["1], '),
    ],
)
def test_a_manifest_that_is_not_as_it_was_written_is_refused(tmp_path: Path, spoil: Any) -> None:
    path = tmp_path / "manifest.jsonl"
    write_manifest(path, fake(tmp_path, 3), 1)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(InputError):
        list(read_manifest(path).of(1))


def test_dealing_again_changes_nothing_and_other_scans_need_another_folder(tmp_path: Path) -> None:
    path = tmp_path / "manifest.jsonl"
    first = write_manifest(path, fake(tmp_path, 9), 2)
    stamp = path.stat().st_mtime_ns
    Log(first.log(1), ABOUT, float, 1).close()
    assert write_manifest(path, fake(tmp_path, 9), 2) == first
    assert path.stat().st_mtime_ns == stamp
    with pytest.raises(InputError, match="begun for other scans"):
        write_manifest(path, fake(tmp_path, 8), 2)


# ---- the log


def test_a_line_that_was_cut_is_read_over_and_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    log = Log(path, ABOUT, lambda: 1.0, 2)
    for name in ("a", "b", "c"):
        log.write({"begun": name})
        log.write({"name": name, "state": "done", "seconds": 1, "review": [], "ml": {}})
    log.close()
    whole = path.read_bytes()
    for cut in range(len(whole)):
        path.write_bytes(whole[:cut])
        told = read_log(path)
        lines = whole[:cut].splitlines()
        assert told.unread <= 1
        assert len(told.done) <= sum(b"done" in line for line in lines)
        Log(path, ABOUT, lambda: 0.0, 2).close()
        again = read_log(path)
        assert again.unread == 0
        assert again.head["model"] == "m"
    path.write_bytes(whole + b'{"name": "d", "state": "do')
    assert read_log(path).done == {"a", "b", "c"}
    path.write_bytes(whole + b"\0" * 100 + b"\n" + b'{"name": "d", "state": "done", "at": 2}\n')
    assert read_log(path).done == {"a", "b", "c", "d"}
    assert read_log(path).unread == 1


def test_a_log_keeps_to_one_model_and_counts_all_times_of_work(tmp_path: Path) -> None:
    path = tmp_path / "1.jsonl"
    for seconds, cores in ((10.0, 2), (5.0, 4)):
        log = Log(path, ABOUT, lambda seconds=seconds: seconds, cores)
        log.close()
    assert read_log(path).core_seconds == 40
    with pytest.raises(InputError, match="begun with another model sha256"):
        Log(path, ABOUT | {"model_sha256": "2"}, float, 1)


# ---- predicting


def test_two_shards_at_once_and_one_report(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert medseg("archive", "deal", scans, "-o", out, "-n", 2).status == 0
    command = [sys.executable, "-m", "medseg", "predict", "--manifest", out, "-m", made.model, "--threads", "1"]
    children = [
        subprocess.Popen([*map(str, command), "--shard", f"{n}/2"], stderr=subprocess.PIPE, stdout=subprocess.PIPE)
        for n in (1, 2)
    ]
    for child in children:
        said = child.communicate(timeout=120)
        assert child.returncode == 0, said
    outcome = medseg("archive", "report", out)
    assert outcome.status == 0, outcome
    assert "6 scans: 6 done" in outcome.out
    rows = rows_of(out / "scans.csv")
    assert sorted(row["name"] for row in rows) == ["a", "a~2", "b", "c", "d", "e"]
    assert {row["result"].split("/")[1] for row in rows} == {"00001-00", "00002-00"}
    assert all((out / row["result"]).exists() and "left blob=" in row["volumes_ml"] for row in rows)
    told = json.loads((out / "report.json").read_text())
    assert told["volumes_ml"]["left blob"]["scans"] == 6
    assert told["cost"]["core_hours"] > 0
    page = (out / "report.html").read_text()
    assert "6 of 6 scans done" in page
    assert "right blob" in page
    assert "://" not in page
    index = read_index(out)
    assert len(index) == 6
    assert all(path.exists() for path in index.values())
    again = medseg(*command[3:], "--shard", "1/2", "--json")
    assert json.loads(again.out)["now"] == 0


def test_a_killed_shard_goes_on_by_its_log(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    source = tmp_path / "in" / "1" / "a.nii.gz"
    for number in range(40):
        shutil.copy(source, tmp_path / "in" / f"x{number:02d}.nii.gz")
    scans.write_text("".join(f"{path}\n" for path in sorted((tmp_path / "in").glob("x*"))))
    out = tmp_path / "out"
    assert medseg("archive", "deal", scans, "-o", out, "-n", 1).status == 0
    command = ["predict", "--manifest", out, "-m", made.model, "--shard", "1/1"]
    program = [sys.executable, "-m", "medseg", *map(str, command), "--threads", "1"]
    log = read_manifest(out).log(1)
    with subprocess.Popen(program, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as child:
        deadline = time.monotonic() + 120
        while len(read_log(log).done) < 3 and time.monotonic() < deadline:
            time.sleep(0.02)
        busy = medseg(*command, *QUICK)
        child.send_signal(signal.SIGKILL)
        child.wait(timeout=60)
    busy.refused("predict is at work in", status=1)
    done = read_log(log).done
    assert 3 <= len(done) < 40
    outcome = medseg("archive", "report", out)
    assert outcome.status == 1
    assert f"40 scans: {len(done)} done" in outcome.out
    assert "not done. Start the shards again" in outcome.err
    stamps = {p: p.stat().st_mtime_ns for name in done for p in (out / "results").rglob(f"{name}_seg.nii.gz")}
    # As if killed between a label map and its sidecar, and while a file was written.
    left = sorted(read_log(log).begun)[0]
    place = out / "results" / "00001-00"
    (place / f"{left}_seg.nii.gz").write_bytes(b"half")
    (place / f".{left}_seg.json.0123456789ab.part").write_bytes(b"half")
    again = medseg(*command, *QUICK, "--json")
    assert again.status == 0, again
    assert json.loads(again.out)["now"] == 40 - len(done)
    assert {p: p.stat().st_mtime_ns for p in stamps} == stamps
    assert not [path for path in place.iterdir() if path.name.startswith(".")]
    assert medseg("archive", "report", out).status == 0


def test_scans_that_fail_do_not_fail_the_shard_and_are_told(
    made: Any, medseg: Any, scans: Path, tmp_path: Path
) -> None:
    out, bad = tmp_path / "out", tmp_path / "in" / "1" / "c.nii.gz"
    sound = bad.read_bytes()
    bad.write_bytes(sound[:100])
    assert medseg("archive", "deal", scans, "-o", out, "-n", 2).status == 0
    command = ["predict", "--manifest", out, "-m", made.model, *QUICK]
    first = medseg(*command)  # every shard, one after another
    assert first.status == 0, first
    assert "medseg: c: " in first.err
    assert medseg("archive", "report", out, "--allow-failed").status == 0
    outcome = medseg("archive", "report", out)
    assert outcome.status == 1
    assert "6 scans: 5 done, 0 of them flagged for review; 1 failed" in outcome.out
    (row,) = rows_of(out / "failed.csv")
    assert (row["name"], row["state"]) == ("c", "failed")
    assert "truncated" in row["reason"]
    assert "truncated" in (out / "report.html").read_text()
    with pytest.raises(InputError, match="1 case of"):
        read_index(out)
    assert medseg(*command, "--json").out.count('"now": 0') == 2
    bad.write_bytes(sound)
    assert medseg(*command, "--mend").status == 0
    assert medseg("archive", "report", out).status == 0


def test_a_lost_file_is_found_and_mended(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert medseg("archive", "deal", scans, "-o", out, "-n", 1).status == 0
    command = ["predict", "--manifest", out, "-m", made.model, *QUICK]
    assert medseg(*command).status == 0
    (out / "results" / "00001-00" / "d_seg.nii.gz").unlink()
    outcome = medseg("archive", "report", out, "--allow-failed")
    assert outcome.status == 1
    assert "1 lost" in outcome.out
    (row,) = rows_of(out / "failed.csv")
    assert (row["name"], row["state"]) == ("d", "lost")
    assert json.loads(medseg(*command, "--json").out)["now"] == 0
    assert json.loads(medseg(*command, "--json", "--mend").out)["now"] == 1
    assert medseg("archive", "report", out).status == 0
    other = tmp_path / "other"
    assert medseg("archive", "deal", scans, "-o", other, "-n", 3).status == 0
    shutil.copytree(out / "shards", other / "shards")
    medseg("archive", "report", other).refused("is of another manifest")
    assert not (other / "report.html").exists()


def test_what_cannot_go_together_is_refused(made: Any, medseg: Any, scans: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert medseg("archive", "deal", scans, "-o", out, "-n", 2).status == 0
    command = ["predict", "--manifest", out, "-m", made.model, *QUICK]
    medseg(*command, "--shard", "1/3").refused("has 2 shards, not 3", "1/2")
    medseg(*command, "--skip-done").refused("Leave out")
    medseg(*command, "-o", tmp_path).refused("Leave out")
    medseg("predict", "--manifest", out).refused("--manifest goes with a model")
    medseg("predict", "a.nii.gz", "-m", made.model, "--mend").refused("--mend goes with --manifest")
    medseg("predict", "--manifest", tmp_path / "no", "-m", made.model).refused("is missing", "archive deal")
    medseg("archive", "report", tmp_path / "no").refused("is missing")


class Runs:
    """Stands for the model: ends as it is told for each scan, for what no real one can be made to do here."""

    def __init__(self, ends: dict[str, Any]) -> None:
        self.ends, self.order = ends, []

    def __call__(self, jobs: list[Job], begun: Any) -> Generator[Any, None, None]:
        for job in jobs:
            begun(job)
            self.order.append((job.name, len(jobs)))
            end = self.ends.get(job.name, {"seconds": 1.0, "flags": [], "organs": []})
            if isinstance(end, BaseException) and not isinstance(end, MedsegError):
                raise end
            yield job, end


def work(runs: Runs) -> Work:
    about = {key: ABOUT[key] for key in ("model", "model_sha256", "wishes", "to")}
    return Work(runs, about, 1, mend=False, as_json=True)


def test_what_ends_its_process_three_times_is_given_up(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", fake(tmp_path, 4), 1)
    orders = []
    for _ in range(3):
        runs = Runs({"1": ZeroDivisionError()})  # a word that nobody awaits, as a killed process has none
        with pytest.raises(ZeroDivisionError):
            predict_shards(manifest.path, None, work(runs))
        orders.append(runs.order)
    assert orders == [[("0", 4), ("1", 4)], [("2", 2), ("3", 2), ("1", 1)], [("1", 1)]]
    runs = Runs({})
    predict_shards(manifest.path, None, work(runs))
    assert runs.order == []
    told = read_log(manifest.log(1))
    assert told.done == {"0", "2", "3"}
    assert "its process ended 3 times" in told.scans["1"]["reason"]


def test_a_stop_in_good_order_is_held_against_no_scan(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", fake(tmp_path, 4), 1)
    for _ in range(4):
        with pytest.raises(SystemExit):
            predict_shards(manifest.path, None, work(Runs({"1": SystemExit(143)})))
    assert not read_log(manifest.log(1)).begun
    predict_shards(manifest.path, None, work(Runs({})))
    assert len(read_log(manifest.log(1)).done) == 4


def test_a_machine_that_fails_every_scan_ends_the_shard_and_the_scans_are_tried_again(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", fake(tmp_path, 30), 1)
    full = Runs({str(n): MedsegError("the disk is full") for n in range(30)})
    with pytest.raises(MedsegError, match="5 scans in a row"):
        predict_shards(manifest.path, Shard(1, 1), work(full))
    assert len(full.order) == 5
    runs = Runs({})
    predict_shards(manifest.path, Shard(1, 1), work(runs))
    assert len(runs.order) == 30
    assert len(read_log(manifest.log(1)).done) == 30


def test_a_report_names_like_reasons_once_and_escapes_what_it_shows() -> None:
    found = Collected()
    rows = [
        Row(f"s{n}", f"/in/s{n}", 1, "failed", f"s{n}: slice {n} <b>is missing", "", 5, None, (), {})
        for n in range(300)
    ]
    rows.append(
        Row("=x", "/in/=x", 1, "done", "", "r", 5, 2.0, ("liver 3 ml, trained on 900 to 2000",), {"liver": 3.0})
    )
    for row in rows:
        found.add(row)
    told = found.summary()
    assert told["reasons"] == [{"state": "failed", "reason": "…: slice N <b>is missing", "scans": 300}]
    assert len(told["not_done"]) == 200
    assert told["volumes_ml"]["liver"]["median"] == 3.0
    page = archive_report("x", told)
    assert "<b>" not in page
    assert csv_line(rows[-1]).startswith(b"'=x,")


def test_results_lie_in_folders_of_a_thousand(tmp_path: Path) -> None:
    manifest = write_manifest(tmp_path / "manifest.jsonl", fake(tmp_path, 2500), 1)
    predict_shards(manifest.path, None, work(Runs({})))
    assert sorted({scan.folder for scan in manifest.of(1)}) == ["00001-00", "00001-01", "00001-02"]
    assert manifest.log(1).stat().st_size < 2500 * 250
