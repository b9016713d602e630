"""The workflow on a real SLURM of one machine: what is cancelled, preempted, requeued, killed or out of time or memory
ends with the weights and the scores of the run that nothing disturbed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from one_machine import BRITTLE, Slurm, for_this_cluster, lose, run, why_not

ROOT = Path(__file__).parents[2]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(why_not() is not None, reason=f"no SLURM: {why_not()}"),
]
TASK, PATIENCE = "Task98_Tiny", 900


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    pytest.importorskip("snakemake_executor_plugin_slurm")
    with Slurm(tmp_path_factory.mktemp("slurm")) as slurm:
        yield slurm


class Workflow:
    """One in a folder of its own, through the shipped profile."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.run = folder, folder / "results" / TASK
        self.model = self.run / "3d" / "fold0" / "model"

    def start(self, *options: str, **config: object) -> subprocess.Popen[str]:
        """As docs/cluster.md has it, and ``config`` beside it."""
        asked = {"tasks": TASK, "configurations": "[3d]", "of_folds": 3, "budget": "15s"} | config
        command = [sys.executable, "-m", "snakemake", "--snakefile", ROOT / "Snakefile", "--profile", "profile"]
        command += [*options, "--config", *(f"{key}={value}" for key, value in asked.items())]
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as in a shell's background, and of children too
            signal.signal(signal.SIGINT, signal.default_int_handler)
        with (self.folder / "said.txt").open("a") as said:
            return subprocess.Popen(command, cwd=self.folder, stdout=said, stderr=said, text=True)

    def finish(self, *options: str) -> None:
        assert self.start(*options).wait(PATIENCE) == 0, self.said[-6000:]

    @property
    def said(self) -> str:
        return (self.folder / "said.txt").read_text()

    def job(self) -> str:
        """The number of the training's job once it has left a checkpoint and runs on."""
        return until(lambda: self._running() if self.checkpoint() else None, lambda: self.said[-3000:])

    def checkpoint(self) -> bool:
        return any((self.run / "checkpoints").rglob("checkpoint.safetensors"))

    def _running(self) -> str | None:
        lines = run("squeue", "-h", "-t", "RUNNING", "-o", "%i %Z %k").splitlines()
        mine = [line.split()[0] for line in lines if f" {self.folder} " in line and "rule_train" in line]
        return mine[0] if mine else None

    def send(self, number: signal.Signals) -> None:
        """To the processes that train; none where SLURM was quicker."""
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                words = path.read_bytes().split(b"\0")
                if words[1:4] == [b"-m", b"medseg", b"train"] and path.with_name("cwd").readlink() == self.folder:
                    os.kill(int(path.parent.name), number)

    def ended(self) -> tuple[dict[str, bytes], str]:
        """The weights, and the scores of each case."""
        weights = {path.name: path.read_bytes() for path in sorted(self.model.glob("*.safetensors"))}
        assert weights
        return weights, (self.run / "3d" / "fold0" / "metrics.csv").read_text()

    def copy(self, folder: Path) -> Workflow:
        """Another, planned and preprocessed as this one was, and not trained."""
        subprocess.run(["cp", "-a", self.folder, folder], check=True)
        other = Workflow(folder)
        shutil.rmtree(other.run / "3d" / "fold0")
        shutil.rmtree(other.run / "checkpoints")
        for path in other.run.glob("report.*"):
            path.unlink()
        (folder / "said.txt").unlink()
        return other


def until(found: Callable[[], str | None], otherwise: Callable[[], str]) -> str:
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        if (value := found()) is not None:
            return value
        time.sleep(0.2)
    raise AssertionError(otherwise())


@pytest.fixture(scope="module")
def undisturbed(cluster: Slurm, tiny_task: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Workflow:
    folder = tmp_path_factory.mktemp("undisturbed")
    tiny_task(folder / TASK, cases=6)
    shutil.copytree(ROOT / "profiles" / "slurm", folder / "profile")
    for path in (folder / "profile").iterdir():
        path.write_text(for_this_cluster(path.read_text()))
    made = Workflow(folder)
    made.finish()
    return made


# ---- what is told before anything starts --------------------------------------------------------


def refused(work: Workflow, **config: object) -> str:
    """What a workflow says that starts nothing."""
    assert work.start(**config).wait(PATIENCE) != 0
    assert str(work.folder) not in run("squeue", "-h", "-t", "all", "-o", "%Z")
    assert "othing was started" in work.said
    return work.said


def test_a_profile_as_it_is_shipped_names_no_partition(undisturbed: Workflow, tmp_path: Path) -> None:
    work = undisturbed.copy(tmp_path / "work")
    shutil.copy(ROOT / "profiles/slurm/config.yaml", work.folder / "profile" / "config.yaml")
    said = refused(work)
    names = f"{BRITTLE}, calm, normal, scavenge, urgent"
    assert said.count(f"the profile names no partition (slurm_partition): write one of these into it: {names}") == 1


@pytest.mark.parametrize("key", ["device", "memory_mb"])
def test_what_would_be_taken_from_the_login_node(undisturbed: Workflow, tmp_path: Path, key: str) -> None:
    work = undisturbed.copy(tmp_path / "work")
    (work.folder / "profile" / "medseg.yaml").write_text({"device": "memory_mb: 2000", "memory_mb": "device: cpu"}[key])
    assert f"jobs run on other machines, and {key} is taken from this one" in refused(work, threads=1)


def test_a_plan_that_fits_no_node(undisturbed: Workflow, tmp_path: Path) -> None:
    work = undisturbed.copy(tmp_path / "work")
    plan = work.run / "plan.json"
    told = json.loads(plan.read_text())
    told["configurations"]["3d"]["cost"] |= {"ram_bytes": 50_000_000_000}
    plan.write_text(json.dumps(told))
    said = refused(work, memory_mb=500000)
    assert re.search(r"train asks for 1 core, 6\d{4} MB and 0 GPUs, and no node of normal has them", said), said[-3000:]


def test_a_task_that_a_node_does_not_see(cluster: Slurm, undisturbed: Workflow, tmp_path: Path) -> None:
    work = undisturbed.copy(tmp_path / "work")
    with cluster.without(work.folder / TASK):
        assert f"cannot read {work.folder / TASK / 'dataset.json'}" in refused(work)


@pytest.mark.parametrize("partition", ["normal", "urgent", "scavenge"])
def test_a_partition_that_ends_what_it_preempts_is_told(cluster: Slurm, tmp_path: Path, partition: str) -> None:
    wanted = {"results": str(tmp_path), "slurm": True, "jobs": [{"rule": "train", "partition": partition}]}
    command = [sys.executable, "-m", "medseg", "preflight"]
    told = subprocess.run(command, input=json.dumps(wanted), capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert ("scavenge ends the jobs that it preempts" in told.stderr) == (partition == "scavenge")


# ---- what happens to a training -----------------------------------------------------------------


def requeued(work: Workflow) -> None:
    """By whoever runs the cluster."""
    started = work.start()
    assert subprocess.run(["scontrol", "requeue", work.job()]).returncode == 0
    assert started.wait(PATIENCE) == 0, work.said[-6000:]


def preempted(work: Workflow) -> None:
    """By a job of a partition that goes first and wants the whole machine."""
    started = work.start()
    job = work.job()
    subprocess.run(["sbatch", "-p", "urgent", "-c", "4", "-o", "/dev/null", "--wrap", "sleep 4"], check=True)
    until(lambda: "" if f"{job} RUNNING" not in run("squeue", "-h", "-o", "%i %T") else None, lambda: "not preempted")
    assert started.wait(PATIENCE) == 0, work.said[-6000:]


def node_lost(work: Workflow) -> None:
    """With all that ran on it; SLURM starts the job again on another."""
    started = work.start("--set-resources", f"train:slurm_partition={BRITTLE}")
    job = work.job()
    assert run("squeue", "-h", "-j", job, "-o", "%N") == BRITTLE
    lose(BRITTLE, job)
    until(lambda: job if f"{job} PENDING" in run("squeue", "-h", "-o", "%i %T") else None, lambda: shown(job))
    assert started.wait(PATIENCE) == 0, work.said[-6000:]


def out_of_time(work: Workflow) -> None:
    """As on a node that hangs: it does not get on until its minute is over, also where it was preempted meanwhile."""
    started = work.start()
    job = work.job()
    assert subprocess.run(["scontrol", "update", f"JobId={job}", "TimeLimit=1"]).returncode == 0

    def hung() -> str | None:
        work.send(signal.SIGSTOP)
        return "" if "TIMEOUT" in work.said else None

    until(hung, lambda: work.said[-6000:])
    assert started.wait(PATIENCE) == 0, work.said[-6000:]


def out_of_memory(work: Workflow) -> None:
    """The plan reckons too little; each retry asks for half as much again."""
    plan = work.run / "plan.json"
    told = json.loads(plan.read_text())
    told["configurations"]["3d"]["cost"] |= {"ram_bytes": 50_000_000, "disk_bytes": 0}
    times = plan.stat()
    plan.write_text(json.dumps(told))
    os.utime(plan, ns=(times.st_atime_ns, times.st_mtime_ns))
    work.finish()
    asked = [int(n) for n in re.findall(r"mem_mb=(\d+), .*runtime=\d+, gpu=0|mem_mb=(\d+)", work.said) for n in n if n]
    assert 362 in asked, asked
    assert 543 in asked, asked


def cancelled(work: Workflow) -> None:
    """Its job, by somebody else; squeue tells."""
    started = work.start()
    subprocess.run(["scancel", work.job()], check=True)
    assert started.wait(PATIENCE) == 0, work.said[-6000:]


def interrupted(work: Workflow) -> None:
    """Snakemake, by ctrl-C: it cancels its jobs, and goes on when it is started again."""
    started = work.start()
    job = work.job()
    started.send_signal(signal.SIGINT)
    assert started.wait(PATIENCE) != 0
    until(lambda: "" if f"{job} RUNNING" not in run("squeue", "-h", "-o", "%i %T") else None, lambda: "job goes on")
    work.finish()


def killed(work: Workflow) -> None:
    """Snakemake, by SIGKILL: its job runs on, and the one of the next start waits for it. It is not requeued, or it
    would remove what it made and make it again, when others work with it."""
    unmoved = ("--set-resources", "train:slurm_partition=calm")  # where it is not preempted before the next start
    first = left_alone(work, *unmoved)
    again = work.start(*unmoved)
    waited = f"waited for: 1 job of an earlier start ({first})"
    until(lambda: first if waited in work.said else None, lambda: work.said[-6000:])
    assert "Requeue=0" in shown(first)
    assert subprocess.run(["scontrol", "requeue", first]).returncode != 0
    work.send(signal.SIGCONT)
    assert again.wait(PATIENCE) == 0, work.said[-6000:]
    assert first not in run("squeue", "-h", "-o", "%i").split()


def killed_and_requeued(work: Workflow) -> None:
    """Its job waits again when the next start comes, which withdraws it: nobody waits for what has not begun."""
    first = left_alone(work)

    def held() -> str | None:
        for verb in ("requeuehold", "hold"):  # whether it was preempted meanwhile or not
            subprocess.run(["scontrol", verb, first], capture_output=True)
        return first if f"{first} PENDING" in run("squeue", "-h", "-o", "%i %T") else None

    until(held, lambda: shown(first))
    work.finish()
    assert f"withdrawn: 1 job of an earlier start ({first})" in work.said
    assert first not in run("squeue", "-h", "-o", "%i").split()


def left_alone(work: Workflow, *options: str) -> str:
    """The number of a training's job whose Snakemake was killed; it stands still, so as not to end before the next."""
    started = work.start(*options)
    first = work.job()
    work.send(signal.SIGSTOP)
    started.kill()
    started.wait()
    assert first in run("squeue", "-h", "-o", "%i").split()
    work.finish("--unlock")
    return first


def shown(job: str) -> str:
    """What SLURM knows of it, a while after its end too."""
    return run("scontrol", "show", "job", job)


FAULTS = (
    requeued,
    preempted,
    node_lost,
    out_of_time,
    out_of_memory,
    cancelled,
    interrupted,
    killed,
    killed_and_requeued,
)


@pytest.fixture(scope="module")
def faults(undisturbed: Workflow, tmp_path_factory: pytest.TempPathFactory) -> dict[str, object]:
    """What became of each, all at once: the ended workflow, or what went wrong."""
    folder = tmp_path_factory.mktemp("faults")

    def suffer(fault: Callable[[Workflow], None]) -> object:
        work = undisturbed.copy(folder / fault.__name__)
        try:
            fault(work)
        except Exception as error:  # noqa: BLE001 - told by the test of this fault
            return error
        return work

    with ThreadPoolExecutor(len(FAULTS)) as pool:
        return dict(zip((fault.__name__ for fault in FAULTS), pool.map(suffer, FAULTS), strict=True))


@pytest.mark.parametrize("fault", [fault.__name__ for fault in FAULTS])
def test_what_is_disturbed_ends_as_what_is_not(faults: dict[str, object], undisturbed: Workflow, fault: str) -> None:
    found = faults[fault]
    if isinstance(found, Exception):
        raise found
    assert isinstance(found, Workflow)
    assert found.ended() == undisturbed.ended()
    assert not list(found.run.rglob("*.part"))


@pytest.mark.parametrize("fault", ["killed", "killed_and_requeued"])
def test_a_second_call_has_nothing_to_do(faults: dict[str, object], fault: str) -> None:
    found = faults[fault]
    assert isinstance(found, Workflow)
    found.finish("--dry-run")
    assert "Nothing to be done" in found.said
