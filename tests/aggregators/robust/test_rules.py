"""Every rule against its slow twin, and what its definition says."""

import numpy as np
import pytest
import torch

from aggregators import robust
from aggregators.robust import (
    NNA,
    NNM,
    Bucketing,
    CenteredClipping,
    CoordinateMedian,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    NoPre,
    coordinates,
    geometry,
)
from aggregators.robust.nearest import krum_scores
from fl.keys import generator
from tests.aggregators.robust.cases import RULES, SHIFTS, D, F, N, case, outcome, root
from tests.oracles import robust as naive


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("trial", range(6))
def test_a_rule_is_its_definition(name, trial):
    rule, twin = RULES[name]
    rows, _ = case(trial)
    np.testing.assert_allclose(outcome(rule, rows), twin(rows, F), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize(("n", "f"), [(3, 0), (7, 1), (8, 1), (12, 2), (16, 3)])
def test_small_and_even_numbers(name, n, f):
    rule, twin = RULES[name]
    if name.endswith("m = n - f"):
        return
    rows, _ = case("small", n, f, n=n, f=f, d=9)
    np.testing.assert_allclose(outcome(rule, rows, f), twin(rows, f), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("n", [15, 70])  # sorted by a network, and column by column
def test_float32_rows_of_many_columns(name, n, monkeypatch):
    """In blocks and a remainder; updates' size, about a start far larger than their differences."""
    monkeypatch.setattr(geometry, "_BLOCK", 1)
    monkeypatch.setattr(coordinates, "_BLOCK", 1)
    rule, twin = RULES[name]
    if name.endswith("m = n - f"):
        return
    draw = generator("robust", "columns", n)
    f = 3 if n == 15 else 2
    rows = (0.02 * draw.normal(size=2_100) + 1e-3 * draw.normal(size=(n, 2_100))).astype(np.float32)
    wide = rows.astype(np.float64)
    if rule.weighs:  # distances are those of fewer coordinates, where the twins are fast
        if rule.root:
            wide = np.concatenate([wide, root(2_100)[None]])
        q, r = np.linalg.qr(wide.T)
        rest = {"own": r[:, -1]} if rule.root else {}
        expected = q @ twin(r.T[:n], f, **rest)
    else:
        expected = twin(wide, f)
    np.testing.assert_allclose(outcome(rule, rows, f), expected, rtol=1e-6, atol=1e-6 * abs(expected).max())


@pytest.mark.parametrize("name", RULES)
def test_equal_rows_give_that_row(name):
    rule, _ = RULES[name]
    row = root() if rule.root else 0.3 * generator("robust", "one").normal(size=D)  # 0.3: within reach of the clipping
    if isinstance(rule, FoolsGold):  # it takes clients that agree for one: nobody counts
        np.testing.assert_array_equal(outcome(rule, np.tile(row, (N, 1))), 0)
        return
    np.testing.assert_allclose(outcome(rule, np.tile(row, (N, 1))), row, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("name", RULES)
def test_the_order_of_rows_is_nothing_to_a_rule(name):
    rule, _ = RULES[name]
    for trial in range(3):
        rows, _ = case("order", trial)
        order = generator("robust", "order", trial).permutation(N)
        np.testing.assert_allclose(outcome(rule, rows[order]), outcome(rule, rows), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", SHIFTS)
@pytest.mark.parametrize("pre", [NoPre(), NNM(), Bucketing(2)])
def test_moving_and_stretching_all_rows_moves_and_stretches_the_outcome(name, pre):
    rule, _ = RULES[name]
    rows, _ = case("shift")
    f = 1 if isinstance(pre, Bucketing) else F
    if name.endswith("m = n - f") and f == 1:
        return
    shift = 5 * generator("robust", "shift").normal(size=D)
    plain = outcome(rule, rows, f, pre)
    np.testing.assert_allclose(outcome(rule, rows + shift, f, pre), plain + shift, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(outcome(rule, 1e-6 * rows, f, pre), 1e-6 * plain, rtol=1e-6, atol=1e-13)


def test_centred_clipping_starts_from_its_last_outcome():
    rows, _ = case("clipping")
    rule = CenteredClipping(tau=1.0, iterations=2)
    first = robust.combine(rule, NoPre(), F, torch.from_numpy(rows))
    np.testing.assert_allclose(first.memory["centre"], first.vector.numpy())
    second = robust.combine(rule, NoPre(), F, torch.from_numpy(rows), memory=first.memory)
    np.testing.assert_allclose(
        second.vector.numpy(), naive.centered_clipping(rows, 1.0, 2, first.vector.numpy()), rtol=1e-9, atol=1e-10
    )
    again = robust.combine(CenteredClipping(tau=1.0, iterations=2, start="zero"), NoPre(), F, torch.from_numpy(rows))
    np.testing.assert_array_equal(again.vector.numpy(), first.vector.numpy())
    assert again.memory == {}


def test_foolsgold_compares_sums_over_rounds_by_client():
    rule = FoolsGold()
    memory: dict = {}
    sums = np.zeros((6, D))
    for round in range(3):
        clients = [0, 2, 3, 5] if round == 1 else [5, 1, 0, 3]
        rows = generator("robust", "foolsgold", round).normal(size=(4, D)) + np.eye(4, D)
        if round < 2:
            rows[1] = rows[0] + 0.01  # two of a kind, and so they stay whatever the last round brings
            rows *= 10
        for client, row in zip(clients, rows, strict=True):
            sums[client] += row
        before = {name: array.copy() for name, array in memory.items()}
        found = robust.combine(rule, NoPre(), 0, torch.from_numpy(rows), clients=clients, memory=memory)
        np.testing.assert_allclose(found.vector.numpy(), naive.foolsgold(rows, sums[clients]), rtol=1e-8, atol=1e-10)
        for name, array in before.items():
            np.testing.assert_array_equal(array, memory[name])  # what came in is left alone
        memory = found.memory
    assert memory["clients"].tolist() == [0, 1, 2, 3, 5]
    np.testing.assert_allclose(memory["sums"], sums[[0, 1, 2, 3, 5]])
    assert not np.allclose(outcome(FoolsGold(history=False), rows, 0), found.vector.numpy())


def test_foolsgold_takes_the_weight_from_clients_that_agree():
    rows = generator("robust", "sybils").normal(size=(10, 200))
    rows[7:] = rows[7] + 0.01 * rows[7:]
    found = robust.combine(FoolsGold(), NoPre(), 3, torch.from_numpy(rows))
    assert found.coefficients is not None
    assert found.coefficients[7:].max() < 1e-6 < 0.1 < found.coefficients[:7].min()


def test_fltrust_gives_nothing_where_nobody_goes_the_server_s_way():
    rows = -root() * np.arange(1, N + 1)[:, None]
    np.testing.assert_array_equal(outcome(FLTrust(), rows), 0)
    mixed = np.concatenate([rows, 100 * root()[None]])
    np.testing.assert_allclose(outcome(FLTrust(), mixed), root(), rtol=1e-10)  # of the one it trusts, at its own norm


def test_nna_keeps_a_peer_s_own_model_and_is_the_mean_without_hostile_ones():
    rows, _ = case("nna")
    np.testing.assert_allclose(outcome(NNA(), rows, 0), rows.mean(axis=0), rtol=1e-12)
    rows[6] = 0
    found = robust.combine(NNA(), NoPre(), F, torch.from_numpy(rows))
    assert found.coefficients is not None
    assert found.coefficients[6] == pytest.approx(1 / (N - F))
    assert (found.coefficients > 0).sum() == N - F


@pytest.mark.parametrize("name", ["median", "geometric_median", "clipping", "mean"])
def test_a_whole_weight_counts_as_that_many_rows(name):
    rule, _ = RULES[name]
    rows, _ = case("weights")
    weights = generator("robust", "weights").integers(0, 5, size=N)
    many = np.repeat(rows, weights, axis=0)
    weighted = outcome(rule, rows, weights=torch.from_numpy(weights.astype(np.float64)))
    np.testing.assert_allclose(weighted, outcome(rule, many), rtol=1e-5, atol=1e-6)


def test_weights_follow_the_twins():
    rows, _ = case("weights")
    weights = generator("robust", "weights").uniform(size=N)
    given = torch.from_numpy(weights)
    np.testing.assert_allclose(outcome(CoordinateMedian(), rows, weights=given), naive.median(rows, weights))
    np.testing.assert_allclose(
        outcome(GeometricMedian(iterations=1000), rows, weights=given), naive.geometric_median(rows, weights), rtol=1e-6
    )
    clipped = naive.centered_clipping(rows, 2.0, 3, np.zeros(D), weights)
    np.testing.assert_allclose(outcome(CenteredClipping(2.0, 3), rows, weights=given), clipped, rtol=1e-8)
    np.testing.assert_array_equal(outcome(Krum(), rows, weights=given), outcome(Krum(), rows))  # it knows no weights


def test_the_geometric_median_is_the_least_sum_of_distances():
    for trial in range(10):
        rows, _ = case("gm", trial)
        found = outcome(GeometricMedian(), rows)
        least = naive.sum_of_distances(rows, found)
        for step in (1e-1, 1e-3):
            for direction in generator("robust", "gm", trial).normal(size=(20, D)):
                assert naive.sum_of_distances(rows, found + step * direction) > least * (1 - 1e-7)


def test_the_geometric_median_of_short_updates_is_not_their_mean():
    """A fixed smoothing (0.1, say) is longer than all updates of an adapter."""
    rows = 1e-3 * case("gm")[0]
    np.testing.assert_allclose(outcome(GeometricMedian(), 1e-6 * rows), 1e-6 * outcome(GeometricMedian(), rows))
    assert np.linalg.norm(outcome(GeometricMedian(), rows) - rows.mean(axis=0)) > 0.1 * np.linalg.norm(rows[0])


@pytest.mark.parametrize("n", [5, 6])
@pytest.mark.parametrize("seed", range(3))
def test_where_most_rows_are_one_point_that_is_the_geometric_median(n, seed):
    rows = generator("robust", "point", n, seed).normal(size=(n, D))
    rows[: n // 2 + 1] = rows[0]
    np.testing.assert_allclose(outcome(GeometricMedian(), rows, 1), rows[0], rtol=1e-6, atol=1e-9)


def test_krum_counts_n_f_2_neighbours():
    squared = np.array([[0, 1, 4, 9, 16.0], [1, 0, 1, 4, 9], [4, 1, 0, 1, 4], [9, 4, 1, 0, 1], [16, 9, 4, 1, 0]])
    np.testing.assert_array_equal(krum_scores(squared, 1), [5, 2, 2, 2, 5])
    np.testing.assert_array_equal(krum_scores(squared, 0), [14, 6, 6, 6, 14])
