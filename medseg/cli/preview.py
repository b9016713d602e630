"""``medseg preview``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from medseg.cli.common import FOLDER, progress
from medseg.core.errors import InputError
from medseg.core.words import count

if TYPE_CHECKING:
    from medseg.core.volume import LabelMap, Volume

# No label map without names has so many structures.
_MOST = 300


@click.command()
@click.argument("scan", type=FOLDER)
@click.argument("seg", type=FOLDER, required=False)
@click.option("-o", "--output", type=FOLDER, help="The picture, a PNG.  [default: SCAN_preview.png beside the scan]")
@click.option("--labels", type=FOLDER, help="dataset.json or sidecar that names the labels.  [default: the sidecar]")
@click.option("--window", type=float, nargs=2, metavar="LOW HIGH", help="Intensities that become black and white.")
@click.option("--series", type=click.IntRange(min=1), help="Which DICOM series, by its number in `medseg inspect`.")
@click.option("--force", is_flag=True, help="Write over a picture that is there.")
def preview(
    scan: Path,
    seg: Path | None,
    output: Path | None,
    labels: Path | None,
    window: tuple[float, float] | None,
    series: int | None,
    force: bool,
) -> None:
    """Draw a picture of SCAN and of the structures in SEG, a NIfTI label map on its grid.

    Three planes with outlines, the patient's right on the left; the structures as bodies; and a legend with their
    volumes. Without SEG the planes only, through the middle. No name or identifier is in the picture.
    """
    from medseg.dataset.task import require_same_grid
    from medseg.io.files import write_bytes
    from medseg.io.scan import read_scan, scan_stem
    from medseg.report.figures import png_bytes
    from medseg.report.preview import preview as draw

    path = output or scan.absolute().parent / f"{scan_stem(scan)}_preview.png"
    if path.suffix.lower() != ".png":
        raise InputError(f"{path.name} is no name for a PNG", "Let it end in .png")
    if path.is_dir() or (path.exists() and not force):
        raise InputError(f"{path} is there already", "Name another with -o, or write over it with --force")
    if window and not window[0] < window[1]:
        raise InputError(f"--window {window[0]:g} {window[1]:g} holds nothing", "Give the lower number first")
    if labels and not seg:
        raise InputError("--labels names the labels of a label map", "Name the label map after the scan")
    volume, notes = read_scan(scan, series, progress=progress("read", unit="file"))
    volume, found = _upright(volume), None
    if seg:
        found, more = _labels(seg, labels)
        notes = (*notes, *more)
        require_same_grid(volume, found, scan.name)
    write_bytes(path, png_bytes(draw(volume.values[0], volume.grid, found, window=window)))
    for note in notes:
        click.echo(f"note: {note}")
    if volume.channels > 1:
        click.echo(f"note: the first of {count(volume.channels, 'channel')} is shown")
    if found and not found.values.any():
        click.echo("note: no voxel is labelled")
    click.echo(path)


def _labels(path: Path, names: Path | None) -> tuple[LabelMap, tuple[str, ...]]:
    """A label map, and what to know of it. A file or its sidecar names the structures; where there is none, they are
    "label 1" and so on."""
    import numpy as np

    from medseg.core.labels import Label, LabelSet
    from medseg.core.volume import LabelMap, Volume
    from medseg.io.label_names import read_label_names
    from medseg.io.nifti import listed, read_raw_labels
    from medseg.io.sidecar import sidecar_of

    values, grid = read_raw_labels(path)
    beside, known = sidecar_of(path), None
    notes: tuple[str, ...] = ()
    if names:
        known = read_label_names(names)
    elif beside.exists():
        try:
            known = read_label_names(beside)
        except InputError as error:  # other programs put other things there
            notes = (error.fault,)
    if known is None:
        numbers = sorted({int(n) for part in np.moveaxis(values, -1, 0) for n in np.unique(part)} - {0})
        if len(numbers) > _MOST:
            raise InputError(
                f"{path.name} has {len(numbers)} values, as an image has and no label map",
                "Name a label map, or what its values mean with --labels",
            )
        known = LabelSet(tuple(Label(f"label {n}", n) for n in numbers))
    named = listed(values, grid, known, path.name)
    upright = _upright(Volume(named.values[None], grid))
    return LabelMap(upright.values[0], upright.grid, known), notes


def _upright(volume: Volume) -> Volume:
    """The same voxels with x, y, z in this order, since programs store one scan in several."""
    from medseg.core.resample import crop

    return crop(volume, volume.grid.reoriented())
