import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import yaml

from aggregators import mean as mean_module
from aggregators.base import Aggregator, in_client_order
from aggregators.fedavg import FedAvg
from aggregators.mean import weighted_mean
from aggregators.server_optimizers import SGD, FedAdam
from clients.adapters.space import Space
from clients.layout import Layout
from fl.config import build
from fl.errors import ConfigError, RunStopped
from fl.keys import generator
from fl.state import ServerState, Update

# not square: hidden size 6, projections of 10, rank 4, 3 classes
LAYOUT = Layout(("lora_A", "lora_B", "head.weight", "head.bias"), ((4, 6), (10, 4), (3, 6), (3,)))


def server() -> ServerState:
    return ServerState(
        generator(0, "server").normal(size=LAYOUT.size).astype(np.float32), Space(LAYOUT), version=7, round=3
    )


def update(client: int, examples: int = 1, vector: np.ndarray | None = None, **fields) -> Update:
    if vector is None:
        draw = generator(0, "update", client)
        # magnitudes far apart: an order of summation that depends on arrival would show in the last bits
        vector = (draw.normal(size=LAYOUT.size) * 10.0 ** draw.integers(-6, 7, size=LAYOUT.size)).astype(np.float32)
    return Update(client=client, round=3, start_version=7, vector=vector, examples=examples, **fields)


def test_mean_is_the_definition():
    rows = generator(1, "rows").normal(size=(5, 70_001))  # more than two blocks of columns, and a remainder
    weights = np.array([3.0, 0.0, 1.0, 2.5, 40.0])
    expected = (weights[:, None] * rows).sum(axis=0) / weights.sum()
    np.testing.assert_allclose(weighted_mean(rows, weights), expected, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("chosen", [0, 2])
def test_all_the_weight_on_one_client_returns_its_update(chosen):
    rows = [update(c).vector for c in range(4)]
    weights = np.zeros(4)
    weights[chosen] = 1
    result = weighted_mean(rows, weights)
    assert result.dtype == np.float64
    np.testing.assert_array_equal(result, rows[chosen])


@pytest.mark.parametrize("weights", [[1, 1, 1], [3, 7, 11]])
def test_mean_of_identical_updates_is_that_update(weights):
    row = update(0).vector
    np.testing.assert_array_equal(weighted_mean([row] * 3, weights), row.astype(np.float64))


def test_scaling_updates_scales_the_mean_and_scaling_weights_does_not():
    rows = np.stack([update(c).vector for c in range(4)]).astype(np.float64)
    weights = np.array([4.0, 1.0, 9.0, 2.0])
    mean = weighted_mean(rows, weights)
    np.testing.assert_array_equal(weighted_mean(rows * -8, weights), mean * -8)  # powers of two: exact
    np.testing.assert_array_equal(weighted_mean(rows, weights / 4), mean)
    np.testing.assert_allclose(weighted_mean(rows * 3, weights), mean * 3, rtol=1e-14)


def test_sums_in_float64():
    """In float32, 1e8 + 1 - 1e8 is 0."""
    rows = np.array([[1e8], [1.0], [-1e8]], dtype=np.float32)
    assert weighted_mean(rows, np.ones(3))[0] == pytest.approx(1 / 3, rel=1e-15)


def test_the_width_of_the_blocks_changes_no_bit(monkeypatch):
    rows = [update(c).vector for c in range(6)]
    whole = weighted_mean(rows, np.arange(1, 7))
    monkeypatch.setattr(mean_module, "_COLUMNS", 7)
    np.testing.assert_array_equal(weighted_mean(rows, np.arange(1, 7)), whole)


def test_memory_does_not_grow_with_the_number_of_updates():
    d = 200_000
    rows = [np.full(d, float(c), dtype=np.float32) for c in range(20)]
    tracemalloc.start()
    weighted_mean(rows, np.ones(20))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 8 * d  # a float64 copy of the updates would be 20 * 8 * d


@pytest.mark.parametrize("weights", [[0.0, 0.0], [1.0, -1.0], [2.0, -1.0], [1.0, np.inf], [1.0, np.nan]])
def test_weights_that_make_no_mean_stop_the_run(weights):
    with pytest.raises(RunStopped, match=r"aggregator\.weights=uniform"):
        weighted_mean(np.ones((2, 3)), weights)


def test_no_updates_stop_the_run():
    with pytest.raises(RunStopped, match="no client's reply was accepted"):
        FedAvg().aggregate(server(), [])


def test_order_of_arrival_changes_no_bit():
    updates = [update(c, examples=10 + c) for c in range(9)]
    updates += [update(4, 3, vector=updates[1].vector * np.float32(1.7), sent_ticks=5)]  # heard twice
    expected = FedAvg().aggregate(server(), updates, FedAdam())
    for trial in range(5):
        order = generator(trial, "order").permutation(len(updates))
        result = FedAvg().aggregate(server(), [updates[i] for i in order], FedAdam())
        assert result.vector.tobytes() == expected.vector.tobytes()
        assert result.optimizer["v"].tobytes() == expected.optimizer["v"].tobytes()


def test_a_client_heard_twice_has_a_fixed_order_too():
    twice = [update(4), update(4, sent_ticks=5), update(4, sent_ticks=5, arrived_ticks=9)]
    updates = [update(7), *twice, update(1)]
    assert [u.client for u in in_client_order(updates)] == [1, 4, 4, 4, 7]
    assert in_client_order(updates[::-1]) == in_client_order(updates) == [updates[4], *twice, updates[0]]


def test_examples_weigh_and_uniform_does_not():
    updates = [
        update(0, 30, np.full(LAYOUT.size, 1.0, np.float32)),
        update(1, 10, np.full(LAYOUT.size, 5.0, np.float32)),
    ]
    start = ServerState(np.zeros(LAYOUT.size, np.float32), Space(LAYOUT))
    np.testing.assert_array_equal(FedAvg().aggregate(start, updates).vector, 2.0)
    np.testing.assert_array_equal(FedAvg(weights="uniform").aggregate(start, updates).vector, 3.0)


def test_one_client_alone_is_followed():
    """x + (y - x) in float64, rounded once, is y."""
    start = server()
    trained = (start.vector + generator(5, "y").normal(size=LAYOUT.size).astype(np.float32)).astype(np.float32)
    result = FedAvg().aggregate(start, [update(0, 100, trained - start.vector)], SGD())
    np.testing.assert_allclose(result.vector, trained, rtol=1e-6)


def test_aggregation_is_pure_and_counts_versions():
    start, updates = server(), [update(c) for c in range(3)]
    arrays = [start.vector, *(u.vector for u in updates)]
    before = [a.copy() for a in arrays]
    first = FedAvg().aggregate(start, updates, FedAdam())
    moments = {k: v.copy() for k, v in first.optimizer.items()}
    second = FedAvg().aggregate(first, updates, FedAdam())
    for array, copy in zip(arrays, before):
        np.testing.assert_array_equal(array, copy)
    for name, copy in moments.items():
        np.testing.assert_array_equal(first.optimizer[name], copy)
    assert (start.version, first.version, second.version) == (7, 8, 9)
    assert second.round == 3
    assert second.vector.dtype == np.float32
    assert set(second.optimizer) == {"m", "v"}
    assert start.optimizer == {}


def test_without_an_optimizer_the_mean_is_added():
    updates = [update(c, examples=c + 1) for c in range(3)]
    plain, sgd = FedAvg().aggregate(server(), updates), FedAvg().aggregate(server(), updates, SGD())
    np.testing.assert_array_equal(plain.vector, sgd.vector)


def test_an_adapter_that_overflows_stops_the_run():
    huge = update(0, vector=np.full(LAYOUT.size, 3e38, np.float32))
    with pytest.raises(RunStopped, match=r"server_optimizer\.lr"):
        FedAvg().aggregate(server(), [huge], SGD(lr=10))


def test_settings():
    values = yaml.safe_load((Path(__file__).parents[2] / "configs" / "aggregator" / "fedavg.yaml").read_text())
    values.pop("defaults")
    assert build(values, "aggregator", Aggregator) == FedAvg("examples")
    assert build({"_target_": "aggregators.fedavg.FedAvg", "weights": "uniform"}, "aggregator") == FedAvg("uniform")
    with pytest.raises(ConfigError, match=r"aggregator\.weights='size'.*examples, uniform"):
        build({"_target_": "aggregators.fedavg.FedAvg", "weights": "size"}, "aggregator")


def test_given_weights_are_one_for_each_client():
    rule = FedAvg([0.0, 3.0, 1.0])
    rule.check_clients(3)
    with pytest.raises(ConfigError, match="4 clients"):
        rule.check_clients(4)
    found = rule.shares([update(1, 10), update(2, 1)])
    np.testing.assert_allclose(found, [0.75, 0.25])
    for wrong in ([], [0.0, 0.0], [1.0, -1.0], "size"):
        with pytest.raises(ConfigError, match=r"aggregator\.weights"):
            FedAvg(wrong)
