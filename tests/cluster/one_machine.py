"""A SLURM of one machine, without systemd: slurmctld, slurmd and munged, as Debian's slurm-wlm has them.

    python tests/cluster/one_machine.py

starts one, says how to use it, and stops it on ctrl-C. It wants root, since slurm.conf must sit in its usual place;
one that it did not write is left alone.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

ETC = Path("/etc/slurm")
PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "squeue", "scancel", "scontrol", "sinfo")
BRITTLE = "brittle"
_MARK = "# written by medseg's tests\n"
# More cores than there are, so that several small jobs run at once; a character device stands for a GPU. Memory is
# looked at each second, and a job that takes more than it asked for is ended. Only a job that asks for it is requeued.
# A second node, to be lost, is the first choice of a partition of its own.
_CONF = """{mark}ClusterName=medseg
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
AuthType=auth/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
AccountingStorageType=accounting_storage/none
SchedulerParameters=sched_interval=1,batch_sched_delay=0,bf_interval=1
SlurmdParameters=config_overrides
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=0
GresTypes=gpu
ReturnToService=2
MinJobAge=300
KillWait=5
OverTimeLimit=0
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdSpoolDir={folder}/spool-%n
StateSaveLocation={folder}/state
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 CoresPerSocket=4 RealMemory=16000 Gres=gpu:1 Weight=2 State=UNKNOWN
NodeName={brittle} NodeHostname={host} NodeAddr=127.0.0.1 Port=16818 CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=normal Nodes={host} Default=YES MaxTime=120 DefaultTime=10 PriorityTier=1 State=UP
PartitionName=urgent Nodes={host} MaxTime=120 DefaultTime=10 PriorityTier=10 PreemptMode=OFF State=UP
PartitionName=calm Nodes={host} MaxTime=120 DefaultTime=10 PriorityTier=1 PreemptMode=OFF State=UP
PartitionName=scavenge Nodes={host} MaxTime=120 DefaultTime=10 PriorityTier=1 PreemptMode=CANCEL State=UP
PartitionName={brittle} Nodes={brittle},{host} MaxTime=120 DefaultTime=10 PriorityTier=1 State=UP
"""


def why_not() -> str | None:
    """Why no such SLURM can be started here; None where it can."""
    if missing := [name for name in PROGRAMS if shutil.which(name) is None and not Path(f"/usr/sbin/{name}").exists()]:
        return f"there is no {missing[0]}"
    if os.geteuid() != 0:
        return "only root can start it"
    conf = ETC / "slurm.conf"
    if conf.exists() and not conf.read_text().startswith(_MARK):
        return f"{conf} is someone else's"
    return None


class Slurm:
    """A running one, whose state and logs are in ``folder``; a context."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.host = socket.gethostname().split(".")[0]
        self._own: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Slurm:
        host = self.host
        (self.folder / "state").mkdir(parents=True, exist_ok=True)
        ETC.mkdir(exist_ok=True)
        (ETC / "slurm.conf").write_text(_CONF.format(mark=_MARK, host=host, folder=self.folder, brittle=BRITTLE))
        (ETC / "gres.conf").write_text(f"{_MARK}NodeName={host} Name=gpu File=/dev/zero\n")
        try:
            self._munge()
            self._start("slurmd", "-D", "-N", BRITTLE)
            self._start("slurmctld", "-D")
            self._start("slurmd", "-D", "-N", host)
            for node in (host, BRITTLE):
                self._until_idle(node)
        except BaseException:
            self._stop()
            raise
        return self

    @contextlib.contextmanager
    def without(self, folder: Path) -> Iterator[None]:
        """The node does not see what is in a folder, as where it was not mounted."""
        self._restart_node(
            "unshare", "--mount", "sh", "-c", f"mount -t tmpfs none {folder}; exec slurmd -D -N {self.host}"
        )
        try:
            yield
        finally:
            self._restart_node("slurmd", "-D", "-N", self.host)

    @contextlib.contextmanager
    def dead(self) -> Iterator[None]:
        """The node's daemon is killed and the controller stopped, and both are started again; jobs run on. (A
        controller that is killed forgets its last jobs, gives their numbers anew, and SLURM drains the node.)"""
        node, controller = self._own.pop(), self._own.pop()
        node.kill()
        controller.send_signal(signal.SIGTERM)
        for process in (node, controller):
            process.wait(20)
        yield
        self._start("slurmctld", "-D")
        self._start("slurmd", "-D", "-N", self.host)
        self._until(lambda: run("sinfo", "-h", "-o", "%T") != "", "slurmctld is silent")

    def _until_idle(self, node: str) -> None:
        self._until(lambda: "idle" in run("sinfo", "-h", "-n", node, "-o", "%T"), f"node {node} is not idle")

    def _restart_node(self, *command: str) -> None:
        node = self._own.pop()
        node.send_signal(signal.SIGTERM)
        node.wait(20)
        self._start(*command)
        self._until_idle(self.host)

    def __exit__(self, *_: object) -> None:
        subprocess.run(["scancel", "--user", "root"], check=False)
        self._until(lambda: not run("squeue", "-h", "-t", "PENDING,RUNNING,COMPLETING"), "jobs go on", patience=20)
        self._stop()

    def _stop(self) -> None:
        for process in reversed(self._own):
            process.send_signal(signal.SIGTERM)
        for process in reversed(self._own):
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
        for name in ("slurm.conf", "gres.conf"):
            (ETC / name).unlink(missing_ok=True)

    def _munge(self) -> None:
        if subprocess.run(["munge", "-n"], capture_output=True).returncode == 0:
            return
        run_folder, key = Path("/run/munge"), Path("/etc/munge/munge.key")
        run_folder.mkdir(exist_ok=True)
        user = pwd.getpwnam("munge")
        if not key.exists():
            key.write_bytes(os.urandom(1024))
            os.chown(key, user.pw_uid, user.pw_gid)
            key.chmod(0o400)
        os.chown(run_folder, user.pw_uid, user.pw_gid)
        run_folder.chmod(0o755)
        with (self.folder / "munged.out").open("wb") as out:
            how = {"user": "munge", "group": "munge", "extra_groups": [], "stdout": out, "stderr": out}
            self._own.append(subprocess.Popen(["/usr/sbin/munged", "--foreground"], **how))  # type: ignore[call-overload]
        self._until(lambda: subprocess.run(["munge", "-n"], capture_output=True).returncode == 0, "munged is silent")

    def _start(self, name: str, *options: str) -> None:
        program = shutil.which(name) or f"/usr/sbin/{name}"
        with (self.folder / f"{name}.out").open("wb") as out:
            self._own.append(subprocess.Popen([program, *options], stdout=out, stderr=out, start_new_session=True))

    def _until(self, reached: object, otherwise: str, patience: float = 30) -> None:
        until = time.monotonic() + patience
        while time.monotonic() < until:
            if reached():  # type: ignore[operator]
                return
            time.sleep(0.1)
        logs = "\n".join(path.read_text(errors="replace")[-2000:] for path in self.folder.glob("slurm*.log"))
        raise RuntimeError(f"{otherwise}\n{logs}")


def run(*command: str) -> str:
    """What one of SLURM's programs prints; nothing where it fails."""
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def lose(node: str, job: str) -> None:
    """The power of a node goes, in the midst of its only job: its daemon and processes die, and none of them tells.
    SLURM is told that the node is down, which it would find out in minutes."""
    named = {process: " ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])}
    daemons = [p for p, words in named.items() if words.endswith(f"slurmd -D -N {node}")]
    steps = [p for p, words in named.items() if words.startswith(f"slurmstepd: [{job}.")]
    below = [child for step in steps for child in step.children(recursive=True)]
    for process in daemons + steps + below:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    subprocess.run(["scontrol", "update", f"NodeName={node}", "State=DOWN", "Reason=lost"], check=True)


def for_this_cluster(profile: str) -> str:
    """As docs/cluster.md says to edit it; and less patient, since this cluster is quick."""
    profile = re.sub(r"\nset-resources:\n(  - .*\n)+", "\n", profile.replace("CHANGE-ME", "normal"))
    for before, after in (("device: cuda", "device: cpu"), ("mb: 32000", "mb: 2000"), ("threads: 8", "threads: 1")):
        profile = profile.replace(before, after)
    return profile.replace("latency-wait: 60", "latency-wait: 5").replace("checks: 20", "checks: 2")


def main() -> None:
    import tempfile

    if reason := why_not():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder, Slurm(Path(folder)):
        for number in (signal.SIGINT, signal.SIGTERM):  # what a shell's background starts ignores ctrl-C
            signal.signal(number, signal.default_int_handler)
        sys.stdout.write(run("sinfo") + "\nctrl-C ends it\n")
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()


if __name__ == "__main__":
    main()
