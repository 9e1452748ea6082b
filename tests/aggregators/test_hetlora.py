import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.hetlora import HetLoRA, norms
from fl.state import Update
from tests.oracles import low_rank as oracle

RANKS, ALPHAS = (2, 4, 1), (4.0, 3.0, 2.0)


@pytest.mark.parametrize("weights", ["uniform", "examples"])
@pytest.mark.parametrize("ranks", [(3,), RANKS])
def test_clients_count_by_the_norm_of_their_change(ranks, weights):
    server = oracle.server_of(oracle.space_of("lora", ranks, [4.0] * len(ranks)))
    updates = oracle.updates_of(server, 5)
    sizes = np.array([oracle.norm(oracle.dense(server.space, oracle.client_state(server, u))) for u in updates])
    np.testing.assert_allclose(norms(server, updates), sizes, rtol=1e-12)
    share = sizes * ([u.examples for u in updates] if weights == "examples" else 1)
    share = share / share.sum()
    new = HetLoRA(weights=weights).aggregate(server, updates)
    expected = oracle.mean_state(server, updates, share)
    np.testing.assert_allclose(new.vector, expected, atol=1e-12)
    # the error is that of the padded mean with these weights
    off = oracle.error(server, updates, share, new)
    for name, matrix in oracle.covariance(server, updates, share).items():
        np.testing.assert_allclose(off[name], -matrix, atol=1e-11)


def test_without_norms_and_with_equal_ranks_it_is_fedavg():
    server = oracle.server_of(oracle.space_of("lora"))
    updates = oracle.updates_of(server, 5)
    for weights in ("examples", "uniform"):
        one = HetLoRA(weights=weights, sparsity_weighted=False).aggregate(server, updates).vector
        np.testing.assert_array_equal(one, FedAvg(weights=weights).aggregate(server, updates).vector)


def test_where_no_client_changed_anything_the_weights_decide():
    server = oracle.server_of(oracle.space_of("lora"))
    for module in server.space.modules:
        server.space.tensor(server.vector, module.b)[...] = 0
    columns = server.space.columns(["head"])
    updates = [Update(c, 1, 0, np.full(len(columns), float(c)), 1, columns=columns) for c in range(3)]
    new = HetLoRA().aggregate(server, updates)
    np.testing.assert_allclose(new.vector[columns] - server.vector[columns], 1.0)


def test_a_client_of_no_change_counts_for_nothing():
    server = oracle.server_of(oracle.space_of("lora"))
    for module in server.space.modules:
        server.space.tensor(server.vector, module.b)[...] = 0
    updates = oracle.updates_of(server, 3)
    for module in server.space.modules:
        updates[1].vector[slice(*server.space.spans[module.b])] = 0
    one, other = (HetLoRA().aggregate(server, us).vector for us in (updates, [updates[0], updates[2]]))
    np.testing.assert_array_equal(one, other)


def test_a_rank_that_few_own_shrinks():
    """The dilution that zero-padding is known for: nobody moves, and the third and fourth rank halve."""
    server = oracle.server_of(oracle.space_of("lora", (2, 4), (2.0, 4.0)))
    space = server.space
    updates = [Update(**{**vars(u), "vector": np.zeros_like(u.vector)}) for u in oracle.updates_of(server, 4)]
    new = HetLoRA(sparsity_weighted=False).aggregate(server, updates)
    for module in space.modules:
        before, after = space.tensor(server.vector, module.a), space.tensor(new.vector, module.a)
        np.testing.assert_allclose(after[:2], before[:2], atol=1e-15)
        np.testing.assert_allclose(after[2:], before[2:] / 2, atol=1e-15)
