"""``medseg doctor``."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, available_cores
from medseg.core.errors import InputError
from medseg.core.finding import Finding, fit
from medseg.core.words import count, discreet

if TYPE_CHECKING:
    from medseg.core.gpu import Gpus
    from medseg.core.installation import Installation


@click.command()
@click.argument("folders", metavar="[FOLDER ...]", type=FOLDER, nargs=-1)
@click.option("--quick", is_flag=True, help="Leave out the golden case and the timing of disks.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of lines.")
def doctor(folders: tuple[Path, ...], quick: bool, as_json: bool) -> None:
    """Is this machine fit for medseg, and if not, why?

    Looks at processor, memory, GPU, libraries and each FOLDER that is to be worked in (the current one unless
    named), and lets the shipped model predict a scan whose labels are known, on every engine that there is. Each
    finding is a line: ok, note, or problem with how to mend it. Nothing is sent, nothing is left behind, and no name
    of a machine, a user, or a folder is told.

    Exit status: 0 fit for use, 1 not.
    """
    for folder in folders:
        if not folder.is_dir():
            raise InputError(f"{folder} is no folder", "Name folders that are to be worked in")
    findings: list[Finding] = []
    facts: dict[str, Any] = {}
    before = signal.signal(signal.SIGTERM, _end)  # what was made for trying is then taken away
    try:
        for finding in _examine(folders, quick, facts):
            findings.append(finding)
            if not as_json:
                _show(finding, findings[-2].section if len(findings) > 1 else "")
    finally:
        signal.signal(signal.SIGTERM, before)
    sound = fit(findings)
    if as_json:
        rows = [asdict(one) for one in findings]
        click.echo(json.dumps({"format": 1, "fit": sound, "findings": rows, "facts": facts}, indent=1, default=sorted))
    else:
        problems = sum(one.verdict == "problem" for one in findings)
        click.echo(
            "This machine is fit for medseg."
            if sound
            else f"This machine is not fit for medseg: {count(problems, 'problem')} to mend."
        )
    if not sound:
        raise SystemExit(1)


def _examine(folders: tuple[Path, ...], quick: bool, facts: dict[str, Any]) -> Iterator[Finding]:
    """All findings, one by one as they are made; ``facts`` are filled in."""
    from medseg.core.gpu import judge_gpus
    from medseg.core.installation import judge_installation, look_at_installation
    from medseg.core.machine import judge_machine, judge_surroundings, look_around, look_at_machine
    from medseg.io.disk import judge_disk, look_at_disk

    machine, around = look_at_machine(), look_around()
    facts |= {"machine": asdict(machine), "surroundings": asdict(around)}
    yield from judge_machine(machine)
    yield from judge_surroundings(around)
    facts["disks"] = []
    for name, folder in _named(folders):
        disk = look_at_disk(folder, timed=not quick)
        facts["disks"].append(asdict(disk))
        yield from judge_disk(disk, name)
    installation, gpus = look_at_installation()
    facts |= {"gpu": asdict(gpus), "installation": asdict(installation)}
    yield from judge_installation(installation)
    yield from judge_gpus(gpus)
    if not quick:
        yield from _golden(installation, gpus, facts)


def _golden(installation: Installation, gpus: Gpus, facts: dict[str, Any]) -> Iterator[Finding]:
    """The golden case, by every engine that there is."""
    broken = {package.name for package in installation.packages if package.version is None or package.error}
    engines = ["openvino"] * ("openvino" not in broken) + ["torch-cpu"] + ["torch-cuda"] * bool(gpus.devices)
    facts["golden"] = []
    try:
        from medseg.infer.golden import judge_golden, try_golden
    except Exception as error:  # noqa: BLE001 - whatever a broken library raises
        yield Finding(
            "golden case",
            "problem",
            f"medseg itself cannot be imported: {discreet(str(error))}",
            "Mend what stands above",
        )
        return
    try:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
            for engine in engines:
                golden = try_golden(engine, Path(place), min(available_cores(), 8))
                facts["golden"].append(asdict(golden))
                yield judge_golden(golden)
    except OSError:
        yield Finding("golden case", "note", "left out, since no temporary file can be written")


def _named(folders: tuple[Path, ...]) -> list[tuple[str, Path]]:
    """What each folder is called where its own name might be somebody's."""
    if not folders:
        return [("the current folder", Path())]
    if len(folders) == 1:
        return [("the folder", folders[0])]
    return [(f"folder {number}", folder) for number, folder in enumerate(folders, 1)]


def _show(finding: Finding, before: str) -> None:
    if finding.section != before:
        click.echo(finding.section)
    mark = {"ok": "  ok       ", "note": "  note     ", "problem": "  PROBLEM  "}[finding.verdict]
    click.echo(mark + str(finding))


def _end(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)
