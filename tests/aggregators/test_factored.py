import numpy as np
import pytest

from aggregators.factored import MAX_STACK, end, factors, mean_step, qr, relative_error, stacks, svd
from aggregators.fedavg import FedAvg
from aggregators.hetlora import HetLoRA
from aggregators.rolora import RoLoRA
from clients.adapters.base_change import Piece
from fl.keys import generator
from fl.state import ServerState, Update
from tests.oracles import low_rank as oracle


def normal(*shape: int) -> np.ndarray:
    return generator("normal", *shape).normal(size=shape)


@pytest.mark.parametrize("form", ["lora", "b", "alternating", "core"])
@pytest.mark.parametrize("ranks", [(3,), (2, 4, 1)])
def test_a_client_s_end_and_its_change_are_those_of_its_padded_state(form, ranks):
    server = oracle.server_of(oracle.space_of(form, ranks, [4.0] * len(ranks), fixed=1))
    space = server.space
    for update in oracle.updates_of(server, 4):
        y = oracle.client_state(server, update)
        changes = oracle.dense(space, y)
        for module in space.modules:
            rank = space.rank(module, update.client)
            np.testing.assert_array_equal(end(server, update, module.a), space.tensor(y, module.a)[:rank])
            np.testing.assert_array_equal(end(server, update, module.b), space.tensor(y, module.b)[:, :rank])
            left, right = factors(server, update, module)
            assert (left.shape[1], len(right)) == (rank, rank)
            np.testing.assert_allclose(left @ right, changes[module.name], atol=1e-13)


def test_the_stacks_multiply_to_the_mean_change():
    server = oracle.server_of(oracle.space_of("lora", (2, 4, 1), (4.0, 1.0, 2.0)))
    updates, shares = oracle.updates_of(server, 5), np.array([0.1, 0.2, 0.3, 0.05, 0.35])
    target = oracle.mean_delta(server, updates, shares)
    for module in server.space.modules:
        left, right = stacks(server, module, updates, shares)
        assert left.shape[1] == 2 + 4 + 1 + 2 + 4
        np.testing.assert_allclose(left @ right, target[module.name], atol=1e-12)


@pytest.mark.parametrize(("d", "p", "k"), [(9, 4, 7), (4, 9, 7), (9, 12, 7), (3, 5, 7), (5, 5, 2)])
@pytest.mark.parametrize("rank", [1, 3, 20])
def test_svd_is_the_best_approximation_with_orthonormal_rows(d, p, k, rank):
    left, right = normal(d, p), normal(p, k)
    u, s, vt = svd(left, right, rank)
    kept = min(rank, p, k)
    assert (u.shape, s.shape, vt.shape) == ((d, kept), (kept,), (kept, k))
    assert np.linalg.norm(left @ right - (u * s) @ vt) == pytest.approx(oracle.tail(left @ right, kept), abs=1e-12)
    np.testing.assert_allclose(vt @ vt.T, np.eye(kept), atol=1e-13)
    assert (np.diff(s) <= 0).all()
    assert (vt[np.arange(kept), np.abs(vt).argmax(axis=1)] > 0).all()


def test_the_signs_of_the_factors_do_not_decide_those_of_the_result():
    left, right = normal(9, 4), normal(4, 7)
    flips = np.array([1.0, -1.0, -1.0, 1.0])
    for one, other in zip(svd(left, right, 3), svd(left * flips, right * flips[:, None], 3), strict=True):
        np.testing.assert_allclose(one, other, atol=1e-13)


def test_svd_of_nothing_keeps_the_row_space():
    right = normal(3, 7)
    u, s, vt = svd(np.zeros((9, 3)), right, 3)
    assert not u.any() or not s.any()
    np.testing.assert_allclose(vt @ vt.T, np.eye(3), atol=1e-14)
    np.testing.assert_allclose(right @ vt.T @ vt, right, atol=1e-13)


def test_qr_has_a_positive_diagonal():
    matrix = normal(8, 5)
    q, r = qr(matrix)
    np.testing.assert_allclose(q @ r, matrix, atol=1e-14)
    np.testing.assert_allclose(q.T @ q, np.eye(5), atol=1e-14)
    assert (np.diagonal(r) > 0).all()


@pytest.mark.parametrize("stale", [False, True])
@pytest.mark.parametrize("ranks", [(3,), (2, 4, 1)])
def test_the_mean_step_leads_to_the_mean_of_the_padded_states(ranks, stale):
    """Stale updates are added to the present vector, or to their own start."""
    server = oracle.server_of(oracle.space_of("lora", ranks, [4.0] * len(ranks), fixed=0))
    updates = oracle.updates_of(server, 6)
    old = normal(server.layout.size)
    updates[1] = Update(**{**vars(updates[1]), "start": old})
    shares = np.arange(1.0, 7.0) / 21
    step, columns = mean_step(server, updates, shares, stale=stale)
    new = server.vector.copy()
    new[slice(None) if columns is None else columns] += step
    present = Update(**{**vars(updates[1]), "start": None})
    expected = oracle.mean_state(server, updates if stale else [updates[0], present, *updates[2:]], shares)
    adapter = server.space.columns(["A", "B"])
    np.testing.assert_allclose(new[adapter], expected[adapter], atol=1e-13)
    # a head moves by the mean of the updates, wherever each began
    head = server.space.columns(["head"])
    np.testing.assert_allclose(
        new[head], oracle.mean_state(server, [*updates[:1], present, *updates[2:]], shares)[head]
    )


def test_updates_of_all_columns_and_of_some_add_up():
    server = oracle.server_of(oracle.space_of("lora", (4, 2), (4.0, 4.0)))
    updates = oracle.updates_of(server, 4)
    whole = [Update(**{**vars(u), "columns": None}) if len(u.vector) == server.layout.size else u for u in updates]
    assert sum(u.columns is None for u in whole) == 2
    one, other = (mean_step(server, us, np.full(4, 0.25)) for us in (updates, whole))
    np.testing.assert_array_equal(one[0], other[0])
    assert one[1] is other[1] is None


@pytest.mark.parametrize("round", [1, 2])
def test_a_rank_that_nobody_heard_owns_contributes_nothing_and_is_not_lost(round):
    """One factor of it is zero after however many rounds, never both, so that its owners can train it again."""
    server = oracle.server_of(oracle.space_of("alternating", (2, 4), (4.0, 4.0)))
    for turn in range(round, round + 3):
        low = [
            u
            for u in oracle.updates_of(server, 6, turn, turn)
            if len(u.columns) < len(server.space.columns(server.space.trains(turn)))
        ]
        new = RoLoRA().aggregate(server, low)
        shares = RoLoRA().shares(low)
        assert oracle.norm(oracle.error(server, low, shares, new)) < 1e-12
        server = new
        for module in server.space.modules:
            a, b = server.space.tensor(server.vector, module.a)[2:], server.space.tensor(server.vector, module.b)[:, 2:]
            assert a.any(axis=1).sum() + b.any(axis=0).sum() == 2
    both = oracle.server_of(oracle.space_of("lora", (2, 4), (4.0, 4.0)))
    ten = oracle.updates_of(both, 20)[::2]  # ten times a tenth is not quite one
    new = HetLoRA(sparsity_weighted=False).aggregate(both, ten)
    for module in both.space.modules:
        assert not new.space.tensor(new.vector, module.b)[:, 2:].any()
        np.testing.assert_array_equal(
            new.space.tensor(new.vector, module.a)[2:], both.space.tensor(both.vector, module.a)[2:]
        )


@pytest.mark.parametrize("ranks", [(3,), (2, 4, 1)])
@pytest.mark.parametrize("form", ["lora", "core"])
def test_the_relative_error_is_that_of_the_dense_matrices(form, ranks):
    server = oracle.server_of(oracle.space_of(form, ranks, [4.0] * len(ranks)))
    updates, shares = oracle.updates_of(server, 5), np.array([0.1, 0.2, 0.3, 0.0, 0.4])
    other = oracle.server_of(server.space, 9)
    full = oracle.server_of(server.space, 10).space.sizes(server.space.modules[1])
    pieces = {"layer0": Piece(normal(7, 2), normal(2, 11)), "layer1": Piece(normal(*full), None)}
    for increment in ({}, pieces):
        new = other.replace(increment=increment)
        expected = oracle.norm(oracle.error(server, updates, shares, new))
        expected /= oracle.norm(oracle.mean_delta(server, updates, shares))
        assert relative_error(server, updates, shares, new) == pytest.approx(expected, rel=1e-12)


def test_the_relative_error_keeps_its_digits_where_the_changes_are_large():
    """Gram matrices would square the condition and end at 1e-8."""
    server = oracle.server_of(oracle.space_of("b"))
    updates = oracle.updates_of(server, 5)
    rule = FedAvg()
    found = relative_error(server, updates, rule.shares(updates), rule.aggregate(server, updates))
    assert found is not None
    assert found < 1e-14


def test_the_relative_error_of_fedit_is_zero_where_one_factor_is_common():
    """And after one step from (A0, B = 0), from which A has no gradient."""
    server = oracle.server_of(oracle.space_of("lora"))
    space = server.space
    for module in space.modules:
        space.tensor(server.vector, module.b)[...] = 0
    updates = oracle.updates_of(server, 4)
    for update in updates:
        for module in space.modules:
            update.vector[slice(*space.spans[module.a])] = 0
    new = FedAvg().aggregate(server, updates)
    assert relative_error(server, updates, FedAvg().shares(updates), new) == pytest.approx(0, abs=1e-14)


def test_the_relative_error_of_nothing():
    server = oracle.server_of(oracle.space_of("lora"))
    nothing = server.replace(vector=np.zeros_like(server.vector))
    still = [Update(0, 1, 0, np.zeros_like(server.vector), 1)]
    assert relative_error(nothing, still, np.ones(1), nothing) == 0
    assert relative_error(nothing, still, np.ones(1), server) == float("inf")


def test_stacks_that_are_too_long_are_not_measured():
    space = oracle.space_of("lora", (8,), (8.0,), ((12, 9),), head=False)
    server: ServerState = oracle.server_of(space)
    updates = oracle.updates_of(server, MAX_STACK // 8)
    shares = np.full(len(updates), 1 / len(updates))
    assert relative_error(server, updates, shares, server) is None
    assert relative_error(server, updates[1:], shares[1:], server) is not None
