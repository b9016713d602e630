from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medseg.core.errors import InputError
from medseg.io.runlog import RunLog

TENSORS = {
    "network.weight": torch.linspace(-3, 3, 24).reshape(2, 3, 4),
    "average.weight": torch.linspace(-3, 3, 5).to(torch.bfloat16),
    "half": torch.tensor([1e-7, 65504.0], dtype=torch.float16),
    "optimiser.0.step": torch.tensor(17.0),
    "counts": torch.tensor([2**62, -5], dtype=torch.int64),
    "flags": torch.tensor([True, False]),
    "odd": torch.tensor([float("nan"), float("inf"), -0.0]),
    "empty": torch.zeros(0, 3),
    "turned": torch.arange(12.0).reshape(3, 4).T,
}
STATE = {"step": 17, "seconds": 12.5, "plan": "digest", "train": ["a", "ü"], "epochs": None}


def test_a_checkpoint_there_and_back(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    assert log.load() is None
    log.save(TENSORS, STATE)
    found = log.load()
    assert found is not None
    tensors, state = found
    assert state == STATE
    assert set(tensors) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert tensors[name].shape == tensor.shape
        assert torch.equal(tensors[name].nan_to_num(7), tensor.nan_to_num(7))


def test_what_is_learning_is_saved_as_it_stands(tmp_path: Path) -> None:
    layer = torch.nn.Linear(2, 2)
    log = RunLog(tmp_path)
    log.save({"weight": layer.weight}, {})
    before = layer.weight.detach().clone()
    with torch.no_grad():
        layer.weight += 1
    assert torch.equal((log.load() or ({}, {}))[0]["weight"], before)


def test_a_later_checkpoint_replaces_an_earlier_one_that_is_in_use(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.save({"x": torch.zeros(1000)}, {"step": 1})
    earlier = log.load()
    log.save({"x": torch.ones(1000)}, {"step": 2})
    later = log.load()
    assert earlier is not None
    assert later is not None
    assert (earlier[0]["x"] == 0).all()
    assert (later[0]["x"] == 1).all()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.earlier.safetensors", "checkpoint.safetensors"]


def test_the_checkpoint_to_go_back_to_stays_until_the_next_of_its_kind(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    assert log.load(kept=True) is None
    for step, keep in ((1, False), (2, True), (3, False), (4, False), (5, False)):
        log.save({"x": torch.full((3,), step)}, {"step": step}, keep=keep)
    for kept, step in ((False, 5), (True, 2)):
        found = log.load(kept=kept)
        assert found is not None
        assert found[1]["step"] == int(found[0]["x"][0]) == step
    log.save({"x": torch.zeros(3)}, {"step": 6}, keep=True)
    assert (log.load(kept=True) or ({}, {}))[1]["step"] == 6


@pytest.mark.parametrize("keep", [0, 4, 8, 40, 0.5, -1])
def test_a_truncated_checkpoint_is_refused(tmp_path: Path, keep: float) -> None:
    log = RunLog(tmp_path)
    log.save(TENSORS, STATE)
    path = tmp_path / "checkpoint.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data)) if keep == 0.5 else int(keep)])
    with pytest.raises(InputError, match=r"cannot be read .* Delete it to start the training anew"):
        log.load()


@pytest.mark.parametrize("header", [b"{}", b'{"__metadata__":{"state":"{"}}', b'{"__metadata__":{"other":"{}"}}'])
def test_a_checkpoint_without_a_state_is_refused(tmp_path: Path, header: bytes) -> None:
    header += b" " * (-len(header) % 8)
    (tmp_path / "checkpoint.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(InputError, match="Delete it to start"):
        RunLog(tmp_path).load()


def test_runs_have_places_of_their_own(tmp_path: Path) -> None:
    log = RunLog(tmp_path)
    log.of("one").save({"x": torch.zeros(1)}, {"step": 1})
    assert log.of("other").load() is None
    assert log.load() is None
    assert (tmp_path / "one/checkpoint.safetensors").exists()


# ---- records ------------------------------------------------------------------------------------


def written(folder: Path, steps: list[int]) -> RunLog:
    folder.mkdir(exist_ok=True)
    (folder / "log.jsonl").write_text("".join(json.dumps({"step": s, "loss": 1 / s}) + "\n" for s in steps))
    return RunLog(folder)


def steps_of(log: RunLog) -> list[int]:
    return [record["step"] for record in log.records()]


def test_no_log_has_no_records(tmp_path: Path) -> None:
    log = RunLog(tmp_path / "run")
    assert log.records() == []
    log.rewind(5)
    assert log.records() == []


@given(st.lists(st.integers(1, 50), unique=True).map(sorted), st.integers(0, 50))
def test_rewinding_forgets_what_comes_later_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, steps: list[int], to: int
) -> None:
    log = written(tmp_path_factory.mktemp("log"), steps)
    before = log.records()
    log.rewind(to)
    assert log.records() == [r for r in before if r["step"] <= to]


def test_a_line_that_was_not_finished_is_left_out_wherever_it_broke_off(tmp_path: Path) -> None:
    whole = '{"step": 1, "loss": 0.5}\n{"step": 2, "name": "prost\\u00e4ta"}\n'
    line = '{"step": 3, "dice_by_label": {"left": 0.5}}'
    for end in range(len(line)):
        (tmp_path / "log.jsonl").write_text(whole + line[:end])
        assert steps_of(RunLog(tmp_path)) == [1, 2]
    (tmp_path / "log.jsonl").write_bytes(whole.encode() + b"\0" * 40)
    assert steps_of(RunLog(tmp_path)) == [1, 2]


def test_after_rewinding_the_next_record_stands_on_a_line_of_its_own(tmp_path: Path) -> None:
    log = written(tmp_path, [1, 2, 3])
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')
    log.rewind(3)
    log.write({"step": 4, "loss": 0.1})
    log.close()
    assert steps_of(log) == [1, 2, 3, 4]
    assert len((tmp_path / "log.jsonl").read_text().splitlines()) == 4


def test_records_go_to_tensorboard_too(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = RunLog(tmp_path / "run")
    records: list[dict[str, Any]] = [
        {"step": 10, "loss": 0.5, "dice_by_label": {"left": 0.25, "right": None}, "note": "words"},
        {"step": 20, "loss": 0.25},
    ]
    for record in records:
        log.write(record)
    log.close()
    log.close()
    assert log.records() == records
    board = EventAccumulator(str(tmp_path / "run/tensorboard"))
    board.Reload()
    assert board.Tags()["scalars"] == ["loss", "dice_by_label/left"]
    assert [(e.step, e.value) for e in board.Scalars("loss")] == [(10, 0.5), (20, 0.25)]
    assert np.isclose(board.Scalars("dice_by_label/left")[0].value, 0.25)
