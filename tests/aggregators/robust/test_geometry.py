"""Inner products: accurate where float32 formulas have no digit left, and the same of factors as of matrices."""

import numpy as np
import pytest
import torch

from aggregators import robust
from aggregators.robust import (
    ARC,
    ARCNNM,
    CAF,
    MDA,
    NNA,
    NNM,
    Bucketing,
    CenteredClipping,
    Clipping,
    CoordinateMedian,
    Dense,
    Factored,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    Mean,
    MultiKrum,
    NoPre,
)
from aggregators.robust.base import squared_distances
from fl.errors import ConfigError, RunStopped
from fl.keys import generator
from tests.oracles import robust as naive

WIDE = 60_000


def direct(rows: np.ndarray) -> np.ndarray:
    """Squared distances of float64 rows, one difference at a time."""
    return np.array([[((a - b) ** 2).sum() for b in rows] for a in rows])


def distances(rows: torch.Tensor, extra=()) -> np.ndarray:
    return squared_distances(Dense(rows, extra).gram.numpy())


def off(matrix: np.ndarray) -> np.ndarray:
    return matrix[~np.eye(len(matrix), dtype=bool)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("d", [3, 900, WIDE])
def test_distances_of_weights_that_differ_by_a_thousandth(dtype, d):
    """The trap: by ||x||^2 + ||y||^2 - 2 <x, y> in float32 these distances are noise."""
    draw = generator("geometry", d)
    rows = torch.from_numpy(draw.normal(size=d) + 1e-3 * draw.normal(size=(6, d))).to(dtype)
    true = direct(rows.to(torch.float64).numpy())
    exact = dtype == torch.float64 or d < WIDE
    np.testing.assert_allclose(off(distances(rows)[:6, :6]), off(true), rtol=1e-10 if exact else 1e-6)
    if dtype == torch.float32 and d == WIDE:
        norms = (rows**2).sum(dim=1)
        trap = (norms[:, None] + norms[None, :] - 2 * rows @ rows.T).numpy()
        assert np.abs(off(trap) / off(true) - 1).max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_within_groups_that_are_far_from_each_other(dtype):
    """Float32 products, about a row of one group, would leave nothing of the distances within the other."""
    draw = generator("geometry", "groups")
    rows = draw.normal(size=(2, WIDE))[[0, 0, 0, 0, 1, 1, 1]] + 1e-4 * draw.normal(size=(7, WIDE))
    rows[6] = rows[5]
    tensor = torch.from_numpy(rows).to(dtype)
    got, true = distances(tensor)[:7, :7], direct(tensor.to(torch.float64).numpy())
    assert got[5, 6] == 0
    np.testing.assert_allclose(got, true, rtol=1e-6)


@pytest.mark.parametrize("far", [1e9, 1e30])
@pytest.mark.parametrize("places", [[0], [7], [0, 1, 2], [0, 3, 6]])
@pytest.mark.parametrize("where", ["everywhere", "in one column"])
def test_far_rows_don_t_touch_the_distances_of_the_others(far, places, where):
    """They carry the mean away, and the square of their norm has more digits than float64 in front of the others'."""
    draw = generator("geometry", "far")
    rows = 1e-3 * draw.normal(size=(8, 20_000))
    if where == "everywhere":
        rows[places] = far * draw.normal(size=(len(places), 20_000))
    else:
        rows[places, 13] = far  # a column that the first look at some columns leaves out
    near = [i for i in range(8) if i not in places]
    got = distances(torch.from_numpy(rows))[:8, :8]
    np.testing.assert_allclose(off(got[np.ix_(near, near)]), off(direct(rows[near])), rtol=1e-9)
    np.testing.assert_allclose(got[np.ix_(places, near)], direct(rows)[np.ix_(places, near)], rtol=1e-9)


def test_rows_at_many_distances():
    draw = generator("geometry", "scales")
    rows = 1e-4 * draw.normal(size=(12, 9_000))
    rows[:3] = np.array([1e9, 1e5, 1e2])[:, None] * draw.normal(size=(3, 9_000))
    got = distances(torch.from_numpy(rows))[:12, :12]
    np.testing.assert_allclose(off(got[3:, 3:]), off(direct(rows[3:])), rtol=1e-9)


def test_the_origin_and_extra_vectors_are_points_too():
    draw = generator("geometry", "origin")
    rows, root = 3 + draw.normal(size=(5, 400)), draw.normal(size=400)
    got = distances(torch.from_numpy(rows).to(torch.float32), [torch.from_numpy(root)])
    every = np.concatenate([rows.astype(np.float32).astype(np.float64), root[None], np.zeros((1, 400))])
    np.testing.assert_allclose(got, direct(every), rtol=1e-10, atol=1e-9)


def test_a_combination_is_the_sum_in_float64_and_looks_at_no_other_row():
    rows = generator("geometry", "sum").normal(size=(5, 40_000)).astype(np.float32)
    extra = generator("geometry", "sum", 1).normal(size=40_000)
    rows[3] = np.nan
    coefficients = np.array([0.3, -2.0, 0.0, 0.0, 1e-9, 0.7, 5.0])
    found = Dense(torch.from_numpy(rows), [torch.from_numpy(extra)]).combination(torch.from_numpy(coefficients))
    expected = coefficients[[0, 1, 4]] @ rows[[0, 1, 4]].astype(np.float64) + 0.7 * extra
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-13)


def factors(key, n=9, ranks=(3,), scale=1.0):
    """Weight changes of two modules, one wide and one tall, and a head: as factors, and as rows."""
    draw = generator("factors", key)
    lefts, rights = [], []
    for out, into in ((7, 11), (9, 5)):
        kinds = [ranks[i % len(ranks)] for i in range(n)]
        lefts.append([scale * draw.normal(size=(out, r)) for r in kinds])
        rights.append([draw.normal(size=(r, into)) for r in kinds])
    rest = draw.normal(size=(n, 4))
    for i in (1, 5):  # hostile
        lefts[0][i] = lefts[0][i] * 8
        rest[i] += 3
    return lefts, rights, rest


def of(lefts, rights, rest) -> Factored:
    return Factored(
        [[torch.from_numpy(x) for x in left] for left in lefts],
        [[torch.from_numpy(x) for x in right] for right in rights],
        None if rest is None else torch.from_numpy(rest),
    )


@pytest.mark.parametrize("ranks", [(3,), (1, 4, 2)])
def test_inner_products_of_factors_are_those_of_the_matrices(ranks):
    lefts, rights, rest = factors("gram", ranks=ranks)
    rows = naive.dense(lefts, rights, rest)
    gram = of(lefts, rights, rest).gram.numpy()
    np.testing.assert_allclose(gram[:9, :9], rows @ rows.T, rtol=1e-12, atol=1e-10)
    np.testing.assert_array_equal(gram[9], 0)  # the origin
    alone = of(lefts, rights, None).gram.numpy()[:9, :9]
    np.testing.assert_allclose(alone, gram[:9, :9] - rest @ rest.T, rtol=1e-12, atol=1e-10)


WEIGHING = [
    Mean(), Krum(), MultiKrum(), NNA(), MDA(), GeometricMedian(), CenteredClipping(3.0, 2, "zero"), CAF(), FLTrust(),
    FoolsGold(history=False),
]  # fmt: skip


@pytest.mark.parametrize("rule", WEIGHING, ids=lambda r: type(r).__name__)
@pytest.mark.parametrize(
    "pre", [NoPre(), NNM(), Clipping(5.0), ARC(), ARCNNM(), Bucketing(2)], ids=lambda p: type(p).__name__
)
def test_a_rule_on_factors_is_the_rule_on_the_matrices(rule, pre):
    if isinstance(rule, FoolsGold) and not isinstance(pre, NoPre):
        return
    if isinstance(rule, NNA) and isinstance(pre, Clipping | ARC):
        return  # clipped rows are equally near to the origin: which is dropped is a matter of rounding
    lefts, rights, rest = factors("rules", n=11, ranks=(2, 3))
    rows, f = naive.dense(lefts, rights, rest), 1
    n, own = (10, 10) if rule.root else (11, None)
    weights = generator("factors", "weights").uniform(1, 2, size=n)
    coefficients, memory = robust.weigh(
        rule, pre, f, of(lefts, rights, rest), weights, root_index=own, seed_key=("a", 1)
    )
    found = robust.combine(
        rule, pre, f, torch.from_numpy(rows[:n]), weights,
        root=torch.from_numpy(rows[10]) if rule.root else None, seed_key=("a", 1),
    )  # fmt: skip
    assert memory == {}
    assert found.coefficients is not None
    np.testing.assert_allclose(coefficients, found.coefficients, rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(coefficients @ rows[:n], found.vector, rtol=1e-7, atol=1e-8)


def test_the_gauge_of_the_factors_is_nothing_to_a_product_and_much_to_them():
    """(B M, M^-1 A) is the same weight change, wherever A and B are."""
    lefts, rights, _ = factors("gauge")
    twisted_l, twisted_r = [list(m) for m in lefts], [list(m) for m in rights]
    for module in range(2):
        for i in range(9):
            m = generator("gauge", module, i).normal(size=(3, 3))
            twisted_l[module][i], twisted_r[module][i] = lefts[module][i] @ m, np.linalg.solve(m, rights[module][i])
    for rule in (Krum(), GeometricMedian(), MDA()):
        plain, _ = robust.weigh(rule, NoPre(), 2, of(lefts, rights, None))
        twisted, _ = robust.weigh(rule, NoPre(), 2, of(twisted_l, twisted_r, None))
        np.testing.assert_allclose(twisted, plain, rtol=1e-6, atol=1e-9)

    def stacked(left, right):
        parts = [np.array([x.ravel() for x in m]) for m in (*left, *right)]
        return torch.from_numpy(np.concatenate(parts, axis=1))

    a = robust.combine(GeometricMedian(), NoPre(), 2, stacked(lefts, rights)).coefficients
    b = robust.combine(GeometricMedian(), NoPre(), 2, stacked(twisted_l, twisted_r)).coefficients
    assert np.abs(a - b).max() > 0.01


def test_a_change_in_factors_keeps_its_digits_beside_a_large_start():
    """D = B A - B_0 A_0 as [dB, B_0] [A; dA]: small differences of large factors."""
    draw = generator("factors", "start")
    b0, a0 = draw.normal(size=(30, 4)), draw.normal(size=(4, 20))
    changes = [(1e-6 * draw.normal(size=b0.shape), 1e-6 * draw.normal(size=a0.shape)) for _ in range(6)]
    lefts = [[np.concatenate([db, b0], axis=1) for db, _ in changes]]
    rights = [[np.concatenate([a0 + da, da]) for _, da in changes]]
    got = squared_distances(of(lefts, rights, None).gram.numpy())[:6, :6]
    rows = np.array([(db @ a0 + b0 @ da + db @ da).ravel() for db, da in changes])
    np.testing.assert_allclose(off(got), off(direct(rows)), rtol=1e-9)


def test_product_space_is_for_rules_that_need_inner_products_only():
    geometry = of(*factors("refused"))
    for rule, why in (
        (CoordinateMedian(), "coordinates"),
        (CenteredClipping(), "remembers"),
        (FoolsGold(), "remembers"),
    ):
        with pytest.raises(ConfigError, match=rf"aggregator\.space='product' .*{why}"):
            robust.weigh(rule, NoPre(), 1, geometry)
    with pytest.raises(ConfigError, match="at least 9"):
        robust.weigh(Krum(), NoPre(), 3, of(*factors("refused", n=8)))


def test_factors_that_are_not_finite_are_refused():
    lefts, rights, rest = factors("bad")
    lefts[0][2][0, 0] = np.nan
    with pytest.raises(RunStopped, match="finite"):
        robust.weigh(Krum(), NoPre(), 1, of(lefts, rights, rest))
