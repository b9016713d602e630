"""Files from the network, and whether they are the right ones.

A download that was cut off goes on where it stopped, and begins anew where the other side has another file by
now. Only `medseg fetch` comes here. The environment has no say: no proxy is taken from it.
"""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import re
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from http import HTTPStatus
from pathlib import Path
from typing import IO, Any, BinaryIO
from urllib.parse import unquote, urlsplit

import medseg
from medseg.core.errors import InputError, MedsegError
from medseg.core.progress import Progress, silent
from medseg.core.words import duration
from medseg.io.files import read_json, write_json

MIB = 1 << 20
_CHUNK = 1 << 18
# Slower than this many bytes in the time of a stall is a stall.
_LEAST_BYTES = 1 << 10
# The largest archive of the Decathlon has 27 GiB; a server that tells no length is not followed for ever.
_LARGEST_BYTES = 1 << 36
# Answers that may be others in a moment.
_PASSING_STATUS = {408, 425, 429, 500, 502, 503, 504}


@dataclass(frozen=True)
class Patience:
    """Seconds without data after which a connection is given up, and those before each new try. A try that
    brought a MiB more than any before it begins the count anew."""

    stall: float = 60.0
    waits: tuple[float, ...] = (1.0, 5.0, 15.0, 60.0)


class UnavailableError(MedsegError):
    """A place does not give the file; the text names the place and says why."""


class _Passing(Exception):  # noqa: N818  # no error yet: it may be over at the next try
    """What may be over at the next try, in words that follow on an address."""


@dataclass(frozen=True)
class Digests:
    """What a file is known by."""

    md5: str
    sha256: str
    size: int


@dataclass(frozen=True)
class _Record:
    """What a partial file is of: the address, what the server called the state of the file there (an ETag or a
    date, or nothing), and its whole length, where the server said it."""

    url: str
    validator: str
    total: int | None


def place(base: str, name: str) -> str | Path:
    """Where a mirror keeps a file: below an http(s) address, or in a folder, given as a path or as file://.

    Raises InputError for an address that is none, of another kind, or one with a password or a query in it, which
    would go into records and messages.
    """
    if not re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", base):
        return Path(base) / name
    remedy = "Name the http(s) address or the folder that the archives lie in"
    try:
        parts = urlsplit(base)
        _ = parts.port
    except ValueError:
        raise InputError("a mirror has an address that cannot be read", remedy) from None
    if parts.username is not None or parts.query or parts.fragment:
        raise InputError("a mirror's address holds a user, a query or a fragment", remedy)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and "\0" not in unquote(parts.path):
        return Path(unquote(parts.path)) / name
    if parts.scheme not in ("http", "https") or not parts.hostname or not re.fullmatch(r"[!-~]+", base):
        raise InputError(f"the mirror {base!r} has no address that can be fetched from", remedy)
    return f"{base.rstrip('/')}/{name}"


def download(
    url: str,
    part: Path,
    *,
    room: Callable[[int, int], None] = lambda total, missing: None,
    patience: Patience = Patience(),
    progress: Progress = silent,
    tell: Callable[[str], None] = lambda text: None,
) -> bool:
    """Bring the whole file at an http(s) address to ``part``, going on with what is there already.

    Beside it ``<part>.json`` remembers what the part is of. ``room`` is told the file's length and how much of it
    is missing before anything is written, and may raise. Returns whether the file was put together of pieces, so
    that a wrong checksum may be the fault of an earlier one.

    Raises UnavailableError where the address does not give the file, however often it is asked; what came is kept.
    Raises MedsegError where it cannot be written.
    """
    longest, tries = _size(part), 0
    while True:
        try:
            return _go_on(url, part, room, patience.stall, progress)
        except _Passing as fault:
            reason = str(fault)
        if _size(part) >= longest + MIB:
            longest, tries = _size(part), 0
        if tries == len(patience.waits):
            raise UnavailableError(f"{url} {reason}")
        tell(f"{url} {reason}; trying again in {duration(patience.waits[tries])}")
        time.sleep(patience.waits[tries])
        tries += 1


def forget(part: Path) -> None:
    """Remove a partial file, and first what it is said to be of."""
    _record_of(part).unlink(missing_ok=True)
    part.unlink(missing_ok=True)


def digests(path: Path, progress: Progress = silent) -> Digests:
    """MD5, SHA-256 and size of a file. Raises UnavailableError where it cannot be read."""
    md5, sha256 = hashlib.md5(usedforsecurity=False), hashlib.sha256()
    size = 0
    try:
        with path.open("rb") as file:
            for _ in progress(range(-(-path.stat().st_size // MIB)), -(-path.stat().st_size // MIB)):
                block = file.read(MIB)
                md5.update(block)
                sha256.update(block)
                size += len(block)
    except OSError as error:
        raise UnavailableError(f"{path} cannot be read ({error.strerror or error})") from None
    return Digests(md5.hexdigest(), sha256.hexdigest(), size)


def _go_on(url: str, part: Path, room: Callable[[int, int], None], stall: float, progress: Progress) -> bool:
    """One try. Returns whether it went on with something."""
    record = _read_record(part)
    have = _size(part) if record else 0
    if record and have and have == record.total:
        return True
    headers = {"User-Agent": f"medseg/{medseg.__version__}"}
    if record and have:
        headers["Range"] = f"bytes={have}-"
        if record.url == url and record.validator:
            headers["If-Range"] = record.validator
    try:
        with _asked(url, headers, stall) as answer:
            start, total = _where(url, answer, record, have)
            _take(answer, part, start, _Record(url, _validator(answer), total), room, stall, progress)
    except _AnotherFile:
        forget(part)
        return _go_on(url, part, room, stall, progress)  # once: there is nothing to go on with any more
    except OSError as error:  # those of the network have become others by now
        raise MedsegError(f"cannot write {part}: {error.strerror or error}. Free some space, and go on") from error
    return start > 0


class _AnotherFile(Exception):  # noqa: N818  # no error: begin anew
    """What there is of a file does not go with what the server has."""


def _where(url: str, answer: http.client.HTTPResponse, record: _Record | None, have: int) -> tuple[int, int | None]:
    """The first byte that an answer gives and the whole file's length, None where it does not say."""
    if answer.status == HTTPStatus.OK:
        start, total = 0, answer.length
    elif answer.status == HTTPStatus.PARTIAL_CONTENT:
        found = re.fullmatch(r"bytes (\d{1,15})-\d{1,15}/(\d{1,15}|\*)", answer.headers.get("Content-Range", ""))
        if not found or int(found[1]) != have or not record:
            raise _AnotherFile if have else UnavailableError(f"{url} answers with a part that nobody asked for")
        start, total = have, None if found[2] == "*" else int(found[2])
        same_place = record.url == url and record.validator
        if same_place and _validator(answer) not in ("", record.validator):
            raise _AnotherFile
        if total != record.total or (total is None and not same_place):
            raise _AnotherFile
    else:
        raise UnavailableError(f"{url} {_answers(answer.status)}")
    if total is not None and total > _LARGEST_BYTES:
        raise UnavailableError(f"{url} says that the file has {total} bytes, which no archive of a task has")
    return start, total


def _take(
    answer: http.client.HTTPResponse,
    part: Path,
    start: int,
    record: _Record,
    room: Callable[[int, int], None],
    stall: float,
    progress: Progress,
) -> None:
    """Write what an answer brings to the part from byte ``start`` on."""
    if start == 0:
        forget(part)
    missing = 0 if record.total is None else record.total - start
    if record.total is not None:
        room(record.total, missing)
    if start == 0:
        write_json(_record_of(part), asdict(record))
    with part.open("ab" if start else "wb") as file:
        for _ in progress(_appended(record.url, answer, file, start, record.total, stall), -(-missing // MIB)):
            pass


def _appended(
    url: str, answer: http.client.HTTPResponse, file: BinaryIO, size: int, total: int | None, stall: float
) -> Iterator[None]:
    """Write what comes to a file of ``size`` bytes; a row for each MiB. No more than ``total`` is read."""
    rows, since, came = size // MIB, time.monotonic(), 0
    while chunk := _read(url, answer, _CHUNK if total is None else min(_CHUNK, total - size)):
        file.write(chunk)
        file.flush()  # what came is not lost if this process is killed
        size, came = size + len(chunk), came + len(chunk)
        if size > _LARGEST_BYTES:
            raise UnavailableError(f"{url} sends more than any archive of a task has")
        if time.monotonic() - since > stall:
            if came < _LEAST_BYTES:
                raise _Passing("stalls")
            since, came = time.monotonic(), 0
        for _ in range(rows, size // MIB):
            yield
        rows = size // MIB
    if total is not None and size < total:
        raise _Passing(f"breaks off after {size} of {total} bytes")


def _read(url: str, answer: http.client.HTTPResponse, most: int) -> bytes:
    with _in_words(url):
        return answer.read1(most) if most else b""


@contextlib.contextmanager
def _asked(url: str, headers: dict[str, str], stall: float) -> Iterator[http.client.HTTPResponse]:
    """The answer of a server, to be read. Raises _Passing, UnavailableError, and _AnotherFile for a range that it has
    not."""
    with _in_words(url):
        answer = _opener().open(urllib.request.Request(url, headers=headers), timeout=stall)  # noqa: S310
    with answer:
        yield answer


@contextlib.contextmanager
def _in_words(url: str) -> Iterator[None]:
    """What goes wrong on the way, as what may be over at the next try and what will not."""
    try:
        yield
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
            raise _AnotherFile from None
        if error.code in _PASSING_STATUS:
            raise _Passing(_answers(error.code)) from None
        raise UnavailableError(f"{url} {_answers(error.code)}") from None
    except (OSError, http.client.HTTPException) as error:
        cause = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(cause, ssl.SSLCertVerificationError):
            raise UnavailableError(f"{url} has a certificate that this machine does not trust") from None
        if isinstance(cause, TimeoutError):
            raise _Passing("stalls") from None
        if isinstance(cause, http.client.HTTPException | ConnectionResetError | BrokenPipeError):
            raise _Passing("breaks the connection off") from None
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise _Passing(f"cannot be reached ({reason or type(cause).__name__})") from None
    except ValueError:
        raise UnavailableError(f"{url} leads to an address that is none") from None


def _answers(status: int) -> str:
    """In our words: those of the server are anyone's."""
    with contextlib.suppress(ValueError):
        return f"answers {status} {HTTPStatus(status).phrase}"
    return f"answers {status}"


class _Redirects(urllib.request.HTTPRedirectHandler):
    max_redirections = 5

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any, newurl: str
    ) -> urllib.request.Request | None:
        fp.close()  # or urllib would read the whole of it, however long
        if req.type == "https" and urlsplit(newurl).scheme != "https":
            raise UnavailableError(f"{req.full_url} leads from https to an address without it")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _opener() -> urllib.request.OpenerDirector:
    """http and https alone, certificates verified; none of the handlers for files, FTP and proxies."""
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(context=ssl.create_default_context()),
        urllib.request.UnknownHandler(),
        urllib.request.HTTPErrorProcessor(),
        urllib.request.HTTPDefaultErrorHandler(),
        _Redirects(),
    ):
        opener.add_handler(handler)
    return opener


def _validator(answer: http.client.HTTPResponse) -> str:
    """What If-Range takes: an ETag that is not weak, else a date; "" where there is neither."""
    tag = answer.headers.get("ETag", "")
    if re.fullmatch(r'"[!#-~]{1,200}"', tag):
        return tag
    date = answer.headers.get("Last-Modified", "")
    return date if re.fullmatch(r"[ -~]{1,60}", date) else ""


def _record_of(part: Path) -> Path:
    return part.with_name(f"{part.name}.json")


def _read_record(part: Path) -> _Record | None:
    """What a part is of; None where it is not there, or nobody knows."""
    try:
        record = _Record(**read_json(_record_of(part)))
    except (InputError, TypeError):
        return None
    sound = isinstance(record.url, str) and isinstance(record.validator, str) and "\n" not in record.validator
    return record if sound and (record.total is None or type(record.total) is int) else None


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
