"""``medseg VERB``: one file a verb. What a verb needs is imported when it runs, so that ``--help``
answers at once."""

from __future__ import annotations

import sys

import click

from medseg import __version__
from medseg.cli.check import check
from medseg.cli.evaluate import evaluate
from medseg.cli.phantom import phantom
from medseg.cli.plan import plan
from medseg.cli.predict import predict
from medseg.cli.preprocess import preprocess
from medseg.cli.report import report
from medseg.cli.train import train
from medseg.core.errors import MedsegError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="medseg")
def cli() -> None:
    """Medical volume segmentation.

    \b
    A scan in, a label map out:   predict
    A dataset in, a model out:    check, plan, preprocess, train, predict, evaluate, report
    Data with known truth:        phantom

    Exit status: 0 done, 1 the work failed, 2 the input is wrong.
    """


for command in (check, plan, preprocess, train, predict, evaluate, report, phantom):
    cli.add_command(command)


def main() -> None:
    """Run the command line; errors of medseg's own become one line and an exit status."""
    try:
        cli()
    except MedsegError as error:
        click.echo(f"medseg: {error}", err=True)
        sys.exit(error.exit_status)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
