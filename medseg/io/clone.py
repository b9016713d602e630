"""Which medseg this is: the commit of its clone, and how what is installed differs from what is pinned."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import medseg
from medseg.core.errors import InputError

_COMMIT = re.compile("[0-9a-f]{40}([0-9a-f]{24})?")


@dataclass(frozen=True)
class Commit:
    """A commit, and whether files that git follows were changed since; None where no git can say."""

    sha: str
    dirty: bool | None


def clone() -> Path | None:
    """The folder of the clone that medseg runs from; None where it is installed otherwise."""
    folder = Path(medseg.__file__).resolve().parents[1]
    return folder if (folder / ".git").exists() else None


def commit_of(folder: Path) -> Commit | None:
    """The commit that is checked out in a clone, asked of git where there is one, else read from ``.git``.
    None where it cannot be told."""
    said = _git(folder, "rev-parse", "HEAD")
    if said is None:
        return _read_commit(folder)
    changed = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return Commit(said.strip(), None if changed is None else bool(changed.strip()))


def _git(folder: Path, *arguments: str) -> str | None:
    program = shutil.which("git")
    if program is None:
        return None
    command = [program, "-c", "core.fsmonitor=false", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout


def _read_commit(folder: Path) -> Commit | None:
    """Of a plain clone; a work tree's ``.git`` is a file, and leads elsewhere."""
    git = folder / ".git"
    try:
        head = (git / "HEAD").read_text().strip()
        name = head.removeprefix("ref: ")
        if name == head:
            found = head
        elif (git / name).is_file():
            found = (git / name).read_text().strip()
        else:
            packed = (line.split() for line in (git / "packed-refs").read_text().splitlines())
            found = next((words[0] for words in packed if words[1:] == [name]), "")
    except (OSError, UnicodeDecodeError):
        return None
    return Commit(found, None) if _COMMIT.fullmatch(found) else None


def departures(constraints: Path) -> tuple[str, ...]:
    """Packages that are installed here in another version than a constraints file pins; what is not installed is
    no departure, nor is a local build (``2.13.0+cpu``). InputError where the file cannot be read."""
    try:
        lines = constraints.read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{constraints} cannot be read", "Name a file of lines like numpy==2.1.0") from None
    pins = (line.partition("#")[0].partition(";")[0].strip().split("==") for line in lines)
    found = []
    for name, pinned in (pin for pin in pins if len(pin) == 2):
        try:
            here = version(name.strip())
        except PackageNotFoundError:
            continue
        if here.partition("+")[0] != pinned.strip().partition("+")[0]:
            found.append(f"{name.strip()} {here}, not {pinned.strip()}")
    return tuple(found)
