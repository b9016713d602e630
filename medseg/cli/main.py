"""``medseg VERB``: one file a verb. What a verb needs is imported when it runs, so that ``--help``
answers at once."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from medseg import __version__
from medseg.cli.archive import archive
from medseg.cli.check import check
from medseg.cli.choose import choose
from medseg.cli.compare import compare
from medseg.cli.convert import convert
from medseg.cli.doctor import doctor
from medseg.cli.evaluate import evaluate
from medseg.cli.fetch import fetch
from medseg.cli.inspect import inspect
from medseg.cli.models import models
from medseg.cli.phantom import phantom
from medseg.cli.plan import plan
from medseg.cli.predict import predict
from medseg.cli.preflight import preflight
from medseg.cli.preprocess import preprocess
from medseg.cli.preview import preview
from medseg.cli.record import record
from medseg.cli.report import report
from medseg.cli.run import run
from medseg.cli.train import train
from medseg.cli.verify import verify
from medseg.core.errors import MedsegError


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="medseg")
def cli() -> None:
    """Medical volume segmentation.

    \b
    A scan in, a label map out:   inspect, predict, convert
    All of a dataset in one go:   run
    A dataset in, a model out:    fetch, check, plan, preprocess, train, predict, evaluate,
                                  compare, choose, report
    Results to be repeated:       record, verify
    Thousands of scans:           archive
    A picture of a scan:          preview
    Models of nnU-Net and others: models
    Data with known truth:        phantom
    Is this machine fit for it:   doctor

    Exit status: 0 done, 1 the work failed, 2 the input is wrong.
    """


VERBS = (
    inspect,
    convert,
    preview,
    fetch,
    check,
    plan,
    preprocess,
    train,
    predict,
    evaluate,
    compare,
    choose,
    report,
    run,
    record,
    verify,
    archive,
    models,
    phantom,
    doctor,
    preflight,
)
for command in VERBS:
    cli.add_command(command)


def main() -> None:
    """Run the command line; what goes wrong becomes one line and an exit status."""
    try:
        sys.exit(cli(prog_name="medseg", standalone_mode=False))
    except MedsegError as error:
        _end(str(error), error.exit_status)
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
        sys.exit(error.exit_code)
    except click.UsageError as error:
        verb = error.ctx.command_path if error.ctx else "medseg"
        _end(f"{error.format_message().rstrip('.')}. See `{verb} --help`.", error.exit_code)
    except click.ClickException as error:
        _end(error.format_message(), error.exit_code)
    except click.Abort:
        _end("stopped. Nothing was left half written.", 1)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(1)
    except OSError as error:
        _end(f"{error.filename or 'a file'} cannot be read or written: {error.strerror or error}.", 1)
    except MemoryError:
        _end("there is not enough memory. Use a machine that has more.", 1)


def _end(text: str, status: int) -> NoReturn:
    click.echo(f"medseg: {' '.join(line.strip() for line in text.splitlines())}", err=True)
    sys.exit(status)
