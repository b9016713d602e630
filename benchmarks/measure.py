"""Run a command some times; print its wall time, its processor time and the peak memory, all children included.

    python benchmarks/measure.py --repeat 3 medseg check data/Task04_Hippocampus

Memory is the resident size of the whole process tree, summed every 50 ms; pages that processes
share are counted for each. The command's own output goes to standard error.
"""

import argparse
import resource
import statistics
import subprocess
import sys
import threading
import time

import psutil


def tree_bytes(pid: int) -> int:
    """Resident bytes of a process and all its descendants."""
    total = 0
    try:
        parent = psutil.Process(pid)
        for process in (parent, *parent.children(recursive=True)):
            try:
                total += process.memory_info().rss
            except psutil.Error:
                continue
    except psutil.Error:
        pass
    return total


def processor_seconds() -> float:
    """Processor time of all children that have ended, and of theirs."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def run(command: list[str]) -> tuple[float, float, int]:
    """Seconds by the clock, of the processor, and peak bytes of one run; exits where it fails."""
    peak, done = 0, threading.Event()
    started, spent = time.perf_counter(), processor_seconds()
    child = subprocess.Popen(command, stdout=sys.stderr)

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.05):
            peak = max(peak, tree_bytes(child.pid))

    watcher = threading.Thread(target=watch)
    watcher.start()
    status = child.wait()
    seconds = time.perf_counter() - started
    done.set()
    watcher.join()
    if status:
        sys.exit(f"{' '.join(command)} ended with {status}")
    return seconds, processor_seconds() - spent, peak


def main() -> None:
    """Parse, run, print one line of a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("command", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    runs = [run(options.command) for _ in range(options.repeat)]
    seconds, processor = [s for s, _, _ in runs], [p for _, p, _ in runs]
    memory = max(m for _, _, m in runs) / 2**30
    print(
        f"| `{' '.join(options.command)}` | {options.repeat} | {min(seconds):.2f} | {statistics.median(seconds):.2f} "
        f"| {max(seconds):.2f} | {statistics.median(processor):.2f} | {memory:.2f} |"
    )


if __name__ == "__main__":
    main()
