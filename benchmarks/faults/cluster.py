"""Faults on a SLURM: the phantom workflow through the shipped profile, harmed again and again from its first job to its
last, and the same command given until it ends.

    python benchmarks/faults/cluster.py -o cluster.json           all of them: a table, and every harm as JSON
    python benchmarks/faults/cluster.py --fault requeued          some of them; --list names them

The SLURM is that of the tests (tests/cluster/one_machine.py), and as there it wants root. Three phantom tasks are made,
checked, planned, preprocessed, trained (2D and 3D), predicted, scored and reported once undisturbed, once by plain
`snakemake` on this machine, and once for each fault, each time from nothing. Phantoms, plans, preprocessed cases,
weights, label maps and scores are compared bit for bit (`checks.SAME`); every file is read to its end. Only the
number of steps is less than the workflow's own. Several workflows run side by side, so that what is done to the SLURM
(a preemption, its daemons killed) meets others too.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

import checks
from measure import kill, mount, own_namespace, say, umount

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "cluster"))
from one_machine import Slurm, for_this_cluster, run, why_not  # noqa: E402 - the tests' own SLURM

STAGES = ("plan", "preprocess", "train", "predict", "evaluate", "report")
TASKS = ("Phantom_Abdomen", "Phantom_Brain", "Phantom_Prostate")
# A command that takes longer than this is taken to hang, and so many of them are given.
_LONGEST, _CALLS = 1800, 15
# Harm comes so many seconds after a job has ended, at the most: into the middle of another.
_LATE = 12.0


@dataclass
class Trial(checks.Found):
    """One fault: what was done to the workflow and when, how often the command was given, and what came of it."""

    fault: str
    harms: list[str] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)


class Work:
    """The workflow in a folder of its own."""

    def __init__(self, folder: Path, fault: str, slurm: Slurm, options: argparse.Namespace) -> None:
        self.folder, self.results, self.slurm = folder, folder / "results", slurm
        self.trial, self.rng = Trial(fault), random.Random(f"{options.seed} {fault}")
        self.results.mkdir(parents=True)
        shutil.copytree(ROOT / "profiles" / "slurm", folder / "profile")
        for path in (folder / "profile").iterdir():
            path.write_text(for_this_cluster(path.read_text()))
        with (folder / "profile" / "medseg.yaml").open("a") as told:
            fixed = {"steps": options.steps, "machine": "cpu", "memory": "2GiB"}
            phantoms = {"tasks": ["abdomen", "brain", "prostate"], "cases": options.cases, "seed": 0, "budget": {}}
            told.write(f"\nfixed: {json.dumps(fixed)}\nphantoms: {json.dumps(phantoms)}\n")

    def start(self, *options: str, where: str = "", slurm: bool = True) -> subprocess.Popen[str]:
        """As docs/cluster.md has it; or without a cluster, or in another working folder."""
        command = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "Snakefile")]
        told = ["--cores", "2", "--configfile", "profile/medseg.yaml"]
        command += ["--profile", str(self.folder / "profile")] if slurm else told
        folder = self.folder / where
        with (self.folder / "said.txt").open("a") as said:
            return subprocess.Popen([*command, *options], cwd=folder, stdout=said, stderr=said, text=True)

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def jobs(self) -> list[tuple[str, str]]:
        """Number and rule of each that runs."""
        lines = run("squeue", "-h", "-t", "RUNNING", "-o", "%i %Z %k").splitlines()
        mine = [re.match(rf"(\d+) {self.folder}(?:/other)? rule_(\w+?)(?:_wildcards|$)", line) for line in lines]
        return [(found[1], found[2]) for found in mine if found]

    def processes(self, job: str) -> Iterator[int]:
        """Those of medseg in a job; none where SLURM was quicker."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                if path.read_bytes().split(b"\0")[1:3] == [b"-m", b"medseg"]:
                    environment = path.with_name("environ").read_bytes().split(b"\0")
                    if f"SLURM_JOB_ID={job}".encode() in environment:
                        yield int(path.parent.name)

    def digests(self) -> dict[str, str]:
        """SHA-256 by path of all that must be the same."""
        found = checks.phantoms(self.results / "phantoms")
        for task in TASKS:
            found |= {f"{task}/{name}": sha for name, sha in checks.digests(self.results / task, STAGES).items()}
            # It names the task by its whole path, which is another for each fault.
            told = (self.results / task / "run.json").read_text().replace(str(self.folder), "")
            found[f"{task}/run.json"] = told
        return found

    def lost(self) -> list[str]:
        """Cases that were held out and have no score."""
        gone = []
        for task in TASKS:
            held = set(json.loads((self.results / task / "folds.json").read_text())["folds"][0]["validation"])
            for configuration in ("3d", "2d"):
                scored = checks.scored(self.results / task / configuration / "fold0" / "metrics.csv")
                gone += [f"{task} {configuration} {case}" for case in sorted(held - scored)]
        return gone


# ---- harms: what is done at a random moment, in words; nothing where there was nothing to do it to -------------------

Harm = Callable[[Work, subprocess.Popen[str]], str]


def some_job(work: Work) -> tuple[str, str] | None:
    jobs = work.jobs()
    return work.rng.choice(jobs) if jobs else None


def killed_job(work: Work, _: object) -> str:
    """a job's process killed"""
    if (job := some_job(work)) and (processes := list(work.processes(job[0]))):
        with contextlib.suppress(ProcessLookupError):
            os.kill(work.rng.choice(processes), signal.SIGKILL)
        return job[1]
    return ""


def requeued(work: Work, _: object) -> str:
    """requeued"""
    if (job := some_job(work)) and subprocess.run(["scontrol", "requeue", job[0]]).returncode == 0:
        return job[1]
    return ""


def preempted(work: Work, _: object) -> str:
    """preempted"""
    if not (jobs := work.jobs()):
        return ""
    urgent = ("-p", "urgent", "-c", "4", "-o", "/dev/null", "--wrap", "sleep 3")
    if subprocess.run(["sbatch", "-Q", *urgent]).returncode:
        return ""
    time.sleep(3)
    return " ".join(rule for _, rule in jobs)


def cancelled(work: Work, _: object) -> str:
    """cancelled"""
    job = some_job(work)
    return job[1] if job and subprocess.run(["scancel", job[0]]).returncode == 0 else ""


def out_of_time(work: Work, _: object) -> str:
    """hung, and out of time"""
    job = some_job(work)
    if not job or subprocess.run(["scontrol", "update", f"JobId={job[0]}", "TimeLimit=1"]).returncode:
        return ""
    end = time.monotonic() + 180
    while job in work.jobs() and time.monotonic() < end:
        for process in work.processes(job[0]):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGSTOP)
        time.sleep(0.2)
    return job[1]


def interrupted(work: Work, started: subprocess.Popen[str]) -> str:
    """Snakemake: ctrl-C"""
    started.send_signal(signal.SIGINT)
    return ended_by(work, started)


def terminated(work: Work, started: subprocess.Popen[str]) -> str:
    """Snakemake: SIGTERM"""
    started.send_signal(signal.SIGTERM)
    return ended_by(work, started)


def killed(work: Work, started: subprocess.Popen[str]) -> str:
    """Snakemake: killed, its jobs run on"""
    started.kill()
    return ended_by(work, started)


def ended_by(work: Work, started: subprocess.Popen[str]) -> str:
    rules = " ".join(rule for _, rule in work.jobs()) or "no job"
    started.wait(_LONGEST)
    return rules


def dated(work: Work, started: subprocess.Popen[str]) -> str:
    """clock jumps (ctrl-C, all files from 1971 or in ten years)"""
    interrupted(work, started)
    when = work.rng.choice((365 * 86400, time.time() + 10 * 365 * 86400))
    for path in work.results.rglob("*"):
        os.utime(path, (when, when))
    return "1971" if when < time.time() else "in ten years"


def daemons_killed(work: Work, _: object) -> str:
    """SLURM: slurmd killed, slurmctld stopped, back after seconds"""
    rules = " ".join(rule for _, rule in work.jobs()) or "no job"
    with work.slurm.dead():
        time.sleep(work.rng.uniform(1, 5))
    return rules


def disk_full(work: Work, _: object) -> str:
    """disk full"""
    there = os.statvfs(work.results)
    used = (there.f_blocks - there.f_bfree) * there.f_frsize
    more = work.rng.choice((0, work.rng.randint(0, 2**21)))
    mount("-o", f"remount,size={max(4096, used + more)}", work.results)
    held(work)
    mount("-o", "remount,size=2g", work.results)
    return f"room for {more // 1024} KiB"


def read_only(work: Work, _: object) -> str:
    """read-only results"""
    mount("--bind", work.results, work.results)
    mount("-o", "remount,bind,ro", work.results)
    held(work)
    umount(work.results)
    return "read-only"


def vanishing(work: Work, _: object) -> str:
    """results not mounted for a while"""
    mount("-t", "tmpfs", "-o", "size=64m", "tmpfs", work.results)  # an empty folder where they were
    held(work)
    umount(work.results)
    return "empty"


def held(work: Work) -> None:
    time.sleep(work.rng.uniform(2, 8))


# ---- what is done once ---------------------------------------------------------------------------------------------


def out_of_memory(bench: "Bench", work: Work) -> list[int]:
    """out of memory"""
    work.start("--until", "preprocess").wait(_LONGEST)
    kept = {}
    for task in TASKS:
        plan = work.results / task / "plan.json"
        kept[plan] = plan.read_bytes(), plan.stat()
        told = json.loads(kept[plan][0])
        for configuration in told["configurations"].values():
            configuration["cost"] |= {"ram_bytes": 20_000_000, "disk_bytes": 0}
        plan.write_text(json.dumps(told))
        os.utime(plan, ns=(kept[plan][1].st_atime_ns, kept[plan][1].st_mtime_ns))
    statuses = bench.until_done(work)
    for plan, (data, times) in kept.items():
        plan.write_bytes(data)
        os.utime(plan, ns=(times.st_atime_ns, times.st_mtime_ns))
    # A model has its plan beside it, cost and all.
    for path in work.results.rglob("model/plan.json"):
        path.write_bytes((bench.base / "undisturbed" / path.relative_to(work.folder)).read_bytes())
    work.trial.harms += ["a training was given too little, and tried again"] * work.said.count("Trying to restart job")
    return statuses


def broken_case(bench: "Bench", work: Work) -> list[int]:
    """a broken case in each task"""
    work.start("--until", "phantom").wait(_LONGEST)
    kept = {}
    for task in TASKS:
        path = sorted((work.results / "phantoms" / task / "imagesTr").glob("*.nii.gz"))[7]
        kept[path] = path.read_bytes(), path.stat()
        path.write_bytes(kept[path][0][: len(kept[path][0]) // 2])
    status = work.start().wait(_LONGEST)
    for path, (data, times) in kept.items():
        name = path.name.removesuffix(".nii.gz").removesuffix("_0000")
        work.trial.harms.append(f"cut: {name}")
        if f"case {name}" not in work.said:
            work.trial.lost.append(f"{name} was not named")
        path.write_bytes(data)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    return [status, *bench.until_done(work)]


def two_at_once(bench: "Bench", work: Work) -> list[int]:
    """two workflows, one folder of results"""
    (work.folder / "other").mkdir()
    both = [
        work.start("--config", f"results={work.results}", where=where)
        for where in ("", "other")  # Snakemake's own lock is in its working folder
    ]
    statuses = [one.wait(_LONGEST) for one in both]
    work.trial.harms.append(f"two ended with {statuses}")
    return [*statuses, *bench.until_done(work)]


def without_slurm(bench: "Bench", work: Work) -> list[int]:
    """none: without SLURM, on the same machine"""
    return [work.start(slurm=False).wait(_LONGEST)]


AGAIN_AND_AGAIN: dict[str, tuple[Harm, int]] = {
    str(harm.__doc__): (harm, times)
    for harm, times in (
        (killed_job, 8),
        (requeued, 5),
        (preempted, 4),
        (cancelled, 5),
        (out_of_time, 2),
        (interrupted, 4),
        (terminated, 4),
        (killed, 4),
        (daemons_killed, 4),
        (disk_full, 5),
        (read_only, 5),
        (vanishing, 5),
        (dated, 3),
    )
}
ONCE = {str(do.__doc__): do for do in (without_slurm, out_of_memory, broken_case, two_at_once)}
FAULTS = (*AGAIN_AND_AGAIN, *ONCE)
ON_TMPFS = (disk_full.__doc__,)


class Bench:
    """The SLURM, the undisturbed run, and what came of each fault."""

    def __init__(self, base: Path, slurm: Slurm, options: argparse.Namespace) -> None:
        self.base, self.slurm, self.options = base, slurm, options
        self.trials: list[Trial] = []
        self.begun = time.monotonic()

    def undisturbed(self) -> None:
        work, begun = Work(self.base / "undisturbed", "none", self.slurm, self.options), time.monotonic()
        if work.start().wait(_LONGEST):
            raise SystemExit(work.said[-6000:])
        self.whole, self.took = work.digests(), time.monotonic() - begun
        self.jobs = work.said.count("Finished jobid")
        say(f"undisturbed: {self.jobs} jobs in {self.took:.0f} s, {len(self.whole)} files to compare")
        assert not checks.broken(work.results), checks.broken(work.results)
        assert not work.lost()

    def until_done(self, work: Work, harm: Harm | None = None, times: int = 0) -> list[int]:
        """Give the command until it ends with 0. Harm is done at random moments: when so many jobs have ended, some
        seconds later, and once there is something to do it to."""
        ended: list[int] = []
        moments = sorted(work.rng.uniform(0, self.jobs - 1) for _ in range(times))
        while len(ended) < _CALLS:
            started, begun = work.start(), time.monotonic()
            late = work.rng.uniform(0, _LATE)
            while started.poll() is None and time.monotonic() - begun < _LONGEST:
                time.sleep(0.5)
                if not harm or not moments or work.said.count("Finished jobid") < moments[0]:
                    continue
                late -= 0.5
                if late < 0 and work.jobs() and (what := harm(work, started)):
                    work.trial.harms.append(what)
                    moments.pop(0)
                    late = work.rng.uniform(0, _LATE)
            if started.poll() is None:
                started.kill()
            ended.append(started.wait())
            if ended[-1] == 0:
                break
            if "Directory cannot be locked" in work.said[-3000:] or ended[-1] < 0:
                work.start("--unlock").wait(_LONGEST)
        return ended

    def suffer(self, fault: str) -> None:
        begun = time.monotonic()
        work = Work(self.base / f"fault{FAULTS.index(fault)}", fault, self.slurm, self.options)
        one = work.trial
        if fault in ON_TMPFS:
            mount("-t", "tmpfs", "-o", "size=2g", "tmpfs", work.results)
        try:
            one.ended = ONCE[fault](self, work) if fault in ONCE else self.until_done(work, *AGAIN_AND_AGAIN[fault])
        except Exception as error:  # noqa: BLE001 - of this fault alone
            one.ended, one.line = [1], repr(error)
        one.survived = one.ended[-1] == 0
        # Tracebacks of Snakemake's own, of a ctrl-C while it starts, are not medseg's.
        one.told = f'File "{ROOT}/medseg/' not in work.said
        try:
            found = work.digests()
            one.lost += work.lost()
        except OSError as error:
            found, one.line = {}, f"{one.line} {error}"
        one.differ = sorted(name for name in {*found, *self.whole} if found.get(name) != self.whole.get(name))
        one.identical = not one.differ
        one.half_written, one.left_over = checks.broken(work.results), checks.left_over(work.results)
        one.seconds = time.monotonic() - begun
        self.trials.append(one)
        self.record()
        say(f"{fault}: {len(one.harms)} harms, ended {one.ended}, {one.seconds:.0f} s{'' if one.sound else ' BAD'}")
        if not one.sound:
            say(json.dumps(asdict(one) | {"differ": one.differ[:20]}, indent=1))
        if os.path.ismount(work.results):
            umount(work.results)
        if one.sound or not self.options.keep:
            shutil.rmtree(work.folder)

    def record(self) -> list[dict]:
        """What came of those that have ended; kept."""
        trials = sorted((asdict(one) for one in self.trials), key=lambda one: FAULTS.index(one["fault"]))
        told = {name: getattr(self.options, name) for name in ("seed", "steps", "cases", "at_once")}
        told |= {"undisturbed_seconds": round(self.took, 1), "seconds": round(time.monotonic() - self.begun, 1)}
        if self.options.output:
            self.options.output.write_text(json.dumps({"format": 1, **told, "trials": trials}, indent=1))
        return trials


def table(trials: list[dict]) -> str:
    """Markdown: a line for each fault; how often harm was done and the command given beside what came of it."""
    heads = ("fault", "harms", "commands", "survived", "identical", "half written", "left over", "lost without a word")
    lines = [f"| {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) - 1)]
    for one in trials:
        counts = (len(one["harms"]), len(one["ended"]))
        good = ("yes" if one[key] else "**no**" for key in ("survived", "identical"))
        bad = (len(one[key]) for key in ("half_written", "left_over", "lost"))
        lines.append(f"| {one['fault']} | {' | '.join(map(str, (*counts, *good, *bad)))} |")
    return "\n".join(lines)


def measure(options: argparse.Namespace, base: Path) -> int:
    """All faults that are asked for; 1 where one was not survived as it should be."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background has ignored
    with Slurm(base / "slurm") as slurm:
        bench = Bench(base, slurm, options)
        bench.undisturbed()
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(bench.suffer, options.fault or FAULTS))
    trials = bench.record()
    print(table(trials))
    return int(not all(one.sound for one in bench.trials))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, help="every trial, as JSON")
    parser.add_argument("--folder", type=Path, help="where to work; a new folder in it is removed at the end")
    parser.add_argument("--fault", action="append", choices=FAULTS, help="only this one; may be repeated")
    parser.add_argument("--steps", type=int, default=40, help="of each training")
    parser.add_argument("--cases", type=int, default=20, help="of each task")
    parser.add_argument(
        "--at-once", type=int, default=6, help="so many of them side by side: SLURM lets a requeued job wait"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", action="store_true", help="the folders of what went wrong")
    parser.add_argument("--list", action="store_true", help="name the faults")
    parser.add_argument("--base", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.list:
        print("\n".join(FAULTS))
        return 0
    if options.base:
        return measure(options, options.base)
    if reason := why_not():
        raise SystemExit(reason)
    if not (around := own_namespace()):
        raise SystemExit("nothing can be mounted here")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    base = Path(tempfile.mkdtemp(prefix="medseg-cluster-", dir=options.folder))
    command = [*around, sys.executable, __file__, *sys.argv[1:], "--base", str(base)]
    inner = subprocess.Popen(command, start_new_session=True)
    try:
        return inner.wait()
    finally:
        kill(inner)  # and with it all that it started: the first process of a namespace hears nothing else
        inner.wait()
        if not options.keep:
            shutil.rmtree(base, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
