"""Pre-aggregators against their slow twins: the points they make, seen through the mean and through a rule."""

import numpy as np
import pytest
import torch

from aggregators import robust
from aggregators.robust import ARC, ARCNNM, NNM, Bucketing, Clipping, CoordinateMedian, GeometricMedian, Mean, NoPre
from aggregators.robust.base import Cloud, one_hot
from aggregators.robust.geometry import Dense
from fl.keys import generator
from tests.oracles import robust as naive

N, F, D = 13, 3, 17
TWINS = {
    "none": (NoPre(), lambda rows, f: rows),
    "nnm": (NNM(), naive.nnm),
    "clipping": (Clipping(2.5), lambda rows, f: naive.clipping(rows, 2.5)),
    "arc": (ARC(), naive.arc),
    "arc_nnm": (ARCNNM(), lambda rows, f: naive.nnm(naive.arc(rows, f), f)),
}


def case(*key, n=N, f=F) -> np.ndarray:
    draw = generator("pre", *key)
    return naive.attacked(n, f, D, draw, int(draw.integers(6)))[0]


def points(pre, rows: np.ndarray, f: int, weights: np.ndarray | None = None, key: tuple = ()) -> Cloud:
    n = len(rows)
    cloud = Cloud(
        Dense(torch.from_numpy(rows)),
        torch.eye(n + 1, dtype=torch.float64)[:n],
        np.full(n, 1 / n) if weights is None else weights / weights.sum(),
        one_hot(n, n + 1),
    )
    return pre.apply(cloud, f, key)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("trial", range(8))
@pytest.mark.parametrize(("n", "f"), [(13, 3), (8, 2), (5, 0), (9, 4)])
def test_points_are_those_of_the_definition(name, trial, n, f):
    pre, twin = TWINS[name]
    rows = case(trial, n=n, f=f)
    cloud = points(pre, rows, f)
    np.testing.assert_allclose(cloud.points[:, :n].numpy() @ rows, twin(rows, f), rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(cloud.points.sum(dim=1), 1)  # affine: distances don't depend on where the origin is
    true = np.array([[naive.distance(a, b) ** 2 for b in twin(rows, f)] for a in twin(rows, f)])
    np.testing.assert_allclose(cloud.squared, true, rtol=1e-6, atol=1e-9 * true.max() + 1e-20)


@pytest.mark.parametrize("name", TWINS)
@pytest.mark.parametrize("rule", [GeometricMedian(iterations=1000), CoordinateMedian()])
def test_a_rule_sees_these_points(name, rule):
    pre, twin = TWINS[name]
    rows = case("rule")
    found = robust.combine(rule, pre, F, torch.from_numpy(rows)).vector
    expected = (naive.geometric_median if isinstance(rule, GeometricMedian) else naive.median)(twin(rows, F))
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(("n", "size"), [(13, 2), (12, 3), (13, 1), (13, 13), (5, 20)])
@pytest.mark.parametrize("weighted", [False, True])
def test_buckets_are_means_of_a_permutation(n, size, weighted):
    rows = case("bucket", n=n, f=1)
    weights = generator("pre", "weights").uniform(1, 5, size=n) if weighted else np.ones(n)
    cloud = points(Bucketing(size), rows, 1, weights, ("seed", 4))
    order = generator("seed", 4, "bucketing").permutation(n)
    buckets = [order[i : i + size] for i in range(0, n, size)]
    assert len(cloud) == len(buckets) == Bucketing(size).number(n)
    for own, point, weight in zip(buckets, cloud.points[:, :n].numpy() @ rows, cloud.weights, strict=True):
        np.testing.assert_allclose(point, np.average(rows[own], axis=0, weights=weights[own]), rtol=1e-10)
        assert weight == pytest.approx(weights[own].sum() / weights.sum())


def test_buckets_are_drawn_anew_with_each_key():
    rows = torch.from_numpy(case("keys"))
    outcomes = [
        robust.combine(CoordinateMedian(), Bucketing(2), 2, rows, seed_key=key).vector
        for key in ((1, 1), (1, 2), (1, 1))
    ]
    assert torch.equal(outcomes[0], outcomes[2])
    assert not torch.equal(outcomes[0], outcomes[1])


def test_the_weighted_mean_of_buckets_is_that_of_the_rows():
    """Some of which have no weight, or share a bucket with others that have none."""
    rows = case("zero")
    weights = np.array([0, 0, 0, 0, 0, 0, 0, 3, 1, 0, 2, 0, 5.0])
    found = robust.combine(Mean(), Bucketing(2), 1, torch.from_numpy(rows), weights, seed_key=(7,)).vector
    np.testing.assert_allclose(found, np.average(rows, axis=0, weights=weights), rtol=1e-10)


def test_clipping_cuts_and_keeps():
    rows = case("clip")
    norms = np.linalg.norm(rows, axis=1)
    bound = float(np.median(norms))
    clipped = points(Clipping(bound), rows, F).points[:, :N].numpy() @ rows
    np.testing.assert_allclose(np.linalg.norm(clipped, axis=1), np.minimum(norms, bound), rtol=1e-10)
    np.testing.assert_array_equal(clipped[norms < bound], rows[norms < bound])


@pytest.mark.parametrize(("n", "f", "cut"), [(10, 0, 0), (10, 1, 1), (10, 2, 3), (10, 4, 4), (15, 3, 4)])
def test_arc_clips_that_many_and_to_the_next_norm(n, f, cut):
    rows = generator("pre", "arc").normal(size=(n, D)) * np.arange(1, n + 1)[:, None]
    norms = np.linalg.norm(rows, axis=1)
    clipped = np.linalg.norm(points(ARC(), rows, f).points[:, :n].numpy() @ rows, axis=1)
    assert (clipped < norms * (1 - 1e-9)).sum() == cut
    assert clipped.max() == pytest.approx(np.sort(norms)[n - 1 - cut])


def test_mixing_leaves_a_far_row_among_the_hostile():
    """n - f rows are honest, so no honest row has a far one among its n - f nearest."""
    rows = generator("pre", "far").normal(size=(N, D))
    rows[:F] = 1e12
    mixed = points(NNM(), rows, F).points[:, :N].numpy()
    assert (mixed[F:, :F] == 0).all()
    found = robust.combine(GeometricMedian(), NNM(), F, torch.from_numpy(rows)).vector
    np.testing.assert_allclose(found, rows[F:].mean(axis=0), atol=1e-6)
