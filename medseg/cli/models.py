"""``medseg models``: import, install, list, describe and pass on model packages."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from medseg.cli.common import FOLDER, Patch, available_cores, table, threads_option

if TYPE_CHECKING:
    from medseg.models.package import ModelPackage

_models_dir = click.option(
    "--models-dir", type=FOLDER, help="Where models are installed.  [default: ~/.local/share/medseg/models]"
)
_json = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group()
def models() -> None:
    """Model packages: import one of nnU-Net's, install, list, describe, pass on.

    Where a verb asks for a package it takes its folder or the name it is installed or shipped under.
    """


@models.command("import")
@click.argument("source", type=FOLDER)
@click.option("-o", "--output", type=FOLDER, required=True, help="The package, a folder.")
@click.option("-c", "--configuration", help="Where SOURCE holds several models: 2d, 3d_fullres, ...")
@click.option("--fold", "folds", multiple=True, help="A fold to take; may be repeated.  [default: all]")
def import_(source: Path, output: Path, configuration: str | None, folds: tuple[str, ...]) -> None:
    """Make a package of a model that nnU-Net v2 trained.

    SOURCE is the folder TRAINER__PLANS__CONFIGURATION with dataset.json, plans.json and fold_*, one
    above it, or a zip that nnUNetv2_export_model_to_zip wrote. Nothing that its checkpoints name is
    run. What would not give the labels that nnU-Net gives is refused.
    """
    from medseg.io.sources import unpacked
    from medseg.models.nnunet import belongs, import_nnunet
    from medseg.models.package import load_package, save_package
    from medseg.models.shelf import most_unpacked

    with unpacked(source, belongs, most=most_unpacked(source)) as folder:
        package = import_nnunet(folder, configuration=configuration, folds=folds)
    save_package(output, package)
    _show(_facts(load_package(output), output))


@models.command()
@click.option(
    "--patch", type=Patch(), default="64x64x64", show_default=True, help="Voxels of a patch; two sizes for 2D."
)
@click.option(
    "--features", type=click.IntRange(1, 1024), default=16, show_default=True, help="Of a U-Net's first stage."
)
@click.option("--channels", type=click.IntRange(1, 1000), default=1, show_default=True)
@click.option("--classes", type=click.IntRange(2, 1000), default=3, show_default=True, help="The background is one.")
@click.option(
    "--measure", is_flag=True, help="Time training steps of two patches on this machine; takes a minute or two."
)
@threads_option
@_json
def families(
    patch: tuple[int, ...],
    features: int,
    channels: int,
    classes: int,
    measure: bool,
    threads: int | None,
    as_json: bool,
) -> None:
    """The families of networks that `medseg plan --family` takes, what each is good for, and what it costs.

    Parameters and multiplications (in thousand millions, of one patch forward) are counted; the memory of a
    training step of two patches is reckoned, or with --measure measured.
    """
    from medseg.plan.families import TRAINED

    rows = [
        _family(name, patch, features, channels, classes, threads if measure else None, measure) for name in TRAINED
    ]
    if as_json:
        click.echo(json.dumps(rows))
        return
    head = ["family", "patch", "parameters", "multiplications (G)", "training memory"] + ["step (s)"] * measure
    click.echo(table([head, *(_told(row, measure) for row in rows)], right=(2, 3, 4, 5)))
    click.echo()
    click.echo(table([["family", "good for"], *([row["family"], row["good_for"]] for row in rows)]))


def _family(
    name: str, patch: tuple[int, ...], features: int, channels: int, classes: int, threads: int | None, measure: bool
) -> dict[str, Any]:
    from medseg.models.build import weigh
    from medseg.plan.cost import estimate
    from medseg.plan.families import FAMILIES
    from medseg.plan.planner import sketch
    from medseg.train.measure import measure_step

    made = sketch(name, patch, features, 16 * features)
    parameters, multiplications = weigh(made, channels, classes)
    memory = estimate(made, channels, classes, kind="cpu", half=False).memory_bytes
    row = {
        "family": name,
        "good_for": FAMILIES[name].good_for,
        "patch": list(made.patch.value[: len(patch)]),
        "parameters": parameters,
        "multiplications": multiplications,
        "memory_bytes": memory,
    }
    if measure:
        step = measure_step(made, channels, classes, kind="cpu", threads=threads or available_cores())
        row |= {"memory_bytes": step.memory_bytes, "seconds_per_step": step.seconds, "measured_on": step.measured_on}
    return row


def _told(row: dict[str, Any], measure: bool) -> list[str]:
    """A family's row of the table."""
    from medseg.plan.cost import gib

    cells = ["x".join(map(str, row["patch"])), f"{row['parameters']:,}", f"{row['multiplications'] / 1e9:.2f}"]
    cells = [row["family"], *cells, gib(row["memory_bytes"])]
    return [*cells, f"{row['seconds_per_step']:.2f}"] if measure else cells


@models.command()
@click.argument("source", type=FOLDER)
@click.option("--name", help="The name to install it under.  [default: task and configuration]")
@_models_dir
def install(source: Path, name: str | None, models_dir: Path | None) -> None:
    """Check a package, a folder or a zip, and put it where it is found by name."""
    from medseg.models.shelf import install as put
    from medseg.models.shelf import shelf

    folder = put(source, models_dir or shelf(), name)
    # By its name a model is found in the usual place alone.
    click.echo(f"installed: medseg predict -m {folder if models_dir else folder.name}")


@models.command("list")
@_json
@_models_dir
def list_(as_json: bool, models_dir: Path | None) -> None:
    """The models that are installed, and those shipped with medseg."""
    from medseg.core.errors import InputError
    from medseg.models.package import load_package
    from medseg.models.shelf import at_hand

    rows = []
    for name, folder in at_hand(models_dir).items():
        try:
            rows.append({"name": name, **_facts(load_package(folder), folder)})
        except InputError as error:
            rows.append({"name": name, "fault": str(error)})
    if as_json:
        click.echo(json.dumps(rows))
    elif rows:
        head = ["name", "model", "structures", "digest", "size (MB)", "from"]
        click.echo(table([head, *([str(cell) for cell in _row(row)] for row in rows)], right=(4,)))
    else:
        click.echo("no model is installed")


@models.command()
@click.argument("package", type=str)
@_json
@_models_dir
def info(package: str, as_json: bool, models_dir: Path | None) -> None:
    """What is known of PACKAGE, after all its checksums were compared."""
    from medseg.models.package import load_package
    from medseg.models.shelf import find_package

    folder = find_package(package, models_dir)
    facts = _facts(load_package(folder), folder)
    if as_json:
        click.echo(json.dumps(facts))
    else:
        _show(facts)


@models.command()
@click.argument("package", type=str)
@click.option("-o", "--output", type=FOLDER, required=True, help="The zip.")
@click.option("--half", is_flag=True, help="Store the weights in half the bits (float16).")
@_models_dir
def export(package: str, output: Path, half: bool, models_dir: Path | None) -> None:
    """Write PACKAGE as a zip, the same bytes each time, for `medseg models install`.

    With --half it is half as large, and gives the same results to within rounding: weights are made
    float32 again before anything is computed.
    """
    from medseg.models.shelf import find_package, pack

    pack(find_package(package, models_dir), output, half=half)
    click.echo(output)


def _facts(package: ModelPackage, folder: Path) -> dict[str, Any]:
    from medseg.models.shelf import shipped, size_of

    configuration = package.configuration
    cases = len(package.trained_on) or package.provenance.get("training_cases")
    return {
        "model": package.name,
        "digest": package.digest(),
        "channels": list(package.plan.channels),
        "structures": {str(label.number): label.name for label in package.plan.label_set},
        "spacing_mm": [round(s, 4) for s in configuration.spacing.value],
        "patch": list(configuration.patch.value),
        "networks": len(package.members),
        "family": configuration.network.value.family,
        "training_cases": cases,
        "origin": package.provenance.get("imported", "medseg"),
        **_decided(package),
        "engines": sorted(package.engines),
        "shipped": folder.parent == shipped(),
        "checksums": "as written",
        "bytes": size_of(folder),
    }


def _decided(package: ModelPackage) -> dict[str, Any]:
    """Post-processing; and what `medseg choose` measured, where it made the package."""
    steps = package.refinement.steps if package.refinement else ()
    known = package.evaluation
    return {
        "post_processing": [f"{step.name}: {step}" for step in steps] or ["none"],
        "out_of_fold_dice": str(known.dice) if known else None,
        "out_of_fold_cases": known.cases if known else None,
    }


def _show(facts: dict[str, Any]) -> None:
    width = max(map(len, facts))
    for name, value in facts.items():
        if isinstance(value, dict):
            value = ", ".join(f"{key} {one}" for key, one in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value))
        click.echo(f"{name.replace('_', ' ').ljust(width)}  {'unknown' if value in (None, '') else value}")


def _row(facts: dict[str, Any]) -> list[Any]:
    if "fault" in facts:
        return [facts["name"], facts["fault"], "", "", "", ""]
    names = list(facts["structures"].values())
    some = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
    place = "shipped" if facts["shipped"] else "installed"
    return [facts["name"], facts["model"], some, facts["digest"][:12], f"{facts['bytes'] / 1e6:.1f}", place]
