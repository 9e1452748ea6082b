import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.fedex import FedEx
from aggregators.flora import FLoRA
from fl.config import build
from fl.errors import ConfigError
from tests.oracles import low_rank as oracle

RANKS, ALPHAS = (2, 3, 1), (4.0, 3.0, 2.0)


def test_the_factors_are_fedit_s():
    server = oracle.server_of(oracle.space_of("lora"))
    updates = oracle.updates_of(server, 5)
    np.testing.assert_allclose(
        FedEx().aggregate(server, updates).vector, FedAvg().aggregate(server, updates).vector, atol=1e-15
    )


@pytest.mark.parametrize("clients", [2, 4, 6])
def test_the_residual_is_the_covariance_of_rank_n_minus_one_times_r(clients):
    server = oracle.server_of(oracle.space_of("lora", (2,), (5.0,), ((20, 30), (25, 16))))
    updates = oracle.updates_of(server, clients)
    rule = FedEx()
    new = rule.aggregate(server, updates)
    expected = oracle.covariance(server, updates, rule.shares(updates))
    for name, matrix in oracle.change_of(new.increment, server.space).items():
        np.testing.assert_allclose(matrix, expected[name], atol=1e-12)
        assert new.increment[name].rank == 2 * (clients - 1) == np.linalg.matrix_rank(expected[name])


def test_the_rank_of_a_residual_of_mixed_ranks():
    server = oracle.server_of(oracle.space_of("lora", RANKS, ALPHAS, ((20, 30), (25, 16))))
    new = FedEx().aggregate(server, oracle.updates_of(server, 5))
    assert {piece.rank for piece in new.increment.values()} == {2 + 3 + 1 + 2 + 3 - 1}


@pytest.mark.parametrize("ranks", [(3,), RANKS])
def test_one_client_leaves_no_residual(ranks):
    server = oracle.server_of(oracle.space_of("lora", ranks, [4.0] * len(ranks)))
    updates = oracle.updates_of(server, 4)
    assert not FedEx().aggregate(server, updates[2:3]).increment
    assert not FedEx(weights=[0.0, 0.0, 3.0, 0.0]).aggregate(server, updates).increment


def test_clients_with_the_same_a_leave_no_residual():
    server = oracle.server_of(oracle.space_of("lora"))
    updates = oracle.updates_of(server, 4)
    for update in updates:
        for module in server.space.modules:
            update.vector[slice(*server.space.spans[module.a])] = 0
    assert not FedEx().aggregate(server, updates).increment


@pytest.mark.parametrize("ranks", [(3,), RANKS])
def test_it_agrees_with_flora_on_the_total_change(ranks):
    server = oracle.server_of(oracle.space_of("lora", ranks, [4.0] * len(ranks)))
    updates = oracle.updates_of(server, 6)
    one, other = (oracle.total(rule.aggregate(server, updates)) for rule in (FedEx(), FLoRA()))
    for name in one:
        np.testing.assert_allclose(one[name], other[name], atol=1e-12)


def test_residuals_of_two_rounds_add_up_in_the_base():
    """The mean of the clients' models, where each client's base has the first round's residual."""
    server = oracle.server_of(oracle.space_of("lora"))
    first = FedEx().aggregate(server, oracle.updates_of(server, 4, 1))
    folded = first.folded()
    updates = oracle.updates_of(folded, 3, 2)
    second = FedEx().aggregate(folded, updates)
    base = oracle.change_of(second.folded().base, server.space)
    target = oracle.mean_delta(folded, updates, FedEx().shares(updates))
    residual = oracle.change_of(first.increment, server.space)
    for name, change in oracle.dense(server.space, second.vector).items():
        np.testing.assert_allclose(base[name] + change, residual[name] + target[name], atol=1e-11)


def test_a_rank_as_high_as_the_residual_s_cuts_nothing():
    server = oracle.server_of(oracle.space_of("lora", (2,), (5.0,)))
    updates = oracle.updates_of(server, 3)
    for rank, expected in ((4, 4), (9, 4), (3, 3)):
        new = FedEx(rank=rank).aggregate(server, updates)
        assert {piece.rank for piece in new.increment.values()} == {expected}
    whole, same = (FedEx(rank=rank).aggregate(server, updates).increment for rank in (None, 4))
    for name, piece in whole.items():
        np.testing.assert_array_equal(piece.left, same[name].left)


def test_settings():
    with pytest.raises(ConfigError, match=r"aggregator\.rank"):
        build({"_target_": "aggregators.fedex.FedEx", "rank": 0}, "aggregator")
    assert FedEx.stateful
