import numpy as np
import pytest

from aggregators.flexlora import FlexLoRA, completion
from fl.config import build
from fl.errors import ConfigError
from fl.keys import generator
from fl.state import ServerState, Update
from tests.oracles import low_rank as oracle

RANKS, ALPHAS = (2, 4, 1), (4.0, 3.0, 2.0)
SPLITS = ("B", "even")


def setting(ranks=RANKS, clients: int = 6) -> tuple[ServerState, list[Update]]:
    server = oracle.server_of(oracle.space_of("lora", ranks, ALPHAS[: len(ranks)]))
    return server, oracle.updates_of(server, clients)


@pytest.mark.parametrize("split", SPLITS)
def test_every_client_takes_the_best_approximation_of_its_own_rank(split):
    """In its own scale: what `Space.take` gives it, multiplied out, is as near to D* as any matrix of that rank."""
    server, updates = setting()
    space = server.space
    rule = FlexLoRA(split=split)
    target = oracle.mean_delta(server, updates, rule.shares(updates))
    new = rule.aggregate(server, updates)
    for client, (rank, alpha) in enumerate(zip(RANKS, ALPHAS, strict=True)):
        own = np.zeros(server.layout.size)
        own[space.columns(None, client)] = space.take(new.vector, None, client)
        for module in space.modules:
            product = alpha / rank * space.tensor(own, module.b) @ space.tensor(own, module.a)
            gap = np.linalg.norm(product - target[module.name])
            assert gap == pytest.approx(oracle.tail(target[module.name], rank), abs=1e-11)


def test_the_singular_values_go_where_the_split_says():
    server, updates = setting()
    space = server.space
    whole, even = (FlexLoRA(split=split).aggregate(server, updates).vector for split in SPLITS)
    target = oracle.mean_delta(server, updates, FlexLoRA().shares(updates))
    for module in space.modules:
        values = np.linalg.svd(target[module.name], compute_uv=False)[:4]
        a, b = space.tensor(whole, module.a), space.tensor(whole, module.b)
        np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-12)
        np.testing.assert_allclose(module.scale * np.linalg.norm(b, axis=0), values, rtol=1e-10)
        a, b = space.tensor(even, module.a), space.tensor(even, module.b)
        np.testing.assert_allclose(module.scale * (a @ a.T), np.diag(values), atol=1e-10)
        np.testing.assert_allclose(module.scale * (b.T @ b), np.diag(values), atol=1e-10)


@pytest.mark.parametrize("split", SPLITS)
def test_it_is_exact_where_the_rank_suffices(split):
    """All clients of rank 1, and one heard: the mean has rank 1 and the server's factors hold it."""
    server, updates = setting()
    rule = FlexLoRA(split=split)
    alone = updates[2:3]
    new = rule.aggregate(server, alone)
    assert oracle.norm(oracle.error(server, alone, [1.0], new)) < 1e-12


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("heard", [slice(2, 3), slice(0, 0)])
def test_ranks_that_the_mean_does_not_need_can_still_be_trained(split, heard):
    """Their B is zero and their A is not: unit rows, orthogonal to all others, out of the old A's row space."""
    server, updates = setting()
    space = server.space
    updates = updates[heard] or [Update(1, 1, 0, np.zeros(server.layout.size), 1)]
    if heard.stop == 0:  # nobody learned anything
        for module in space.modules:
            space.tensor(server.vector, module.b)[...] = 0
    used = 1 if heard.stop else 0
    new = FlexLoRA(split=split).aggregate(server, updates).vector
    for module in space.modules:
        a, b = space.tensor(new, module.a), space.tensor(new, module.b)
        assert not b[:, used:].any()
        free = a[used:]
        np.testing.assert_allclose(free @ free.T, np.eye(4 - used), atol=1e-12)
        np.testing.assert_allclose(free @ a[:used].T, 0, atol=1e-12)
        old = np.concatenate([space.tensor(server.vector, module.a), a[:used]])
        basis = np.linalg.svd(old, full_matrices=False)[2]
        np.testing.assert_allclose(free @ basis.T @ basis, free, atol=1e-12)


def test_completion_takes_what_there_is_most_of():
    old = np.diag([5.0, 1.0, 3.0, 2.0])[:, [0, 1, 2, 3]]
    rows = np.eye(4)[:1]
    np.testing.assert_allclose(completion(rows, old[:3]), np.eye(4)[[2, 1]], atol=1e-15)


def test_completion_is_orthogonal_to_rows_that_the_old_ones_almost_are():
    rng = generator(0, "almost")
    rows = np.linalg.qr(rng.normal(size=(9, 3)))[0].T
    old = rng.normal(size=(5, 3)) @ rows + 1e-9 * rng.normal(size=(5, 9))
    found = completion(rows, old)
    np.testing.assert_allclose(found @ rows.T, 0, atol=1e-14)
    np.testing.assert_allclose(found @ found.T, np.eye(2), atol=1e-14)


def test_completion_has_no_more_directions_than_there_are():
    old = generator(0, "wide").normal(size=(5, 3))
    found = completion(np.eye(3)[:2], old)
    np.testing.assert_allclose(found[0], np.eye(3)[2], atol=1e-15)
    np.testing.assert_array_equal(found[1:], old[:2])


def test_more_ranks_than_columns():
    server = oracle.server_of(oracle.space_of("lora", (5,), (5.0,), ((7, 3), (2, 9))))
    updates = oracle.updates_of(server, 3)
    new = FlexLoRA().aggregate(server, updates)
    assert oracle.norm(oracle.error(server, updates, FlexLoRA().shares(updates), new)) < 1e-11
    for module in server.space.modules:
        assert server.space.tensor(new.vector, module.a).any(axis=1).all()


def test_a_change_of_basis_of_a_client_changes_nothing():
    """Only the product counts: B G^-1 and G A are the same client."""
    server, updates = setting((4,))
    space = server.space
    y = oracle.client_state(server, updates[1])
    for module in space.modules:
        g = generator(0, "basis").normal(size=(4, 4)) + 4 * np.eye(4)
        a, b = space.tensor(y, module.a), space.tensor(y, module.b)
        a[...], b[...] = g @ a, b @ np.linalg.inv(g)
    turned = Update(**{**vars(updates[1]), "vector": y - server.vector})
    one = FlexLoRA().aggregate(server, updates).vector
    other = FlexLoRA().aggregate(server, [updates[0], turned, *updates[2:]]).vector
    np.testing.assert_allclose(one, other, atol=1e-10)


def test_settings():
    with pytest.raises(ConfigError, match=r"aggregator\.split='A'"):
        build({"_target_": "aggregators.flexlora.FlexLoRA", "split": "A"}, "aggregator")
