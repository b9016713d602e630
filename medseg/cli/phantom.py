"""``medseg phantom``."""

from __future__ import annotations

from pathlib import Path

import click

from medseg.cli.common import FOLDER, progress, seed_option


@click.command()
@click.argument("folder", type=FOLDER)
@click.option(
    "-t", "--task", "names", multiple=True, help="abdomen, brain, prostate or counted; may be repeated.  [default: all]"
)
@click.option("--cases", type=int, default=20, show_default=True, help="Training cases in each task.")
@seed_option
def phantom(folder: Path, names: tuple[str, ...], cases: int, seed: int) -> None:
    """Write tasks whose truth is known by formula into FOLDER.

    The same seed gives the same bytes.
    """
    from medseg.dataset.phantom import TASKS
    from medseg.dataset.phantom import phantom as write_phantom

    for name in names or tuple(TASKS):
        click.echo(write_phantom(folder, name, cases=cases, seed=seed, progress=progress(name)))
