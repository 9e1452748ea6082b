"""MLflow: a run in a file store in the run's own folder, or at a tracking server or database."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fl.config import setting
from fl.records import write_atomically
from fl.trackers.base import Session, Tracker, about, final_scalars, moment, scalars

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

FOLDER, RUN_ID = "mlflow", "run_id"
_STATUS = {"completed": "FINISHED", "failed": "FAILED", "interrupted": "KILLED"}
_MAX_PARAMS, _MAX_VALUE = 100, 500  # of one call of log_batch; what every version takes


@dataclass(frozen=True)
class MLflow(Tracker):
    """Metrics, settings as parameters, and what the run is as tags."""

    name: ClassVar[str] = "mlflow"
    modules: ClassVar[tuple[str, ...]] = ("mlflow.tracking",)
    # Nothing is sent to the makers, newer versions write plain files only where told to, and a server that is gone
    # costs a quarter of a minute instead of four.
    environment: ClassVar[Mapping[str, str]] = {
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ALLOW_FILE_STORE": "true",
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    }

    uri: str | None = setting(None, help="a tracking server's or database's; null: files in the run's folder")
    experiment: str = setting("shoal", help="the MLflow experiment that the run is listed in")

    def start(self, record: Mapping[str, Any], folder: Path) -> Session:
        """A new MLflow run; for a resumed run the one whose id is in the folder."""
        from mlflow.tracking import MlflowClient

        place = folder / FOLDER
        place.mkdir(exist_ok=True)
        client = MlflowClient(tracking_uri=self.uri or place.resolve().as_uri())
        known = place / RUN_ID
        if known.is_file():
            run = known.read_text(encoding="utf-8").strip()
            client.update_run(run, status="RUNNING")
        else:
            run = client.create_run(self._experiment(client), run_name=record["name"], tags=about(record)).info.run_id
            write_atomically(known, run)
            _log_settings(client, run, record["settings"])
        return _Session(client, run, record)

    def _experiment(self, client: MlflowClient) -> str:
        found = client.get_experiment_by_name(self.experiment)
        if found is None:
            try:
                return client.create_experiment(self.experiment)
            except Exception:  # another run may have made it in this moment
                found = client.get_experiment_by_name(self.experiment)
                if found is None:
                    raise
        return found.experiment_id


class _Session(Session):
    def __init__(self, client: MlflowClient, run: str, record: Mapping[str, Any]):
        self.client, self.run, self.record = client, run, record
        keys = client.get_run(run).data.metrics
        self.sent = {key: max(m.step for m in client.get_metric_history(run, key)) for key in keys}

    def event(self, event: Mapping[str, Any]) -> None:
        self._log(scalars(event), event["round"], moment(self.record, event))

    def finish(self, final: Mapping[str, Any], status: str) -> None:
        if status == "completed":
            self._log(final_scalars(final), int(final["rounds"]), moment(self.record, final))
        self.client.set_terminated(self.run, _STATUS[status])

    def _log(self, values: Mapping[str, float], step: int, seconds: float) -> None:
        from mlflow.entities import Metric

        new = [
            Metric(name, value, int(seconds * 1000), step)
            for name, value in values.items()
            if step > self.sent.get(name, -1)
        ]
        if new:
            self.client.log_batch(self.run, metrics=new)


def _log_settings(client: MlflowClient, run: str, settings: Mapping[str, Any]) -> None:
    from mlflow.entities import Param

    params = [Param(re.sub(r"[^\w\-. /]", "_", key), str(value)[:_MAX_VALUE]) for key, value in settings.items()]
    for low in range(0, len(params), _MAX_PARAMS):
        client.log_batch(run, params=params[low : low + _MAX_PARAMS])
