"""MLflow, for those who ask for it: told the numbers of a training run while it runs."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from medseg.core.errors import InputError
from medseg.io.files import read_json, write_json

# What MLflow takes in a metric's name.
_STRANGE = re.compile(r"[^\w\-. /]")


class MlflowTracker:
    """The runs of one ``experiment`` on the server, or in the folder, at ``uri``.

    A training that is taken up again goes on in the same MLflow run, whose number stands in
    ``mlflow.json`` beside its checkpoint. Where the server does not answer the training goes on,
    and ``warn`` is told, once. Raises InputError where MLflow is not installed, or does not take the URI.
    """

    def __init__(self, uri: str, experiment: str, warn: Callable[[str], None]) -> None:
        # It would report its use to its makers.
        os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
        # By default it would hold a training up for minutes where a server is gone.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "10")
        try:
            import mlflow
        except ImportError:
            raise InputError("MLflow is not installed", "pip install mlflow-skinny, or leave out --mlflow") from None
        self._faults = (mlflow.exceptions.MlflowException, OSError)
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
        except self._faults as error:
            raise InputError(f"MLflow does not take {uri}: {_first_line(error)}", "Name a server or database") from None
        self._experiment, self._warn = experiment, warn
        self._runs: dict[Path, str] = {}
        self._silent = False

    def tell(self, run: Path, step: int, numbers: Mapping[str, float]) -> None:
        """Send the numbers of a step."""
        if self._silent:
            return
        try:
            number = self._runs.setdefault(run, self._run(run))
            for name, value in numbers.items():
                self._client.log_metric(number, _STRANGE.sub("_", name), value, step=step)
        except self._faults as error:
            self._silent = True
            self._warn(f"MLflow is told no more, since it failed: {_first_line(error)}")

    def _run(self, run: Path) -> str:
        place = run / "mlflow.json"
        if place.exists():
            found: Any = read_json(place)
            return str(found["run"])
        known = self._client.get_experiment_by_name(self._experiment)
        experiment = known.experiment_id if known else self._client.create_experiment(self._experiment)
        number = self._client.create_run(experiment, run_name=run.name).info.run_id
        write_json(place, {"format": 1, "run": number})
        return str(number)


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
