import numpy as np
import pytest

from aggregators.mean import FedAvg
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
def test_fedavg_adds_the_mean_of_the_changes_of_mixed_ranks_instead(round):
    """From where each client began: what a client does not own, it leaves as it is."""
    server = oracle.server_of(oracle.space_of("alternating", (2, 4, 1), (4.0, 2.0, 3.0)))
    updates = oracle.updates_of(server, 6, 0, round)
    shares = FedAvg().shares(updates)
    still = [type(u)(**{**vars(u), "vector": np.zeros_like(u.vector)}) for u in updates]
    ends, starts = (oracle.mean_delta(server, us, shares) for us in (updates, still))
    before, after = (oracle.dense(server.space, s.vector) for s in (server, FedAvg().aggregate(server, updates)))
    for name in ends:
        np.testing.assert_allclose(after[name] - before[name], ends[name] - starts[name], atol=1e-12)
