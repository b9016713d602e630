"""What a SLURM cluster says of itself, read; and jobs held against it."""

from __future__ import annotations

from typing import Any

import pytest

from medseg.io.cluster import Job, Left, faults, read_left, read_partitions

# As sinfo 22.05 and 24.11 print it: partition, time limit, cores, megabytes, resources, state, node, preemption.
TOLD = """\
cpu*|2-00:00:00|64|256000|(null)|idle|c1|REQUEUE
cpu*|2-00:00:00|64|256000+|(null)|mixed|c2|REQUEUE
gpu|1:30:00|32|128000|gpu:a100:4(S:0-1)|allocated|g1|GANG,SUSPEND
gpu|1:30:00|32|64000|gpu:2,lustre:1|drained|g2|GANG,SUSPEND
old|infinite|8|16000|gpu:k80:1,gpu:k40:1|idle*|o1|CANCEL
dark|10:00|8|16000|(null)|down*|d1|OFF
"""


def test_partitions_are_what_sinfo_says() -> None:
    found = read_partitions(TOLD)
    assert {name: one.minutes for name, one in found.items()} == {"cpu": 2880, "gpu": 90, "old": None, "dark": 10}
    assert [name for name, one in found.items() if one.default] == ["cpu"]
    assert [name for name, one in found.items() if one.cancels] == ["old"]
    assert [(kind.cores, kind.memory_mb, kind.gpus, kind.up) for kind in found["gpu"].kinds] == [
        (32, 128000, 4, ("g1",)),
        (32, 64000, 2, ()),
    ]
    assert found["old"].kinds[0].gpus == 2
    assert found["cpu"].kinds[1].memory_mb == 256000


def job(**asked: Any) -> Job:
    return Job(rule="train", **asked)


@pytest.mark.parametrize(
    "asked",
    [
        {},
        {"partition": "cpu", "cores": 64, "memory_mb": 256000, "minutes": 2880},
        {"partition": "gpu", "gpus": 4, "cores": 32, "memory_mb": 128000, "minutes": 90},
        {"partition": "old", "gpus": 2, "minutes": 10**6},
        {"partition": "gpu", "gpus": 1, "memory_mb": None, "minutes": None},
    ],
)
def test_what_fits_is_not_spoken_of(asked: dict[str, Any]) -> None:
    assert not list(faults([job(**asked)], read_partitions(TOLD)))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (
            {"partition": "CHANGE-ME"},
            "the profile names no partition (slurm_partition): write one of these into it: cpu, dark, gpu, old",
        ),
        ({"partition": "gpus"}, "the cluster has no partition 'gpus'"),
        (
            {"partition": "gpu", "minutes": 91},
            "asks for 91 minutes, and gpu lets a job run 90; lower the budget, say --set-resources train:runtime",
        ),
        (
            {"partition": "gpu", "memory_mb": 128001, "gpus": 1},
            "no node of gpu has them (the largest: 32, 128000 MB, 4)",
        ),
        ({"partition": "cpu", "gpus": 1}, "and 1 GPU, and no node of cpu has them"),
        ({"partition": "cpu", "cores": 65}, "asks for 65 cores"),
        ({"partition": "dark"}, "no node of dark takes jobs now"),
        ({"account": "CHANGE-ME"}, "names no account"),
    ],
)
def test_what_fits_nowhere_is_told_with_the_way_out(asked: dict[str, Any], said: str) -> None:
    (found,) = faults([job(**asked)], read_partitions(TOLD))
    assert said in found


def test_one_fault_is_told_once_for_all_jobs_alike() -> None:
    assert len(list(faults([job(partition="x"), job(partition="x")], read_partitions(TOLD)))) == 1


def test_a_cluster_without_a_default_partition_wants_one_named() -> None:
    (found,) = faults([job()], read_partitions(TOLD.replace("*|2-", "|2-")))
    assert "names no partition" in found


# As squeue prints it: number, name (that of a start), state, folder, comment (which may be of anything).
LEFT = """\
11|first|RUNNING|/home/a|rule_train_wildcards_Task01_3d_0
12_[3-5]|first|PENDING|/home/a|rule_train_wildcards_Task01_3d_1
13|first|PENDING|/home/a|rule_train_wildcards_Task02_3d_0
14|other|PENDING|/home/a|rule_train_wildcards_Task01_3d_0
15|second|COMPLETING|/home/a|rule_plan_wildcards_a|b
16|second|REQUEUE_HOLD|/home/a|rule_report
17|second|PENDING|/home/b|rule_report

18|bash|RUNNING|/home/a|
"""


def test_only_jobs_of_an_earlier_start_and_of_the_same_work_are_left() -> None:
    works = {"train_wildcards_Task01_3d_0", "train_wildcards_Task01_3d_1", "plan_wildcards_a|b", "report"}
    here = {f"/home/a|rule_{work}" for work in works}
    found = read_left(LEFT, {"first", "second"}, here)
    assert [(job.number, job.waits) for job in found] == [
        ("11", False),
        ("12_[3-5]", True),
        ("15", False),
        ("16", True),
    ]
    assert found[2] == Left("15", "COMPLETING")
    assert not read_left(LEFT, {"third"}, here)
    assert not read_left(LEFT, {"first", "second"}, set())
