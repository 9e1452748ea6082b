"""Every rule against its slow twin, and what the definitions promise: equivariance, bounds, far rows, kappa."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators import robust
from aggregators.robust import (
    ARC,
    ARCNNM,
    CAF,
    MDA,
    NNA,
    NNM,
    Auto,
    Bucketing,
    Bulyan,
    CenteredClipping,
    CoordinateMedian,
    FLTrust,
    FoolsGold,
    GeometricMedian,
    Krum,
    MeaMed,
    Mean,
    MultiKrum,
    NoPre,
    TrimmedMean,
    coordinates,
    geometry,
)
from aggregators.robust.nearest import krum_scores
from fl.errors import ConfigError, RunStopped
from fl.keys import generator
from tests.oracles import robust as naive

N, F, D = 15, 3, 23
RULES = {
    "mean": (Mean(), lambda rows, f: rows.mean(axis=0)),
    "auto": (Auto(), lambda rows, f: rows.mean(axis=0)),
    "krum": (Krum(), naive.krum),
    "multi_krum": (MultiKrum(), naive.multi_krum),
    "multi_krum, m = n - f": (MultiKrum(N - F), lambda rows, f: naive.multi_krum(rows, f, N - F)),
    "nna": (NNA(), naive.nna),
    "mda": (MDA(), naive.mda),
    "median": (CoordinateMedian(), lambda rows, f: naive.median(rows)),
    "trimmed_mean": (TrimmedMean(), naive.trimmed_mean),
    "meamed": (MeaMed(), naive.meamed),
    "bulyan": (Bulyan(), naive.bulyan),
    "geometric_median": (GeometricMedian(iterations=1000), lambda rows, f: naive.geometric_median(rows)),
    "clipping": (
        CenteredClipping(tau=2.0, iterations=3),
        lambda rows, f: naive.centered_clipping(rows, 2.0, 3, np.zeros(rows.shape[1])),
    ),
    "caf": (CAF(), naive.caf),
    "fltrust": (
        FLTrust(),
        lambda rows, f, root=None: naive.fltrust(rows, own(rows.shape[1]) if root is None else root),
    ),
    "foolsgold": (FoolsGold(), lambda rows, f: naive.foolsgold(rows, rows)),
}
SHIFTS = [name for name in RULES if name not in ("clipping", "fltrust", "foolsgold", "nna")]


def root(d: int = D) -> np.ndarray:
    return generator("robust", "root").normal(size=d)


own = root


def case(*key, n=N, f=F, d=D) -> tuple[np.ndarray, np.ndarray]:
    draw = generator("robust", *key)
    return naive.attacked(n, f, d, draw, int(draw.integers(6)))


def outcome(rule, rows, f=F, pre=None, **more) -> np.ndarray:
    rows = torch.as_tensor(rows)
    if rule.root:
        more.setdefault("root", torch.from_numpy(root(rows.shape[1])))
    return robust.combine(rule, pre or NoPre(), f, rows, **more).vector.numpy()


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
        rest = {"root": r[:, -1]} if rule.root else {}
        expected = q @ twin(r.T[:n], f, **rest)
    else:
        expected = twin(wide, f)
    np.testing.assert_allclose(outcome(rule, rows, f), expected, rtol=1e-6, atol=1e-9)


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


@pytest.mark.parametrize("size", [1e3, 1e9, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("spread", [1.0, 1e-3])
@pytest.mark.parametrize(
    "name",
    ["krum", "multi_krum", "mda", "median", "trimmed_mean", "meamed", "bulyan", "geometric_median", "caf", "nna"],
)
def test_far_rows_leave_the_outcome_among_the_honest_rows(name, size, dtype, spread):
    """And it is what the rule makes of the honest rows and less far ones, to the honest rows' own precision."""
    rule, _ = RULES[name]
    draw = generator("robust", "far", name)
    honest = spread * draw.normal(size=(N - F, D))
    kinds = {
        "one place": np.tile(draw.normal(size=D), (F, 1)),
        "apart": draw.normal(size=(F, D)),
        "first": np.tile(draw.normal(size=D), (F, 1)),
    }
    for kind, direction in kinds.items():
        parts = [size * direction, honest] if kind == "first" else [honest, size * direction]
        rows = torch.from_numpy(np.concatenate(parts)).to(dtype)
        found = outcome(rule, rows)
        good = honest if dtype == torch.float64 else honest.astype(np.float32).astype(np.float64)
        assert (found >= good.min(axis=0) - 1e-6 * spread).all(), kind
        assert (found <= good.max(axis=0) + 1e-6 * spread).all(), kind
        if name in ("krum", "multi_krum", "mda", "meamed", "nna"):  # the others lean towards where far rows are
            nearer = torch.from_numpy(np.concatenate([100 * direction, honest] if kind == "first" else
                                                     [honest, 100 * direction])).to(dtype)  # fmt: skip
            np.testing.assert_allclose(found, outcome(rule, nearer), rtol=1e-5, atol=1e-5 * spread)


@pytest.mark.parametrize("iterations", [1, 4])
def test_hostile_rows_move_centred_clipping_by_no_more_than_their_share_of_tau(iterations):
    rule = CenteredClipping(tau=0.5, iterations=iterations, start="zero")
    honest = generator("robust", "clip").normal(size=(N - F, D))
    far = np.concatenate([honest, np.full((F, D), 1e9)])
    near = np.concatenate([honest, np.zeros((F, D))])
    moved = np.linalg.norm(outcome(rule, far) - outcome(rule, near))
    assert 0 < moved <= iterations * 0.5 * 2 * F / N + 1e-12


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


# (n, f): bounds of the rules, by Allouah et al. 2023, in terms of a = f / (n - 2f)
KAPPA = {
    "krum": lambda a, n, f: 6 * (1 + a),
    "multi_krum": lambda a, n, f: 6 * (1 + a),
    "median": lambda a, n, f: 4 * (1 + a) ** 2,
    "geometric_median": lambda a, n, f: 4 * (1 + a) ** 2,
    "trimmed_mean": lambda a, n, f: 6 * a * (1 + a),
}


@pytest.mark.parametrize("name", KAPPA)
@pytest.mark.parametrize(("n", "f"), [(9, 1), (11, 4), (20, 4), (30, 10)])
@pytest.mark.parametrize("pre", [NoPre(), NNM()])
def test_kappa_is_never_exceeded(name, n, f, pre):
    rule, _ = RULES[name]
    bound = KAPPA[name](f / (n - 2 * f), n, f)
    if isinstance(pre, NNM):
        bound = 8 * f / (n - f) * (bound + 1)
    worst = 0.0
    for trial in range(120):
        rows, honest = naive.attacked(n, f, 12, generator("robust", "kappa", n, f, trial), trial)
        worst = max(worst, naive.kappa(rows, honest, outcome(rule, rows, f, pre)))
    assert 0 < worst <= bound


@pytest.mark.parametrize("name", ["mda", "caf", "meamed", "bulyan"])
@pytest.mark.parametrize(("n", "f"), [(15, 3), (23, 5)])
def test_rules_without_a_known_constant_stay_within_the_honest_spread(name, n, f):
    rule, _ = RULES[name]
    for trial in range(60):
        rows, honest = naive.attacked(n, f, 12, generator("robust", "spread", n, f, trial), trial)
        assert naive.kappa(rows, honest, outcome(rule, rows, f)) < 4  # the mean goes beyond 1e9 on these


def test_the_mean_is_moved_anywhere():
    worst = max(
        naive.kappa(
            *(x := naive.attacked(15, 3, 12, generator("robust", "spread", 15, 3, t), t)), outcome(Mean(), x[0])
        )
        for t in range(60)
    )
    assert worst > 1e6


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


def test_hostile_rows_can_t_raise_the_smoothing():
    """With f near n / 2 most pairs of rows are far apart: a smoothing by these would reach for the far rows."""
    honest = generator("robust", "smooth").normal(size=(11, D))
    rows = np.concatenate([honest, 1e12 * generator("robust", "smooth", 1).normal(size=(9, D))])
    assert np.linalg.norm(outcome(GeometricMedian(), rows, 9) - honest.mean(axis=0)) < 4 * np.sqrt(D)


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


@pytest.mark.parametrize("trial", range(40))
def test_mda_finds_the_least_diameter(trial):
    n, f, d = [(8, 3), (9, 2), (11, 4), (10, 3)][trial % 4] + ([1, 2, 30][trial % 3],)
    rows, _ = case("mda", trial, n=n, f=f, d=d)
    found = robust.combine(MDA(), NoPre(), f, torch.from_numpy(rows)).coefficients
    assert found is not None
    assert tuple(np.flatnonzero(found)) in naive.mda_subsets(rows, f)
    np.testing.assert_allclose(outcome(MDA(), rows, f), naive.mda(rows, f), rtol=1e-9, atol=1e-11)


def test_mda_is_exact_where_there_are_too_many_subsets_to_try():
    """C(60, 20) = 4e15 subsets, and in many dimensions all distances are much alike."""
    rows = generator("robust", "mda").normal(size=(60, 500))
    rows[::3] += 10.0 * generator("robust", "mda", 1).normal(size=(20, 500))
    found = robust.combine(MDA(), NoPre(), 20, torch.from_numpy(rows)).coefficients
    assert found is not None
    assert np.flatnonzero(found == 0).tolist() == list(range(0, 60, 3))


LEAST = {
    "krum": lambda f: 2 * f + 3,
    "multi_krum": lambda f: 2 * f + 3,
    "bulyan": lambda f: 4 * f + 3,
    **{n: lambda f: 2 * f + 1 for n in ("nna", "mda", "median", "trimmed_mean", "meamed", "geometric_median", "caf")},
    "clipping": lambda f: 2 * f + 1,
    **{n: lambda f: 1 for n in ("mean", "auto", "fltrust", "foolsgold")},
}


@pytest.mark.parametrize("name", LEAST)
@pytest.mark.parametrize("f", [0, 1, 4])
def test_a_rule_refuses_what_is_outside_its_breakdown_condition(name, f):
    rule, _ = RULES[name]
    least = LEAST[name](f)
    rule.check(least, f, NoPre())
    outcome(rule, case("least", n=least, f=0)[0], f)
    if least > 1:
        with pytest.raises(ConfigError, match=rf"aggregator\.f={f} .* at least {least} .* {least - 1} updates"):
            rule.check(least - 1, f, NoPre())
        with pytest.raises(ConfigError):
            outcome(rule, case("least", n=least - 1, f=0)[0], f)


def test_pre_aggregators_have_conditions_of_their_own():
    for pre in (NNM(), ARC(), ARCNNM()):
        Mean().check(9, 4, pre)
        with pytest.raises(ConfigError, match="at least 9 .* 8 updates"):
            Mean().check(8, 4, pre)
    Krum().check(17, 3, Bucketing(2))  # 9 buckets
    with pytest.raises(ConfigError, match="Krum needs at least 9 .* 8 points that Bucketing makes of 16"):
        Krum().check(16, 3, Bucketing(2))
    with pytest.raises(ConfigError, match="FoolsGold"):
        FoolsGold().check(9, 1, NNM())
    with pytest.raises(ConfigError, match="at least 12"):
        MultiKrum(10).check(11, 2, NoPre())


def test_fltrust_asks_for_a_root_update():
    with pytest.raises(ConfigError, match=r"data\.public"):
        robust.combine(FLTrust(), NoPre(), 1, torch.ones(4, 5))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("where", [0, 7])
def test_rows_that_are_not_finite_are_refused(name, bad, where):
    """By every rule that looks at them: the mean of them is for the one who asked for it."""
    rule, _ = RULES[name]
    rows = case("bad")[0].astype(np.float32)
    rows[where, 3] = bad
    if name in ("mean", "auto"):
        assert not np.isfinite(outcome(rule, rows)[3])
        return
    with pytest.raises(RunStopped, match="finite"):
        outcome(rule, rows)


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("pre", [NoPre(), ARC()])
def test_inputs_are_left_alone_and_the_outcome_is_float64(name, dtype, pre):
    rule, _ = RULES[name]
    if isinstance(rule, FoolsGold) and not isinstance(pre, NoPre):
        return
    rows = torch.from_numpy(case("types")[0]).to(dtype)
    weights, own = torch.full((N,), 2.0, dtype=torch.float64), torch.from_numpy(root())
    before = [x.clone() for x in (rows, weights, own)]
    found = robust.combine(rule, pre, F, rows, weights, root=own if rule.root else None)
    for mine, old in zip((rows, weights, own), before, strict=True):
        assert torch.equal(mine, old)
    assert found.vector.dtype == torch.float64
    # the same as of the same numbers in float64
    wide = robust.combine(rule, pre, F, rows.to(torch.float64), weights, root=own if rule.root else None)
    np.testing.assert_allclose(found.vector, wide.vector, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", RULES)
def test_coefficients_make_the_outcome(name):
    rule, _ = RULES[name]
    rows = case("coefficients")[0]
    found = robust.combine(
        rule, NoPre(), F, torch.from_numpy(rows), root=torch.from_numpy(root()) if rule.root else None
    )
    assert (found.coefficients is None) == (not rule.weighs)
    if found.coefficients is not None:
        np.testing.assert_allclose(found.coefficients @ rows, found.vector.numpy(), rtol=1e-10, atol=1e-11)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(
        ["krum", "median", "trimmed_mean", "meamed", "bulyan", "geometric_median", "mda", "caf", "nna"]
    ),
    seed=st.integers(0, 2**31),
    f=st.integers(0, 3),
    more=st.integers(0, 5),
    d=st.integers(1, 6),
    values=st.integers(1, 4),
)
def test_rules_stay_in_the_box_of_all_rows_whatever_they_are(name, seed, f, more, d, values):
    """Also where many numbers are equal, which is where orders and windows go wrong."""
    rule, _ = RULES[name]
    rows = generator("robust", "box", seed).integers(0, values, size=(rule.least(f) + more, d)).astype(np.float64)
    found = outcome(rule, rows, f)
    assert (found >= rows.min(axis=0) - 1e-9).all() and (found <= rows.max(axis=0) + 1e-9).all()
    if name in ("median", "trimmed_mean", "meamed"):
        np.testing.assert_allclose(found, RULES[name][1](rows, f), rtol=1e-12, atol=1e-12)
