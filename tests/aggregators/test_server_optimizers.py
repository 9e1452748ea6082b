from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower

from aggregators.base import ServerOptimizer
from aggregators.mean import weighted_mean
from aggregators.server_optimizers import SGD, Adaptive, FedAdagrad, FedAdam, FedYogi
from fl.config import build
from fl.errors import ConfigError
from fl.keys import generator
from tests.oracles.server_optimizers import adaptive_federated_optimization, server_momentum

CONFIGS = Path(__file__).parents[2] / "configs"
D, CLIENTS, ROUNDS = 13, 3, 6
SHAPES = {"lora_A": (2, 3), "lora_B": (3, 2), "bias": (1,)}  # 13 scalars


def rounds() -> np.ndarray:
    """(rounds, clients, d): sizes from far below tau to far above, some coordinates still for a while, one always."""
    draw = generator(0, "server optimiser test")
    deltas = draw.normal(size=(ROUNDS, CLIENTS, D)) * 10.0 ** draw.integers(-5, 1, size=D)
    deltas[2:5, :, 1] = 0
    deltas[:, :, 2] = 0
    return deltas


def trajectory(optimizer, x: np.ndarray, deltas: np.ndarray) -> Iterator[np.ndarray]:
    state: dict = {}
    for clients in deltas:
        x, state = optimizer.step(x, weighted_mean(clients, np.ones(len(clients))), state)
        yield x


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (FedAdagrad(lr=0.3, beta1=0.0, tau=1e-2), "fedadagrad"),
        (FedAdagrad(lr=0.3, beta1=0.7, tau=1e-2), "fedadagrad"),
        (FedAdam(lr=0.02, beta1=0.9, beta2=0.99, tau=1e-3), "fedadam"),
        (FedAdam(lr=0.02, beta1=0.3, beta2=0.5, tau=1e-1), "fedadam"),
        (FedYogi(lr=0.02, beta1=0.9, beta2=0.99, tau=1e-3), "fedyogi"),
        (FedYogi(lr=0.02, beta1=0.3, beta2=0.5, tau=1e-1), "fedyogi"),
    ],
)
def test_adaptive_steps_are_algorithm_2(optimizer, name):
    x, deltas = generator(1, "x").normal(size=D), rounds()
    expected = adaptive_federated_optimization(
        name,
        x.tolist(),
        deltas.tolist(),
        optimizer.lr,
        optimizer.beta1,
        getattr(optimizer, "beta2", 0.0),
        optimizer.tau,
    )
    np.testing.assert_allclose(list(trajectory(optimizer, x, deltas)), expected, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_fedavgm(momentum):
    x, deltas = generator(1, "x").normal(size=D), rounds()
    actual = list(trajectory(SGD(lr=0.5, momentum=momentum), x, deltas))
    np.testing.assert_allclose(
        actual, server_momentum(x.tolist(), deltas.tolist(), 0.5, momentum), rtol=1e-13, atol=1e-15
    )


@pytest.mark.parametrize("optimizer", [SGD(momentum=0.9), FedAdagrad(beta1=0.5), FedAdam(), FedYogi()])
def test_a_step_leaves_its_arguments_alone_and_works_in_float64(optimizer):
    x, delta = np.linspace(-1, 1, D), np.linspace(1, 2, D)
    state: dict = {}
    for _ in range(2):  # the first step makes the state, the second changes it
        arguments = [x, delta, *state.values()]
        before = [a.copy() for a in arguments]
        new, after = optimizer.step(x, delta, state)
        for array, copy in zip(arguments, before):
            np.testing.assert_array_equal(array, copy)
        assert {a.dtype for a in (new, *after.values())} == {np.dtype(np.float64)}
        assert not any(np.shares_memory(a, b) for a in (new, *after.values()) for b in arguments)
        state = after


def test_yogi_forgets_slower_than_adam():
    """After a burst the second moment of Adam decays by a factor a round, Yogi's by the size of the squared update."""
    big, small = np.full(1, 10.0), np.full(1, 1e-2)
    moments = {}
    for optimizer in (FedAdam(), FedYogi()):
        _, state = optimizer.step(np.zeros(1), big, {})
        peak = state["v"]
        for _ in range(50):
            _, state = optimizer.step(np.zeros(1), small, state)
        moments[type(optimizer)] = float(state["v"][0] / peak[0])
    assert moments[FedAdam] < 0.65
    assert moments[FedYogi] > 0.99


@pytest.mark.parametrize(
    ("target", "setting", "value"),
    [("SGD", "momentum", 1.0), ("SGD", "lr", 0.0), ("FedAdam", "tau", 0.0), ("FedYogi", "beta2", 1.0)],
)
def test_values_out_of_range_are_refused_by_name(target, setting, value):
    values = {"_target_": f"aggregators.server_optimizers.{target}", setting: value}
    with pytest.raises(ConfigError, match=rf"server_optimizer\.{setting}="):
        build(values, "server_optimizer")


# Flower's own strategies, on the same numbers. Its arrays keep float64, so the comparison is to rounding.


def record(x: np.ndarray) -> ArrayRecord:
    arrays, start = {}, 0
    for name, shape in SHAPES.items():
        stop = start + int(np.prod(shape))
        arrays[name] = Array(x[start:stop].reshape(shape))
        start = stop
    return ArrayRecord(arrays)


def flat(arrays: ArrayRecord) -> np.ndarray:
    return np.concatenate([arrays[name].numpy().reshape(-1) for name in SHAPES])


def flower_step(strategy, server_round: int, x: np.ndarray, deltas: np.ndarray) -> np.ndarray:
    """What Flower's ``strategy`` makes of ``x`` ``(d,)`` and clients that moved by ``deltas`` ``(clients, d)``."""
    adaptive = not isinstance(strategy, flower.FedAvgM)
    strategy.current_arrays = {k: a.numpy() for k, a in record(x).items()} if adaptive else record(x)
    replies = []
    for delta in deltas:
        content = RecordDict({"arrays": record(x + delta), "metrics": MetricRecord({"num-examples": 5})})
        # a stand-in for a Message: a real one can only be made inside a running Flower app
        replies.append(SimpleNamespace(content=content, has_error=lambda: False))
    arrays, _ = strategy.aggregate_train(server_round, replies)
    return flat(arrays)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (FedAdagrad(lr=0.3, tau=1e-2), flower.FedAdagrad(eta=0.3, tau=1e-2)),
        (FedYogi(lr=0.02), flower.FedYogi(eta=0.02)),
    ],
)
def test_flower_agrees_but_for_the_first_second_moment(ours: Adaptive, theirs):
    """Flower starts v at 0, where Algorithm 2 asks for v >= tau^2. From v = 0 both take the same steps."""
    x, deltas = generator(2, "x").normal(size=D), rounds()
    state: dict = {"v": np.zeros(D)}
    for number, clients in enumerate(deltas, start=1):
        new, state = ours.step(x, weighted_mean(clients, np.ones(CLIENTS)), state)
        np.testing.assert_allclose(new, flower_step(theirs, number, x, clients), rtol=0, atol=1e-11)
        x = new


def test_flower_fedadam_agrees_but_for_its_bias_correction():
    """Flower's FedAdam scales round t's step by sqrt(1 - beta2^(t+1)) / (1 - beta1^(t+1)) and starts at v = 0."""
    ours, theirs = FedAdam(lr=0.02), flower.FedAdam(eta=0.02)
    x, deltas = generator(2, "x").normal(size=D), rounds()
    state: dict = {"v": np.zeros(D)}
    for t, clients in enumerate(deltas, start=1):
        new, state = ours.step(x, weighted_mean(clients, np.ones(CLIENTS)), state)
        correction = np.sqrt(1 - 0.99 ** (t + 1)) / (1 - 0.9 ** (t + 1))
        np.testing.assert_allclose(x + correction * (new - x), flower_step(theirs, t, x, clients), rtol=0, atol=1e-11)
        x = new


def test_flower_fedavgm_agrees():
    ours = SGD(lr=0.5, momentum=0.9)
    theirs = flower.FedAvgM(server_learning_rate=0.5, server_momentum=0.9)
    x, deltas = generator(2, "x").normal(size=D), rounds()
    state: dict = {}
    for number, clients in enumerate(deltas, start=1):
        new, state = ours.step(x, weighted_mean(clients, np.ones(CLIENTS)), state)
        np.testing.assert_allclose(new, flower_step(theirs, number, x, clients), rtol=0, atol=1e-11)
        x = new


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("sgd", SGD(lr=1.0, momentum=0.0)),
        ("fedavgm", SGD(lr=1.0, momentum=0.9)),
        ("fedadagrad", FedAdagrad()),
        ("fedadam", FedAdam()),
        ("fedyogi", FedYogi()),
    ],
)
def test_configs_hold_every_setting(name, expected):
    values = yaml.safe_load((CONFIGS / "server_optimizer" / f"{name}.yaml").read_text())
    assert build(values, "server_optimizer", ServerOptimizer) == expected
    assert set(values) - {"_target_"} == {f.name for f in fields(expected)}
