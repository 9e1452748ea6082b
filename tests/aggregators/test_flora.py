import numpy as np
import pytest

from aggregators.flora import START, FLoRA
from tests.oracles import low_rank as oracle

RANKS, ALPHAS = (2, 3, 1), (4.0, 3.0, 2.0)


@pytest.mark.parametrize(("ranks", "expected"), [((3,), 5 * 3), (RANKS, 2 + 3 + 1 + 2 + 3)])
def test_the_increment_is_the_stack_of_all_clients(ranks, expected):
    server = oracle.server_of(oracle.space_of("lora", ranks, ALPHAS[: len(ranks)], ((20, 30), (25, 16))))
    updates = oracle.updates_of(server, 5)
    rule = FLoRA()
    new = rule.aggregate(server, updates)
    target = oracle.mean_delta(server, updates, rule.shares(updates))
    for name, piece in new.increment.items():
        assert piece.rank == expected
        np.testing.assert_allclose(piece.matrix(), target[name], atol=1e-12)


def test_the_weights_are_on_one_stack_alone():
    server = oracle.server_of(oracle.space_of("lora"))
    updates = oracle.updates_of(server, 2)
    one, other = (FLoRA(weights=w).aggregate(server, updates).increment["layer0"] for w in ([1.0, 1.0], [1.0, 3.0]))
    np.testing.assert_array_equal(one.left, other.left)
    np.testing.assert_allclose(one.right[:3] / other.right[:3], 2)


def test_the_adapter_begins_anew_from_where_the_first_round_began():
    server = oracle.server_of(oracle.space_of("lora", RANKS, ALPHAS))
    space, start = server.space, server.vector
    for round in range(3):
        new = FLoRA().aggregate(server, oracle.updates_of(server, 4, round))
        for module in space.modules:
            np.testing.assert_array_equal(space.tensor(new.vector, module.a), space.tensor(start, module.a))
            assert not space.tensor(new.vector, module.b).any()
        assert new.vector[space.columns(["head"])].any()
        # as if another rule, or a saved run, had moved A in between: the first start is what counts
        moved = new.vector.copy()
        moved[space.columns(["A"])] += 1
        server = new.folded().replace(vector=moved)
    assert set(server.extra) == {START}


def test_other_rules_memories_stay():
    server = oracle.server_of(oracle.space_of("lora")).replace(extra={"mine": np.ones(2)})
    assert set(FLoRA().aggregate(server, oracle.updates_of(server, 2)).extra) == {"mine", START}


def test_clients_without_weight_are_not_stacked():
    server = oracle.server_of(oracle.space_of("lora"))
    new = FLoRA(weights=[0.0, 1.0, 0.0, 2.0]).aggregate(server, oracle.updates_of(server, 4))
    assert {piece.rank for piece in new.increment.values()} == {2 * 3}


def test_the_start_survives_a_checkpoint():
    server = oracle.server_of(oracle.space_of("lora"))
    new = FLoRA().aggregate(server, oracle.updates_of(server, 3)).folded()
    arrays, meta = new.parts()
    again = type(new).from_parts(arrays, meta, new.space)
    one, other = (FLoRA().aggregate(s, oracle.updates_of(s, 3, 7)) for s in (new, again))
    np.testing.assert_array_equal(one.vector, other.vector)
    assert FLoRA.stateful
