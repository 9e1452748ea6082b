"""Trackers: what is sent, each number once, also over a resume; and nothing that goes wrong there harms the run."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from fl import checkpoint
from fl.cli import main
from fl.compose import compose
from fl.errors import ConfigError
from fl.experiment import Settings
from fl.records import RunFolder, read_events, read_run
from fl.run import resume
from fl.server_app import Server
from fl.trackers.base import Session, Tracker, about, final_scalars, moment, scalars
from fl.trackers.mlflow import MLflow
from fl.trackers.tracking import SENT, Tracking
from fl.trackers.wandb import WandB
from tests.fl import tracker_stores as stores
from tests.helpers import ENCODER, SHARED, go, metric_bytes, weights

THREE = ("clients.number=3", "schedule.rounds=3", "evaluation.clients=always")
LIBRARIES = {"tensorboard": "tensorboard", "mlflow": "mlflow", "wandb": "wandb"}
STORES = {"tensorboard": stores.TensorBoard, "mlflow": stores.MLflow, "wandb": stores.WandB}


@dataclass(frozen=True)
class Notebook(Tracker):
    """Writes down in the run's folder what it is given; raises ``raises`` at the moment ``at``."""

    name: ClassVar[str] = "notebook"
    at: ClassVar[str | int | None] = None
    raises: ClassVar[BaseException] = ValueError("no\n paper")

    def start(self, record, folder):
        session = NotebookSession(folder / "notebook.jsonl")
        session.moment("start", dict(record))
        return session


class NotebookSession(Session):
    def __init__(self, path: Path):
        self.path, self.count = path, 0

    def moment(self, name, content) -> None:
        if Notebook.at == name:
            raise Notebook.raises
        with open(self.path, "a") as file:
            file.write(json.dumps([name, content]) + "\n")

    def event(self, event) -> None:
        self.count += 1
        self.moment(self.count, event)

    def finish(self, final, status) -> None:
        self.moment("finish", [dict(final), status])


NOTEBOOK = "tracker._target_=tests.fl.test_trackers.Notebook"


def noted(folder: Path) -> list:
    return [json.loads(line) for line in (folder / "notebook.jsonl").read_text().splitlines()]


def sent(folder: Path) -> list[dict]:
    return [e for e in read_events(folder) if e["event"] in SENT]


def expected(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What a tracker has to hold of a run: the numbers of metrics.jsonl at their rounds."""
    rows = [[name, e["round"], value] for e in sent(folder) for name, value in scalars(e).items()]
    return stores.curves(rows)


def curves(found: dict, wall: bool = True) -> dict:
    """Without final numbers, rounded to TensorBoard's float32; without the wall clock where runs are compared."""
    return {
        name: [(step, float(np.float32(value))) for step, value in points]
        for name, points in found.items()
        if not name.startswith("final/") and (wall or not name.endswith("/wall_s"))
    }


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """A run without a tracker."""
    folder = tmp_path_factory.mktemp("plain")
    go(folder, *THREE)
    return folder


@pytest.fixture
def note(monkeypatch):
    def at(moment, raises: BaseException | None = None) -> None:
        monkeypatch.setattr(Notebook, "at", moment)
        monkeypatch.setattr(Notebook, "raises", raises or ValueError("no\n paper"))

    at(None)
    return at


# Events as numbers


def test_a_round_is_named_numbers():
    event = {
        "event": "round", "round": 3, "version": 2, "virtual_s": 1.5, "wall_s": 2.0, "accepted": np.int64(4),
        "rejected": {"shape": 2, "late": 1}, "bytes_up_total": 10**9, "loss": np.float32(0.5), "epsilon": None,
        "update_norm": float("inf"), "over": True, "note": "text",
    }  # fmt: skip
    assert scalars(event) == {
        "round/virtual_s": 1.5, "round/wall_s": 2.0, "round/accepted": 4.0, "round/rejected": 3.0,
        "round/bytes_up_total": 1e9, "round/loss": 0.5,
    }  # fmt: skip
    assert all(type(v) is float for v in scalars(event).values())
    assert scalars({**event, "rejected": {}})["round/rejected"] == 0


def test_an_evaluation_is_named_by_its_split():
    common = {"event": "eval", "round": 3, "virtual_s": 1.5, "wall_s": 2.0}
    assert scalars({**common, "split": "test", "examples": 9, "loss": 0.5, "accuracy": 0.75}) == {
        "test/loss": 0.5, "test/accuracy": 0.75,
    }  # fmt: skip
    spread = {"metric": "accuracy", "mean": 0.5, "std": None, "worst_decile": 0.25, "per_client": [1.0, None]}
    assert scalars({**common, "split": "clients", **spread, "loss_mean": 2.0, "bytes_up": 7}) == {
        "clients/accuracy_mean": 0.5, "clients/accuracy_worst_decile": 0.25, "clients/loss_mean": 2.0,
        "clients/bytes_up": 7.0,
    }  # fmt: skip


def test_other_events_are_no_numbers():
    assert scalars({"event": "client", "round": 1, "loss": 0.5}) == {}


def test_final_numbers_and_what_a_run_is():
    assert final_scalars({"accuracy": 0.5, "rejected": {"late": 1}, "epsilon": None, "rounds": 3}) == {
        "final/accuracy": 0.5, "final/rounds": 3.0,
    }  # fmt: skip
    record = {"model": "m", "commit": None, "privacy": "No privacy.", "seed": 1, "versions": {"shoal": "0.1"}}
    assert about(record) == {"model": "m", "privacy": "No privacy.", "shoal": "0.1"}


def test_the_moment_of_an_event_counts_the_time_at_work():
    assert moment({"started": "1970-01-01T00:01:40+00:00"}, {"wall_s": 2.5}) == 102.5


# The run and its tracker


def test_a_tracker_is_given_all_but_clients_events_and_changes_no_bit(tmp_path, plain, note):
    out = go(tmp_path, *THREE, NOTEBOOK)
    (start, record), *events, (finish, (final, status)) = noted(tmp_path)
    assert (start, finish, status) == ("start", "finish", "completed")
    assert [e for _, e in events] == sent(tmp_path) and len(events) == 3 + 4 + 4
    assert record["settings"]["clients.number"] == 3 and record["trainable_parameters"] > 0
    assert final == out.run["final"]
    assert (metric_bytes(tmp_path), weights(tmp_path)) == (metric_bytes(plain), weights(plain))
    assert (read_run(tmp_path) or {})["tracker"] == {"name": "notebook", "error": None}
    assert "tracker" not in (read_run(plain) or {})


@pytest.mark.parametrize("at", ["start", 1, 4, "finish"])
def test_a_tracker_that_fails_is_off_and_the_run_goes_on(tmp_path, plain, note, capfd, at):
    note(at)
    go(tmp_path, *THREE, NOTEBOOK)
    assert (metric_bytes(tmp_path), weights(tmp_path)) == (metric_bytes(plain), weights(plain))
    names = [name for name, _ in noted(tmp_path)] if at != "start" else []
    assert names == {"start": [], 1: ["start"], 4: ["start", 1, 2, 3]}.get(at, ["start", *range(1, 12)])
    run = read_run(tmp_path) or {}
    assert run["status"] == "completed"
    assert run["tracker"] == {"name": "notebook", "error": "ValueError: no paper"}
    warning = "shoal: warning: tracker=notebook failed and is off: ValueError: no paper\n"
    errors = capfd.readouterr().err
    assert warning in errors and errors.count("warning: tracker") == 1


def test_the_failure_is_in_run_json_at_once(tmp_path):
    class Broken(Session):
        def event(self, event):
            raise RuntimeError

        def finish(self, final, status):
            raise AssertionError("it is off")

    folder = RunFolder(tmp_path)
    tracking = Tracking(Notebook(), {"final": None, "status": "failed"}, folder)
    tracking.session = Broken()
    tracking.event({"event": "client"})  # is not sent
    assert read_run(tmp_path) is None
    tracking.event({"event": "round"})
    assert (read_run(tmp_path) or {})["tracker"] == {"name": "notebook", "error": "RuntimeError"}
    tracking.finish()
    folder.close()


def test_ctrl_c_at_the_tracker_is_ctrl_c_and_a_resumed_session_is_given_everything(tmp_path, plain, note):
    note(6, KeyboardInterrupt())  # after round 2's event (1-2: round 0; 3-5: round 1), before its evaluations
    with pytest.raises(KeyboardInterrupt):
        go(tmp_path, *THREE, NOTEBOOK)
    assert [name for name, _ in noted(tmp_path)] == ["start", 1, 2, 3, 4, 5, "finish"]
    assert noted(tmp_path)[-1][1][1] == "interrupted"
    note(None)
    (tmp_path / "notebook.jsonl").unlink()
    resume(tmp_path, shared=SHARED, quiet=True)
    assert [e for _, e in noted(tmp_path)[1:-1]] == sent(tmp_path)
    assert (metric_bytes(tmp_path), weights(tmp_path)) == (metric_bytes(plain), weights(plain))


def test_a_tracker_that_failed_is_given_everything_when_the_run_is_resumed(tmp_path, note):
    note(3)
    cut_off(4, tmp_path, NOTEBOOK)
    assert (read_run(tmp_path) or {})["tracker"]["error"] == "ValueError: no paper"
    note(None)
    (tmp_path / "notebook.jsonl").unlink()
    resume(tmp_path, shared=SHARED, quiet=True)
    assert [e for _, e in noted(tmp_path)[1:-1]] == sent(tmp_path)
    assert (read_run(tmp_path) or {})["tracker"] == {"name": "notebook", "error": None}


def cut_off(after: int, folder: Path, *more: str) -> None:
    """Run until the ``after``-th event is sent; as after a kill, the checkpoint is an older one (of round 0)."""
    event, save, count = Tracking.event, Server._save, [0]

    def counting(self, e):
        event(self, e)
        count[0] += e["event"] in SENT
        if count[0] == after:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tracking, "event", counting)
        patch.setattr(Server, "_save", lambda self: save(self) if count[0] < after else None)
        with pytest.raises(KeyboardInterrupt):
            go(folder, *THREE, "checkpoint_every=3", *more)


def test_a_new_run_does_not_inherit_a_trackers_files(tmp_path):
    for name in LIBRARIES:
        (tmp_path / name).mkdir()
    RunFolder(tmp_path).close()
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


# The three services, by their stand-ins and, where they are installed, by themselves


@pytest.fixture(params=["fake", "real"])
def store(request, monkeypatch):
    """Sets a service up; returns what reads its store."""

    def use(name: str):
        if request.param == "real":
            pytest.importorskip(LIBRARIES[name])
        else:
            STORES[name].install(monkeypatch)
        return getattr(STORES[name], request.param)

    return use


@pytest.mark.parametrize("name", LIBRARIES)
def test_the_store_holds_what_metrics_jsonl_holds(tmp_path, plain, store, name):
    read = store(name)
    folder = tmp_path / "ä b=1,c"  # as a sweep may name it
    go(folder, *THREE, f"tracker={name}")
    assert (read_run(folder) or {})["tracker"] == {"name": name, "error": None}
    assert curves(read(folder)) == curves(expected(folder))
    assert [step for step, _ in read(folder)["test/accuracy"]] == [0, 1, 2, 3]
    assert {"round/loss", "round/bytes_up_total", "round/virtual_s"} < set(read(folder))
    assert (metric_bytes(folder), weights(folder)) == (metric_bytes(plain), weights(plain))


@pytest.mark.parametrize("after", [3, 6, 8])  # in rounds 1 and 2, and after round 2
@pytest.mark.parametrize("name", LIBRARIES)
def test_a_resumed_run_has_each_step_once(tmp_path, plain, store, name, after):
    read = store(name)
    cut_off(after, tmp_path, f"tracker={name}")
    assert (checkpoint.load(tmp_path / "checkpoint") or ({}, {}))[1]["server"]["round"] == 0
    resume(tmp_path, shared=SHARED, quiet=True)
    assert (read_run(tmp_path) or {})["tracker"] == {"name": name, "error": None}
    assert curves(read(tmp_path), wall=False) == curves(expected(plain), wall=False)


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_missing_library_is_refused_before_anything_is_made(tmp_path, monkeypatch, capsys, name):
    for module in ("torch.utils.tensorboard", "mlflow", "mlflow.tracking", "wandb"):
        monkeypatch.setitem(sys.modules, module, None)
    folder = tmp_path / "run"
    for command, key in (("run", "hydra.run.dir"), ("sweep", "hydra.sweep.dir")):
        assert main([command, *ENCODER, f"tracker={name}", f"{key}={folder}"]) == 2
        error = capsys.readouterr().err
        assert f"tracker='{name}' is not allowed: its library can't be imported" in error
        assert f'pip install "shoal-fl[{name}]"' in error and error.count("\n") == 1
    assert not folder.exists()


@pytest.mark.parametrize("name", LIBRARIES)
def test_nothing_is_sent_to_the_makers_unless_the_user_wants_it(monkeypatch, name):
    STORES[name].install(monkeypatch)
    tracker = Settings.of(compose([f"tracker={name}"])[0]).tracker
    for key, value in tracker.environment.items():
        monkeypatch.delenv(key, raising=False)
        tracker.check()
        assert os.environ[key] == value
        monkeypatch.setenv(key, "mine")
        tracker.check()
        assert os.environ[key] == "mine"


def test_mlflow_keeps_settings_final_numbers_and_how_the_run_ended(tmp_path, monkeypatch):
    stores.MLflow.install(monkeypatch)
    out = go(tmp_path, *THREE, "tracker=mlflow", "name=mine")
    kept = stores.MLflow.store(tmp_path)
    assert (kept["experiment"], kept["name"], kept["status"]) == ("shoal", "mine", "FINISHED")
    assert kept["params"]["clients.number"] == "3" and len(kept["params"]) == len(out.run["settings"])
    assert dict(stores.MLflow.fake(tmp_path))["final/accuracy"] == [(3, out.run["final"]["accuracy"])]
    assert "No privacy" in kept["tags"]["privacy"]


def test_mlflow_is_told_of_a_run_that_was_cut_off(tmp_path, monkeypatch):
    stores.MLflow.install(monkeypatch)
    cut_off(5, tmp_path, "tracker=mlflow")
    kept = stores.MLflow.store(tmp_path)
    assert kept["status"] == "KILLED" and not any(m[0].startswith("final/") for m in kept["metrics"])
    MLflow().start(read_run(tmp_path) or {}, tmp_path)
    assert stores.MLflow.store(tmp_path)["status"] == "RUNNING"


def test_mlflow_takes_many_and_long_settings(tmp_path, monkeypatch):
    stores.MLflow.install(monkeypatch)  # which refuses more than MLflow does
    settings = {f"odd{{key}}.{i}": "x" * 600 for i in range(230)}
    record = {"name": "n", "started": "1970-01-01T00:00:00+00:00", "settings": settings}
    MLflow(experiment="other").start(record, tmp_path)
    params = stores.MLflow.store(tmp_path)["params"]
    assert len(params) == 230 and params["odd_key_.229"] == "x" * 500
    assert stores.MLflow.store(tmp_path)["experiment"] == "other"


@pytest.mark.parametrize("uri", [None, "http://localhost:5000"])
def test_mlflow_goes_where_the_uri_says(tmp_path, monkeypatch, uri):
    stores.MLflow.install(monkeypatch)
    seen = []

    def client(tracking_uri):
        seen.append(tracking_uri)
        return stores.MLflow.Client((tmp_path / "mlflow").as_uri())

    monkeypatch.setattr(sys.modules["mlflow.tracking"], "MlflowClient", client)
    MLflow(uri=uri).start({"name": "n", "settings": {}}, tmp_path)
    assert seen == [uri or (tmp_path / "mlflow").as_uri()]


def test_wandb_keeps_settings_and_final_numbers(tmp_path, monkeypatch):
    stores.WandB.install(monkeypatch)
    out = go(tmp_path, *THREE, "tracker=wandb", "name=mine", "tracker.project=school")
    run = stores.WandB.run
    assert (run.about["project"], run.about["name"], run.code) == ("school", "mine", 0)
    assert run.about["config"]["clients.number"] == 3 and "No privacy" in run.about["config"]["about"]["privacy"]
    assert run.summary == final_scalars(out.run["final"])
    assert stores.WandB.torn == [True]


def test_wandb_is_left_up_for_a_run_of_the_callers(tmp_path, monkeypatch):
    monkeypatch.setattr(stores.WandB.install(monkeypatch), "run", "theirs")
    go(tmp_path, *THREE, "tracker=wandb")
    assert stores.WandB.run.code == 0 and stores.WandB.torn == []


def test_wandb_online_sends_only_what_its_server_lacks(tmp_path, monkeypatch):
    stores.WandB.install(monkeypatch)
    cut_off(8, tmp_path, "tracker=wandb", "tracker.mode=online")  # after all of round 2
    first = stores.WandB.run
    assert first.code == 1 and not first.summary
    resume(tmp_path, shared=SHARED, quiet=True)
    assert stores.WandB.run is not first and stores.WandB.run.id == first.id
    rows = [[name, step, value] for step, row in stores.WandB.server for name, value in row.items()]
    assert [step for step, _ in stores.curves(rows)["test/loss"]] == [0, 1, 2, 3]
    assert [step for step, _ in stores.curves(rows)["round/loss"]] == [1, 2, 3]


@pytest.mark.parametrize("old", [False, True])
def test_wandb_online_without_a_key_is_refused(monkeypatch, old):
    stores.WandB.install(monkeypatch, None, old)
    with pytest.raises(ConfigError, match=r"tracker.mode='online'.*wandb login"):
        WandB(mode="online").check()
    WandB().check()
    stores.WandB.install(monkeypatch, "key", old)
    WandB(mode="online").check()
