"""What trackers keep, for tests: stand-ins for the three libraries, and what a run's folder holds, by name and step.

The stand-ins keep plain JSON where the real libraries keep their files, and take only what the real ones take. Each
store has ``install(patch)``, which puts its stand-in in the library's place, and ``fake(folder)`` and ``real(folder)``,
which read ``{name: [(step, value), ...]}`` as the stand-in and the library wrote it.
"""

from __future__ import annotations

import itertools
import json
import struct
import types
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import unquote, urlparse

Curves = dict[str, list[tuple[int, float]]]
_NUMBER = itertools.count()


def module(patch, name: str, **content) -> types.ModuleType:
    made = types.ModuleType(name)
    vars(made).update(content)
    patch.setitem(__import__("sys").modules, name, made)
    return made


def curves(rows: list[list[Any]]) -> Curves:
    found: Curves = defaultdict(list)
    for name, step, value in rows:
        found[name].append((step, value))
    return {name: sorted(points) for name, points in found.items()}


class TensorBoard:
    class SummaryWriter:
        def __init__(self, log_dir: str, purge_step: int):
            Path(log_dir).mkdir(parents=True)
            self.file = open(Path(log_dir) / f"events.{next(_NUMBER)}", "w")  # noqa: SIM115

        def add_text(self, tag: str, text: str, step: int) -> None: ...

        def add_scalar(self, tag: str, value: float, step: int, walltime: float) -> None:
            self.file.write(json.dumps([tag, step, value]) + "\n")

        def flush(self) -> None:
            self.file.flush()

        def close(self) -> None:
            self.file.close()

    @staticmethod
    def install(patch) -> None:
        module(patch, "torch.utils.tensorboard", SummaryWriter=TensorBoard.SummaryWriter)

    @staticmethod
    def fake(folder: Path) -> Curves:
        files = (folder / "tensorboard").iterdir()
        return curves([json.loads(line) for file in files for line in file.read_text().splitlines()])

    @staticmethod
    def real(folder: Path) -> Curves:
        from tensorboard.backend.event_processing.event_file_loader import EventFileLoader
        from tensorboard.util.tensor_util import make_ndarray

        rows = []
        for file in (folder / "tensorboard").iterdir():
            for event in EventFileLoader(str(file)).Load():
                for value in event.summary.value:
                    if value.metadata.plugin_data.plugin_name == "scalars":
                        rows.append([value.tag, event.step, float(make_ndarray(value.tensor))])
        return curves(rows)


class MLflow:
    class Client:
        def __init__(self, tracking_uri: str):
            self.place = Path(unquote(urlparse(tracking_uri).path)) / "store.json"

        def _change(self, **changes) -> dict:
            kept = json.loads(self.place.read_text()) if self.place.exists() else {}
            self.place.write_text(json.dumps({**kept, **changes}))
            return kept

        def get_experiment_by_name(self, name: str):
            return SimpleNamespace(experiment_id="7") if self._change().get("experiment") == name else None

        def create_experiment(self, name: str) -> str:
            self._change(experiment=name)
            return "7"

        def create_run(self, experiment_id: str, run_name: str, tags: dict):
            assert (
                experiment_id == "7" and "run" not in self._change() and all(isinstance(v, str) for v in tags.values())
            )
            self._change(run="abc", name=run_name, tags=tags, status="RUNNING", metrics=[], params={})
            return SimpleNamespace(info=SimpleNamespace(run_id="abc"))

        def get_run(self, run_id: str):
            assert run_id == "abc"
            return SimpleNamespace(data=SimpleNamespace(metrics={m[0]: m[2] for m in self._change()["metrics"]}))

        def get_metric_history(self, run_id: str, key: str):
            return [SimpleNamespace(step=m[1], value=m[2]) for m in self._change()["metrics"] if m[0] == key]

        def log_batch(self, run_id: str, metrics=(), params=()) -> None:
            assert run_id == "abc" and len(metrics) <= 1000 and len(params) <= 100
            assert all(len(value) <= 500 for _, value in params)
            assert all(isinstance(stamp, int) for *_, stamp, _ in metrics)
            kept = self._change()
            self._change(metrics=kept["metrics"] + [[key, step, value] for key, value, _, step in metrics])
            self._change(params={**kept["params"], **dict(params)})

        def update_run(self, run_id: str, status: str) -> None:
            self._change(status=status)

        set_terminated = update_run

    @staticmethod
    def install(patch) -> None:
        module(patch, "mlflow")
        module(patch, "mlflow.tracking", MlflowClient=MLflow.Client)
        module(patch, "mlflow.entities", Metric=lambda *fields: fields, Param=lambda *fields: fields)

    @staticmethod
    def store(folder: Path) -> dict[str, Any]:
        return json.loads((folder / "mlflow" / "store.json").read_text())

    @staticmethod
    def fake(folder: Path) -> Curves:
        return curves(MLflow.store(folder)["metrics"])

    @staticmethod
    def real(folder: Path) -> Curves:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=(folder / "mlflow").as_uri())
        (experiment,) = [e for e in client.search_experiments() if e.name == "shoal"]
        (run,) = client.search_runs([experiment.experiment_id])
        history = [client.get_metric_history(run.info.run_id, key) for key in run.data.metrics]
        return curves([[m.key, m.step, m.value] for metrics in history for m in metrics])


class WandB:
    """The stand-in's server is the list ``server`` of the rows that online runs have sent."""

    server: list[tuple[int, dict]]
    torn: list[bool]

    class Run:
        def __init__(self, id: str | None, resume: str | None, mode: str, dir: str, **about):
            self.id, self.rows, self.offline = id or f"id{next(_NUMBER)}", [], mode == "offline"
            self.step = 0
            if not self.offline:
                self.rows = WandB.server
                assert not self.rows or resume == "allow"
                self.step = self.rows[-1][0] + 1 if self.rows else 0
            elif resume is not None:
                raise ValueError("an offline run can't be resumed")
            self.last, self.about, self.summary, self.code = self.step, about, {}, None
            self.file = Path(dir, "wandb", f"{'offline-' * self.offline}run-{next(_NUMBER)}-{self.id}", "rows.json")
            self.file.parent.mkdir(parents=True)
            WandB.run = self

        def log(self, row: dict, step: int) -> None:
            assert step >= self.last, "steps must not fall"
            self.last = step
            self.rows.append((step, row))
            self.file.write_text(json.dumps(self.rows))

        def finish(self, exit_code: int) -> None:
            self.code = exit_code

    run: Run

    @staticmethod
    def install(patch, key: str | None = "key", old: bool = False) -> types.ModuleType:
        def login(prompt: bool = True, verify: bool = True) -> bool:
            assert not prompt and not verify
            return key is not None

        WandB.server, WandB.torn = [], []
        return module(
            patch,
            "wandb",
            init=lambda settings, **arguments: WandB.Run(**arguments),
            Settings=lambda **fields: fields,
            login=(lambda key=None: 1 / 0) if old else login,
            api=SimpleNamespace(api_key=key),
            run=None,
            teardown=lambda: WandB.torn.append(True),
        )

    @staticmethod
    def fake(folder: Path) -> Curves:
        (place,) = (folder / "wandb").glob("offline-run-*")
        rows = json.loads((place / "rows.json").read_text())
        return curves([[name, step, value] for step, row in rows for name, value in row.items()])

    @staticmethod
    def real(folder: Path) -> Curves:
        from wandb.proto import wandb_internal_pb2

        rows = []
        (file,) = (folder / "wandb").glob("offline-run-*/*.wandb")
        for data in _leveldb_records(file.read_bytes()[7:]):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            row = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            rows += [[k, int(row["_step"]), float(v)] for k, v in row.items() if not k.startswith("_")]
        return curves(rows)


def _leveldb_records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: blocks of 32 KiB, of pieces after (crc32, length, type)."""
    at, whole = 7, b""
    data = b"\0" * 7 + data
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a whole one, or the last piece
            yield whole
            whole = b""
