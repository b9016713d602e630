"""Which scans ``medseg predict`` is to segment, and where each result goes."""

from __future__ import annotations

import heapq
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medseg.cli.channels import ChannelScan, parse_channels
from medseg.core.errors import InputError

if TYPE_CHECKING:
    from medseg.plan.plan import Plan


@dataclass(frozen=True)
class Job:
    """A scan (the first, where channels come as several) and where its label map goes."""

    name: str
    scan: Path
    output: Path
    channels: tuple[ChannelScan, ...] = ()
    series: int | None = None
    align: bool = False
    to: str = "nifti"


@dataclass(frozen=True)
class Shard:
    """Part ``number`` of ``count``, from 1 on."""

    number: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``3/8``. Raises InputError for what is none."""
        first, _, second = text.partition("/")
        if first.isascii() and second.isascii() and first.isdigit() and second.isdigit():
            shard = cls(int(first), int(second))
            if 1 <= shard.number <= shard.count:
                return shard
        raise InputError(f"{text!r} is no shard", "Write 3/8 for the third of eight, from 1/8 to 8/8")

    def of(self, jobs: list[Job]) -> list[Job]:
        """The jobs of this part: every job is in one part, and the parts are of nearly equal size in
        bytes. Every task of an array finds the same parts by itself."""
        sizes = [job.scan.stat().st_size if job.scan.is_file() else 0 for job in jobs]
        loads = [(0, number) for number in range(1, self.count + 1)]
        mine = []
        for index in sorted(range(len(jobs)), key=lambda i: (-sizes[i], jobs[i].name)):
            load, number = heapq.heappop(loads)
            # Scans of unknown size count for one byte, so that they too are spread.
            heapq.heappush(loads, (load + max(1, sizes[index]), number))
            if number == self.number:
                mine.append(index)
        return [jobs[index] for index in sorted(mine)]


def listed(path: Path) -> tuple[Path, ...]:
    """The scans that a text file names, one a line, relative to the file's folder."""
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"{path} cannot be read as a list of scans", "Write one path a line, in UTF-8") from None
    found = tuple(path.parent / line.strip() for line in lines if line.strip())
    if not found:
        raise InputError(f"{path} names no scan", "Write one path a line")
    return found


def jobs_of(
    scans: tuple[Path, ...], output: Path | None, to: str, *, series: int | None = None, one: bool = False
) -> list[Job]:
    """What to do for SCANS; with ``one``, a folder is a scan and not a place of several."""
    from medseg.io.nifti import is_nifti
    from medseg.io.scan import scan_stem
    from medseg.io.sidecar import SUFFIX

    files = list(scans) if one else [file for scan in scans for file in _files(scan)]
    if series is not None and len(files) > 1:
        raise InputError(f"--series {series} for {len(files)} scans", "Name one scan with it")
    ending = ".nii.gz" if to == "nifti" else ".dcm"
    if output and (is_nifti(output) or output.suffix == ".dcm"):
        if len(files) > 1:
            raise InputError(f"{output} is one file for {len(files)} scans", "Name a folder with -o")
        if is_nifti(output) != (to == "nifti"):
            raise InputError(f"{output.name} is no name for {to}", f"Let it end in {ending}, or name another --to")
        return [Job(scan_stem(files[0]), files[0], output, series=series, to=to)]
    places = [(output or f.absolute().parent) / f"{scan_stem(f)}{SUFFIX}{ending}" for f in files]
    if twice := next((place for place, count in Counter(places).items() if count > 1), None):
        raise InputError(f"two scans would both be written to {twice}", "Predict them into different folders")
    if output:
        _make(output)
    return [Job(scan_stem(f), f, place, series=series, to=to) for f, place in zip(files, places, strict=True)]


def _files(scan: Path) -> list[Path]:
    from medseg.io.nifti import is_nifti, stem
    from medseg.io.scan import holds_dicom
    from medseg.io.sidecar import COUNTED, SUFFIX

    def is_result(path: Path) -> bool:
        own = stem(path)
        beside = path.with_name(f"{own.removesuffix(COUNTED)}{SUFFIX}.json")
        return own.endswith(SUFFIX) or (own.endswith(COUNTED) and beside.exists())

    if not scan.is_dir():
        return [scan]
    if (scan / "dataset.json").exists():
        raise InputError(f"{scan} is a task", "Name its imagesTs or imagesTr, or add --held-out")
    found = sorted(p for p in scan.iterdir() if is_nifti(p) and not is_result(p))
    if not found and not holds_dicom(scan):
        raise InputError(
            f"{scan} holds no NIfTI file and no DICOM", "Name a folder of .nii.gz files or of one patient's DICOM"
        )
    return found or [scan]


def job_of_channels(options: tuple[str, ...], plan: Plan, align: bool, output: Path | None, other: Any, to: str) -> Job:
    """The one case whose channels come as several scans."""
    if other:
        raise InputError("--channel names one case", "Leave out SCANS, --list, --series and --held-out")
    found = parse_channels(options, plan.channels, plan.optional_channels.value)
    (job,) = jobs_of((found[0].path,), output, to, one=True)
    return replace(job, channels=found, series=found[0].series, align=align)


def jobs_held_out(scans: tuple[Path, ...], output: Path | None, cases: tuple[str, ...]) -> list[Job]:
    """The cases of a task that a model was not trained on."""
    from medseg.dataset.task import load_task
    from medseg.io.nifti import is_nifti
    from medseg.io.sidecar import SUFFIX

    if len(scans) != 1 or output is None or is_nifti(output):
        raise InputError(
            "--held-out goes with one task and an output folder", "Write: predict TASK --held-out -o FOLDER"
        )
    task = load_task(scans[0])
    images = [(case, task.case(case).image) for case in cases]
    _make(output)
    return [Job(case, image, output / f"{case}{SUFFIX}.nii.gz") for case, image in images]


def _make(output: Path) -> None:
    """Make it, or take it if it is one of predictions."""
    from medseg.io.files import new_folder
    from medseg.io.sidecar import INDEX

    new_folder(output, holds=INDEX)
