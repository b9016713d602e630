"""``medseg fetch``."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import click

from medseg.cli.common import FOLDER, progress, stopping, table


@click.command()
@click.argument("task", required=False)
@click.option(
    "-o", "--output", type=FOLDER, default="data", show_default=True, help="The folder that the task's own goes into."
)
@click.option(
    "--mirror",
    "mirrors",
    multiple=True,
    help="An address or a folder that TASK.tar lies in, tried before the built-in one; may be repeated.",
)
@click.option("--archive", type=FOLDER, help="A TASK.tar that is here already: nothing is asked of the network.")
@click.option("--sha256", help="What the archive must have, in place of the built-in MD5.")
@click.option("--keep-archive", is_flag=True, help="Keep the archive that was downloaded, as TASK.tar in the folder.")
@click.option("--list", "as_list", is_flag=True, help="Name the tasks; nothing is asked of the network.")
def fetch(
    task: str | None,
    output: Path,
    mirrors: tuple[str, ...],
    archive: Path | None,
    sha256: str | None,
    keep_archive: bool,
    as_list: bool,
) -> None:
    """Download TASK of the Medical Segmentation Decathlon, check it and unpack it.

    The one verb that downloads anything. Stopped or killed, the same command goes on where it was. The archive is
    checked by its MD5 and unpacked beside its place, so that the task is there whole or not at all.
    """
    if as_list:
        click.echo(_listed())
        return
    if task is None:
        raise click.UsageError("Missing argument 'TASK'")
    if archive and mirrors:
        raise click.UsageError("--archive or --mirror, not both")
    if sha256 and not re.fullmatch(r"[0-9A-Fa-f]{64}", sha256):
        raise click.UsageError("--sha256 takes 64 hexadecimal digits")
    from medseg.dataset.decathlon import catalogue, fetch_task

    known = catalogue()
    with stopping():
        fetched = fetch_task(
            task,
            output,
            mirrors=mirrors,
            archive=archive,
            sha256=sha256,
            keep_archive=keep_archive,
            known=known,
            progress=partial(progress, unit="MiB"),
            tell=partial(click.echo, err=True),
        )
    if fetched.was_there:
        click.echo(f"{fetched.folder} is there already and is left as it is")
        return
    click.echo(f"{fetched.folder}: {known.licence}, please cite {known.citation}")
    click.echo(f"next: medseg check {fetched.folder}")


def _listed() -> str:
    from medseg.dataset.decathlon import catalogue

    known = catalogue()
    rows = [[name, str(a.training), str(a.test), known.licence] for name, a in known.archives.items()]
    heading = ["task", "cases with labels", "without", "licence"]
    return f"{table([heading, *rows], right=(1, 2))}\nPlease cite {known.citation}."
