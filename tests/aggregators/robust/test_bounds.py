"""How far hostile rows get: not beyond the honest box, not beyond kappa."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregators.robust import (
    NNM,
    CenteredClipping,
    GeometricMedian,
    Mean,
    NoPre,
)
from fl.keys import generator
from tests.aggregators.robust.cases import RULES, D, F, N, outcome
from tests.oracles import robust as naive


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
    for trial in range(120 if isinstance(pre, NoPre) else 60):
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


def test_hostile_rows_can_t_raise_the_smoothing():
    """With f near n / 2 most pairs of rows are far apart: a smoothing by these would reach for the far rows."""
    honest = generator("robust", "smooth").normal(size=(11, D))
    rows = np.concatenate([honest, 1e12 * generator("robust", "smooth", 1).normal(size=(9, D))])
    assert np.linalg.norm(outcome(GeometricMedian(), rows, 9) - honest.mean(axis=0)) < 4 * np.sqrt(D)


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
