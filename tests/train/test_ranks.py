"""Several processes, started by torchrun, that talk through gloo."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.core.errors import InputError
from medseg.core.resample import resample
from medseg.dataset.task import load_case, load_task
from medseg.io.store import CaseStore
from medseg.preprocess.regrid import preprocess
from medseg.train.ranks import ALONE, Ranks

SCRIPT = """
import json, sys
from pathlib import Path
from medseg.io.runlog import RunLog
from medseg.io.store import CaseStore
from medseg.plan.plan import read_plan
from medseg.train.loop import Setup, train
from medseg.train.ranks import Ranks

folder, log, stop_after = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
plan, ranks, cases = read_plan(folder / "plan.json"), Ranks.of_torchrun(), tuple(json.loads(sys.argv[4]))
count = iter(range(1000))
package, records = train(
    plan, Setup("3d", 0, cases, (), device="cpu"), CaseStore(folder / "store"), RunLog(folder / log), ranks=ranks,
    stop=lambda: ranks.rank == 1 and next(count) + 1 == stop_after,  # asked of one of them
)
(folder / f"{log}.{ranks.rank}.json").write_text(json.dumps([package.digest(), [r["loss"] for r in records]]))
"""


def torchrun(folder: Path, log: str, cases: list[str], stop_after: int = 0) -> Any:
    (folder / "script.py").write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(folder / "script.py"), str(folder), log, str(stop_after), json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)
    if stop_after:
        assert done.returncode
        assert f"stopped at step {stop_after} of 8" in done.stderr
        return None
    assert done.returncode == 0, done.stderr[-2000:]
    return [json.loads((folder / f"{log}.{rank}.json").read_text()) for rank in range(2)]


def test_two_ranks_agree_repeat_themselves_and_go_on_after_a_stop(
    tiny_task: Callable[..., Path], small_plan: Any, tmp_path: Path
) -> None:
    task, plan = load_task(tiny_task(tmp_path / "Task00_blobs", 3)), small_plan(steps=8, batch=4, steps_per_epoch=4)
    (tmp_path / "plan.json").write_text(plan.model_dump_json())
    store = CaseStore(tmp_path / "store")
    for case in task.cases:
        volume, labels = load_case(task, case)
        prepared = preprocess(volume, plan, plan.configuration("3d"))
        values = resample(labels, onto=prepared.grid).values
        store.write(case.id, prepared.values, values, {n: np.flatnonzero(values == n) for n in (1, 2)})
    ids = [case.id for case in task.cases]
    store.finish(tuple(ids), plan.preparation("3d"), "3d")
    first, second = torchrun(tmp_path, "whole", ids)
    assert first == second
    assert len(first[1]) == 2
    torchrun(tmp_path, "parts", ids, stop_after=5)
    assert torchrun(tmp_path, "parts", ids)[0] == first


def test_a_batch_is_dealt_evenly_or_not_at_all() -> None:
    assert list(ALONE.share(3)) == [0, 1, 2]
    assert [list(Ranks(rank, 2).share(4)) for rank in range(2)] == [[0, 2], [1, 3]]
    with pytest.raises(InputError, match=r"a batch of 2 cannot be shared evenly by 4 processes.*a multiple of 4"):
        Ranks(1, 4).share(2)
