"""Ordinary Flower apps run in one process, the same each time, and nobody sees another's changes."""

import logging

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAdam, FedAvg, FedMedian, Krum
from flwr.supercore.task_identity import TaskIdentity

from fl.engine.flower import quiet_flower
from fl.engine.in_process import InProcessGrid
from fl.errors import ShoalError

COPIES = ["records", "wire", "none"]


@pytest.fixture(autouse=True)
def _quiet():
    quiet_flower()


def echo(message: Message, context: Context) -> Message:
    return Message(message.content, reply_to=message)


def content(**values) -> RecordDict:
    arrays = ArrayRecord({"a": Array(np.arange(3, dtype=np.float32))})
    return RecordDict({"arrays": arrays, "config": ConfigRecord({"list": [1, 2], **values}), "metrics": MetricRecord()})


def messages(nodes, record=None, kind="train") -> list[Message]:
    return [Message(record if record is not None else content(node=n), n, kind) for n in nodes]


def learner() -> ClientApp:
    """Moves towards its own target, partition-id, and counts its calls in Context.state."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        (start,) = message.content["arrays"].to_numpy_ndarrays()
        calls = context.state.get("calls", MetricRecord({"n": 0}))
        context.state["calls"] = MetricRecord({"n": calls["n"] + 1})
        target = float(context.node_config["partition-id"])
        new = start + np.float32(context.run_config["lr"]) * (target - start)
        metrics = MetricRecord({"num-examples": 10, "calls": calls["n"] + 1})
        return Message(RecordDict({"arrays": ArrayRecord([new]), "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        (state,) = message.content["arrays"].to_numpy_ndarrays()
        error = float(np.abs(state - context.node_config["partition-id"]).mean())
        return Message(RecordDict({"m": MetricRecord({"num-examples": 10, "error": error})}), reply_to=message)

    return app


def run_strategy(strategy, nodes=8, rounds=3, **settings):
    results = []
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        start = ArrayRecord([np.full(4, 100.0, np.float32)])
        results.append(strategy.start(grid, start, num_rounds=context.run_config["rounds"]))

    with InProcessGrid(learner(), nodes, {"lr": 0.5, "rounds": rounds}, **settings) as grid:
        app(grid, grid.server_context())
    return results[0]


@pytest.mark.parametrize("copy", COPIES)
def test_fedavg_runs_unmodified(copy):
    result = run_strategy(FedAvg(), copy=copy)
    # every client moves half way to its id; so does their mean, to 3.5
    np.testing.assert_allclose(result.arrays.to_numpy_ndarrays()[0], 3.5 + (100 - 3.5) / 8)
    assert [r["calls"] for r in result.train_metrics_clientapp.values()] == pytest.approx([1, 2, 3])
    assert result.evaluate_metrics_clientapp[3]["error"] == pytest.approx(100 - 3.5 - (100 - 3.5) * 7 / 8)


@pytest.mark.parametrize("strategy", [FedAdam, FedMedian, Krum], ids=lambda s: s.__name__)
def test_other_strategies_run_unmodified_and_repeat_bit_for_bit(strategy):
    ends = [run_strategy(strategy()).arrays.to_numpy_ndarrays()[0].tobytes() for _ in range(2)]
    assert ends[0] == ends[1]
    assert ends[0] != np.full(4, 100.0, np.float32).tobytes()


def test_a_legacy_server_app_runs_unmodified():
    from flwr.client import NumPyClient
    from flwr.common import Context as AnyContext
    from flwr.common import ndarrays_to_parameters
    from flwr.server import ServerAppComponents, ServerConfig
    from flwr.server.strategy import FedAvg as LegacyFedAvg

    class Client(NumPyClient):
        def fit(self, parameters, config):
            return [parameters[0] + 1], 10, {}

        def evaluate(self, parameters, config):
            return float(parameters[0][0]), 10, {}

    def server_fn(context: AnyContext) -> ServerAppComponents:
        start = ndarrays_to_parameters([np.zeros(2, np.float32)])
        strategy = LegacyFedAvg(initial_parameters=start, min_fit_clients=4, min_available_clients=4)
        return ServerAppComponents(config=ServerConfig(num_rounds=2), strategy=strategy)

    calls = []

    def client_fn(context: Context):
        calls.append(context.node_id)
        return Client().to_client()

    with InProcessGrid(ClientApp(client_fn=client_fn), 4) as grid:
        ServerApp(server_fn=server_fn)(grid, grid.server_context())
    assert sorted(calls) == sorted([2, 3, 4, 5] * 4)  # fit and evaluate, twice


def test_clients_run_at_the_pull_in_the_order_of_pushing():
    ran = []

    def app(message, context):
        ran.append((message.metadata.dst_node_id, message.content["config"]["node"]))
        return Message(RecordDict(), reply_to=message)

    grid = InProcessGrid(app, 4)
    first = grid.push_messages(messages([5, 2]))
    second = grid.push_messages(messages([3, 2]))
    assert ran == []
    replies = grid.pull_messages({*second})
    assert ran == [(5, 5), (2, 2), (3, 3), (2, 2)]
    assert [r.metadata.src_node_id for r in replies] == [2, 3]  # by node
    assert [r.metadata.src_node_id for r in grid.pull_messages(first)] == [2, 5]
    assert grid.pull_messages(first + second) == []


def test_ids_are_the_same_in_every_grid():
    seen = []
    for _ in range(2):
        with InProcessGrid(echo, 3) as grid:
            assert grid.get_node_ids() == [2, 3, 4] == [n.node_id for n in grid.get_nodes()]
            ids = grid.push_messages(messages([2, 3, 4]))
            replies = grid.pull_messages(ids)
            assert [r.metadata.reply_to_message_id for r in replies] == ids
            seen.append((ids, [r.metadata.message_id for r in replies]))
    assert seen[0] == seen[1]
    assert len({*seen[0][0], *seen[0][1]}) == 6


def test_replies_of_a_node_come_in_the_order_of_pushing_beyond_nine():
    with InProcessGrid(echo, 1) as grid:
        ids = grid.push_messages(messages([2] * 25))
        assert [r.metadata.reply_to_message_id for r in grid.pull_messages(set(ids))] == ids


def test_a_client_that_raises_becomes_an_error_reply(caplog):
    def app(message, context):
        if context.node_id == 3:
            raise ValueError("no data")
        if context.node_id == 4:
            return "not a message"
        return Message(RecordDict(), reply_to=message)

    with InProcessGrid(app, 3) as grid, caplog.at_level(logging.ERROR):
        good, raised, wrong = grid.send_and_receive(messages([2, 3, 4]))
    assert good.has_content()
    assert raised.error.code == ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    assert "ValueError" in raised.error.reason and "no data" in raised.error.reason
    assert (raised.metadata.src_node_id, raised.metadata.dst_node_id) == (3, SUPERLINK_NODE_ID)
    assert "not str" in wrong.error.reason
    assert "Traceback" in caplog.text  # a bug in an app can be found


def test_stopping_is_not_an_error_of_a_client():
    def app(message, context):
        if not stopped:
            stopped.append(1)
            raise KeyboardInterrupt
        return Message(RecordDict(), reply_to=message)

    stopped: list[int] = []
    grid = InProcessGrid(app, 3)
    ids = grid.push_messages(messages([2, 3, 4]))
    with pytest.raises(KeyboardInterrupt):
        grid.pull_messages(ids)
    assert [r.metadata.src_node_id for r in grid.pull_messages(ids)] == [3, 4]


@pytest.mark.parametrize("copy", ["records", "wire"])
def test_receivers_can_not_reach_each_other(copy):
    seen, kept = [], []

    def app(message, context):
        record = message.content
        seen.append((str(record["config"]), record["arrays"]["a"].dtype, sorted(record)))
        record["config"]["list"].append(9)
        record["config"]["stage"] = "done"
        record["arrays"]["a"].dtype = "spoiled"
        del record["metrics"]
        message.metadata.ttl = 1.0
        kept.append(record)
        return Message(record, reply_to=message)

    shared = content()
    with InProcessGrid(app, 2, copy=copy) as grid:
        sent = messages([2, 3], shared)
        replies = grid.send_and_receive(sent)
        kept[0]["config"]["list"].append(10)
    assert seen[0] == seen[1]
    assert dict(shared["config"]) == {"list": [1, 2]}
    assert sorted(shared) == ["arrays", "config", "metrics"]
    assert shared["arrays"]["a"].dtype == "float32"
    assert sent[0].metadata.ttl > 1
    assert replies[0].content["config"]["list"] == [1, 2, 9]


def test_a_message_is_as_it_was_when_pushed():
    record = content(round=1)
    with InProcessGrid(echo, 1) as grid:
        ids = grid.push_messages(messages([2], record))
        record["config"]["round"] = 2
        assert grid.pull_messages(ids)[0].content["config"]["round"] == 1


def test_array_bytes_are_shared_unless_they_go_over_a_wire():
    record = content()
    for copy, same in (("records", True), ("none", True), ("wire", False)):
        with InProcessGrid(echo, 1, copy=copy) as grid:
            (reply,) = grid.send_and_receive(messages([2], record))
            assert (reply.content["arrays"]["a"].data is record["arrays"]["a"].data) == same
            assert (reply.content is record) == (copy == "none")
            assert reply.content == record


@pytest.mark.parametrize("copy", COPIES)
def test_errors_pass_through_every_copy(copy):
    def app(message, context):
        return Message(Error(7, "refused"), reply_to=message)

    with InProcessGrid(app, 1, copy=copy) as grid:
        (reply,) = grid.send_and_receive(messages([2]))
    assert (reply.error.code, reply.error.reason) == (7, "refused")


def test_two_grids_are_apart():
    def app(message, context):
        n = context.state.get("n", MetricRecord({"n": 0}))["n"] + 1
        context.state["n"] = MetricRecord({"n": n})
        return Message(RecordDict({"n": MetricRecord({"n": n, "run": context.run_id})}), reply_to=message)

    def ask(grid):
        (reply,) = grid.send_and_receive(messages([2]))
        return reply.content["n"]["n"], reply.content["n"]["run"], reply.metadata.run_id

    one, two = InProcessGrid(app), InProcessGrid(app)
    assert one.run.run_id != two.run.run_id
    assert ask(one) == (1, one.run.run_id, one.run.run_id)
    assert ask(two) == (1, two.run.run_id, two.run.run_id)
    two.close()
    assert ask(one) == (2, one.run.run_id, one.run.run_id)
    assert InProcessGrid(app, run_id=77).run.run_id == 77


def test_the_identity_of_another_runtime_is_left_alone(monkeypatch):
    monkeypatch.setattr(TaskIdentity, "_task_id", 41)
    monkeypatch.setattr(TaskIdentity, "_run_id", 42)
    monkeypatch.setattr(TaskIdentity, "_node_id", 43)
    with InProcessGrid(echo, run_id=5) as grid:
        sent = messages([2])
        (reply,) = grid.send_and_receive(sent)
    assert (TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id) == (41, 42, 43)
    assert (sent[0].metadata.run_id, reply.metadata.run_id) == (5, 5)
    assert (sent[0].metadata.src_node_id, reply.metadata.dst_node_id) == (SUPERLINK_NODE_ID, SUPERLINK_NODE_ID)


def test_a_closed_grid_says_so():
    grid = InProcessGrid(echo)
    ids = grid.push_messages(messages([2]))
    grid.close()
    grid.close()
    for use in (lambda: grid.push_messages(messages([2])), lambda: grid.pull_messages(ids)):
        with pytest.raises(ShoalError, match="closed"):
            use()


def test_an_unknown_node_is_refused_before_anything_is_queued():
    ran = []
    with InProcessGrid(lambda m, c: ran.append(1) or echo(m, c), 2) as grid:
        with pytest.raises(ShoalError, match="no node 9; this grid has nodes 2 to 3"):
            grid.push_messages(messages([2, 9]))
        assert grid.pull_messages(["1"]) == []
    assert ran == []


@pytest.mark.parametrize("wrong", [{"num_nodes": 0}, {"copy": "deep"}])
def test_wrong_arguments(wrong):
    with pytest.raises(ValueError, match="num_nodes"):
        InProcessGrid(echo, **wrong)


def test_contexts_name_the_partition_and_carry_the_run_config():
    seen = []
    with InProcessGrid(lambda m, c: seen.append(c) or echo(m, c), 2, {"lr": 0.1}) as grid:
        grid.send_and_receive(messages([2, 3]))
        server = grid.server_context({"rounds": 2})
        assert (server.node_id, server.run_config) == (SUPERLINK_NODE_ID, {"rounds": 2})
        assert grid.server_context().run_config == {"lr": 0.1}
    assert [c.node_config for c in seen] == [{"partition-id": i, "num-partitions": 2} for i in range(2)]
    assert all(c.run_config == {"lr": 0.1} for c in seen)
    seen[0].run_config["lr"] = 0.2
    assert seen[1].run_config == {"lr": 0.1}
