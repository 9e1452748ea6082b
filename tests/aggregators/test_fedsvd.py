import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.fedsvd import FedSVD
from clients.adapters.space import Space
from fl.config import build
from fl.errors import ConfigError
from fl.keys import generator
from fl.state import ServerState, Update
from tests.oracles import low_rank as oracle


def factors(state: ServerState, i: int = 0) -> tuple[np.ndarray, np.ndarray]:
    module = state.space.modules[i]
    return state.space.tensor(state.vector, module.a), state.space.tensor(state.vector, module.b)


def same_row_space(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether all principal angles are zero."""
    q = [np.linalg.qr(m.T)[0] for m in (one, other)]
    return bool(np.linalg.svd(q[0].T @ q[1], compute_uv=False).min() > 1 - 1e-12)


def test_it_leaves_the_product_and_makes_a_orthonormal():
    server = oracle.server_of(oracle.space_of("b"))
    updates = oracle.updates_of(server, 5)
    new, plain = FedSVD().aggregate(server, updates), FedAvg().aggregate(server, updates)
    for i in range(2):
        (a, b), (old_a, mean_b) = factors(new, i), factors(plain, i)
        np.testing.assert_allclose(b @ a, mean_b @ old_a, atol=1e-13)
        np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-14)
        values = np.linalg.svd(mean_b @ old_a, compute_uv=False)[:3]
        np.testing.assert_allclose(b.T @ b, np.diag(values**2), atol=1e-11)
        assert same_row_space(a, old_a)


@pytest.mark.parametrize("rank_of_b", [0, 1, 2])
def test_where_b_lacks_rank_the_row_space_of_a_is_kept(rank_of_b):
    server = oracle.server_of(oracle.space_of("b", head=False))
    for i in range(2):
        b = factors(server, i)[1]
        b[...] = b[:, :rank_of_b] @ generator(0, "mix").normal(size=(rank_of_b, 3)) if rank_of_b else 0
    columns = server.space.columns(["B"])
    new = FedSVD().aggregate(server, [Update(0, 1, 0, np.zeros(len(columns)), 1, columns=columns)])
    for i in range(2):
        (a, b), (old_a, old_b) = factors(new, i), factors(server, i)
        np.testing.assert_allclose(a @ a.T, np.eye(3), atol=1e-14)
        np.testing.assert_allclose(b @ a, old_b @ old_a, atol=1e-13)
        assert same_row_space(a, old_a)


def test_the_period_counts_versions():
    server = oracle.server_of(oracle.space_of("b"), version=0)
    changed = []
    for _ in range(7):
        new = FedSVD(period=3).aggregate(server, oracle.updates_of(server, 3))
        changed.append(not np.array_equal(factors(new)[0], factors(server)[0]))
        server = new
    assert changed == [False, False, True, False, False, True, False]
    assert FedSVD.stateful


@pytest.mark.parametrize(("d", "k"), [(2, 9), (9, 2)])
def test_a_module_smaller_than_the_rank(d, k):
    server = oracle.server_of(oracle.space_of("b", (4,), (4.0,), ((d, k),)))
    updates = oracle.updates_of(server, 3)
    new = FedSVD().aggregate(server, updates)
    assert oracle.norm(oracle.error(server, updates, FedSVD().shares(updates), new)) < 1e-12
    a = factors(new)[0]
    if k >= 4:
        np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-14)
    else:  # four rows in two dimensions can't be orthonormal
        np.testing.assert_array_equal(a, factors(server)[0])


def test_a_late_client_s_step_counts_in_the_basis_that_it_was_made_in():
    server = oracle.server_of(oracle.space_of("b"))
    then = server
    for round in range(3):
        server = FedSVD().aggregate(server, oracle.updates_of(server, 3, round))
    late = Update(**{**vars(oracle.updates_of(then, 1, 9)[0]), "start": then.vector})
    new = FedSVD().aggregate(server, [late])
    before, after = oracle.dense(server.space, server.vector), oracle.dense(server.space, new.vector)
    base, end = oracle.dense(server.space, then.vector), oracle.dense(server.space, oracle.client_state(server, late))
    for name in before:
        np.testing.assert_allclose(after[name] - before[name], end[name] - base[name], atol=1e-12)


class Regression:
    """Clients that fit ``y = s B A x`` to their own samples by steps on B."""

    clients, samples, d, k, r, s = 3, 8, 5, 9, 3, 2.0

    def __init__(self) -> None:
        rng = generator(0, "regression")
        self.x = rng.normal(size=(self.clients, self.samples, self.k))
        self.y = self.x @ rng.normal(size=(self.k, self.d)) + 0.1 * rng.normal(
            size=(self.clients, self.samples, self.d)
        )
        self.a = rng.uniform(-1, 1, size=(self.r, self.k))
        base = oracle.space_of("b", (self.r,), (self.r * self.s,), ((self.d, self.k),), head=False)
        self.space: Space = base

    def start(self, a: np.ndarray) -> ServerState:
        return ServerState(np.concatenate([a.ravel(), np.zeros(self.d * self.r)]), self.space)

    def train(self, state: ServerState, client: int, lr: float, clip: float | None, adam: bool) -> Update:
        a, start = factors(state)
        b, m, v = start.copy(), 0.0, 0.0
        for t in range(1, 5):
            error = self.s * self.x[client] @ a.T @ b.T - self.y[client]  # (samples, d)
            grads = self.s * error[:, :, None] * (self.x[client] @ a.T)[:, None, :]  # (samples, d, r)
            if clip is not None:
                norms = np.linalg.norm(grads.reshape(self.samples, -1), axis=1)
                grads = grads * np.minimum(1, clip / norms)[:, None, None]
            g = grads.mean(axis=0)
            if adam:
                m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
                g = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.99**t)) + 1e-8)
            b -= lr * g
        columns = self.space.columns(["B"])
        return Update(client, 1, state.version, (b - start).ravel(), 5 + client, columns=columns)

    def run(self, rule, a: np.ndarray, rounds: int = 12, lr: float = 0.01, clip=None, adam=False) -> list[np.ndarray]:
        """``B A`` after each round."""
        state, out = self.start(a), []
        for _ in range(rounds):
            state = rule.aggregate(state, [self.train(state, c, lr, clip, adam) for c in range(self.clients)])
            now, b = factors(state)
            assert same_row_space(now, self.a)
            out.append(b @ now)
        return out


def orthonormal(a: np.ndarray) -> np.ndarray:
    return np.linalg.qr(a.T)[0].T


@pytest.mark.parametrize("clip", [None, 1.5])
def test_under_plain_sgd_it_is_ffa_over_an_orthonormal_a(clip):
    task = Regression()
    start = orthonormal(task.a)
    one, other = task.run(FedSVD(), start, clip=clip), task.run(FedAvg(), start, clip=clip)
    assert np.abs(other[-1]).max() > 0.05  # they did learn
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-15 * max(1, np.abs(y).max()) * 4)


def test_under_adam_it_is_not():
    task = Regression()
    start = orthonormal(task.a)
    one, other = (task.run(rule, start, lr=0.05, adam=True)[-1] for rule in (FedSVD(), FedAvg()))
    assert np.abs(one - other).max() > 1e-3


@pytest.mark.parametrize("clip", [None, 0.8])
def test_ffa_over_a_scaled_a_is_ffa_at_another_rate_and_clip(clip):
    """A = c Q with (eta, C) and Q with (eta c^2, C / c) make the same changes."""
    task, c = Regression(), 0.6
    q = orthonormal(task.a)
    one = task.run(FedAvg(), c * q, lr=0.02, clip=clip)
    other = task.run(FedAvg(), q, lr=0.02 * c**2, clip=None if clip is None else clip / c)
    for x, y in zip(one, other, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-14)


def test_settings():
    with pytest.raises(ConfigError, match=r"aggregator\.period"):
        build({"_target_": "aggregators.fedsvd.FedSVD", "period": 0}, "aggregator")
