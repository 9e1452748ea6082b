import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.fedsb import FedSB
from aggregators.server_optimizers import FedAdam
from fl.config import build
from fl.errors import ConfigError
from tests.oracles import low_rank as oracle

RANKS, ALPHAS = (2, 4, 1), (4.0, 3.0, 2.0)


@pytest.mark.parametrize("blocks", ["zero", "owners"])
def test_with_equal_ranks_it_is_the_mean_of_the_cores(blocks):
    server = oracle.server_of(oracle.space_of("core"))
    updates = oracle.updates_of(server, 5)
    rule = FedSB(blocks=blocks)
    new = rule.aggregate(server, updates)
    np.testing.assert_allclose(new.vector, FedAvg().aggregate(server, updates).vector, rtol=1e-14, atol=1e-15)
    expected = oracle.mean_state(server, updates, rule.shares(updates))
    np.testing.assert_allclose(new.vector, expected, atol=1e-13)
    frozen = server.space.columns(["A", "B"])
    assert new.vector[frozen].tobytes() == server.vector[frozen].tobytes()


@pytest.mark.parametrize(("d", "k"), [(7, 11), (200, 300)])
def test_a_client_sends_r_squared_numbers_a_module_whatever_its_size(d, k):
    server = oracle.server_of(oracle.space_of("core", RANKS, ALPHAS, ((d, k), (k, d)), head=False))
    assert [len(u.vector) for u in oracle.updates_of(server, 3)] == [2 * r**2 for r in RANKS]


def test_padded_blocks():
    server = oracle.server_of(oracle.space_of("core", RANKS, ALPHAS))
    updates = oracle.updates_of(server, 7)
    rule = FedSB()
    new = rule.aggregate(server, updates)
    expected = oracle.mean_state(server, updates, rule.shares(updates))
    cores = server.space.columns(["R", "head"])
    np.testing.assert_allclose(new.vector[cores], expected[cores], atol=1e-13)
    frozen = server.space.columns(["A", "B"])
    assert new.vector[frozen].tobytes() == server.vector[frozen].tobytes()


@pytest.mark.parametrize("clients", [[0, 1, 2, 3, 4, 5], [0, 2, 3], [2]])
def test_owners_average_their_own_entries(clients):
    """One entry at a time; what nobody owns stays."""
    server = oracle.server_of(oracle.space_of("core", RANKS, ALPHAS, fixed=1))
    space = server.space
    updates = [oracle.updates_of(server, 6)[c] for c in clients]
    new = FedSB(blocks="owners").aggregate(server, updates)
    states = [oracle.client_state(server, u) for u in updates]
    for module in space.modules:
        before, after = space.tensor(server.vector, module.core), space.tensor(new.vector, module.core)
        for i in range(module.rank):
            for j in range(module.rank):
                owners = [n for n, u in enumerate(updates) if max(i, j) < space.rank(module, u.client)]
                weight = sum(updates[n].examples for n in owners)
                value = sum(updates[n].examples * space.tensor(states[n], module.core)[i, j] for n in owners)
                assert after[i, j] == pytest.approx(value / weight if owners else before[i, j], abs=1e-13)
    head = space.columns(["head"])
    np.testing.assert_allclose(new.vector[head], oracle.mean_state(server, updates, FedSB().shares(updates))[head])


def test_owners_are_not_the_mean_change_and_padding_is():
    server = oracle.server_of(oracle.space_of("core", RANKS, ALPHAS))
    updates = oracle.updates_of(server, 6)
    shares = FedSB().shares(updates)
    off = [
        oracle.norm(oracle.error(server, updates, shares, FedSB(blocks=b).aggregate(server, updates)))
        for b in ("zero", "owners")
    ]
    assert off[0] < 1e-12 < 1 < off[1]


@pytest.mark.parametrize("blocks", ["zero", "owners"])
def test_the_optimizer_has_one_memory_whoever_is_heard(blocks):
    server = oracle.server_of(oracle.space_of("core", RANKS, ALPHAS))
    updates = oracle.updates_of(server, 6)
    for heard in (updates, updates[1:2], updates[2:3], updates[::3]):
        server = FedSB(blocks=blocks).aggregate(server, heard, FedAdam())
    assert [len(a) for a in server.optimizer.values()] == [2 * 16 + 15] * 2


def test_settings():
    with pytest.raises(ConfigError, match=r"aggregator\.blocks='mean'"):
        build({"_target_": "aggregators.fedsb.FedSB", "blocks": "mean"}, "aggregator")
