from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError, MedsegError
from medseg.dataset import decathlon
from medseg.dataset.decathlon import Archive, Catalogue, catalogue, fetch_task
from medseg.io.fetch import Patience

NAME = "Task09_Spleen"
QUICK = Patience(stall=10, waits=(0.01, 0.02))
BUILT_IN = "/built-in"  # where the tests' server stands for the address in the package


@pytest.fixture(scope="module")
def tar(tmp_path_factory: Any, tiny_task: Any, packed: Any) -> bytes:
    """A small task as the Decathlon packs its own, on a Mac."""
    task = tiny_task(tmp_path_factory.mktemp("made") / NAME, 2)
    members: dict[str, bytes] = {f"._{NAME}": b"mac", f"{NAME}/": b""}
    for path in sorted(p for p in task.rglob("*") if p.is_file()):
        name = path.relative_to(task.parent)
        members[str(name.parent / f"._{name.name}")] = b"mac"
        members[str(name)] = path.read_bytes()
    members[f"{NAME}/imagesTs/spleen_1.nii.gz"] = np.random.default_rng(0).bytes(2 << 20)
    return packed(members)


@pytest.fixture
def server(file_server: Any, tar: bytes) -> Any:
    file_server.files |= {f"{BUILT_IN}/{NAME}.tar": tar, f"/mirror/{NAME}.tar": tar}
    return file_server


@pytest.fixture
def known(server: Any, tar: bytes, monkeypatch: pytest.MonkeyPatch) -> Catalogue:
    """A catalogue with the small task in it and its address on this machine; the command line has it too."""
    archives = {**catalogue().archives, NAME: Archive(2, 0, hashlib.md5(tar).hexdigest())}
    known = replace(catalogue(), bases=(server.url + BUILT_IN,), archives=archives)
    monkeypatch.setattr(decathlon, "catalogue", lambda: known)
    return known


@pytest.fixture
def get(known: Catalogue, tmp_path: Path) -> Any:
    return partial(fetch_task, NAME, tmp_path / "data", known=known, patience=QUICK)


@pytest.fixture
def half(known: Catalogue, get: Any, server: Any, tar: bytes, tmp_path: Path) -> Path:
    """The part that a try left which was cut off half-way."""
    server.then = [partial(server.serve, cut=len(tar) // 2)] * 3
    with pytest.raises(MedsegError):
        get(patience=Patience(waits=()))
    server.then, server.asked = [], []
    return tmp_path / "data" / f".{NAME}.tar.part"


def entries(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir()) if folder.exists() else []


# ---- the command --------------------------------------------------------------------------------


def test_a_task_comes_ready_to_be_checked(
    medseg: Any, known: Catalogue, server: Any, tar: bytes, tmp_path: Path
) -> None:
    data = tmp_path / "data"
    outcome = medseg("fetch", NAME, "-o", data)
    assert outcome.status == 0, outcome
    assert outcome.err == ""
    assert outcome.out == (
        f"{data / NAME}: CC-BY-SA 4.0, please cite arXiv:1902.09063\nnext: medseg check {data / NAME}\n"
    )
    assert entries(data) == [NAME]
    assert not list(data.rglob("._*"))
    assert medseg("check", data / NAME).status == 0
    sources = json.loads((data / NAME / "SOURCES.json").read_text())
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", sources.pop("time"))
    assert sources.pop("medseg")
    assert sources == {
        "format": 1,
        "task": NAME,
        "url": f"{server.url}{BUILT_IN}/{NAME}.tar",
        "archive": f"{NAME}.tar",
        "bytes": len(tar),
        "md5": hashlib.md5(tar).hexdigest(),
        "sha256": hashlib.sha256(tar).hexdigest(),
        "checked_by": "md5",
        "licence": "CC-BY-SA 4.0",
        "citation": "arXiv:1902.09063",
    }
    again = medseg("fetch", NAME, "-o", data)
    assert (again.status, again.out) == (0, f"{data / NAME} is there already and is left as it is\n")
    assert len(server.asked) == 1


def test_a_mirror_is_asked_first_and_a_sha256_stands_for_the_md5(
    medseg: Any, server: Any, tar: bytes, tmp_path: Path
) -> None:
    sha256 = hashlib.sha256(tar).hexdigest()  # the package's own MD5 is of another, larger file
    arguments = ["fetch", NAME, "-o", tmp_path, "--mirror", f"{server.url}/mirror", "--sha256", sha256.upper()]
    outcome = medseg(*arguments, "--keep-archive")
    assert outcome.status == 0, outcome
    assert [path for path, _ in server.asked] == [f"/mirror/{NAME}.tar"]
    assert json.loads((tmp_path / NAME / "SOURCES.json").read_text())["checked_by"] == "sha256"
    assert entries(tmp_path) == [NAME, f"{NAME}.tar"]
    assert (tmp_path / f"{NAME}.tar").read_bytes() == tar
    shutil.rmtree(tmp_path / NAME)
    assert medseg(*arguments).status == 0
    assert len(server.asked) == 1  # what was kept is taken


@pytest.mark.parametrize("address", ["{}", "file://{}"])
def test_a_folder_is_a_mirror_too(
    medseg: Any, known: Any, server: Any, tar: bytes, tmp_path: Path, address: str
) -> None:
    shared = tmp_path / "shared disk"
    shared.mkdir()
    (shared / f"{NAME}.tar").write_bytes(tar)
    mirror = address.format(str(shared).replace(" ", "%20") if ":" in address else shared)
    assert medseg("fetch", NAME, "-o", tmp_path, "--mirror", mirror).status == 0
    assert not server.asked
    assert entries(shared) == [f"{NAME}.tar"]
    sources = json.loads((tmp_path / NAME / "SOURCES.json").read_text())
    assert (sources["url"], sources["archive"]) == (None, f"{NAME}.tar")


def test_an_archive_that_is_here(medseg: Any, known: Any, server: Any, tar: bytes, tmp_path: Path) -> None:
    archive = tmp_path / "spleen.tar"
    archive.write_bytes(tar)
    assert medseg("fetch", NAME, "-o", tmp_path / "data", "--archive", archive).status == 0
    assert not server.asked
    assert archive.read_bytes() == tar
    archive.write_bytes(tar[:-1])
    medseg("fetch", NAME, "-o", tmp_path / "other", "--archive", archive).refused("is another file: its MD5 is")
    medseg("fetch", NAME, "-o", tmp_path / "other", "--archive", tmp_path / "no.tar").refused("no.tar is no file")
    assert entries(tmp_path / "other") == []


def test_the_list(medseg: Any, server: Any) -> None:
    outcome = medseg("fetch", "--list")
    assert outcome.status == 0
    assert re.search(r"Task09_Spleen +41 +20 +CC-BY-SA 4\.0", outcome.out)
    assert outcome.out.count("CC-BY-SA") == 10
    assert not server.asked


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], ["Missing argument 'TASK'"]),
        (["Task9_Spleen"], ["'Task9_Spleen' is no task of the Decathlon", "Did you mean Task09_Spleen?", "--list"]),
        (["../../etc"], ["is no task"]),
        ([NAME, "--sha256", "abc"], ["64 hexadecimal digits"]),
        ([NAME, "--archive", "a", "--mirror", "b"], ["--archive or --mirror"]),
        ([NAME, "--mirror", "ftp://example.org"], ["no address that can be fetched from"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_wrong_words(medseg: Any, server: Any, tmp_path: Path, arguments: list[str], words: list[str]) -> None:
    medseg("fetch", *arguments, "-o", tmp_path).refused(*words)
    assert entries(tmp_path) == []
    assert not server.asked


def test_something_else_in_its_place_is_left_alone(medseg: Any, known: Any, server: Any, tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir()
    (tmp_path / NAME / "mine").touch()
    medseg("fetch", NAME, "-o", tmp_path).refused("no whole task", "Move it away")
    assert entries(tmp_path / NAME) == ["mine"]
    shutil.rmtree(tmp_path / NAME)
    (tmp_path / NAME).symlink_to("nowhere")
    medseg("fetch", NAME, "-o", tmp_path).refused("no whole task")
    assert not server.asked


def test_no_mirror_has_it(medseg: Any, known: Any, server: Any, tmp_path: Path) -> None:
    server.files = {}
    outcome = medseg("fetch", NAME, "-o", tmp_path, "--mirror", f"{server.url}/x", "--mirror", tmp_path / "y")
    assert outcome.status == 1
    last = outcome.err.splitlines()[-1]
    assert last.startswith("medseg: the archive was not to be had: ")
    for word in (f"/x/{NAME}.tar answers 404", "y/Task09_Spleen.tar is no file", "built-in", "--mirror", "--archive"):
        assert word in last
    assert entries(tmp_path) == []


# ---- wrong files --------------------------------------------------------------------------------


def test_a_wrong_file_is_removed_and_the_next_mirror_asked(get: Any, server: Any, tar: bytes, tmp_path: Path) -> None:
    server.files[f"/mirror/{NAME}.tar"] = tar[:-1] + b"x"
    told: list[str] = []
    get(mirrors=[f"{server.url}/mirror"], tell=told.append)
    assert [path for path, _ in server.asked] == [f"/mirror/{NAME}.tar", f"{BUILT_IN}/{NAME}.tar"]
    assert "is another file: its MD5 is" in told[0]
    assert "It was removed" in told[0]
    assert entries(tmp_path / "data") == [NAME]


def test_a_wrong_file_everywhere(get: Any, server: Any, tmp_path: Path) -> None:
    server.files[f"{BUILT_IN}/{NAME}.tar"] = b"<html>Please log in</html>"
    with pytest.raises(MedsegError, match=r"not to be had: .* is another file"):
        get()
    assert entries(tmp_path / "data") == []


def test_a_wrong_file_that_was_kept_is_left_unless_asked_to(get: Any, tar: bytes, tmp_path: Path) -> None:
    kept = tmp_path / "data" / f"{NAME}.tar"
    kept.parent.mkdir()
    kept.write_bytes(b"wrong")
    get()
    assert kept.read_bytes() == b"wrong"
    shutil.rmtree(kept.parent / NAME)
    get(keep_archive=True)
    assert kept.read_bytes() == tar


def test_pieces_that_do_not_fit_are_fetched_once_more(get: Any, half: Path, server: Any, tar: bytes) -> None:
    half.write_bytes(b"x" + half.read_bytes()[1:])
    told: list[str] = []
    get(tell=told.append)
    assert [headers.get("range") for _, headers in server.asked] == [f"bytes={len(tar) // 2}-", None]
    assert "the pieces do not make the right file" in told[0]


def test_the_next_mirror_goes_on_with_what_the_first_gave(get: Any, half: Path, server: Any, tar: bytes) -> None:
    server.files[f"{BUILT_IN}/{NAME}.tar"] = b""
    get(mirrors=[f"{server.url}/mirror"])
    assert [(path, headers.get("range")) for path, headers in server.asked] == [
        (f"/mirror/{NAME}.tar", f"bytes={len(tar) // 2}-")
    ]
    assert entries(half.parent) == [NAME]


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ({f"{NAME}/dataset.json": b"{}", "../x": b"x"}, "leads out of it"),
        ({f"{NAME}/imagesTr/a.nii.gz": b"x"}, f"holds no {NAME}/dataset.json"),
        ({"Task01_BrainTumour/dataset.json": b"{}"}, "outside the folder"),
        ({f"{NAME}/dataset.json/": b""}, "holds no"),
    ],
    ids=["climbs out", "no dataset.json", "another task", "a folder for a file"],
)
def test_a_hostile_archive_leaves_nothing(
    get: Any, server: Any, packed: Any, tmp_path: Path, members: Any, words: str
) -> None:
    server.files[f"{BUILT_IN}/{NAME}.tar"] = bad = packed(members)
    with pytest.raises(InputError, match=words):
        get(sha256=hashlib.sha256(bad).hexdigest())
    assert entries(tmp_path / "data") == []


# ---- stopped and gone on ------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_it_goes_on_after_it_was_stopped(
    get: Any, medseg: Any, known: Any, server: Any, tar: bytes, tmp_path: Path, how: signal.Signals
) -> None:
    cut = len(tar) // 2
    server.then = [partial(server.serve, cut=cut, stall=True)]
    program = (
        "import signal, sys; from dataclasses import replace; from medseg.cli.main import main\n"
        "from medseg.dataset import decathlon\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored by what a shell's background starts
        "known = replace(decathlon.catalogue(), bases=(sys.argv.pop(1),))\n"
        "decathlon.catalogue = lambda: known\n"
        "main()\n"
    )
    data = tmp_path / "data"
    part = data / f".{NAME}.tar.part"
    command = [sys.executable, "-c", program, server.url + BUILT_IN, "fetch", NAME, "-o", data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        for _ in range(1000):
            if part.exists() and part.stat().st_size == cut:
                break
            time.sleep(0.02)
        with pytest.raises(MedsegError, match="another process works in"):
            get()
        process.send_signal(how)
        out, err = process.communicate(timeout=20)
    assert process.returncode == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 1}[how]
    assert "Traceback" not in err
    assert out == ""
    assert part.stat().st_size == cut
    left = [f".{NAME}.tar.part", f".{NAME}.tar.part.json"]
    assert entries(data) == ([f".{NAME}.part", *left] if how == signal.SIGKILL else left)
    assert medseg("fetch", NAME, "-o", data).status == 0
    assert server.asked[-1][1]["range"] == f"bytes={cut}-"
    assert entries(data) == [NAME]
    assert medseg("check", data / NAME).status == 0


def test_one_killed_while_it_unpacked_asks_for_nothing_again(
    get: Any, server: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(decathlon, "unpack", killed)
        with pytest.raises(KeyboardInterrupt):
            get()
    data = tmp_path / "data"
    assert entries(data) == [f".{NAME}.tar.part", f".{NAME}.tar.part.json"]
    (data / f".{NAME}.part" / NAME / "imagesTr").mkdir(parents=True)  # as SIGKILL leaves it
    get()
    assert len(server.asked) == 1
    assert entries(data) == [NAME]


def test_one_killed_at_the_very_end_is_tidied_up(get: Any, tmp_path: Path) -> None:
    get()
    part = tmp_path / "data" / f".{NAME}.tar.part"
    part.write_bytes(b"left")
    assert get().was_there
    assert entries(part.parent) == [NAME]


# ---- room ---------------------------------------------------------------------------------------


def test_a_disk_without_room_is_said_before_anything_comes(get: Any, server: Any, tar: bytes, small_disk: Path) -> None:
    with pytest.raises(MedsegError, match=r"needs 4\.1 MiB in .* where 3\.0 MiB are free: 1\.1 MiB are missing"):
        fetch_task(NAME, small_disk, known=get.keywords["known"], patience=QUICK)
    assert entries(small_disk) == []
    assert len(server.asked) == 1


def test_a_disk_that_fills_up_meanwhile(get: Any, server: Any, tar: bytes, small_disk: Path) -> None:
    def silent_on_length(handler: Any, data: bytes) -> None:
        server.answer(handler, 200, {"ETag": server.etag}, data * 2)

    server.then = [silent_on_length]
    with pytest.raises(MedsegError, match=r"cannot write .*: No space left on device") as raised:
        fetch_task(NAME, small_disk, known=get.keywords["known"], patience=QUICK)
    assert type(raised.value) is MedsegError
    assert entries(small_disk) == [f".{NAME}.tar.part", f".{NAME}.tar.part.json"]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 3 MiB, less a page that its folders take."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if (
        not shutil.which("mount")
        or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "none", disk], capture_output=True).returncode
    ):
        pytest.skip("a disk cannot be mounted here")
    yield disk
    subprocess.run(["umount", disk], check=True)


# ---- the table ----------------------------------------------------------------------------------


def test_the_table_is_that_of_the_data_page() -> None:
    page = (Path(__file__).parents[2] / "data" / "README.md").read_text()
    rows = re.findall(r"^\| (Task\w+) \|.*?\| (\d+) \| (\d+) \|.*\| `([0-9a-f]{32})` \|$", page, re.M)
    assert {name: Archive(int(training), int(test), md5) for name, training, test, md5 in rows} == catalogue().archives
    assert len(rows) == 10
    assert all(base.startswith("https://") for base in catalogue().bases)
