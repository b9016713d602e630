"""``medseg preflight``."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

import click

from medseg.core.errors import MedsegError
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.io.cluster import Wanted

# A run that has not this much room fails soon, and is tried for by writing, which a quota ends where a disk's free
# space does not tell of it.
_LEAST_ROOM = 256 * 2**20


@click.command()
@click.argument("wanted", type=click.File("r"), default="-")
@click.option(
    "--room", type=click.IntRange(min=0), default=_LEAST_ROOM, show_default=True, help="Bytes that must be free."
)
def preflight(wanted: TextIO, room: int) -> None:
    """Say what will keep a workflow from ending, before it begins. The workflow calls it.

    WANTED is JSON: the folders and the jobs. Asked are: results and scratch can be written and have room, quota
    included; tasks can be read; and of a SLURM cluster, that its partitions are there and have a node that each
    job fits, and that nodes see the folders. Jobs that an earlier start of the same work left to SLURM are withdrawn
    where they wait, and where they run, not started once more.
    """
    from medseg.io.cluster import read_wanted

    asked = read_wanted(wanted.read())
    found = [*_folders(asked, room), *(_cluster(asked) if asked.slurm else ())]
    if asked.slurm and not found:
        _earlier(asked)
    for text in found[:20]:
        click.echo(f"medseg: {text}", err=True)
    if len(found) > 20:
        click.echo(f"medseg: and {len(found) - 20} more", err=True)
    sys.exit(2 if found else 0)


def _earlier(asked: Wanted) -> None:
    """Settle with the jobs that an earlier start left, since they would write what this one's jobs write."""
    from medseg.io.cluster import part_with

    withdrawn, running = part_with(asked.starts, asked.works)
    for what, jobs in (("withdrawn", withdrawn), ("waited for", running)):
        if jobs:
            numbers = ", ".join(sorted(jobs))
            click.echo(f"medseg: {what}: {count(len(jobs), 'job')} of an earlier start ({numbers})", err=True)


def _folders(asked: Wanted, room: int) -> Iterator[str]:
    import tempfile

    for task in asked.tasks:
        if not (task / "dataset.json").is_file():
            yield f"{task} has no dataset.json that can be read; put the task there"
    yield from _room(asked.results, room, "results cannot be written to")
    try:
        scratch = Path(tempfile.gettempdir())
    except OSError:
        yield "no folder for temporary files can be written; set TMPDIR to one"
        return
    yield from _room(scratch, min(room, 16 * 2**20), "temporary files cannot be written to")


def _room(folder: Path, room: int, what: str) -> Iterator[str]:
    """What keeps a file of so many bytes from being written there."""
    import os
    import tempfile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            if room:
                os.posix_fallocate(file.fileno(), 0, room)
    except OSError as error:
        yield f"{what} {folder}: {error.strerror}; free space or quota, or choose another folder"


def _cluster(asked: Wanted) -> Iterator[str]:
    from medseg.io.cluster import ask_nodes, faults, partitions, used

    try:
        known = partitions()
    except MedsegError as error:
        yield str(error)
        return
    found = list(faults(asked.jobs, known))
    yield from found
    for partition in used(asked.jobs, known):
        if partition.cancels:
            click.echo(
                f"medseg: {partition.name} ends the jobs that it preempts (PreemptMode=CANCEL), and Snakemake does not "
                "notice: it waits. Then ctrl-C and the same command go on; or name another partition",
                err=True,
            )
    if found or not asked.ask_nodes:
        return
    tasks = [task.resolve() / "dataset.json" for task in asked.tasks]
    paths = [asked.results.resolve(), *tasks, Path(sys.executable)]
    missing, answered, busy = ask_nodes(asked.jobs, known, paths, asked.ask_nodes)
    yield from (
        f"{text}; mount it there, or keep jobs off that node (slurm_extra='--exclude=NODE')" for text in missing
    )
    asked_too = f"; {count(busy, 'node')} too busy to be asked" if busy else ""
    click.echo(f"the folders are seen by {count(answered, 'node')}{asked_too}", err=True)
