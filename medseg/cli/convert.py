"""``medseg convert``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, progress

if TYPE_CHECKING:
    from medseg.core.grid import Grid
    from medseg.core.labels import LabelSet
    from medseg.core.terminology import Terminology
    from medseg.core.volume import LabelMap
    from medseg.io.dicom_seg import Algorithm
    from medseg.io.reference import Reference

TARGETS = ("nifti", "dicom-seg", "rtstruct")
_SEG, _RTSTRUCT = "DICOM SEG", "RTSTRUCT"


@click.command()
@click.argument("source", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="The file to write.")
@click.option("--to", type=click.Choice(TARGETS), help="Format.  [default: nifti where -o ends in .nii or .nii.gz]")
@click.option("--reference", type=FOLDER, help="The scan that the labels were drawn on; a DICOM series to write DICOM.")
@click.option("--series", type=click.IntRange(min=1), help="Which DICOM series, by its number in `medseg inspect`.")
@click.option("--labels", type=FOLDER, help="dataset.json or sidecar that names the labels.  [default: the sidecar]")
@click.option("--only", multiple=True, help="Take this structure, and no others; may be repeated.")
@click.option("--terms", type=FOLDER, help="More names and their codes, in the form of medseg's terminology.json.")
@click.option("--made-by", help="What made the labels, with its version: 'NAME VERSION', or 'hand'.")
@click.option("--label-map", is_flag=True, help="A DICOM SEG of the label map kind, which older programs cannot read.")
def convert(
    source: Path,
    output: Path,
    to: str | None,
    reference: Path | None,
    series: int | None,
    labels: Path | None,
    only: tuple[str, ...],
    terms: Path | None,
    made_by: str | None,
    label_map: bool,
) -> None:
    """Convert SOURCE: a DICOM series to NIfTI; labels between NIfTI, DICOM SEG and RTSTRUCT.

    \b
    medseg convert SERIES -o scan.nii.gz
    medseg convert seg.nii.gz -o seg.dcm --to dicom-seg --reference SERIES --labels dataset.json
    medseg convert seg.dcm -o labels.nii.gz --reference SERIES

    Labels stay where they are: a label map that does not lie on the reference's grid is refused,
    with the distance in mm. Labels written as NIfTI get a sidecar that names them.
    """
    from medseg.core.errors import InputError
    from medseg.io.nifti import is_nifti

    target = to or ("nifti" if is_nifti(output) else None)
    if target is None:
        raise InputError(f"{output.name} does not say which format is wanted", "Add --to dicom-seg or --to rtstruct")
    if (target == "nifti") != is_nifti(output):
        raise InputError(f"{output.name} is no name for {target}", "NIfTI ends in .nii or .nii.gz, and nothing else")
    if output.exists():
        raise InputError(f"{output} is there already", "Move it, or name another with -o")
    kind = _kind(source)
    if kind == "scan":
        if target != "nifti":
            raise InputError(f"{source.name} is a scan and holds no labels", "Name a label map")
        _scan(source, output, series)
        return
    where = _where(reference, series, dicom=target != "nifti")
    found = _labels(source, kind, where, labels, only)
    for note in found.notes:
        click.echo(f"note: {note}")
    if target == "nifti":
        if kind == "nifti":
            raise InputError(f"{source.name} is NIfTI already", "Name another format with --to")
        _as_nifti(output, found.label_map, found.notes)
        return
    algorithm = _algorithm(source, made_by)
    write_dicom(output, found.label_map, where.series, algorithm, target, _terminology(terms), label_map_kind=label_map)
    click.echo(f"{output}: {target}; {found.label_map.labels}")


@dataclass(frozen=True)
class Where:
    """The scan that labels were drawn on, as far as it is known."""

    grid: Grid | None = None
    series: Reference | None = None

    @property
    def frame(self) -> str | None:
        return str(self.series.first.get("FrameOfReferenceUID", "")) or None if self.series else None


@dataclass(frozen=True)
class Found:
    """Labels, and what to say of them."""

    label_map: LabelMap
    notes: tuple[str, ...]


def write_dicom(
    output: Path,
    label_map: LabelMap,
    reference: Reference | None,
    algorithm: Algorithm,
    target: str,
    terminology: Terminology | None = None,
    *,
    label_map_kind: bool = False,
) -> None:
    """Write labels as DICOM SEG or RTSTRUCT of a series, and say which have no code."""
    from medseg.core.errors import InputError
    from medseg.core.terminology import default_terminology, unknown_names
    from medseg.io.dicom_seg import write_seg
    from medseg.io.rtstruct import write_rtstruct

    if reference is None:
        raise InputError(f"{target} belongs to a DICOM series", "Name its folder with --reference")
    words = terminology or default_terminology()
    if target == "dicom-seg":
        kind = "labelmap" if label_map_kind else "binary"
        write_seg(output, label_map, reference, algorithm, kind=kind, terminology=words)  # type: ignore[arg-type]
    else:
        write_rtstruct(output, label_map, reference, algorithm, terminology=words)
    if not label_map.values.any():
        click.echo(f"note: the label map is empty, and {output.name} says so")
    if unknown := unknown_names(label_map.labels, words):
        click.echo(f"note: no SNOMED CT code is known for {', '.join(unknown)}; they got private codes (--terms)")


def reference_for(scan: Path, series: int | None, target: str) -> Reference:
    """The DICOM series that a scan was read from; InputError where it is no DICOM."""
    from medseg.core.errors import InputError
    from medseg.io.dicom import choose, find_series
    from medseg.io.itk import is_itk
    from medseg.io.nifti import is_nifti
    from medseg.io.reference import reference_of

    if scan.is_file() and (is_nifti(scan) or is_itk(scan)):
        raise InputError(f"{target} belongs to a DICOM series, and {scan.name} is none", "Name the DICOM folder")
    return reference_of(choose(find_series(scan, progress=progress("look", unit="file")), series))


def _kind(source: Path) -> str:
    """ "nifti" or "image" for a label map, "DICOM SEG", "RTSTRUCT", or "scan" for a series."""
    from medseg.core.errors import InputError
    from medseg.io import dicom_seg_read, rtstruct
    from medseg.io.itk import is_itk
    from medseg.io.nifti import is_nifti
    from medseg.io.reference import read_dataset
    from medseg.io.sources import Source, is_dicom

    if not source.exists():
        raise InputError(f"{source} is missing", "Name a file or folder that is there")
    if source.is_file() and is_nifti(source):
        return "nifti"
    if source.is_file() and is_itk(source):
        return "image"
    if source.is_file() and is_dicom(Source(source)):
        kind = str(read_dataset(source, stop_before_pixels=True).get("SOPClassUID", ""))
        if kind in dicom_seg_read.SOP_CLASSES:
            return _SEG
        if kind == rtstruct.SOP_CLASS:
            return _RTSTRUCT
    return "scan"


def _scan(source: Path, output: Path, series: int | None) -> None:
    from medseg.io.nifti import write_volume
    from medseg.io.scan import read_scan

    volume, notes = read_scan(source, series, progress=progress("read", unit="file"))
    write_volume(output, volume)
    for note in notes:
        click.echo(f"note: {note}")
    click.echo(f"{output}: {_described(volume.grid)}")


def _where(reference: Path | None, series: int | None, *, dicom: bool) -> Where:
    from medseg.io.nifti import is_nifti
    from medseg.io.scan import read_scan

    if reference is None:
        return Where()
    if not dicom and reference.is_file() and is_nifti(reference):
        return Where(read_scan(reference, series)[0].grid)
    found = reference_for(reference, series, "DICOM")
    return Where(found.grid, found)


def _labels(source: Path, kind: str, where: Where, names: Path | None, only: tuple[str, ...]) -> Found:
    from medseg.core.errors import InputError
    from medseg.io.dicom_seg_read import read_seg
    from medseg.io.itk import read_itk_labels
    from medseg.io.nifti import read_labels
    from medseg.io.rtstruct import read_rtstruct

    listed = _names(source, names, needed=kind in ("nifti", "image"))
    if kind == _SEG:
        read = read_seg(source, onto=where.grid, labels=listed, only=only or None, frame_of_reference=where.frame)
        return Found(read.label_map, read.notes)
    if kind == _RTSTRUCT:
        if where.grid is None:
            raise InputError(f"{source.name} has contours and no voxels", "Name its scan with --reference")
        read = read_rtstruct(source, where.grid, labels=listed, only=only or None, frame_of_reference=where.frame)
        return Found(read.label_map, read.notes)
    if only:
        raise InputError(f"--only is for DICOM, and {source.name} is none", "Leave it out")
    if listed is None:
        raise InputError(f"{source.name} does not say what its labels mean", "Name them with --labels dataset.json")
    return Found(read_labels(source, listed) if kind == "nifti" else read_itk_labels(source, listed), ())


def _names(source: Path, names: Path | None, *, needed: bool) -> LabelSet | None:
    from medseg.io.label_names import read_label_names
    from medseg.io.sidecar import sidecar_of

    beside = sidecar_of(source)
    if names is None and needed and beside.exists():
        names = beside
    return None if names is None else read_label_names(names)


def _as_nifti(output: Path, label_map: LabelMap, notes: tuple[str, ...]) -> None:
    from medseg.core.errors import InputError
    from medseg.io.label_names import write_label_names
    from medseg.io.nifti import write_labels
    from medseg.io.sidecar import sidecar_of

    side = sidecar_of(output)
    if side.exists():
        raise InputError(f"{side} is there already", "Move it, or name another with -o")
    write_labels(output, label_map)
    write_label_names(side, label_map.labels, notes)
    click.echo(f"{output}: {_described(label_map.grid)}; {label_map.labels}")


def _algorithm(source: Path, made_by: str | None) -> Algorithm:
    """From the option, or from the sidecar of a prediction; else it says that nobody said it."""
    from medseg.io.dicom_seg import Algorithm
    from medseg.io.files import read_json
    from medseg.io.sidecar import sidecar_of

    if made_by == "hand":
        return Algorithm("MANUAL", "hand", "-")
    if made_by:
        name, _, version = made_by.rpartition(" ")
        return Algorithm("AUTOMATIC", name or version, version if name else "not stated")
    side = sidecar_of(source)
    record = read_json(side) if side.exists() else None
    if isinstance(record, dict) and isinstance(record.get("model"), str):
        return Algorithm.of_model(record["model"])
    click.echo("note: what made the labels is not stated; say it with --made-by")
    return Algorithm("SEMIAUTOMATIC", "not stated", "not stated")


def _terminology(path: Path | None) -> Terminology | None:
    from medseg.core.terminology import default_terminology
    from medseg.io.files import read_json

    return None if path is None else default_terminology().extended(read_json(path), path.name)


def _described(grid: Grid) -> str:
    size = "x".join(str(n) for n in grid.shape)
    spacing = "x".join(f"{n:.4g}" for n in grid.spacing)
    return f"{size} voxels of {spacing} mm, axes {grid.orientation}"
