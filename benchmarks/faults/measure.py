"""Faults, for real: what is done to a run, and whether the same command, given again, comes to the same results.

    python benchmarks/faults/measure.py -o faults.json            all of them: a table, and every trial as JSON
    python benchmarks/faults/measure.py --fault "disk full"       some of them; --list names them
    python benchmarks/faults/measure.py --short                   a few trials of what needs the least time

A tiny task is planned, preprocessed, trained, predicted, scored, chosen from and reported once undisturbed. Then, stage
by stage, a copy of what the stage started from is given to it again, the harm is done while it runs, and the same
command is run again, as a user would. Compared with the undisturbed run, bit for bit: plan, preprocessed cases,
weights, label maps, scores (`checks.SAME`); every file is read to its end.

Mounts are made in a mount namespace of this program's own (unshare, as root or where users may), so that none outlives
it, however it ends; what cannot be done on a machine is said and left out. Nothing is written outside of --folder.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import checks

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from conftest import tiny_task  # noqa: E402 - the tests' own small task

STAGES = ("plan", "preprocess", "train", "predict", "evaluate", "choose", "report")
TASK = "Task98_Tiny"
FOLD = "run/3d/fold0"
# A command that takes longer than this is taken to hang.
_LONGEST = 120
# Nobody says anything then.
_KILLED = (-signal.SIGKILL,)


@dataclass(frozen=True)
class Ended:
    """How a command ended (below 0: by that signal), what it said, and for how long it ran (s)."""

    status: int
    said: str
    seconds: float

    @property
    def line(self) -> str:
        """Its last word."""
        return ([""] + [line for line in self.said.splitlines() if line.strip()])[-1]

    @property
    def told(self) -> bool:
        """Whether it ended well, or said in a line of its own why not."""
        return self.status == 0 or ("Traceback" not in self.said and "medseg: " in self.said)


@dataclass
class Trial(checks.Found):
    """One harm and what came of it."""

    fault: str
    stage: str
    what: str
    ended: int = 0


class Bench:
    """The undisturbed run, and copies of it to be harmed."""

    def __init__(self, base: Path, *, seed: int, times: int, faketime: Path | None, stages: tuple[str, ...]) -> None:
        self.base, self.seed, self.times, self.faketime, self.stages = base, seed, times, faketime, stages
        self.rng = random.Random(seed)
        self.task = tiny_task(base / TASK, 6)
        self.trials: list[Trial] = []
        self.skipped: dict[str, str] = {}
        self.took: dict[str, float] = {}
        self.adds: dict[str, int] = {}  # bytes on disk
        self.peak: dict[str, int] = {}
        self.cases = {f"blob_{n:03d}" for n in range(6)}

    # The commands

    def command(self, stage: str) -> list[str]:
        """As it is called in a folder that holds ``run``."""
        task, one = str(self.task), ("--threads", "1")
        fixed = ("--steps", "20", "--no-measure", "--folds", "3", "--machine", "cpu", "--memory", "2GiB")
        return {
            "plan": ["plan", task, "-o", "run", *fixed, *one],
            "preprocess": ["preprocess", "run", *one],
            "train": ["train", "run", "--device", "cpu", *one],
            "predict": ["predict", task, "--held-out", "-m", f"{FOLD}/model", "-o", f"{FOLD}/predictions", *one],
            "evaluate": ["evaluate", f"{FOLD}/predictions", task, "-o", FOLD, *one],
            "choose": ["choose", "run", "--partial", *one],
            "report": ["report", "run", "--pdf"],
        }[stage]

    def start(self, command: Iterable[str], folder: Path, *, before: tuple[str, ...] = (), **how) -> subprocess.Popen:
        """medseg in a group of its own; what it says goes to a file, which never makes it wait."""
        with tempfile.NamedTemporaryFile(dir=self.base, prefix="said-", delete=False) as said:
            started = subprocess.Popen(
                [*before, sys.executable, "-m", "medseg", *command],
                cwd=folder,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **how,
            )
        started.begun, started.file = time.monotonic(), Path(said.name)
        return started

    def end(self, started: subprocess.Popen) -> Ended:
        """Wait for it; one that hangs is killed."""
        try:
            started.wait(_LONGEST)
        except subprocess.TimeoutExpired:
            kill(started)
            started.wait()
        with contextlib.suppress(ProcessLookupError):  # children of one that was killed alone
            os.killpg(started.pid, signal.SIGKILL)
        said = started.file.read_text(errors="replace")
        started.file.unlink()
        return Ended(started.returncode, said, time.monotonic() - started.begun)

    def run(self, stage: str, folder: Path, **how) -> Ended:
        return self.end(self.start(self.command(stage), folder, **how))

    # What a stage starts from, and what it leaves

    def undisturbed(self, last: str) -> None:
        """Up to the ``last`` stage."""
        folder, stages = self.base / "undisturbed", STAGES[: STAGES.index(last) + 1]
        folder.mkdir()
        for stage in stages:
            kept = self.base / "before" / stage / "run"
            kept.parent.mkdir(parents=True)
            if (folder / "run").exists():
                shutil.copytree(folder / "run", kept)
            ended = self.run(stage, folder)
            if ended.status:
                raise SystemExit(f"undisturbed, {stage} ends with {ended.status}: {ended.said[-2000:]}")
            self.took[stage] = ended.seconds
            self.adds[stage] = occupied(folder) - occupied(kept.parent)
            say(f"undisturbed {stage}: {ended.seconds:.1f} s")
        self.whole = {stage: checks.digests(folder / "run", (stage,)) for stage in stages}
        assert all(self.whole.values()), self.whole
        self.given = {stage: self.cases & set(checks._LISTED[stage](folder / "run")) for stage in stages}
        assert not checks.broken(folder / "run"), checks.broken(folder / "run")

    def fresh(self, stage: str, folder: Path | None = None) -> Path:
        """A folder as it was before the stage."""
        folder = folder or Path(tempfile.mkdtemp(prefix=f"{stage}-", dir=self.base))
        kept = self.base / "before" / stage / "run"
        if kept.exists():
            shutil.copytree(kept, folder / "run")
        else:
            (folder / "run").mkdir()
        return folder

    def trial(
        self,
        fault: str,
        stage: str,
        what: str,
        harm: Callable[[Path], Ended],
        mend: Callable[[Path], object] = lambda folder: None,
        *,
        folder: Path | None = None,
        once: bool = False,
        silent: tuple[int, ...] = (),
    ) -> Trial:
        """Do harm while a stage runs, mend what caused it, give the same command again, and look. With ``once``
        the stage has to come through as it is; one that ends with a status in ``silent`` need not say why."""
        begun = time.monotonic()
        folder = self.fresh(stage, folder)
        ended = harm(folder)
        told = ended.told or ended.status in silent
        one = Trial(fault, stage, what, ended.status, told=told, line=ended.line)
        if not one.told:
            one.line = ended.said[-1500:]
        one.half_written = checks.broken(folder)
        if ended.status == 0:
            one.lost = checks.missing(folder / "run", stage, self.given[stage], ended.said)
        mend(folder)
        again = ended if once else self.run(stage, folder)
        one.survived = again.status == 0
        if not one.survived:
            one.line += f" / again: {again.line}"
        found = checks.digests(folder / "run", (stage,))
        wanted = self.whole[stage]
        one.differ = sorted(name for name in {*found, *wanted} if found.get(name) != wanted.get(name))
        one.identical = not one.differ
        one.half_written += [text for text in checks.broken(folder) if text not in one.half_written]
        one.left_over = checks.left_over(folder)
        one.lost += checks.missing(folder / "run", stage, self.given[stage], again.said)
        one.seconds = time.monotonic() - begun
        self.add(one)
        remove(folder)
        return one

    def add(self, one: Trial) -> None:
        self.trials.append(one)
        bad = not one.sound
        say(
            f"{one.fault}, {one.stage}, {one.what}: ended {one.ended}{'' if one.told else ' WITHOUT A WORD'}, "
            f"{one.seconds:.0f} s"
        )
        if bad or one.ended > 0:
            say(f"    {'BAD ' if bad else ''}{json.dumps(asdict(one))}" if bad else f"    {one.line[:200]}")

    def skip(self, fault: str, why: str) -> None:
        self.skipped[fault] = why
        say(f"{fault}: left out, {why}")


# Ways to do harm


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def kill(started: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, number)


def occupied(folder: Path) -> int:
    return sum((p.stat().st_size + 4095) // 4096 * 4096 for p in folder.rglob("*") if p.is_file())


def state(folder: Path) -> frozenset[tuple[str, int, int]]:
    """Every file with its size and time."""
    found = set()
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):
            known = path.stat()
            found.add((str(path), known.st_size, known.st_mtime_ns))
    return frozenset(found)


def mount(*arguments: object) -> None:
    subprocess.run(["mount", *map(str, arguments)], check=True, capture_output=True)


def umount(folder: Path) -> None:
    subprocess.run(["umount", "--lazy", str(folder)], check=False, capture_output=True)


def remove(folder: Path) -> None:
    for place in (folder / "run", folder):
        if os.path.ismount(place):
            umount(place)
    shutil.rmtree(folder, ignore_errors=True)


def at(started: subprocess.Popen, seconds: float) -> bool:
    """Whether it still runs so many seconds after its start."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(max(0.0, started.begun + seconds - time.monotonic()))
        return False
    return True


def after_changes(started: subprocess.Popen, folder: Path, changes: int) -> None:
    """Return when so many files have come or changed in a folder, or the process has ended."""
    seen, count = state(folder), 0
    while started.poll() is None and count < changes:
        now = state(folder)
        count += len(now - seen)
        seen = now
        time.sleep(0.002)


# Faults


def killed(bench: Bench) -> None:
    """SIGKILL at random moments"""
    for stage in bench.stages:
        for number in range(bench.times):
            moment = bench.rng.uniform(0, bench.took[stage])

            def harm(folder: Path, stage=stage, moment=moment) -> Ended:
                started = bench.start(bench.command(stage), folder)
                if at(started, moment):
                    kill(started)
                return bench.end(started)

            bench.trial("SIGKILL at random moments", stage, f"after {moment:.2f} s ({number})", harm, silent=_KILLED)


def killed_writing(bench: Bench) -> None:
    """SIGKILL between two files"""
    for stage in bench.stages:
        files = len(bench.whole[stage])
        for number in range(bench.times):
            changes = bench.rng.randint(1, 2 * files + 4)

            def harm(folder: Path, stage=stage, changes=changes) -> Ended:
                started = bench.start(bench.command(stage), folder)
                after_changes(started, folder, changes)
                kill(started)
                return bench.end(started)

            what = f"at the {changes}. change in its folder ({number})"
            bench.trial("SIGKILL between two files", stage, what, harm, silent=_KILLED)


def stopped(bench: Bench) -> None:
    """SIGTERM, and ctrl-C twice"""
    for stage in bench.stages:
        for what, signals in (("SIGTERM", [signal.SIGTERM]), ("ctrl-C twice", [signal.SIGINT, signal.SIGINT])):
            moment = bench.rng.uniform(0.3, 0.9) * bench.took[stage]

            def harm(folder: Path, stage=stage, moment=moment, signals=signals) -> Ended:
                started = bench.start(bench.command(stage), folder)
                for number, one in enumerate(signals):
                    if at(started, moment + 0.2 * number):
                        kill(started, one)
                return bench.end(started)

            asked = (143, -signal.SIGTERM, -signal.SIGINT)  # whoever asked for it knows why
            bench.trial("SIGTERM, and ctrl-C twice", stage, f"{what} after {moment:.2f} s", harm, silent=asked)


def disk_full(bench: Bench) -> None:
    """disk full"""
    if not bench.mounts:
        return limited_files(bench)
    for stage in bench.stages:
        for number in range(bench.times + 1):
            pages = bench.rng.randint(0, max(1, bench.adds[stage] // 4096 - 1)) if number else 0
            folder = Path(tempfile.mkdtemp(prefix="full-", dir=bench.base))
            mount("-t", "tmpfs", "-o", "size=512m", "tmpfs", folder)

            def harm(folder: Path, stage=stage, pages=pages) -> Ended:
                there = os.statvfs(folder)
                used = (there.f_blocks - there.f_bfree) * there.f_frsize
                mount("-o", f"remount,size={max(4096, used + 4096 * pages)}", folder)
                return bench.run(stage, folder)

            def mend(folder: Path) -> None:
                mount("-o", "remount,size=512m", folder)

            bench.trial("disk full", stage, f"room for {4 * pages} KiB", harm, mend, folder=folder)
    return None


def limited_files(bench: Bench) -> None:
    """Where nothing can be mounted: no file may grow beyond a few KiB."""
    for stage in bench.stages:
        most = bench.rng.choice((0, 200, 4096))

        def limit(most=most) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        def harm(folder: Path, stage=stage, limit=limit) -> Ended:
            return bench.run(stage, folder, preexec_fn=limit)

        bench.trial("disk full", stage, f"no file above {most} bytes (no mounts here)", harm)


def read_only(bench: Bench) -> None:
    """read-only folder"""
    if not bench.mounts:
        return bench.skip("read-only folder", "nothing can be mounted here, and permissions do not bind root")
    for stage in bench.stages:
        for share in (0.0, bench.rng.uniform(0.3, 0.9)):

            def harm(folder: Path, stage=stage, share=share) -> Ended:
                started = None
                if share:
                    started = bench.start(bench.command(stage), folder)
                    at(started, share * bench.took[stage])
                mount("--bind", folder / "run", folder / "run")
                mount("-o", "remount,bind,ro", folder / "run")
                return bench.end(started or bench.start(bench.command(stage), folder))

            when = f"from {share * bench.took[stage]:.2f} s on" if share else "from the start"
            bench.trial("read-only folder", stage, when, harm, lambda folder: umount(folder / "run"))
    return None


def vanishing(bench: Bench) -> None:
    """vanishing folder"""
    for stage in bench.stages:
        for what in ("run", "images"):
            moment = bench.rng.uniform(0.3, 0.9) * bench.took[stage]

            def place(folder: Path, what=what) -> Path:
                return folder / "run" if what == "run" else bench.task / "imagesTr"

            def harm(folder: Path, stage=stage, moment=moment, place=place) -> Ended:
                started = bench.start(bench.command(stage), folder)
                at(started, moment)
                place(folder).rename(f"{place(folder)}.away")
                return bench.end(started)

            def mend(folder: Path, place=place) -> None:
                if place(folder).exists():  # made anew meanwhile
                    shutil.rmtree(place(folder))
                Path(f"{place(folder)}.away").rename(place(folder))

            def look(folder: Path, stage=stage, what=what, harm=harm) -> Ended:
                ended = harm(folder)
                # A command that ends well must have left its results where they were asked for. What vanished with
                # the folder is back when that is; an ending in good faith without them is a loss.
                if ended.status == 0 and what == "run":
                    lost = checks.missing(folder / "run", stage, bench.given[stage], ended.said)
                    back = checks.missing(folder / "run.away", stage, bench.given[stage], ended.said)
                    if not (lost and back):
                        return Ended(0, ended.said + " " + " ".join(bench.cases), ended.seconds)
                return ended

            bench.trial("vanishing folder", stage, f"the {what} after {moment:.2f} s", look, mend)


def short_of_memory(bench: Bench) -> None:
    """memory limit"""
    for stage in bench.stages:
        share = bench.rng.uniform(0.4, 0.9)
        most = int(share * bench.peak.setdefault(stage, peak_of(bench, stage)))

        def killed_above(folder: Path, stage=stage, most=most) -> Ended:
            started = bench.start(bench.command(stage), folder)
            while started.poll() is None:
                if resident(started.pid) > most:
                    kill(started)
                time.sleep(0.005)
            return bench.end(started)

        def refused_above(folder: Path, stage=stage, most=most) -> Ended:
            def limit() -> None:
                resource.setrlimit(resource.RLIMIT_DATA, (most, most))

            return bench.run(stage, folder, preexec_fn=limit)

        mib = most // 2**20
        what = f"killed above {mib} MiB, as a scheduler does"
        bench.trial("memory limit", stage, what, killed_above, silent=_KILLED)
        bench.trial("memory limit", stage, f"refused above {mib} MiB (RLIMIT_DATA)", refused_above)
        if stage in ("train", "predict"):

            def told(folder: Path, stage=stage) -> Ended:
                return bench.end(bench.start([*bench.command(stage), "--memory", "20MB"], folder))

            bench.trial("memory limit", stage, "--memory 20MB", told)


def resident(process: int) -> int:
    with contextlib.suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * resource.getpagesize()
    return 0


def peak_of(bench: Bench, stage: str) -> int:
    """Of the stage undisturbed, resident, in bytes."""
    folder = bench.fresh(stage)
    started, most = bench.start(bench.command(stage), folder), 0
    while started.poll() is None:
        most = max(most, resident(started.pid))
        time.sleep(0.005)
    bench.end(started)
    remove(folder)
    return most


def clock(bench: Bench) -> None:
    """clock jumps"""
    year = 365 * 86400
    for stage in bench.stages:
        for what, shift in (("ten years ahead", 10 * year), ("in 1971", None)):

            def dated(folder: Path, shift=shift) -> None:
                when = year if shift is None else time.time() + shift
                for path in (*(folder / "run").rglob("*"), *bench.task.rglob("*")):
                    os.utime(path, (when, when))

            def harm(folder: Path, stage=stage, dated=dated) -> Ended:
                dated(folder)
                ended = bench.run(stage, folder)
                dated(folder)  # and what it left, before it is run again
                return ended

            bench.trial("clock jumps", stage, f"every file is from {what}", harm)
    if bench.faketime is None:
        return bench.skip("clock jumps while a stage runs", "no libfaketime (--faketime)")
    for stage in bench.stages:
        for what, jump in (("a year on", "+1y"), ("a year back", "-1y")):

            def harm(folder: Path, stage=stage, jump=jump) -> Ended:
                said = folder / "clock"
                said.write_text("+0\n")
                told = {"LD_PRELOAD": str(bench.faketime), "FAKETIME_TIMESTAMP_FILE": str(said)}
                how = {"FAKETIME_NO_CACHE": "1", "FAKETIME_DONT_FAKE_MONOTONIC": "1", "NO_FAKE_STAT": "1"}
                started = bench.start(bench.command(stage), folder, env={**os.environ, **told, **how})
                at(started, 0.5 * bench.took[stage])
                said.write_text(f"{jump}\n")
                ended = bench.end(started)
                said.unlink()
                return ended

            bench.trial("clock jumps", stage, f"{what} in its middle", harm)
    return None


def two_at_once(bench: Bench) -> None:
    """two runs in one folder"""
    for stage in bench.stages:
        for number in range(bench.times):
            apart = bench.rng.uniform(0, 0.3) * bench.took[stage] if number else 0.0

            def harm(folder: Path, stage=stage, apart=apart) -> Ended:
                both = [bench.start(bench.command(stage), folder)]
                time.sleep(apart)
                both.append(bench.start(bench.command(stage), folder))
                ended = [bench.end(one) for one in both]
                worst = max(ended, key=lambda one: (not one.told, one.status != 0))
                return Ended(worst.status, worst.said, sum(one.seconds for one in ended))

            bench.trial("two runs in one folder", stage, f"{apart:.2f} s apart", harm, once=True)


def corrupt(bench: Bench) -> None:
    """one corrupt case in a hundred"""
    import nibabel as nib

    fault = "one corrupt case in a hundred"
    folder = Path(tempfile.mkdtemp(prefix="hundred-", dir=bench.base))
    count = 100
    task = tiny_task(folder / "Task97_Hundred", count)
    cases = {f"blob_{n:03d}" for n in range(count)}

    def medseg(*command: str) -> Ended:
        return bench.end(bench.start(command, folder))

    planned = medseg("plan", str(task), "-o", "run", "--steps", "20", "--no-measure", "--machine", "cpu")
    assert planned.status == 0, planned.said
    cut, moved = task / "imagesTr/blob_037.nii.gz", task / "labelsTr/blob_061.nii.gz"
    data, label = cut.read_bytes(), nib.load(moved)
    cut.write_bytes(data[: len(data) // 2])
    affine = label.affine.copy()
    affine[0, 3] += 5
    nib.save(nib.Nifti1Image(label.get_fdata().astype("uint8"), affine), moved)

    def note(stage: str, what: str, ended: Ended, *, lost: Iterable[str], right: bool) -> None:
        one = Trial(fault, stage, what, ended.status, told=ended.told, line=ended.line[:300])
        one.survived, one.lost = right, sorted(lost)
        one.half_written, one.left_over = checks.broken(folder / "run"), checks.left_over(folder)
        one.seconds = ended.seconds
        bench.add(one)

    checked = medseg("check", str(task))
    named = {case for case in ("blob_037", "blob_061") if f"error: case {case}" in checked.said}
    told = Ended(checked.status, f"medseg: {checked.said}", checked.seconds)
    note("check", f"names {len(named)} of 2", told, lost={"blob_037", "blob_061"} - named, right=checked.status == 2)
    for stage, command in (("plan", ["plan", str(task), "-o", "new"]), ("preprocess", ["preprocess", "run"])):
        ended = medseg(*command)
        named = {case for case in ("blob_037", "blob_061") if case in ended.line}
        lost = () if named else ("blob_037",)
        note(stage, f"refuses, names {' '.join(named)}", ended, lost=lost, right=ended.status == 2)
    shutil.copytree(bench.base / "undisturbed" / FOLD / "model", folder / "model")
    ended = medseg("predict", str(task / "imagesTr"), "-m", "model", "-o", "run/out", "--threads", "1")
    made = {p.name.removesuffix("_seg.nii.gz") for p in (folder / "run/out").glob("*_seg.nii.gz")}
    index = json.loads((folder / "run/out/predictions.json").read_text())
    right = (
        ended.status > 0
        and made == cases - {"blob_037"} == set(index["cases"])
        and set(index["failed"]) == cases - made
    )
    lost = {case for case in cases - made if case not in ended.said or case not in index["failed"]}
    note("predict", f"{len(made)} of {count} predicted", ended, lost=lost, right=right)
    cut.write_bytes(data)
    again = medseg("predict", str(task / "imagesTr"), "-m", "model", "-o", "run/out", "--skip-done", "--threads", "1")
    index = json.loads((folder / "run/out/predictions.json").read_text())
    done_before = "99 of 100 scans were done before" in again.said
    right = again.status == 0 and set(index["cases"]) == cases and not index["failed"] and done_before
    note("predict", "mended, --skip-done", again, lost=cases - set(index["cases"]), right=right)
    remove(folder)


def alone(bench: Bench) -> None:
    """no network, read-only home"""
    fault = "no network, read-only home"
    if not bench.mounts:
        return bench.skip(fault, "nothing can be mounted here")
    home = bench.base / "home"
    home.mkdir()
    mount("-t", "tmpfs", "-o", "size=1m", "tmpfs", home)
    mount("-o", "remount,ro", home)
    env = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")} | {"HOME": str(home)}
    unplugged = (
        ("unshare", "--net") if subprocess.run(["unshare", "--net", "true"], check=False).returncode == 0 else ()
    )
    if not unplugged:
        bench.skip("no network", "no network namespace can be made here")
    for stage in bench.stages:

        def harm(folder: Path, stage=stage) -> Ended:
            return bench.run(stage, folder, before=unplugged, env=env)

        bench.trial(fault, stage, "all of it" if unplugged else "home only", harm, once=True)
    if "train" in bench.stages:
        workflow(bench, fault, unplugged, env)
    umount(home)
    return None


def workflow(bench: Bench, fault: str, before: tuple[str, ...], env: dict[str, str]) -> None:
    """The same through Snakemake, twice; then with every file ten years ahead."""
    folder = Path(tempfile.mkdtemp(prefix="workflow-", dir=bench.base))
    config = {"tasks": [str(bench.task)], "configurations": ["3d"], "folds": [0], "of_folds": 3, "threads": 1}
    config["fixed"] = {"steps": 20, "machine": "cpu", "memory": "2GiB"}
    (folder / "config.json").write_text(json.dumps(config | {"device": "cpu"}))
    command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile"), "--cores", "2"]
    first: dict[str, str] = {}
    for what in ("snakemake --cores 2", "again: nothing to do", "again, every file from ten years ahead"):
        if "ahead" in what:
            for path in folder.rglob("*"):
                os.utime(path, (time.time() + 3e8, time.time() + 3e8))
        begun = time.monotonic()
        done = subprocess.run(
            [*before, *command, "--configfile", "config.json"],
            cwd=folder,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        run = folder / "results" / TASK
        ended = done.returncode
        one = Trial(fault, "all", what, ended, told=ended == 0, survived=ended == 0)
        if done.returncode:
            one.line = done.stdout[-1500:]
        found = checks.digests(run, ("plan", "preprocess", "train", "predict", "evaluate", "report"))
        one.differ = sorted(n for n in {*first, *found} if first and first.get(n) != found.get(n))
        if "nothing" in what and "Nothing to be done" not in done.stdout:
            one.differ.append("something was done")
        first = first or found
        one.identical = bool(found) and not one.differ
        one.half_written, one.left_over = checks.broken(run), checks.left_over(run)
        one.lost = checks.missing(run, "evaluate", bench.given["evaluate"], "")
        one.seconds = time.monotonic() - begun
        bench.add(one)
    remove(folder)


FAULTS = {
    fault.__doc__: fault
    for fault in (
        killed,
        killed_writing,
        stopped,
        disk_full,
        read_only,
        vanishing,
        corrupt,
        short_of_memory,
        clock,
        two_at_once,
        alone,
    )
}
_SHORT = ("SIGKILL between two files", "disk full", "vanishing folder", "two runs in one folder")


def as_table(trials: list[dict], skipped: dict[str, str]) -> str:
    """Markdown: a line for each fault."""
    silent = "without a word"
    heads = ("runs", "survived", "identical", "half written", "left over", f"lost {silent}", f"ended {silent}")
    lines = [f"| fault | {' | '.join(heads)} |", "| --- |" + " ---: |" * len(heads)]
    for fault in dict.fromkeys(one["fault"] for one in trials):
        mine = [one for one in trials if one["fault"] == fault]
        told = [sum(1 for one in mine if one[key]) for key in ("survived", "identical")]
        bad = [sum(len(one[key]) for one in mine) for key in ("half_written", "left_over", "lost")]
        untold = sum(1 for one in mine if not one["told"])
        lines.append(f"| {fault} | {' | '.join(map(str, (len(mine), *told, *bad, untold)))} |")
    everything = [len(trials), *(sum(1 for one in trials if one[key]) for key in ("survived", "identical"))]
    everything += [sum(len(one[key]) for one in trials) for key in ("half_written", "left_over", "lost")]
    everything.append(sum(1 for one in trials if not one["told"]))
    lines.append(f"| **all** | {' | '.join(map(str, everything))} |")
    lines += [f"\nLeft out: {fault} ({why})." for fault, why in skipped.items()]
    return "\n".join(lines)


def own_namespace() -> list[str]:
    """What gives a command mounts and processes of its own, which end with it; nothing where that cannot be."""
    for more in ([], ["--map-root-user"]):
        command = ["unshare", *more, "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"]
        with contextlib.suppress(OSError):
            if subprocess.run([*command, "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True).returncode == 0:
                return command
    return []


def measure(options: argparse.Namespace, base: Path) -> int:
    """All faults that are asked for; 1 where one was not survived as it should be."""
    begun = time.monotonic()
    signal.signal(
        signal.SIGINT, signal.default_int_handler
    )  # which a shell's background has ignored, and what it starts
    stages = tuple(options.stage or (("preprocess", "predict") if options.short else STAGES))
    bench = Bench(base, seed=options.seed, times=options.times, faketime=options.faketime, stages=stages)
    bench.mounts = options.inside == "mounts"
    bench.undisturbed("predict" if options.short else STAGES[-1])
    for name in options.fault or (_SHORT if options.short else FAULTS):
        FAULTS[name](bench)
    trials = [asdict(one) for one in bench.trials]
    found = {"format": 1, "seed": options.seed, "times": options.times, "seconds": round(time.monotonic() - begun, 1)}
    found |= {"undisturbed_seconds": {s: round(v, 2) for s, v in bench.took.items()}, "skipped": bench.skipped}
    if options.output:
        options.output.write_text(json.dumps(found | {"trials": trials}, indent=1))
    print(as_table(trials, bench.skipped))
    say(f"{len(trials)} trials in {time.monotonic() - begun:.0f} s")
    return int(not all(one.sound for one in bench.trials))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="every trial, as JSON")
    parser.add_argument("--folder", type=Path, help="where to work; a new folder in it is removed at the end")
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only this one; may be repeated")
    parser.add_argument("--stage", action="append", choices=STAGES, help="only in this one; may be repeated")
    parser.add_argument("--times", type=int, default=2, help="how often each random harm is done to each stage")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--short", action="store_true", help="a few faults in two stages")
    parser.add_argument("--faketime", type=Path, help="libfaketime.so.1, to turn the clock while a stage runs")
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--inside", choices=("mounts", "plain"), help=argparse.SUPPRESS)
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(FAULTS))
        return 0
    if options.inside:
        return measure(options, options.base)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    around = own_namespace()
    with tempfile.TemporaryDirectory(prefix="medseg-faults-", dir=options.folder, ignore_cleanup_errors=True) as base:
        inside = ["--inside", "mounts" if around else "plain", "--base", base]
        inner = subprocess.Popen([*around, sys.executable, __file__, *sys.argv[1:], *inside], start_new_session=True)
        try:
            return inner.wait()
        finally:
            kill(inner)
            inner.wait()


if __name__ == "__main__":
    sys.exit(main())
