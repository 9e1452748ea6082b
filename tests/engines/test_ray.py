"""Clients in Ray workers: the same replies as in one process, dead workers replaced, the server's errors untouched."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from flwr.app import Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode

from fl.compose import compose
from fl.engine import ray_workers
from fl.engine.cohort_grid import CohortGrid, client_of, cohort_app, node_id
from fl.engine.flower import quiet_flower
from fl.engine.in_process import FIRST_NODE, InProcessGrid
from fl.engine.ray import LazyApp, _plan
from fl.engine.ray_workers import RayGrid, init_args, simulate
from fl.engine.settings import Ray
from fl.errors import ConfigError, RunStopped
from fl.experiment import Settings
from fl.run import resume
from tests.helpers import FIXED, SHARED, final, go, rounds, vector

CLIENTS = 5


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    quiet_flower()
    monkeypatch.setenv("PYTHONPATH", os.getcwd())


def train(messages, context):
    """Adds up what each client is sent; client 1 refuses 13, client 2 ends its worker's process at -1."""
    replies = []
    for message in messages:
        client, value = client_of(message.metadata.dst_node_id), message.content["in"]["x"]
        if value == 13 and client == 1:
            raise ValueError("13 is bad luck")
        if value == -1 and client == 2:
            os._exit(1)
        if value == -2:
            time.sleep(600)
        total = context.state.get(f"{client}", MetricRecord({"sum": 0}))["sum"] + value
        context.state[f"{client}"] = MetricRecord({"sum": total})
        said = {"client": client, "sum": total, "part": context.node_config["partition-id"], "together": len(messages)}
        replies.append(Message(RecordDict({"out": MetricRecord(said)}), reply_to=message))
    return replies


def ask(grid, value):
    messages = [
        Message(RecordDict({"in": MetricRecord({"x": value})}), node_id(c), "train") for c in reversed(range(CLIENTS))
    ]
    replies = grid.send_and_receive(messages, timeout=120)
    return [
        (client_of(r.metadata.src_node_id), r.error.code, r.error.reason) if r.has_error() else dict(r.content["out"])
        for r in replies
    ]


def asked(values):
    """A server that asks all clients ``values`` in turn, and a list of what they answered."""
    heard = []

    def main(grid):
        clients = CohortGrid(grid, CLIENTS)
        heard.extend(ask(clients, value) for value in values)

    return main, heard


class Fake:
    """Workers without Ray: each runs the app here, or dies at the calls (worker, number) in ``dies``."""

    def __init__(self, number=2, dies=(), room=True):
        self.actors, self.dies, self.room, self.renewed, self.calls = [0] * number, set(dies), room, [], {}

    def answer(self, worker, app, message, context):
        self.calls[worker] = self.calls.get(worker, 0) + 1
        if (worker, self.calls[worker]) in self.dies:
            raise ChildProcessError("out of memory")
        return app(message, context), context

    def renew(self, worker):
        self.renewed.append(worker)
        return self.room


# The grid over workers


def test_messages_of_a_node_are_answered_in_their_order_and_all_nodes_at_once():
    with RayGrid(Fake(3), cohort_app(train)) as grid:
        assert grid.get_node_ids() == [FIRST_NODE, FIRST_NODE + 1, FIRST_NODE + 2]
        clients = CohortGrid(grid, CLIENTS)
        assert clients.join  # what is handed over is serialised, as on a wire
        for value in (1, 2, 3):
            clients.push_messages([Message(RecordDict({"in": MetricRecord({"x": value})}), node_id(0), "train")])
        got = ask(clients, 4)
    assert [r["sum"] for r in got] == [10, 4, 4, 4, 4]
    assert [r["part"] for r in got] == [0, 1, 2, 0, 1]
    assert [r["together"] for r in got] == [2, 2, 1, 2, 2]


def test_a_dead_worker_is_replaced_and_only_its_clients_lose_the_message():
    workers = Fake(dies=[(1, 2)])
    with RayGrid(workers, cohort_app(train)) as grid:
        clients = CohortGrid(grid, CLIENTS)
        first, second, third = ask(clients, 1), ask(clients, 2), ask(clients, 3)
    assert [r["sum"] for r in first] == [1] * CLIENTS
    assert [(r[:2] if isinstance(r, tuple) else r["sum"]) for r in second] == [
        3, (1, ErrorCode.NODE_UNAVAILABLE), 3, (3, ErrorCode.NODE_UNAVAILABLE), 3
    ]  # fmt: skip
    assert "out of memory" in second[1][2]
    assert [r["sum"] for r in third] == [6, 4, 6, 4, 6]
    assert workers.renewed == [1]


def test_deaths_with_an_answer_in_between_do_not_end_the_run():
    with RayGrid(Fake(dies=[(0, 1), (0, 3), (1, 2)]), cohort_app(train)) as grid:
        clients = CohortGrid(grid, CLIENTS)
        for value in range(4):
            ask(clients, value)


@pytest.mark.parametrize(("dies", "room"), [([(0, 2), (0, 3)], True), ([(0, 2)], False)], ids=["again", "no room"])
def test_a_worker_that_goes_on_dying_ends_the_run_with_a_way_out(dies, room):
    with RayGrid(Fake(dies=dies, room=room), cohort_app(train)) as grid:
        clients = CohortGrid(grid, CLIENTS)
        ask(clients, 1)
        for _ in dies[1:]:
            ask(clients, 2)
        with pytest.raises(RunStopped, match=r"out of memory.*shoal run --resume"):
            ask(clients, 2)


def test_a_closed_grid_leaves_no_thread():
    with RayGrid(Fake(), cohort_app(train)) as grid:
        threads = grid._threads
        ask(CohortGrid(grid, CLIENTS), 1)
    for thread in threads:
        thread.join(5)
        assert not thread.is_alive()


# What Ray is told


def test_ray_is_started_here_with_a_processor_for_each_worker_and_without_noise(monkeypatch):
    monkeypatch.setattr(ray_workers, "processors", lambda: 4)
    args = init_args(Ray(nodes=6, num_cpus=2, threads=3), most=100)
    assert (args["address"], args["num_cpus"], args["include_dashboard"]) == ("local", 12, False)
    assert args["log_to_driver"] is False
    variables = args["runtime_env"]["env_vars"]
    assert variables["OMP_NUM_THREADS"] == "3"
    assert variables["RAY_USAGE_STATS_ENABLED"] == variables["FLWR_TELEMETRY_ENABLED"] == "0"
    assert os.getcwd() in variables["PYTHONPATH"].split(os.pathsep)
    assert init_args(Ray(nodes=6), most=5)["num_cpus"] == 5  # no more workers than clients
    assert init_args(Ray(), most=5)["num_cpus"] == 4
    assert "OMP_NUM_THREADS" not in init_args(Ray(), most=5)["runtime_env"]["env_vars"]


def test_a_standing_head_keeps_its_own_resources():
    args = init_args(Ray(ray_address="10.0.0.1:6379", nodes=6, num_cpus=2), most=100)
    assert args["address"] == "10.0.0.1:6379"
    assert "num_cpus" not in args and "include_dashboard" not in args


@pytest.mark.parametrize("address", ["127.0.0.1:1", "auto"])
def test_an_address_without_ray_is_refused_at_once(address):
    with pytest.raises(ConfigError, match=r"engine\.ray_address.*HOST:PORT.*ray start --head"):
        simulate(Ray(ray_address=address), lambda grid: None, cohort_app(train), CLIENTS)


def test_without_ray_there_is_one_error_with_the_way_out(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"engine='ray'.*pip install 'shoal-fl\[ray\]'"):
        simulate(Ray(), lambda grid: None, cohort_app(train), CLIENTS)


def test_nothing_of_ray_is_imported_before_it_is_needed():
    code = "import sys, fl.engine.ray; print({'ray', 'flwr.simulation'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize(
    ("engine", "device", "measured"),
    [
        ({}, "cpu", True),
        ({"num_gpus": 0.5}, "cuda", False),
        ({"device": "cuda:1"}, "cuda:1", False),
        ({"num_cpus": 4}, "cpu", True),
        ({"threads": 3, "num_cpus": 4}, "cpu", True),
    ],
)
def test_a_worker_has_the_plan_that_was_measured_for_its_kind_of_device(engine, device, measured):
    plan = SimpleNamespace(
        device="cpu", settings=lambda: {"device": "cpu", "dtype": "float32", "workers": 2, "threads": 2}
    )
    given = Ray(**engine)
    found = _plan(given, plan)
    assert found["device"] == device
    assert found["workers"] == 1
    assert found["threads"] == (given.num_cpus if given.threads == "auto" else given.threads)
    assert ("dtype" in found) == measured


def test_the_app_that_travels_is_small():
    import cloudpickle

    text = "x" * 5000
    assert len(cloudpickle.dumps(LazyApp(text, "/run/clients", "/"))) < 6000


def test_presets_of_the_engine_are_checked():
    base = ["experiment=quickstart", "engine=ray"]
    engine = Settings.of(compose([*base, "engine.nodes=3", "engine.num_gpus=0.5"])[0]).engine
    assert engine == Ray(nodes=3, num_gpus=0.5)
    with pytest.raises(ConfigError, match=r"engine\.nodes"):
        Settings.of(compose([*base, "engine.nodes=many"])[0])


# Ray itself


@pytest.mark.slow
def test_workers_answer_as_one_process_does_and_have_the_gpus_they_ask_for(monkeypatch):
    # One GPU that only Ray believes in, shared by two workers.
    monkeypatch.setattr(ray_workers, "init_args", lambda *args: init_args(*args) | {"num_gpus": 1, "num_cpus": 8})
    values = (1, 2, 13, 4)
    main, heard = asked(values)
    seen = []

    def server(grid):
        import ray

        seen.append(grid.get_node_ids())
        seen.extend(ray.available_resources().get(name, 0.0) for name in ("CPU", "GPU"))
        main(grid)

    simulate(Ray(num_cpus=1, num_gpus=0.5), server, cohort_app(train), CLIENTS)
    assert seen == [[FIRST_NODE, FIRST_NODE + 1], 6.0, 0.0]
    same, here = asked(values)
    with InProcessGrid(cohort_app(train), 2) as grid:
        same(grid)
    assert heard == here
    assert heard[2][1] == (1, ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'ValueError'>:<'13 is bad luck'>")

    import ray

    assert not ray.is_initialized()


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_one_that_is_killed_again_ends_the_run():
    main, heard = asked([1, -1, 3, -1, -1])
    with pytest.raises(RunStopped, match="shoal run --resume"):
        simulate(Ray(nodes=2), main, cohort_app(train), CLIENTS)
    lost = {0, 2, 4}
    assert [r["sum"] for r in heard[0]] == [1] * CLIENTS
    assert {r[0] for r in heard[1] if isinstance(r, tuple)} == lost
    assert {r[1] for r in heard[1] if isinstance(r, tuple)} == {ErrorCode.NODE_UNAVAILABLE}
    assert [r["sum"] for r in heard[2]] == [4, 3, 4, 3, 4]


@pytest.mark.slow
def test_more_workers_than_fit_are_refused_and_a_servers_error_keeps_its_type():
    with pytest.raises(ConfigError, match=r"engine\.nodes.*0 workers of 1 processors and 64 GPUs fit"):
        simulate(Ray(num_gpus=64), lambda grid: None, cohort_app(train), CLIENTS)

    def broken(grid):
        raise ConfigError("a.b", 1, "2")

    with pytest.raises(ConfigError, match="a.b"):
        simulate(Ray(nodes=1), broken, cohort_app(train), CLIENTS)


@pytest.mark.slow
def test_ctrl_c_ends_the_run_and_its_workers_within_seconds(tmp_path):
    code = (
        "import tests.engines.test_ray as t\n"
        "from fl.engine.ray_workers import simulate\n"
        "from fl.engine.settings import Ray\n"
        "def main(grid):\n"
        "    clients = t.CohortGrid(grid, t.CLIENTS)\n"
        "    t.ask(clients, 1)\n"
        "    import ray\n"
        "    print('working', ray.get_runtime_context().gcs_address, flush=True)\n"
        "    t.ask(clients, -2)\n"
        "simulate(Ray(nodes=2), main, t.cohort_app(t.train), t.CLIENTS)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline().startswith("working"), process.stderr.read()
        time.sleep(1.0)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does: to all of its group
        _, errors = process.communicate(timeout=60)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode in (-signal.SIGINT, 130)
    assert errors.strip().endswith("KeyboardInterrupt")


# Experiments

SB = ("adapter=lora_sb", "adapter.rank=4", "aggregator=fedsb", "adapter.init.eta0=0.01", "model.head_std=0.1")
SVD = ("adapter=ffa", "adapter.rank=4", "adapter/init=orthonormal", "aggregator=fedsvd", "model.head_std=0.1")
MOMENTUM = ("local=client_momentum", "model.head_std=0.1")


def before_round(monkeypatch, number, act):
    """Call ``act(grid's workers)`` before the messages of round ``number`` are pushed."""
    push, pushed = RayGrid.push_messages, []

    def pushing(grid, messages):
        messages = list(messages)
        pushed.extend(["train"] if any(m.metadata.message_type.startswith("train") for m in messages) else [])
        if len(pushed) == number and messages and messages[0].metadata.message_type.startswith("train"):
            act(grid._workers)
        return push(grid, messages)

    monkeypatch.setattr(RayGrid, "push_messages", pushing)


def both(folder, *words):
    """The run in this process, and on two Ray workers."""
    go(folder / "here", *words)
    go(folder / "ray", "engine=ray", "engine.nodes=2", *FIXED, *words)
    return folder / "here", folder / "ray"


def payload(folder):
    return [(e["bytes_up"], e["bytes_down"], e["bytes_once"]) for e in rounds(folder)]


@pytest.mark.slow
@pytest.mark.parametrize("words", [SB, SVD], ids=["fed_sb", "fedsvd"])
def test_an_experiment_on_ray_is_the_one_in_this_process(tmp_path, words):
    here, there = both(tmp_path, *words)
    np.testing.assert_allclose(vector(there), vector(here), rtol=1e-5, atol=1e-7)
    assert payload(there) == payload(here)
    assert final(there)["accuracy"] == final(here)["accuracy"]


@pytest.mark.slow
def test_what_clients_remember_outlives_their_worker(tmp_path, monkeypatch):
    renewed = []
    before_round(monkeypatch, 3, lambda workers: renewed.append(workers.renew(0)))
    here, there = both(tmp_path, *MOMENTUM, "local.steps=1", "schedule.rounds=4")
    assert renewed == [True]
    np.testing.assert_allclose(vector(there), vector(here), rtol=1e-5, atol=1e-7)
    assert payload(there) == payload(here)


@pytest.mark.slow
def test_the_clients_of_a_killed_worker_are_lost_for_a_round_with_the_reason(tmp_path, monkeypatch):
    def kill(workers):
        import ray

        ray.kill(workers.actors[0])

    before_round(monkeypatch, 2, kill)
    go(tmp_path, "engine=ray", "engine.nodes=2", *FIXED, "schedule.rounds=3")
    assert [e["accepted"] for e in rounds(tmp_path)] == [4, 2, 4]
    assert [e["rejected"] for e in rounds(tmp_path)] == [{}, {"error": 2}, {}]


@pytest.mark.slow
def test_a_run_that_ended_because_workers_die_goes_on_to_the_same_end(tmp_path, monkeypatch):
    words = (*MOMENTUM, "local.steps=1", "schedule.rounds=4")

    def kill(workers):
        import ray

        ray.kill(workers.actors[0])
        monkeypatch.setattr(workers, "renew", lambda worker: False)

    with monkeypatch.context() as patch:
        before_round(patch, 3, kill)
        with pytest.raises(RunStopped, match="shoal run --resume"):
            go(tmp_path / "ray", "engine=ray", "engine.nodes=2", *FIXED, *words)
    assert len(rounds(tmp_path / "ray")) == 2
    resume(tmp_path / "ray", shared=SHARED, quiet=True)
    go(tmp_path / "here", *words)
    np.testing.assert_allclose(vector(tmp_path / "ray"), vector(tmp_path / "here"), rtol=1e-5, atol=1e-7)
    assert payload(tmp_path / "ray") == payload(tmp_path / "here")
