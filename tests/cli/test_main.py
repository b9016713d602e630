from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import click
import pytest

import medseg as package
from medseg.cli.common import Duration, table
from medseg.cli.main import cli

VERBS = sorted(cli.commands)


def test_the_verbs() -> None:
    assert VERBS == [
        "archive",
        "check",
        "choose",
        "compare",
        "convert",
        "doctor",
        "evaluate",
        "fetch",
        "inspect",
        "models",
        "phantom",
        "plan",
        "predict",
        "preflight",
        "preprocess",
        "preview",
        "record",
        "report",
        "run",
        "train",
        "verify",
    ]


@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_every_verb_has_its_help(medseg: Any, verb: str, flag: str) -> None:
    outcome = medseg(verb, flag)
    assert outcome.status == 0
    assert outcome.out.startswith(f"Usage: medseg {verb}")
    assert outcome.err == ""
    for option in cli.commands[verb].params:
        assert option.human_readable_name.upper() in outcome.out or option.opts[-1] in outcome.out


def test_help_and_version(medseg: Any) -> None:
    outcome = medseg("--help")
    assert outcome.status == 0
    for verb in VERBS:
        assert f"\n  {verb} " in outcome.out
    assert medseg("--version").out == f"medseg, version {package.__version__}\n"
    bare = medseg()
    assert bare.status == 2
    assert "Usage: medseg" in bare.err


@pytest.mark.parametrize("command", [[sys.executable, "-m", "medseg"], [str(Path(sys.executable).parent / "medseg")]])
def test_the_script_and_the_module(command: list[str]) -> None:
    if not Path(command[0]).exists():
        pytest.skip("the console script is not installed here")
    done = subprocess.run([*command, "plan", "-h"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: medseg plan")
    done = subprocess.run([*command, "check", "nowhere"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "medseg: nowhere is no folder. Name the folder of a Decathlon task.\n"


@pytest.mark.parametrize("arguments", [["--help"], *([verb, "--help"] for verb in VERBS)], ids=" ".join)
def test_help_comes_without_the_heavy_libraries(arguments: list[str]) -> None:
    script = (
        "import sys; from medseg.cli.main import cli\n"
        f"cli({arguments!r}, standalone_mode=False)\n"
        "heavy = {'torch', 'monai', 'numpy', 'scipy', 'nibabel', 'pydantic', 'skimage'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_planning_scoring_and_reporting_come_without_torch(made: Any, tmp_path: Path) -> None:
    commands = [
        ["check", made.task],
        ["plan", made.task, "-o", tmp_path / "run", "--folds", 3, "--no-measure"],
        ["evaluate", made.fold / "predictions", made.task, "-o", tmp_path / "scores"],
        ["report", made.run, "-o", tmp_path / "report.html"],
    ]
    script = (
        "import sys; from medseg.cli.main import cli\n"
        f"for command in {[[str(a) for a in c] for c in commands]!r}:\n"
        "    cli(command, standalone_mode=False)\n"
        "    assert not {'torch', 'monai'} & set(sys.modules), command\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# ---- how it ends --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["fly"], ["No such command 'fly'", "`medseg --help`"]),
        (["train"], ["Missing argument 'RUN'", "`medseg train --help`"]),
        (["train", "run", "--speed", "3"], ["--speed"]),
        (["plan", "task", "-o", "x", "--budget", "90"], ["'90' is no duration", "90s, 15m or 1h30m"]),
        (["plan", "task", "-o", "x", "--budget", "3d=0s"], ["above zero"]),
        (["plan", "task", "-o", "x", "--budget", "soon"], ["'soon' is no duration"]),
        (["plan", "task", "-o", "x", "--steps", "2", "--budget", "5m"], ["--steps or --budget, not both"]),
        (["plan", "task", "-o", "x", "--steps", "0"], ["--steps"]),
        (["plan", "task", "-o", "x", "--budget", "5m", "--budget", "6m"], ["two budgets for all"]),
        (["plan", "task", "-o", "x", "--budget", "3d=5m", "--budget", "3d=6m"], ["two budgets for 3d"]),
        (["plan", "task", "-o", "x", "--budget", "5m", "--no-measure"], ["leave out --no-measure"]),
        (["plan", "task", "-o", "x", "--machine", "cpu", "--gpu-memory", "8GiB"], ["--gpu-memory", "--memory"]),
        (["plan", "task", "-o", "x", "--machine", "gpu", "--memory", "8GiB"], ["--memory", "--gpu-memory"]),
        (["plan", "task", "-o", "x", "--gpu-memory", "lots"], ["'lots' is no size"]),
        (["train", "run", "--fold", "-1"], ["--fold"]),
        (["train", "run", "--device", "tpu"], ["--device", "tpu"]),
        (["plan", "task"], ["-o"]),
        (["plan", "task", "-o", "x", "--folds", "1"], ["--folds"]),
        (["predict", "task", "--held-out"], ["--held-out", "-m"]),
        (["predict", "-m", "model"], ["SCANS"]),
        (["evaluate", "a"], ["TASK"]),
        (["evaluate", "a", "b", "--tolerance", "-1"], ["--tolerance"]),
        (["phantom", "x", "--cases", "many"], ["--cases"]),
    ],
    ids=lambda v: " ".join(v),
)
def test_wrong_words_are_answered_in_one_line(medseg: Any, arguments: list[str], words: list[str]) -> None:
    medseg(*arguments).refused(*words)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (KeyboardInterrupt(), "stopped"),
        (OSError(28, "No space left on device", "log.jsonl"), "log.jsonl cannot be read or written: No space left"),
        (MemoryError(), "not enough memory"),
        (click.ClickException("so\nand so"), "so and so"),
    ],
    ids=["ctrl-C", "full disk", "memory", "click"],
)
def test_what_may_always_happen_is_one_line_and_status_1(
    medseg: Any, monkeypatch: pytest.MonkeyPatch, error: BaseException, words: str
) -> None:
    def fail(**_: Any) -> None:
        raise error

    monkeypatch.setattr(cli.commands["check"], "callback", fail)
    outcome = medseg("check", "somewhere")
    assert outcome.status == 1
    (line,) = [line for line in outcome.err.splitlines() if line]
    assert line.startswith("medseg: ")
    assert words in line


def test_a_fault_of_its_own_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    from medseg.cli.main import main

    def fail(**_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(cli.commands["check"], "callback", fail)
    monkeypatch.setattr(sys, "argv", ["medseg", "check", "somewhere"])
    with pytest.raises(ZeroDivisionError):
        main()


def test_a_reader_that_goes_away_is_no_traceback(made: Any) -> None:
    done = subprocess.run(
        f"{sys.executable} -m medseg check {made.task} --json | head -c 10", shell=True, capture_output=True, text=True
    )
    assert done.stderr == ""


# ---- its parts ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("2h", 7200), ("1d", 86400), ("1h30m", 5400), ("0.5h", 1800), (" 2M ", 120)],
)
def test_durations(text: str, seconds: float) -> None:
    assert Duration().convert(text, None, None) == seconds


@pytest.mark.parametrize("text", ["", "5", "m", "-5m", "5 m", "1h-5m", "inf", "1e3s", "0s", "5y"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Duration().convert(text, None, None)


def test_a_table() -> None:
    assert table([["name", "n"], ["a", "10"], ["long one", "1"]], right=[1]).splitlines() == [
        "name       n",
        "--------  --",
        "a         10",
        "long one   1",
    ]
