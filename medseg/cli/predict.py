"""``medseg predict``."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.channels import ChannelScan, parse_channels, read_channels
from medseg.cli.common import FOLDER, device_option, progress, table, threads_option, use_cores
from medseg.cli.convert import TARGETS, reference_for, write_dicom

if TYPE_CHECKING:
    from medseg.infer.predict import Prediction, Predictor
    from medseg.plan.plan import Plan

_SHORT_OF_MEMORY = re.compile("out of memory|not enough memory|t allocate memory")


@dataclass(frozen=True)
class Job:
    """A scan (the first, where channels come as several) and where its label map goes."""

    name: str
    scan: Path
    output: Path
    channels: tuple[ChannelScan, ...] = ()
    align: bool = False
    to: str = "nifti"


@click.command()
@click.argument("scans", type=FOLDER, nargs=-1)
@click.option("-m", "--model", type=FOLDER, required=True, help="The model package, a folder.")
@click.option("-o", "--output", type=FOLDER, help="File for one scan, or folder.  [default: beside each scan]")
@click.option("--to", type=click.Choice(TARGETS), default="nifti", show_default=True, help="DICOM needs DICOM scans.")
@click.option("--series", type=click.IntRange(min=1), help="Which DICOM series, by its number in `medseg inspect`.")
@click.option(
    "--channel", "channels", metavar="NAME=SCAN", multiple=True, help="Instead of SCANS: one channel of one case."
)
@click.option("--register", "align", is_flag=True, help="Align the channels to the first one, rigidly.")
@click.option("--held-out", is_flag=True, help="SCANS is a task: predict the cases that the model was not trained on.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of the table.")
@device_option
@threads_option
def predict(
    scans: tuple[Path, ...],
    model: Path,
    output: Path | None,
    to: str,
    series: int | None,
    channels: tuple[str, ...],
    align: bool,
    held_out: bool,
    as_json: bool,
    device: str,
    threads: int | None,
) -> None:
    """Segment SCANS: NIfTI files or folders of them; DICOM files, folders or zips.

    Writes scan_seg.nii.gz on the scan's own grid, and scan_seg.json that says how it was made; with
    --to a DICOM SEG or RTSTRUCT of the same patient and study, scan_seg.dcm.
    Where a DICOM folder holds several series, none is guessed: --series chooses.
    A case whose channels are several scans is named by --channel T2=t2.nii.gz --channel
    ADC=adc.nii.gz (or ADC=FOLDER#4, the fourth DICOM series); its result lies on the grid of the
    model's first channel. One that the model's plan lists as optional may be left out.
    A scan that fails does not stop the others.
    """
    from medseg.core.errors import InputError, MedsegError
    from medseg.io.sidecar import write_index
    from medseg.models.package import load_package

    if not channels and (align or not scans):
        raise InputError(
            "--register goes with --channel" if align else "no scan is named", "Name SCANS, or each --channel NAME=SCAN"
        )
    if held_out and to != "nifti":
        raise InputError(f"--held-out goes with NIfTI, not with --to {to}", "Leave out --to")
    use_cores(threads)
    from medseg.infer.predict import Predictor

    package = load_package(model)
    predictor = Predictor(package, device)
    if channels:
        jobs = [_of_channels(channels, package.plan, align, output, scans or series or held_out, to)]
    else:
        jobs = _held_out(scans, output, package.held_out) if held_out else _jobs(scans, output, to)
    if series is not None and len(jobs) > 1:
        raise InputError(f"--series {series} for {len(jobs)} scans", "Name one scan with it")
    results: list[dict[str, Any]] = []
    failed: list[tuple[Job, MedsegError]] = []
    for job in progress("predict")(jobs, len(jobs)):
        try:
            results.append(_one(job, predictor, series))
        except MedsegError as error:
            failed.append((job, error))
            click.echo(f"medseg: {job.scan.name}: {error}", err=True)
    faults = {job.name: str(error) for job, error in failed}
    if output and output.is_dir():
        write_index(output, package.name, {j.name: j.output.name for j in jobs if j.name not in faults}, faults)
    if as_json:
        click.echo(json.dumps({"format": 1, "predictions": results, "failed": faults}))
    elif len(jobs) == 1 or not held_out:
        for result in results:
            _show(result)
    else:
        click.echo(f"{len(results)} cases predicted into {output}")
    if failed:
        if len(jobs) > 1:
            names = ", ".join(job.scan.name for job, _ in failed)
            click.echo(f"medseg: {len(failed)} of {len(jobs)} scans failed: {names}", err=True)
        raise SystemExit(max(error.exit_status for _, error in failed))


def _one(job: Job, predictor: Predictor, series: int | None) -> dict[str, Any]:
    from medseg.core.errors import MedsegError
    from medseg.io.dicom_seg import Algorithm
    from medseg.io.files import write_json
    from medseg.io.nifti import write_labels
    from medseg.io.scan import read_scan
    from medseg.io.sidecar import require_own, sidecar_of

    require_own(job.output)
    # Before the work, so that what cannot be referred to is refused at once.
    chosen = job.channels[0].series if job.channels else series
    reference = None if job.to == "nifti" else reference_for(job.scan, chosen, job.to)
    try:
        bar = progress("read", unit="file")
        parts: list[dict[str, Any]] = []
        if job.channels:
            rules = predictor.package.plan.normalisation.value
            volume, notes, parts = read_channels(job.channels, rules, align=job.align, progress=bar)
        else:
            volume, notes = read_scan(job.scan, series, progress=bar)
        made = predictor.predict(volume)
    except (MemoryError, RuntimeError) as error:
        # torch has no type of its own for this where it computes on the CPU.
        if isinstance(error, RuntimeError) and not _SHORT_OF_MEMORY.search(str(error)):
            raise
        raise MedsegError(f"{job.scan.name} needs more memory than there is") from None
    record = _sidecar(job, made, notes)
    if parts:
        record["channels"] = parts
    side = sidecar_of(job.output)
    staged = side.with_name(f".{side.name}.new")
    try:
        # Where the disk is full neither takes the place of an earlier one.
        write_json(staged, record)
        if reference is None:
            write_labels(job.output, made.label_map)
        else:
            write_dicom(job.output, made.label_map, reference, Algorithm.of_model(made.model), job.to)
        staged.replace(side)
    finally:
        staged.unlink(missing_ok=True)
    return record


def _sidecar(job: Job, made: Prediction, notes: tuple[str, ...]) -> dict[str, Any]:
    from medseg.core.provenance import versions
    from medseg.io.scan import scan_digest

    grid = made.label_map.grid
    return {
        "format": 1,
        "scan": job.scan.name,
        "scan_sha256": scan_digest(job.scan),
        "labels": job.output.name,
        "model": made.model,
        "model_sha256": made.model_digest,
        "organs": [asdict(organ) for organ in made.organs],
        "warnings": [*notes, *made.warnings],
        "grid": {"shape": list(grid.shape), "affine": grid.affine.tolist()},
        "seconds": round(made.seconds, 3),
        "versions": versions(),
    }


def _show(record: dict[str, Any]) -> None:
    rows = [["structure", "volume (ml)", "confidence"]]
    for organ in record["organs"]:
        sure = "-" if organ["confidence"] is None else f"{organ['confidence']:.3f}"
        rows.append([organ["name"], f"{organ['volume_ml']:.3f}", sure])
    click.echo(f"{record['scan']} -> {record['labels']}")
    click.echo(table(rows, right=(1, 2)))
    for warning in record["warnings"]:
        click.echo(f"warning: {warning}")


def _jobs(scans: tuple[Path, ...], output: Path | None, to: str, *, one: bool = False) -> list[Job]:
    """What to do for SCANS; with ``one``, a folder is a scan and not a place of several."""
    from medseg.core.errors import InputError
    from medseg.io.nifti import is_nifti, stem
    from medseg.io.scan import holds_dicom, scan_stem
    from medseg.io.sidecar import SUFFIX

    files: list[Path] = []
    for scan in scans:
        if one or not scan.is_dir():
            files.append(scan)
            continue
        if (scan / "dataset.json").exists():
            raise InputError(f"{scan} is a task", "Name its imagesTs or imagesTr, or add --held-out")
        found = sorted(p for p in scan.iterdir() if is_nifti(p) and not stem(p).endswith(SUFFIX))
        if not found and not holds_dicom(scan):
            raise InputError(
                f"{scan} holds no NIfTI file and no DICOM", "Name a folder of .nii.gz files or of one patient's DICOM"
            )
        files += found or [scan]
    ending = ".nii.gz" if to == "nifti" else ".dcm"
    if output and (is_nifti(output) or output.suffix == ".dcm"):
        if len(files) > 1:
            raise InputError(f"{output} is one file for {len(files)} scans", "Name a folder with -o")
        if is_nifti(output) != (to == "nifti"):
            raise InputError(f"{output.name} is no name for {to}", f"Let it end in {ending}, or name another --to")
        return [Job(scan_stem(files[0]), files[0], output, to=to)]
    jobs = [
        Job(scan_stem(f), f, (output or f.absolute().parent) / f"{scan_stem(f)}{SUFFIX}{ending}", to=to) for f in files
    ]
    outputs = [job.output for job in jobs]
    if twice := next((o for o in outputs if outputs.count(o) > 1), None):
        raise InputError(f"two scans would both be written to {twice}", "Predict them into different folders")
    if output:
        _output_folder(output)
    return jobs


def _of_channels(options: tuple[str, ...], plan: Plan, align: bool, output: Path | None, other: Any, to: str) -> Job:
    from medseg.core.errors import InputError

    if other:
        raise InputError("--channel names one case", "Leave out SCANS, --series and --held-out")
    found = parse_channels(options, plan.channels, plan.optional_channels.value)
    (job,) = _jobs((found[0].path,), output, to, one=True)
    return replace(job, channels=found, align=align)


def _held_out(scans: tuple[Path, ...], output: Path | None, cases: tuple[str, ...]) -> list[Job]:
    from medseg.core.errors import InputError
    from medseg.dataset.task import load_task
    from medseg.io.nifti import is_nifti
    from medseg.io.sidecar import SUFFIX

    if len(scans) != 1 or output is None or is_nifti(output):
        raise InputError(
            "--held-out goes with one task and an output folder", "Write: predict TASK --held-out -o FOLDER"
        )
    task = load_task(scans[0])
    images = [(case, task.case(case).image) for case in cases]
    _output_folder(output)
    return [Job(case, image, output / f"{case}{SUFFIX}.nii.gz") for case, image in images]


def _output_folder(output: Path) -> None:
    """Make it, or take it if it is one of predictions; its index is written anew at the end, so that
    a run that breaks off leaves no index that speaks of the earlier one."""
    from medseg.io.files import new_folder
    from medseg.io.sidecar import INDEX

    (new_folder(output, holds=INDEX) / INDEX).unlink(missing_ok=True)
