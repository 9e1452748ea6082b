import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.rolora import RoLoRA
from tests.oracles import low_rank as oracle


@pytest.mark.parametrize(("round", "trains", "frozen"), [(1, "B", "A"), (2, "A", "B"), (3, "B", "A")])
@pytest.mark.parametrize("ranks", [(3,), (2, 4, 1)])
def test_only_the_factor_of_the_round_changes(ranks, round, trains, frozen):
    server = oracle.server_of(oracle.space_of("alternating", ranks, [4.0] * len(ranks)))
    space = server.space
    updates = oracle.updates_of(server, 5, 0, round)
    new = RoLoRA().aggregate(server, updates)
    stays, moves = space.columns([frozen]), space.columns([trains, "head"])
    assert new.vector[stays].tobytes() == server.vector[stays].tobytes()
    expected = oracle.mean_state(server, updates, RoLoRA().shares(updates))
    np.testing.assert_allclose(new.vector[moves], expected[moves], atol=1e-13)


@pytest.mark.parametrize("round", [1, 2])
def test_with_equal_ranks_it_is_fedavg(round):
    server = oracle.server_of(oracle.space_of("alternating"))
    updates = oracle.updates_of(server, 5, 0, round)
    one, other = RoLoRA().aggregate(server, updates), FedAvg().aggregate(server, updates)
    assert one.vector.tobytes() == other.vector.tobytes()


@pytest.mark.parametrize("round", [1, 2])
def test_both_are_exact_with_mixed_ranks(round):
    server = oracle.server_of(oracle.space_of("alternating", (2, 4, 1), (4.0, 2.0, 3.0)))
    updates = oracle.updates_of(server, 6, 0, round)
    wanted = oracle.mean_delta(server, updates, FedAvg().shares(updates))
    for rule in (FedAvg(), RoLoRA()):
        found = oracle.dense(server.space, rule.aggregate(server, updates).vector)
        for name, change in wanted.items():
            np.testing.assert_allclose(found[name], change, atol=1e-12)
