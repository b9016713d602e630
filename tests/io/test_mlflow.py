"""With MLflow itself where it is installed; it is none of medseg's dependencies."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from medseg.core.errors import InputError
from medseg.io.mlflow import MlflowTracker
from medseg.io.runlog import RunLog

RECORD = {"step": 5, "loss": 0.5, "dice": 0.25, "dice_by_label": {"left (big)": 0.5, "none": None}}


def tracker(tmp_path: Path, said: list[str] | None = None) -> MlflowTracker:
    uri = f"file:{tmp_path / 'mlruns'}"
    return MlflowTracker(uri, "Task00_blobs 3d", said.append if said is not None else pytest.fail)


def test_a_run_taken_up_again_goes_on_in_the_same_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    for step in (5, 10):
        log = RunLog(tmp_path / "log", tracker(tmp_path)).of("run")
        log.write({**RECORD, "step": step})
        log.close()
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"file:{tmp_path / 'mlruns'}")
    experiment = client.get_experiment_by_name("Task00_blobs 3d")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.data.metrics == {"loss": 0.5, "dice": 0.25, "dice_by_label/left _big_": 0.5}
    assert [m.step for m in client.get_metric_history(run.info.run_id, "loss")] == [5, 10]


def test_a_server_that_does_not_answer_is_told_of_once_and_stops_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    said: list[str] = []
    log = RunLog(tmp_path / "log", MlflowTracker("http://127.0.0.1:9", "Task00_blobs 3d", said.append)).of("run")
    for step in (5, 10):
        log.write({**RECORD, "step": step})
    log.close()
    assert len(said) == 1
    assert said[0].startswith("MLflow is told no more")
    assert [r["step"] for r in log.records()] == [5, 10]


def test_a_place_that_is_none(tmp_path: Path) -> None:
    pytest.importorskip("mlflow")
    with pytest.raises(InputError, match="MLflow does not take nowhere://x"):
        MlflowTracker("nowhere://x", "Task00_blobs 3d", pytest.fail)


def test_without_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match="MLflow is not installed"):
        tracker(tmp_path)
