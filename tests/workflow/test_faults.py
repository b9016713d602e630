"""A short form of benchmarks/faults: harm done to a run for real, and the same command given again."""

import json
import subprocess
import sys
from pathlib import Path

PROGRAM = Path(__file__).parents[2] / "benchmarks" / "faults" / "measure.py"


def test_a_run_comes_to_the_same_results_whatever_is_done_to_it(tmp_path):
    report = tmp_path / "faults.json"
    command = [sys.executable, PROGRAM, "--short", "--times", "1", "--folder", tmp_path, "-o", report]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-6000:]
    trials = json.loads(report.read_text())["trials"]
    assert {one["fault"] for one in trials} >= {"SIGKILL between two files", "disk full", "two runs in one folder"}
    for one in trials:
        assert one["survived"], one
        assert one["identical"], one
        assert one["told"], one
        assert not one["half_written"] + one["left_over"] + one["lost"], one
    assert [path.name for path in tmp_path.iterdir()] == ["faults.json"]
