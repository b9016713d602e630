"""``medseg archive``: many scans as shards of an array, and what became of them."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, progress, stopping
from medseg.cli.jobs import Job, Shard, listed
from medseg.core.errors import InputError, MedsegError
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.io.archive import Log, Manifest, Scan
    from medseg.report.archive import Collected, Row

# A full disk or a broken machine fails every scan: so many in a row end a shard.
_GIVE_UP = 5
_MISSING = "missing.txt"


@click.group()
def archive() -> None:
    """Thousands to millions of scans, as shards of an array.

    \b
    medseg archive deal scans.txt -o out -n 200            which scan is in which shard
    medseg predict --manifest out -m MODEL --shard 3/200   one task of the array
    medseg archive report out                              what became of every scan
    """


@archive.command()
@click.argument("scans", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="A new folder, for results, logs and the report.")
@click.option("-n", "--shards", type=click.IntRange(1, 100_000), help="How many.  [default: one for 500 scans]")
def deal(scans: Path, output: Path, shards: int | None) -> None:
    """Deal the SCANS that a text file names, one a line, to shards of nearly equal size.

    Each is a file, or the DICOM folder or zip of one scan. All are looked for before anything starts; those that
    are missing are listed. The same list gives the same shards.
    """
    from medseg.io.archive import MANIFEST, look_up, some, write_manifest
    from medseg.io.files import new_folder, write_text

    named = listed(scans)
    if shards and shards > len(named):
        raise InputError(f"{shards} shards for {count(len(named), 'scan')}", "Take no more shards than scans")
    new_folder(output, holds=MANIFEST)
    with _counting(len(named)) as tell:
        seen = look_up(named, tell)
    missing = [str(path) for path, one in zip(named, seen, strict=True) if one is None]
    if missing:
        write_text(output / _MISSING, "".join(f"{path}\n" for path in missing))
        raise InputError(
            f"{len(missing)} of {count(len(named), 'scan')} {'is' if len(missing) == 1 else 'are'} missing "
            f"({some(missing)}); all of them are listed in {output / _MISSING}",
            "Put them there, or take them from the list",
        )
    (output / _MISSING).unlink(missing_ok=True)
    there = [one for one in seen if one]
    manifest = write_manifest(output / MANIFEST, there, shards or -(-len(there) // 500))
    click.echo(f"{count(len(there), 'scan')} dealt to {count(manifest.shards, 'shard')}: {manifest.path}")


@contextmanager
def _counting(total: int) -> Iterator[Callable[[int], object]]:
    steps = iter(progress("look up", unit="scan")(range(total), total))

    def tell(number: int) -> None:
        for _ in range(number):
            next(steps, None)

    yield tell
    next(steps, None)


@archive.command("report")
@click.argument("folder", type=FOLDER)
@click.option("--allow-failed", is_flag=True, help="Exit status 0 also where scans failed, if it is known why.")
def report_(folder: Path, allow_failed: bool) -> None:
    """What became of every scan of FOLDER: manifest, logs and files held against each other.

    Writes report.html, report.json, scans.csv (a line for each scan), failed.csv (those that are not done, and why)
    and predictions.json, by which other verbs find the results. Exit status 1 where a scan failed, is not done yet
    or is lost.
    """
    from medseg.io.archive import read_manifest
    from medseg.io.files import atomic, write_json, write_text
    from medseg.io.sidecar import INDEX, write_index
    from medseg.report.archive import HEAD, Collected, archive_report, csv_line

    manifest = read_manifest(folder)
    found = Collected()
    cases: dict[str, str] = {}
    failed: dict[str, str] = {}
    with atomic(folder / "scans.csv") as every, atomic(folder / "failed.csv") as wrong:
        every.write(HEAD)
        wrong.write(HEAD)
        for row in _rows(manifest, found):
            found.add(row)
            line = csv_line(row)
            every.write(line)
            if row.state == "done":
                cases[row.name] = row.result
            else:
                failed[row.name] = row.reason or row.state
                wrong.write(line)
    told = found.summary()
    write_json(folder / "report.json", told)
    write_text(folder / "report.html", archive_report(folder.absolute().name, told))
    write_index(folder / INDEX, ", ".join(sorted(found.models)), cases, failed)
    states = told["scans"]
    click.echo(
        f"{states['all']} scans: {states['done']} done, {states['flagged']} of them flagged for review; "
        f"{states['failed']} failed, {states['not done']} not done, {states['lost']} lost"
    )
    click.echo(folder / "report.html")
    for fault in told["faults"]:
        click.echo(f"medseg: {fault}", err=True)
    if told["faults"] or (states["failed"] and not allow_failed):
        raise SystemExit(1)


def _rows(manifest: Manifest, found: Collected) -> Iterator[Row]:
    """Every scan of the manifest, in its order; what belongs to no scan is told to ``found``."""
    from medseg.io.archive import read_log, written
    from medseg.io.sidecar import SUFFIX
    from medseg.report.archive import Row

    files = written(manifest)
    for number in range(1, manifest.shards + 1):
        told = read_log(manifest.log(number))
        if told.head and told.head.get("manifest") != manifest.digest:
            raise InputError(f"{manifest.log(number)} is of another manifest", "Deal the scans to a new folder")
        found.log(told.head, told.core_seconds, told.unread)
        ending = ".nii.gz" if told.head.get("to", "nifti") == "nifti" else ".dcm"
        strangers = set(told.scans)
        for scan in manifest.of(number):
            strangers.discard(scan.name)
            name = f"{scan.name}{SUFFIX}"
            here = files.get(scan.folder, set())
            row = told.scans.get(scan.name)
            both = f"{name}{ending}", f"{name}.json"
            # Network file systems list late what others wrote; one that is asked for is looked for.
            there = here.issuperset(both) or (
                row is not None and row["state"] == "done" and _there(manifest, scan, both)
            )
            state, reason = _state(row, there, told.begun[scan.name], bool(told.head))
            yield Row(
                name=scan.name,
                scan=str(scan.path),
                shard=number,
                state=state,
                reason=reason,
                result=f"{manifest.results.name}/{scan.folder}/{name}{ending}",
                size=scan.size,
                seconds=_number(row, "seconds") if state == "done" else None,
                review=tuple(map(str, row.get("review", ()))) if row and state == "done" else (),
                volumes=_volumes(row) if row and state == "done" else {},
            )
        found.strangers += len(strangers)


def _there(manifest: Manifest, scan: Scan, names: tuple[str, ...]) -> bool:
    return all((manifest.results / scan.folder / name).exists() for name in names)


def _state(row: dict[str, Any] | None, there: bool, begun: int, started: bool) -> tuple[str, str]:
    if row and row["state"] == "failed":
        return "failed", str(row.get("reason", ""))
    if row:
        return ("done", "") if there else ("lost", "the log says that it is done, and its files are not there")
    if begun:
        return "not done", "it was begun, and its process ended"
    return "not done", "its shard was stopped before it" if started else "its shard was never started"


def _number(row: dict[str, Any] | None, key: str) -> float | None:
    value = row.get(key) if row else None
    return float(value) if isinstance(value, float | int) else None


def _volumes(row: dict[str, Any]) -> dict[str, float]:
    found = row.get("ml")
    return {str(k): float(v) for k, v in found.items() if isinstance(v, float | int)} if isinstance(found, dict) else {}


# ---- predicting


@dataclass(frozen=True)
class Work:
    """How scans are predicted: ``run`` gives each job and its record, or why there is none, and tells of each that it
    begins; ``about`` is the model and what was wished, which all times of a shard must have alike."""

    run: Callable[[list[Job], Callable[[Job], object]], Generator[tuple[Job, dict[str, Any] | MedsegError], None, None]]
    about: dict[str, Any]
    cores: int
    mend: bool
    as_json: bool


class _BusyError(Exception):
    """Another process is at this shard."""


def predict_shards(path: Path, part: Shard | None, work: Work) -> None:
    """Predict the scans of one shard of a manifest, or of each that nobody else is at.

    Raises InputError where the manifest has another number of shards, and MedsegError where another process is at
    this one, or where it must be given up.
    """
    from medseg.io.archive import read_manifest
    from medseg.io.files import alone

    manifest = read_manifest(path)
    if part and part.count != manifest.shards:
        raise InputError(
            f"{manifest.path} has {count(manifest.shards, 'shard')}, not {part.count}",
            f"Write --shard {min(part.number, manifest.shards)}/{manifest.shards}",
        )

    def busy(told: str) -> None:
        raise _BusyError(told)

    # The first shard bears what it took to start and to load the model.
    since = time.monotonic() - _age()
    for number in (part.number,) if part else range(1, manifest.shards + 1):
        lock = manifest.log(number).with_suffix(".lock")
        try:
            with alone(lock, "predict", busy):
                _shard(manifest, number, work, since)
            since = time.monotonic()
        except _BusyError as error:
            if part:
                raise MedsegError(f"{error}. Wait until it has ended, or stop it.") from None


def _age() -> float:
    """Seconds since this process began."""
    import psutil

    return max(0.0, time.time() - psutil.Process().create_time())


def _shard(manifest: Manifest, number: int, work: Work, since: float) -> None:
    from medseg.io.archive import Log
    from medseg.io.files import write_json

    about = {"manifest": manifest.digest, "shard": number, **work.about}
    log = Log(manifest.log(number), about, lambda: time.monotonic() - since, work.cores)
    try:
        fresh, again = _left(manifest, number, work, log)
        ends = {name: row["state"] for name, row in log.told.scans.items()}
        flagged = {name for name, row in log.told.scans.items() if row["state"] == "done" and row.get("review")}
        with stopping():
            # One by one what was begun when a process ended: so the next end says which of them it was.
            for jobs, strict in ((fresh, True), *(([job], False) for job in again)):
                with closing(_logged(jobs, work, log, strict=strict)) as rows:
                    for row in progress(f"shard {number}")(rows, len(jobs)):
                        ends[row["name"]] = row["state"]
                        (flagged.add if row.get("review") else flagged.discard)(row["name"])
    finally:
        log.close()
    told = {
        "format": 1,
        "manifest": manifest.digest,
        "shard": number,
        "scans": manifest.counts[number - 1],
        "done": sum(state == "done" for state in ends.values()),
        "failed": sum(state == "failed" for state in ends.values()),
        "flagged": len(flagged),
        "now": len(fresh) + len(again),
    }
    write_json(manifest.summary(number), told)
    if work.as_json:
        click.echo(json.dumps(told))
    else:
        click.echo(
            f"shard {number} of {manifest.shards}: {told['done']} of {count(told['scans'], 'scan')} done, "
            f"{told['failed']} failed, {told['flagged']} flagged for review; {told['now']} of them tried now"
        )


def _left(manifest: Manifest, number: int, work: Work, log: Log) -> tuple[list[Job], list[Job]]:
    """What is still to do of a shard: what was never begun; and what failed for the machine's sake or was begun when
    its process ended. What ended a process twice is given up, and told so."""
    from medseg.io.archive import ENDED, clear
    from medseg.io.sidecar import SUFFIX

    told, to = log.told, str(work.about["to"])
    fresh: list[Job] = []
    again: list[tuple[int, Job]] = []
    listing: dict[str, set[str]] = {}
    for scan in manifest.of(number):
        row, begun = told.scans.get(scan.name), told.begun[scan.name]
        folder = manifest.results / scan.folder
        ending = ".nii.gz" if to == "nifti" else ".dcm"
        job = Job(scan.name, scan.path, folder / f"{scan.name}{SUFFIX}{ending}", to=to)
        if row and row["state"] == "done":
            if work.mend and scan.folder not in listing:
                listing[scan.folder] = {path.name for path in folder.iterdir()} if folder.is_dir() else set()
            sound = {job.output.name, f"{scan.name}{SUFFIX}.json"} <= listing.get(scan.folder, set())
            if not work.mend or sound:
                continue
            clear(folder, scan.name)
        elif row and row.get("fault") == "scan" and not work.mend:
            continue
        elif begun >= ENDED and not work.mend:
            reason = f"its process ended {begun} times while it was at it, at last with nothing beside it"
            end = {"name": scan.name, "state": "failed", "fault": "scan", "reason": reason}
            log.write(end)
            told.scans[scan.name] = end
            continue
        if begun:
            clear(folder, scan.name)
        if begun or row:
            again.append((begun, job))
        else:
            fresh.append(job)
    return fresh, [job for _, job in sorted(again, key=lambda pair: pair[0])]


def _logged(jobs: list[Job], work: Work, log: Log, *, strict: bool) -> Generator[dict[str, Any], None, None]:
    """Predict jobs, and log of each how it ended. Where ``strict``, MedsegError after five in a row that failed for no
    fault of the scan."""
    at: set[str] = set()
    in_a_row = 0

    def begun(job: Job) -> None:
        at.add(job.name)
        log.write({"begun": job.name})

    try:
        with closing(work.run(jobs, begun)) as outcomes:
            for job, outcome in outcomes:
                row = _ended(job, outcome)
                log.write(row)
                at.discard(job.name)
                if isinstance(outcome, MedsegError):
                    click.echo(f"medseg: {job.name}: {outcome}", err=True)
                in_a_row = in_a_row + 1 if row.get("fault") == "machine" else 0
                yield row
                if strict and in_a_row == _GIVE_UP:
                    raise MedsegError(
                        f"{_GIVE_UP} scans in a row failed, for no fault of their own, the last with: {outcome} "
                        "Mend it and start this shard again; it goes on where it is."
                    )
    except (SystemExit, KeyboardInterrupt, GeneratorExit, MedsegError):
        # An end in good order: nothing is wrong with what was begun.
        for name in sorted(at):
            log.write({"left": name})
        raise


def _ended(job: Job, outcome: dict[str, Any] | MedsegError) -> dict[str, Any]:
    if isinstance(outcome, MedsegError):
        fault = "scan" if isinstance(outcome, InputError) else "machine"
        return {"name": job.name, "state": "failed", "fault": fault, "reason": str(outcome)}
    return {
        "name": job.name,
        "state": "done",
        "seconds": outcome["seconds"],
        "review": [flag["reason"] for flag in outcome["flags"] if flag["review"]],
        "ml": {organ["name"]: round(organ["volume_ml"], 4) for organ in outcome["organs"]},
    }
