"""A cluster that segments an archive, simulated: what would it take, and what would be wasted?

    python benchmarks/scale/simulate.py [WORK/scans.json] [--seed 0] > table.md

Nothing is run. N nodes with slots start shards; each start takes a while (queue, container, model); scans take as long
as those that measure.py measured, or as a large CT; a slot computes a scan while the next is read and the last written,
at the bandwidth that all share; nodes fail, jobs are preempted, and are put back into the queue. A shard goes on by its
log, so what is lost is what was under way. Seeded: the same numbers each time.
"""

from __future__ import annotations

import argparse
import heapq
import json
from collections import deque
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Kind:
    """A kind of scan: seconds of computing (drawn from these), bytes read and written, cores of a slot."""

    name: str
    seconds: np.ndarray
    read: float
    write: float
    cores: int


@dataclass(frozen=True)
class Cluster:
    nodes: int = 64
    slots: int = 4
    start: float = 20.0  # seconds from the job's start to its first scan
    submit: float = 0.04  # seconds that the workflow takes to start a job, one after another
    plan: float = 0.0013  # and to plan it
    requeue: float = 120.0  # until a job that was ended is queued again
    failures: float = 1 / 2000  # of a node, in an hour
    preemptions: float = 1 / 50  # of a job, in an hour
    retries: int = 3
    bandwidth: float = 2e9  # bytes a second, of the file system, for all
    jobs_at_once: int = 1000  # that the scheduler takes, waiting ones included
    limit: float = 24 * 3600.0  # a job's time


@dataclass
class Outcome:
    wall: float = 0.0
    busy: float = 0.0
    useful: float = 0.0
    starts: float = 0.0
    wasted: float = 0.0
    jobs: int = 0
    ended: int = 0
    calls: int = 1
    plan: float = 0.0
    slowed: float = 1.0
    finished: bool = True


# Of the workflow, until it is thought to come to no end.
MOST_CALLS = 20


def simulate(scans: int, per_shard: int, kind: Kind, cluster: Cluster, seed: int, resumes: bool = True) -> Outcome:
    """Shards are events, scans within one are added up: seconds of all of a shard's scans at once, where it stops in
    the midst of them is found by bisection. So a million scans take a second or two."""
    rng = np.random.default_rng(seed)
    count = -(-scans // per_shard)
    slots = cluster.nodes * cluster.slots
    at_once = min(slots, count, cluster.jobs_at_once)
    out = Outcome(plan=cluster.plan * count)
    # Bytes a second that all would move if nothing held them up; what is more than there are slows all down alike.
    mean = float(kind.seconds.mean())
    wanted = at_once * (kind.read + kind.write) / mean
    out.slowed = max(1.0, wanted / cluster.bandwidth)
    progress = [0] * count  # scans done
    tries = np.zeros(count, dtype=int)
    ends_at: dict[int, np.ndarray] = {}  # seconds at which each scan of a shard ends, from its first

    def lengths(shard: int) -> np.ndarray:
        if shard not in ends_at:
            n = min(per_shard, scans - shard * per_shard)
            own = np.random.default_rng((seed, shard))
            ends_at[shard] = np.cumsum(kind.seconds[own.integers(0, len(kind.seconds), n)]) * out.slowed
        return ends_at[shard]

    free = slots
    queue: deque[int] = deque(range(count))
    # (time, what, shard): "ready" puts a shard back into the queue, "end" frees a slot.
    events: list[tuple[float, int, str, int]] = []
    given_up: list[int] = []
    number, now, submitted_at, running = 0, 0.0, out.plan, 0
    hazard = (cluster.failures + cluster.preemptions) / 3600
    while queue or events:
        while queue and free and running < cluster.jobs_at_once:
            shard = queue.popleft()
            submitted_at = max(submitted_at, now) + cluster.submit
            out.jobs += 1
            tries[shard] += 1
            free -= 1
            running += 1
            ends = lengths(shard)
            done = progress[shard] if resumes else 0
            before = ends[done - 1] if done else 0.0
            left = cluster.start + float(ends[-1] - before)
            stop = min(rng.exponential(1 / hazard) if hazard else np.inf, cluster.limit)
            lasts = min(left, stop)
            out.busy += lasts
            out.starts += min(cluster.start, lasts)
            if stop < left:
                out.ended += 1
                until = max(0.0, stop - cluster.start) + before
                reached = int(np.searchsorted(ends, until, side="right"))
                kept = max(reached, done) if resumes else 0
                worth = float((ends[kept - 1] if kept else 0.0) - before) if kept > done else 0.0
                out.useful += worth
                out.wasted += max(0.0, stop - cluster.start) - worth
                progress[shard] = kept
                again = tries[shard] <= cluster.retries
                if not again:
                    given_up.append(shard)
                heapq.heappush(events, (submitted_at + lasts, number, "end", -1))
                if again:
                    heapq.heappush(events, (submitted_at + lasts + cluster.requeue, number + 1, "ready", shard))
            else:
                out.useful += left - cluster.start
                progress[shard] = len(ends)
                ends_at.pop(shard, None)
                heapq.heappush(events, (submitted_at + lasts, number, "end", -1))
            number += 2
        now, _, what, shard = heapq.heappop(events)
        out.wall = max(out.wall, now)
        if what == "end":
            free += 1
            running -= 1
        else:
            queue.append(shard)
        if given_up and not queue and not events and out.calls < MOST_CALLS:
            # A person says the same command again; what was done is not begun anew.
            out.calls += 1
            tries[:] = 0
            queue.extend(given_up)
            given_up = []
    out.finished = not given_up
    return out


def row(scans: int, per_shard: int, kind: Kind, cluster: Cluster, seed: int) -> list[str]:
    made = simulate(scans, per_shard, kind, cluster, seed)
    hours = made.busy * kind.cores / 3600
    least = float(kind.seconds.mean()) * scans / min(cluster.nodes * cluster.slots, scans)
    return [
        f"{scans:,}", kind.name, f"{per_shard:,}", f"{made.jobs:,}", f"{made.ended:,}", f"{made.calls}",
        clock(made.wall), f"{made.wall / least:.2f}", f"{hours:,.1f}" if hours < 100 else f"{hours:,.0f}",
        f"{100 * made.starts / made.busy:.1f}", f"{100 * made.wasted / made.busy:.2f}",
        f"{scans * kind.read / made.wall / 1e6:,.1f}", f"{2 * scans / made.wall:,.1f}",
    ]  # fmt: skip


HEAD = [
    "scans", "kind", "scans a shard", "jobs started", "ended early", "calls", "wall time", "wall / ideal",
    "core hours", "starting (%)", "wasted (%)", "read (MB/s)", "results (files/s)",
]  # fmt: skip


def clock(seconds: float) -> str:
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.1f} s"


def table(rows: list[list[str]], head: list[str]) -> None:
    print("| " + " | ".join(head) + " |")
    print("| " + " | ".join("---" if name == "kind" else "---:" for name in head) + " |")
    for one in rows:
        print("| " + " | ".join(one) + " |")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("measured", type=Path, nargs="?", help="scans.json of measure.py")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ct-seconds", type=float, default=90.0, help="of a large CT, on the cores of a slot")
    parser.add_argument("--ct-megabytes", type=float, default=100.0)
    given = parser.parse_args()
    told = json.loads(given.measured.read_text()) if given.measured else {}
    rng = np.random.default_rng(given.seed)
    seconds = np.array(told.get("scan_seconds") or rng.lognormal(-0.8, 0.2, 1000))
    crop = Kind("crop", seconds, told.get("bytes_in", 6e4), told.get("bytes_out", 3e3), 2)
    spread = np.exp(rng.normal(0, 0.5, 4000) - 0.125)
    ct = Kind("CT", given.ct_seconds * spread, given.ct_megabytes * 1e6, 1e6, 4)
    one, cluster, seed = Cluster(nodes=1, slots=1, failures=0, preemptions=0, start=4), Cluster(), given.seed

    print("## One machine\n")
    table([row(n, min(n, 500), k, one, seed) for k in (crop, ct) for n in (100, 1000, 10_000)], HEAD)
    print(f"## {cluster.nodes} nodes with {cluster.slots} slots\n")
    sizes = {100: (1, 10), 1000: (10, 100), 10_000: (1, 100, 1000), 100_000: (100, 500, 2000),
             1_000_000: (100, 2000, 5000, 10_000)}  # fmt: skip
    table([row(n, p, crop, cluster, seed) for n in sizes for p in sizes[n]], HEAD)
    sizes = {100: (1, 10), 1000: (1, 4, 40), 10_000: (1, 10, 40, 200), 100_000: (1, 10, 40, 200),
             1_000_000: (10, 40, 200, 1000)}  # fmt: skip
    table([row(n, p, ct, cluster, seed) for n in sizes for p in sizes[n]], HEAD)
    print("## 100,000 CT: what goes wrong more often\n")
    for name, change in (
        ("as above", {}),
        ("preempted every 2 hours", {"preemptions": 0.5}),
        ("preempted every half hour", {"preemptions": 2.0}),
        ("a tenth of the bandwidth", {"bandwidth": cluster.bandwidth / 10}),
        ("a start takes 3 minutes", {"start": 180.0}),
    ):
        rows = [row(100_000, p, ct, replace(cluster, **change), seed) for p in (10, 40, 200)]
        print(f"{name}:\n")
        table(rows, HEAD)
    print("## The same without logs: a shard begins anew when it was ended\n")
    rows = []
    for preemptions in (1 / 50, 0.5, 2.0):
        for per_shard in (10, 40, 200):
            made = simulate(100_000, per_shard, ct, replace(cluster, preemptions=preemptions), seed, resumes=False)
            rows.append([f"{preemptions:g}", str(per_shard), clock(made.wall) if made.finished else "no end",
                         str(made.calls), f"{100 * made.wasted / made.busy:.1f}"])  # fmt: skip
    table(rows, ["preemptions an hour", "scans a shard", "wall time", "calls", "wasted (%)"])


if __name__ == "__main__":
    main()
