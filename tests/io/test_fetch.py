from __future__ import annotations

import hashlib
import http.server
import json
import resource
import shutil
import ssl
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError, MedsegError
from medseg.io.fetch import MIB, Patience, UnavailableError, digests, download, forget, place

QUICK = Patience(stall=10, waits=(0.01, 0.02, 0.03))
HASTY = Patience(stall=0.5, waits=QUICK.waits)
DATA = np.random.default_rng(0).bytes(3 * MIB + 12345)
HALF = MIB + 777


@pytest.fixture
def server(file_server: Any) -> Any:
    file_server.files["/a.tar"] = DATA
    return file_server


@pytest.fixture
def get(server: Any, tmp_path: Path) -> Any:
    return partial(download, f"{server.url}/a.tar", tmp_path / "part", patience=QUICK)


def ranges(server: Any) -> list[str | None]:
    return [headers.get("range") for _, headers in server.asked]


def test_a_file_comes(server: Any, get: Any, tmp_path: Path) -> None:
    asked = []
    assert get(room=lambda total, missing: asked.append((total, missing))) is False
    assert (tmp_path / "part").read_bytes() == DATA
    assert asked == [(len(DATA), len(DATA))]
    assert ranges(server) == [None]
    assert server.asked[0][1]["user-agent"].startswith("medseg/")
    forget(tmp_path / "part")
    assert not list(tmp_path.iterdir())


def test_what_is_whole_is_not_asked_for_again(server: Any, get: Any) -> None:
    get()
    assert get() is True
    assert len(server.asked) == 1


def test_rows_of_a_mebibyte_tell_how_far_it_is(get: Any) -> None:
    seen = []

    def bar(rows: Any, total: int) -> Any:
        for n, row in enumerate(rows, start=1):
            seen.append((n, total))
            yield row

    get(progress=bar)
    assert seen == [(1, 4), (2, 4), (3, 4)]


# ---- cut off ------------------------------------------------------------------------------------


@pytest.mark.parametrize("stall", [False, True], ids=["dropped", "stalled"])
def test_it_goes_on_where_it_was_cut_off(server: Any, get: Any, tmp_path: Path, stall: bool) -> None:
    server.then = [partial(server.serve, cut=HALF, stall=stall), partial(server.serve, cut=5, stall=stall)]
    told: list[str] = []
    assert get(tell=told.append, patience=HASTY if stall else QUICK) is True
    assert (tmp_path / "part").read_bytes() == DATA
    assert ranges(server) == [None, f"bytes={HALF}-", f"bytes={HALF + 5}-"]
    assert [headers.get("if-range") for _, headers in server.asked] == [None, '"first"', '"first"']
    word = "stalls" if stall else f"breaks off after {HALF} of {len(DATA)} bytes"
    assert word in told[0]
    assert "trying again in 0.01 s" in told[0]


def test_another_call_goes_on_too(server: Any, get: Any, tmp_path: Path) -> None:
    server.then = [partial(server.serve, cut=HALF)]
    with pytest.raises(UnavailableError, match="breaks off"):
        get(patience=Patience(stall=1, waits=()))
    assert (tmp_path / "part").stat().st_size == HALF
    asked = []
    assert get(room=lambda total, missing: asked.append((total, missing))) is True
    assert (tmp_path / "part").read_bytes() == DATA
    assert asked == [(len(DATA), len(DATA) - HALF)]


@pytest.mark.parametrize("etag", ['"second"', None], ids=["another tag", "no tags, another length"])
def test_a_file_that_changed_meanwhile_is_begun_anew(server: Any, get: Any, tmp_path: Path, etag: str | None) -> None:
    server.etag = '"first"' if etag else None
    server.then = [partial(server.serve, cut=HALF)]
    with pytest.raises(UnavailableError):
        get(patience=Patience(waits=()))
    server.files["/a.tar"] = new = DATA[::-1] + b"more"
    server.etag = etag
    assert get() is False
    assert (tmp_path / "part").read_bytes() == new


def test_a_server_that_gives_a_part_of_another_file_is_not_believed(server: Any, get: Any, tmp_path: Path) -> None:
    def deaf(handler: Any, data: bytes) -> None:  # to If-Range
        del handler.headers["If-Range"]
        server.serve(handler, data)

    server.then = [partial(server.serve, cut=HALF), deaf]
    with pytest.raises(UnavailableError):
        get(patience=Patience(waits=()))
    server.files["/a.tar"], server.etag = DATA[::-1], '"second"'
    assert get() is False
    assert (tmp_path / "part").read_bytes() == DATA[::-1]


@pytest.mark.parametrize("range_", ["bytes 0-9/10", "bytes 5-", "", "bytes */10", "bytes ²-3/4"])
def test_a_part_that_was_not_asked_for_is_begun_anew(server: Any, get: Any, tmp_path: Path, range_: str) -> None:
    def other(handler: Any, data: bytes) -> None:
        server.answer(handler, 206, {"Content-Range": range_.encode().decode("latin-1")}, b"x" * 10)

    server.then = [partial(server.serve, cut=HALF), other]
    assert get() is False
    assert (tmp_path / "part").read_bytes() == DATA
    server.then = [other]
    forget(tmp_path / "part")
    with pytest.raises(UnavailableError, match="nobody asked for"):
        get()


def test_a_server_that_ignores_ranges_is_begun_anew(server: Any, get: Any, tmp_path: Path) -> None:
    def whole(handler: Any, data: bytes) -> None:
        server.answer(handler, 200, {"Content-Length": len(data)}, data)

    server.then = [partial(server.serve, cut=HALF), whole]
    assert get() is False
    assert (tmp_path / "part").read_bytes() == DATA


def test_a_range_that_is_not_there_is_begun_anew(server: Any, get: Any, tmp_path: Path) -> None:
    server.then = [partial(server.serve, cut=HALF), lambda handler, _: handler.send_error(416)]
    assert get() is False
    assert (tmp_path / "part").read_bytes() == DATA


def test_another_place_with_a_file_of_the_same_length_is_gone_on_with(server: Any, get: Any, tmp_path: Path) -> None:
    server.files["/mirror/a.tar"] = DATA
    server.then = [partial(server.serve, cut=HALF)]
    with pytest.raises(UnavailableError):
        get(patience=Patience(waits=()))
    server.etag = '"of the mirror"'
    assert download(f"{server.url}/mirror/a.tar", tmp_path / "part", patience=QUICK) is True
    assert (tmp_path / "part").read_bytes() == DATA
    assert "if-range" not in server.asked[-1][1]
    assert ranges(server)[-1] == f"bytes={HALF}-"


@pytest.mark.parametrize(
    "record", [None, "", "[]", "{}", '{"url": 3, "validator": "", "total": 1}', '{"url": "", "validator": "\\n"}']
)
def test_a_part_of_nobody_knows_what_is_begun_anew(server: Any, get: Any, tmp_path: Path, record: str | None) -> None:
    (tmp_path / "part").write_bytes(b"x" * 1000)
    if record is not None:
        (tmp_path / "part.json").write_text(record)
    assert get() is False
    assert (tmp_path / "part").read_bytes() == DATA


def test_a_part_that_is_longer_than_the_file_is_begun_anew(server: Any, get: Any, tmp_path: Path) -> None:
    get()
    with (tmp_path / "part").open("ab") as file:
        file.write(b"more")
    assert get() is False
    assert (tmp_path / "part").read_bytes() == DATA


# ---- lies and faults ----------------------------------------------------------------------------


def test_a_server_in_trouble_is_asked_again(server: Any, get: Any, tmp_path: Path) -> None:
    def busy(handler: Any, _: bytes) -> None:
        handler.send_error(503)

    server.then = [busy, lambda handler, _: handler.send_error(500), lambda handler, _: handler.wfile.write(b"what?\n")]
    told: list[str] = []
    get(tell=told.append)
    assert (tmp_path / "part").read_bytes() == DATA
    assert "answers 503 Service Unavailable; trying again in 0.01 s" in told[0]
    assert "answers 500 Internal Server Error; trying again in 0.02 s" in told[1]
    assert "breaks the connection off" in told[2]
    server.then = [busy] * 4
    forget(tmp_path / "part")
    with pytest.raises(UnavailableError, match="answers 503"):
        get()
    assert len(server.asked) == 8


@pytest.mark.parametrize("status", [401, 403, 404, 410, 204, 418, 599, 999])
def test_what_will_not_change_is_asked_once(server: Any, get: Any, tmp_path: Path, status: int) -> None:
    server.then = [lambda handler, _: server.answer(handler, status, {}, b"")]
    with pytest.raises(UnavailableError, match=f"answers {status}"):
        get()
    assert len(server.asked) == 1
    assert not list(tmp_path.iterdir())


def test_a_stall_before_the_first_word(server: Any, get: Any, tmp_path: Path) -> None:
    server.then = [lambda handler, _: server.over.wait(5)]
    get(patience=HASTY)
    assert (tmp_path / "part").read_bytes() == DATA


def test_a_trickle_is_a_stall(server: Any, get: Any, tmp_path: Path) -> None:
    def trickle(handler: Any, data: bytes) -> None:
        server.serve(handler, data, cut=1)
        for _ in range(100):
            time.sleep(0.05)
            handler.wfile.write(b"x")

    server.then = [trickle]
    told: list[str] = []
    begun = time.monotonic()
    get(tell=told.append, patience=HASTY)
    assert time.monotonic() - begun < 4
    assert "stalls" in told[0]


@pytest.mark.parametrize("headers", [{}, {"Transfer-Encoding": "chunked"}], ids=["to the end", "chunked"])
def test_a_server_that_tells_no_length(server: Any, get: Any, tmp_path: Path, headers: dict[str, str]) -> None:
    body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(DATA), DATA) if headers else DATA
    server.then = [lambda handler, _: server.answer(handler, 200, headers, body)]
    server.http.RequestHandlerClass.protocol_version = "HTTP/1.1" if headers else "HTTP/1.0"
    get()
    assert (tmp_path / "part").read_bytes() == DATA


def test_chunks_that_break_off_are_begun_anew(server: Any, get: Any, tmp_path: Path) -> None:
    server.http.RequestHandlerClass.protocol_version = "HTTP/1.1"

    def cut(handler: Any, data: bytes) -> None:
        server.answer(handler, 200, {"Transfer-Encoding": "chunked"}, b"%x\r\n%b" % (len(data), data[:HALF]))
        handler.close_connection = True

    server.then = [cut]
    get()
    assert (tmp_path / "part").read_bytes() == DATA


def test_no_more_is_read_than_was_promised(server: Any, get: Any, tmp_path: Path) -> None:
    server.then = [lambda handler, data: server.answer(handler, 200, {"Content-Length": 10}, data)]
    get()
    assert (tmp_path / "part").read_bytes() == DATA[:10]


def test_a_length_beyond_all_reason_is_refused(server: Any, get: Any, tmp_path: Path) -> None:
    server.then = [lambda handler, _: server.answer(handler, 200, {"Content-Length": 1 << 50}, b"")]
    with pytest.raises(UnavailableError, match="no archive of a task"):
        get()


def test_nobody_there(server: Any, tmp_path: Path) -> None:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(UnavailableError, match=r"cannot be reached \(Connection refused\)"):
        download(f"http://127.0.0.1:{port}/a.tar", tmp_path / "part", patience=QUICK)


@pytest.mark.parametrize(
    ("to", "words"),
    [
        ("/b.tar", None),
        ("file:///etc/passwd", "answers 302"),
        ("ftp://127.0.0.1/a.tar", "cannot be reached"),
        ("/a.tar", "answers 302"),
        ("http://127.0.0.1:notaport/", "breaks the connection off|cannot be reached|none"),
    ],
    ids=["elsewhere", "a file of this machine", "another protocol", "a circle", "nowhere"],
)
def test_redirects(server: Any, get: Any, tmp_path: Path, to: str, words: str | None) -> None:
    server.files["/b.tar"] = DATA

    def away(handler: Any, data: bytes) -> None:
        if handler.path == "/a.tar":
            return server.answer(handler, 302, {"Location": to}, b"")
        return server.serve(handler, data)

    server.serve, serve = server.serve, server.serve
    server.then = [away] * 40 if to != "/b.tar" else [away, serve]
    if words is None:
        get()
        assert (tmp_path / "part").read_bytes() == DATA
        return
    with pytest.raises(UnavailableError, match=words):
        get()
    assert not (tmp_path / "part").exists()


def test_a_proxy_of_the_environment_has_no_say(
    server: Any, get: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    get()
    assert (tmp_path / "part").read_bytes() == DATA


@pytest.mark.skipif(not shutil.which("openssl"), reason="no openssl to make a certificate with")
def test_certificates_are_verified(tmp_path: Path, file_server: Any) -> None:
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"),
            *("-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", certificate),
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    secure = http.server.HTTPServer(("127.0.0.1", 0), file_server.http.RequestHandlerClass)
    secure.handle_error = lambda *_: None  # type: ignore[method-assign]
    secure.socket = context.wrap_socket(secure.socket, server_side=True)
    thread = threading.Thread(target=secure.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    told: list[str] = []
    try:
        with pytest.raises(UnavailableError, match="certificate that this machine does not trust"):
            download(
                f"https://127.0.0.1:{secure.server_address[1]}/a", tmp_path / "p", patience=QUICK, tell=told.append
            )
    finally:
        secure.shutdown()
        thread.join()
        secure.server_close()
    assert not told  # it is not asked again
    assert not file_server.asked


# ---- this side ----------------------------------------------------------------------------------


def test_room_is_asked_for_before_anything_is_written(get: Any, tmp_path: Path) -> None:
    def full(total: int, missing: int) -> None:
        raise MedsegError("no room")

    with pytest.raises(MedsegError, match="no room"):
        get(room=full)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_said_and_gone_on_from(server: Any, get: Any, tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from medseg.io.fetch import download\n"
        "from medseg.core.errors import MedsegError\n"
        "try: download(sys.argv[1], Path(sys.argv[2]))\n"
        "except MedsegError as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, f"{server.url}/a.tar", tmp_path / "part"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, MIB)),
    )
    assert done.stderr == ""
    assert done.stdout.startswith(f"MedsegError cannot write {tmp_path / 'part'}: File too large")
    assert (tmp_path / "part").stat().st_size == MIB
    assert get() is True
    assert (tmp_path / "part").read_bytes() == DATA
    assert ranges(server) == [None, f"bytes={MIB}-"]


def test_a_place_that_cannot_be_written(get: Any, tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    with pytest.raises(MedsegError, match="cannot write") as raised:
        get()
    assert type(raised.value) is MedsegError


def test_the_record_names_what_the_part_is_of(server: Any, get: Any, tmp_path: Path) -> None:
    get()
    assert json.loads((tmp_path / "part.json").read_text()) == {
        "url": f"{server.url}/a.tar",
        "validator": '"first"',
        "total": len(DATA),
    }


@pytest.mark.parametrize("size", [0, 1, MIB, MIB + 1])
def test_digests(tmp_path: Path, size: int) -> None:
    (tmp_path / "a").write_bytes(DATA[:size])
    found = digests(tmp_path / "a")
    assert found.md5 == hashlib.md5(DATA[:size]).hexdigest()
    assert found.sha256 == hashlib.sha256(DATA[:size]).hexdigest()
    assert found.size == size
    with pytest.raises(UnavailableError, match="cannot be read"):
        digests(tmp_path / "b")


@pytest.mark.parametrize(
    ("base", "found"),
    [
        ("https://example.org/msd", "https://example.org/msd/a.tar"),
        ("http://example.org:8080/", "http://example.org:8080/a.tar"),
        ("/shared/msd", Path("/shared/msd/a.tar")),
        ("shared", Path("shared/a.tar")),
        ("file:///shared/the%20disk", Path("/shared/the disk/a.tar")),
        ("file://localhost/shared", Path("/shared/a.tar")),
    ],
)
def test_places(base: str, found: Any) -> None:
    assert place(base, "a.tar") == found


@pytest.mark.parametrize(
    "base",
    [
        "ftp://example.org/msd",
        "s3://bucket",
        "https://",
        "https://me:secret@example.org/",
        "https://example.org/?key=secret",
        "https://example.org/#x",
        "http://[::1",
        "http://h:port/",
        "http://a b/",
        "http://a\r\nb/",
        "http://exämple.org/",
        "file://server/share",
        "file:///a%00b",
    ],
)
def test_what_is_no_place(base: str) -> None:
    with pytest.raises(InputError) as raised:
        place(base, "a.tar")
    assert "secret" not in str(raised.value)
    assert "\n" not in str(raised.value)
