"""Tests of privacy/discrete.py: samplers against exact laws, the two halves, and the cost against true divergences.

Statistical tests have fixed keys; with other keys each would fail by chance with a probability below 1e-7 (chi-square
tests at 1e-8, normal ones at 6 standard deviations).
"""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
from scipy import linalg, special, stats

from fl.errors import ConfigError, RunStopped, ShoalError
from fl.keys import generator
from privacy import discrete
from privacy.discrete import DiscreteNoise, DistributedDiscreteGaussian, SkellamRelease

KINDS = ("skellam", "discrete_gaussian")


def draw(kind: str, variance: float, size: int, *key) -> np.ndarray:
    rng = generator("test", kind, *key)
    if kind == "skellam":
        return discrete.skellam(rng, variance, size)
    return discrete.discrete_gaussian(rng, math.sqrt(variance), size)


def log_pmf(kind: str, x: np.ndarray, variance: float) -> np.ndarray:
    """Exact: I_x(V) by its series 0F1, or the discrete Gaussian's normalised exponential."""
    x = np.abs(x)
    if kind == "skellam":
        if variance > 500:  # 0F1 leaves float64's range
            return np.log(special.ive(x, variance))
        series = np.log(special.hyp0f1(x + 1, variance**2 / 4))
        return x * math.log(variance / 2) - special.gammaln(x + 1) + series - variance
    every = np.arange(-int(60 * math.sqrt(variance)) - 60, int(60 * math.sqrt(variance)) + 61)
    return -(x**2) / (2 * variance) - special.logsumexp(-(every**2) / (2 * variance))


def surprise(counts: np.ndarray, probabilities: np.ndarray) -> float:
    """The chi-square statistic over its value at a false-alarm probability of 1e-8; above 1 is a misfit."""
    total = counts.sum()
    many = total * probabilities >= 25  # the rest is one cell, which may be empty
    counts = np.append(counts[many], counts[~many].sum())
    expected = np.append(total * probabilities[many], total * (1 - probabilities[many].sum()))
    if expected[-1] < 25:
        counts, expected = counts[:-1], expected[:-1]
    return float(((counts - expected) ** 2 / expected).sum() / stats.chi2.isf(1e-8, len(counts) - 1))


# ---------------------------------------------------------------- samplers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [0.1, 0.6, 1.0, 40.0, 9e3, 1.1e4, 1e6])
def test_a_sampler_has_the_exact_law(kind, variance):
    size = 200_000
    sample = draw(kind, variance, size)
    assert sample.dtype == np.int64 and sample.shape == (size,)
    reach = int(6 * math.sqrt(variance)) + 2
    width = max(1, reach // 40)  # cells of equal width around zero
    x = np.arange(-reach - reach % width, reach + width)
    x = x[: len(x) // width * width]
    probabilities = np.exp(log_pmf(kind, x, variance)).reshape(-1, width).sum(1)
    inside = sample[(sample >= x[0]) & (sample <= x[-1])]
    assert size - len(inside) < 40  # below 2e-9 each but at the smallest variances, where |x| > 3 has at most 1e-5
    assert surprise(np.bincount((inside - x[0]) // width, minlength=len(probabilities)), probabilities) < 1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variance", [1e8, 1e12, 1e16])
def test_large_variances_have_the_normal_shape_and_uniform_low_bits(kind, variance):
    sample = draw(kind, variance, 500_000)
    edges = stats.norm.ppf(np.arange(1, 64) / 64) * math.sqrt(variance)
    assert surprise(np.bincount(np.searchsorted(edges, sample), minlength=64), np.full(64, 1 / 64)) < 1
    assert surprise(np.bincount(sample % 32, minlength=32), np.full(32, 1 / 32)) < 1
    assert abs(sample.mean()) < 6 * math.sqrt(variance / sample.size)
    assert abs(sample.astype(float).var() / variance - 1) < 6 * math.sqrt(2 / sample.size)


def test_the_skellam_density_for_large_variances_is_bessels():
    x = np.arange(0, 1200, 7)
    wanted = np.log(special.ive(x, 2e4) / special.ive(0, 2e4))
    np.testing.assert_allclose(discrete._skellam_log_ratio(x, 2e4), wanted, rtol=1e-11, atol=1e-12)
    assert np.all(
        np.diff(discrete._skellam_log_ratio(np.arange(100_000), discrete.LARGE)) < 0
    )  # so zero is its largest


@pytest.mark.parametrize("variance", [0.0, -1.0, math.inf, math.nan, 2.0**65])
@pytest.mark.parametrize("kind", KINDS)
def test_other_variances_are_refused(kind, variance):
    sample = discrete.skellam if kind == "skellam" else lambda rng, v, size: discrete.discrete_gaussian(rng, v, size)
    with pytest.raises(ShoalError, match="can't be drawn"):
        sample(generator(0), variance if kind == "skellam" or variance < 1 else variance**0.6, 3)


class Split:
    """A generator whose extra bits (``bytes``) come from elsewhere, so that asking for them changes nothing else."""

    def __init__(self, *key):
        main = generator(*key)
        self.random, self.integers, self.bytes = main.random, main.integers, generator(*key, "bytes").bytes


@pytest.mark.parametrize("sigma", [0.3, 2.7, 1e3, 1e8])
def test_exact_comparisons_agree_with_those_in_floating_point(monkeypatch, sigma):
    fast = discrete.discrete_gaussian(Split("split", 1), sigma, 300)
    monkeypatch.setattr(discrete, "WINDOW", 2.0)  # every comparison is made exactly
    np.testing.assert_array_equal(discrete.discrete_gaussian(Split("split", 1), sigma, 300), fast)


def test_a_comparison_that_floats_can_not_settle_is_settled_by_further_bits():
    below = int(Decimal(-1).exp() * 2**53) / 2**53  # exp(-1) lies between this and this + 2^-53

    class Bits:
        def __init__(self, byte):
            self.bytes = lambda n: byte * n

    assert discrete._below_exp(Bits(b"\x00"), below, Fraction(1))
    assert not discrete._below_exp(Bits(b"\xff"), below, Fraction(1))


# ---------------------------------------------------------------- the two halves


def noise(**changes) -> DiscreteNoise:
    plain = {"dim": 50, "clip": 0.5, "noise_multiplier": 1.0, "scale": 1e4, "clients": 10, "min_cohort": 8}
    return DiscreteNoise(**{**plain, **changes})


def ring_sum(halves: DiscreteNoise, updates, *public) -> np.ndarray:
    sent = [halves.encode(u, generator("noise", i, *public), *public) for i, u in enumerate(updates)]
    return np.sum(sent, axis=0, dtype=sent[0].dtype)


def random_updates(n: int, dim: int, clip: float) -> np.ndarray:
    return generator("updates", n, dim).normal(size=(n, dim)) * clip * 1.5 / math.sqrt(dim)  # all are clipped


@pytest.mark.parametrize("rotate", [True, False])
@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("dim", [1, 50, 64])
def test_without_noise_the_sum_is_that_of_clipped_updates_up_to_rounding(rotate, bits, dim):
    halves = noise(dim=dim, noise_multiplier=1e-9, rotate=rotate, modulus_bits=bits)
    updates = random_updates(10, dim, halves.clip)
    updates[3] = 0
    updates[4] *= 1e-3  # stays as it is
    norms = np.linalg.norm(updates, axis=1, keepdims=True)
    wanted = (updates * np.minimum(1, halves.clip / np.where(norms, norms, 1))).sum(0)
    total = ring_sum(halves, updates, 7)
    assert total.dtype == (np.uint32 if bits == 32 else np.uint64) and total.shape == (halves.padded,)
    error = halves.decode(total, 10, 7) - wanted
    assert np.linalg.norm(error) < 10 * math.sqrt(halves.padded) / halves.scale  # each rounding is below one step
    if not rotate:
        assert np.abs(error).max() < 10 / halves.scale


def test_the_clip_bounds_every_client():
    halves = noise(noise_multiplier=1e-9)
    for size in (1e-300, 1.0, 1e9, 1e200, 1e308):
        sent = halves.decode(halves.encode(np.full(50, size), generator("clip", str(size)), 1), 8, 1)
        assert np.linalg.norm(sent) <= math.sqrt(halves.squared_l2) / halves.scale
        if size >= 1:
            np.testing.assert_allclose(sent, halves.clip / math.sqrt(50), atol=8 / halves.scale)


@pytest.mark.parametrize("bad", [np.zeros(49), np.zeros((1, 50)), np.full(50, np.nan), np.full(50, np.inf)])
def test_updates_that_can_not_be_bounded_are_refused(bad):
    with pytest.raises(ShoalError, match="50 finite numbers"):
        noise().encode(bad, generator(0), 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotate", [True, False])
def test_the_sum_of_min_cohort_shares_has_the_planned_variance(kind, rotate):
    halves = noise(dim=2**16, kind=kind, rotate=rotate, min_cohort=5, scale=100, noise_multiplier=0.8)
    sums = halves.decode(ring_sum(halves, np.zeros((5, halves.dim)), 3), 5, 3)
    spread = 0.8 * halves.clip
    assert abs(sums.mean()) < 6 * spread / math.sqrt(halves.dim)
    assert abs(sums.var() / spread**2 - 1) < 6 * math.sqrt(2 / halves.dim)


@pytest.mark.parametrize("kind", KINDS)
def test_a_share_has_the_law_that_is_named(kind):
    halves = noise(dim=100_000, kind=kind, rotate=False, min_cohort=4, scale=4.0, clip=0.5, noise_multiplier=0.75)
    share = halves.encode(np.zeros(halves.dim), generator("share", kind)).view(np.int32)
    x = np.arange(-9, 10)
    counts = np.array([np.count_nonzero(share == i) for i in x])
    assert surprise(counts, np.exp(log_pmf(kind, x, 0.75**2))) < 1  # variance (4 . 0.75 . 0.5)^2 / 4
    other = KINDS[1 - KINDS.index(kind)]
    assert surprise(counts, np.exp(log_pmf(other, x, 0.75**2))) > 1


def test_rounding_is_unbiased():
    halves = noise(dim=2, rotate=False, noise_multiplier=1e-9, scale=10.0, clip=10.0)
    update = np.array([0.137, -0.562])
    repeats = 20_000
    mean = np.mean([halves._rounded(update, generator("round", i)) for i in range(repeats)], axis=0) / halves.scale
    assert np.abs(mean - update).max() < 6 * 0.5 / halves.scale / math.sqrt(
        repeats
    )  # far from the bound: none rejected


def test_no_rounded_vector_exceeds_the_norms_that_are_accounted(monkeypatch):
    halves = noise(dim=1024, rotate=False, scale=32.0, clip=0.5)
    halfway = np.full(1024, 0.5 / 32)  # of the largest norm, and every coordinate between two integers
    assert halves.squared_l2 == 16**2 + 1024 // 4 + 16 + 16 and halves.l1 == 544  # by |r|_2^2; sqrt(d) |r|_2 is 746
    free, bound = [], []
    for i in range(300):
        bound.append(halves._rounded(halfway, generator("bound", i)))
        free.append(generator("bound", i).integers(0, 2, 1024))
    assert max(int(r @ r) for r in free) > halves.squared_l2  # the bound does refuse some
    assert max(int(r @ r) for r in bound) <= halves.squared_l2
    assert max(int(np.abs(r).sum()) for r in bound) <= halves.l1
    monkeypatch.setattr(discrete, "ROUNDINGS", 0)
    assert not halves._rounded(halfway, generator(1)).any()  # towards zero
    assert halves._rounded(-3 * halfway, generator(1)).any() is np.False_
    assert int(np.square(halves._rounded(random_updates(1, 1024, 3.0)[0], generator(1))).sum()) <= 16**2


@pytest.mark.parametrize("rotate", [True, False])
def test_norms_stay_within_the_bound_for_any_update(rotate):
    for trial in range(200):
        rng = generator("any", trial)
        dim = int(rng.integers(1, 40))
        halves = noise(dim=dim, rotate=rotate, scale=float(10 ** rng.uniform(0.5, 4)), clip=1.0)
        update = rng.standard_t(1.5, dim) * 10 ** rng.uniform(-3, 3)
        rounded = halves._rounded(update, rng, trial)
        assert int(rounded @ rounded) <= halves.squared_l2 and int(np.abs(rounded).sum()) <= halves.l1


def test_a_zero_update_is_noise_alone():
    halves = noise()
    assert not halves._rounded(np.zeros(50), generator(0), 1).any()
    np.testing.assert_array_equal(
        halves.encode(np.zeros(50), generator(0), 1).view(np.int32), halves._share(generator(0))
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_low_bits_of_a_sum_hide_the_update(monkeypatch, kind):
    """Noise drawn coarsely and scaled up ("sample and scale") has the right variance and hides no low bits."""
    halves = noise(dim=2**15, kind=kind, rotate=False, scale=2.0**16, noise_multiplier=1.0)
    updates = np.tile(np.arange(halves.dim) % 2 / halves.scale, (8, 1)) * 3  # three steps in every second coordinate
    updates *= np.minimum(1, halves.clip / np.linalg.norm(updates[0]))

    def misfit() -> float:
        bits = ring_sum(halves, updates, 5)[1::2] % 16
        return surprise(np.bincount(bits, minlength=16), np.full(16, 1 / 16))

    assert misfit() < 1
    fine = getattr(discrete, kind)
    by = 16**2 if kind == "skellam" else 16
    monkeypatch.setattr(discrete, kind, lambda rng, spread, size: 16 * fine(rng, spread / by, size))
    assert misfit() > 10


def test_a_modulus_that_may_wrap_is_refused_and_the_smallest_named():
    with pytest.raises(
        ConfigError, match=r"privacy.modulus_bits=32 .*at least 35 bits.*privacy.modulus_bits=64"
    ) as error:
        noise(scale=1e9, rotate=False)  # 10 clients of 5e8 steps; noise of 8.1 times 5.6e8
    assert error.value.key == "privacy.modulus_bits"
    assert noise(scale=1e9, rotate=False, modulus_bits=64).modulus_bits == 64


def test_the_largest_sums_do_not_wrap():
    # With next to no noise the bound is n (sC + 1): the largest scale that is accepted, and all clients alike.
    n, clip = 10, 0.5
    scale = (2**31 / n - 3) / clip
    with pytest.raises(ConfigError, match="at least 33 bits"):
        noise(scale=scale * (1 + 1e-7), rotate=False, noise_multiplier=1e-12, clients=n)
    halves = noise(scale=scale * (1 - 1e-7), rotate=False, noise_multiplier=1e-12, clients=n)
    for sign in (1, -1):
        updates = np.zeros((n, 50))
        updates[:, 4] = sign * 9.0
        summed = halves.decode(ring_sum(halves, updates), n)
        np.testing.assert_allclose(summed[4], sign * n * clip, rtol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bound_on_the_largest_coordinate_covers_data_and_noise(kind):
    for rotate in (True, False):
        halves = noise(dim=2**12, kind=kind, rotate=rotate, scale=50.0, clients=12, min_cohort=4, noise_multiplier=0.5)
        updates = np.zeros((12, halves.dim))
        updates[:, 0] = 1.0
        largest = np.abs(ring_sum(halves, updates, 2).view(np.int32)).max()
        assert 0.2 * halves._largest() < largest < halves._largest()


def test_a_rotation_lets_a_smaller_modulus_do():
    wide = {"dim": 2**14, "scale": 2e7, "clients": 300, "min_cohort": 250, "noise_multiplier": 0.5}
    with pytest.raises(ConfigError, match="at least 33 bits"):
        noise(**wide, rotate=False)
    assert noise(**wide).padded == 2**14


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"dim": 0}, "dim"), ({"clip": 0.0}, "clip"), ({"noise_multiplier": 0.0}, "noise_multiplier"),
        ({"scale": -1.0}, "scale"), ({"scale": 1e12}, "scale"), ({"kind": "gauss"}, "kind"),
        ({"modulus_bits": 16}, "modulus_bits"), ({"min_cohort": 11}, "min_cohort"), ({"min_cohort": 0}, "min_cohort"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused(changes, key):
    with pytest.raises(ConfigError) as error:
        noise(**{"dim": 2, **changes})
    assert error.value.key == f"privacy.{key}"


def test_sums_of_too_few_or_too_many_are_not_opened():
    halves = noise()
    total = np.zeros(64, np.uint32)
    assert halves.decode(total, 8, 1).shape == (50,)
    for clients, colluding in ((7, 0), (9, 2)):
        with pytest.raises(RunStopped, match="min_cohort=8"):
            halves.decode(total, clients, 1, colluding=colluding)
    for wrong, clients in ((total, 11), (total[:50], 8), (total.astype(np.uint64), 8)):
        with pytest.raises(ShoalError, match="can't be decoded"):
            halves.decode(wrong, clients, 1)


def test_keys_decide_all_randomness():
    halves = noise()
    update = random_updates(1, 50, 0.5)[0]
    first = halves.encode(update, generator("a"), 1)
    np.testing.assert_array_equal(first, halves.encode(update, generator("a"), 1))
    assert (first != halves.encode(update, generator("b"), 1)).mean() > 0.9
    assert (first != halves.encode(update, generator("a"), 2)).mean() > 0.9


def test_the_rotation_is_hadamards_and_its_own_inverse():
    x = generator("rotation").normal(size=64)
    np.testing.assert_allclose(discrete._walsh_hadamard(x), linalg.hadamard(64) @ x / 8, atol=1e-12)
    np.testing.assert_allclose(discrete._walsh_hadamard(discrete._walsh_hadamard(x)), x, atol=1e-12)
    assert discrete._walsh_hadamard(np.array([3.0])) == 3.0


# ---------------------------------------------------------------- the cost


def divergence(p: np.ndarray, q: np.ndarray, order: float) -> float:
    """Renyi divergence of two distributions on the same grid, given as logarithms."""
    return float(special.logsumexp(order * p - (order - 1) * q) / (order - 1))


def skellam_truth(variance: float, shift: int, order: float) -> float:
    reach = int(12 * math.sqrt(variance) + 6 * order * shift + 60)
    x = np.arange(-reach, reach + 1)
    return divergence(log_pmf("skellam", x, variance), log_pmf("skellam", x - shift, variance), order)


@pytest.mark.parametrize("variance", [0.05, 0.5, 2.0, 30.0, 200.0])
@pytest.mark.parametrize("shift", [1, 2, 5])
def test_the_skellam_cost_covers_the_true_divergence(variance, shift):
    orders = np.array([1.1, 1.5, 2, 2.5, 3, 4.7, 8, 16])
    bound = SkellamRelease(variance, shift**2, shift).rdp(orders)
    truth = np.array([skellam_truth(variance, shift, a) for a in orders])
    assert np.all(truth <= bound)
    if variance >= 30 and shift == 1:
        whole = orders == np.round(orders)
        assert np.all(bound[whole] <= 1.11 * truth[whole])  # and not by being useless
    plane = SkellamRelease(variance, shift**2 + 1, shift + 1).rdp(orders)  # two coordinates, moved by (shift, 1)
    assert np.all(truth + np.array([skellam_truth(variance, 1, a) for a in orders]) <= plane)


def sum_of_discrete_gaussians(share_variance: float, shares: int, reach: int) -> np.ndarray:
    """log pmf at -reach..reach of the sum, by convolving."""
    x = np.arange(-reach, reach + 1)
    total = log_pmf("discrete_gaussian", x, share_variance)
    moved = log_pmf("discrete_gaussian", x[:, None] - x, share_variance)  # (sum, sum without the last share)
    for _ in range(shares - 1):
        total = special.logsumexp(moved + total, axis=1)
    return total


@pytest.mark.parametrize("share_variance", [0.05, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shares", [1, 2, 3, 6])
def test_tau_covers_how_far_the_sum_is_from_a_discrete_gaussian(share_variance, shares):
    reach = 8
    p = sum_of_discrete_gaussians(share_variance, shares, 40)[40 - reach : 40 + reach + 1]
    ratio = p + np.arange(-reach, reach + 1) ** 2 / (2 * shares * share_variance)
    tau = DistributedDiscreteGaussian(share_variance, shares, 1, 1, 1).tau()
    assert np.ptp(ratio) <= tau + 1e-12
    if shares == 2 and share_variance >= 0.1:
        assert tau <= 1.05 * np.ptp(ratio) + 1e-9  # tight where one convolution is made
    if share_variance >= 0.25:
        k = np.arange(1, shares)
        assert tau <= 10 * np.exp(-2 * np.pi**2 * share_variance * k / (k + 1)).sum()  # theorem 1 of 2102.06387


@pytest.mark.parametrize("share_variance", [0.05, 0.1, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("shares", [1, 2, 4])
def test_the_discrete_gaussian_cost_covers_the_true_divergence(share_variance, shares):
    orders = np.array([1.05, 1.5, 2, 3, 5])
    reach = 24
    p = sum_of_discrete_gaussians(share_variance, shares, 2 * reach)
    middle = p[reach:-reach]
    truths = {}
    for shift in (1, 2):
        moved = p[reach - shift : -reach - shift]
        truths[shift] = np.array([divergence(middle, moved, a) for a in orders])
        bound = DistributedDiscreteGaussian(share_variance, shares, shift**2, shift, 1).rdp(orders)
        assert np.all(truths[shift] <= bound * (1 + 1e-12))
    plane = DistributedDiscreteGaussian(share_variance, shares, 5, 3, 2).rdp(orders)  # moved by (1, 2)
    assert np.all(truths[1] + truths[2] <= plane * (1 + 1e-12))
    more = sum_of_discrete_gaussians(share_variance, shares + 2, 2 * reach)
    larger = [divergence(more[reach:-reach], more[reach - 1 : -reach - 1], a) for a in orders]
    assert np.all(np.array(larger) <= truths[1] * (1 + 1e-9))  # a larger cohort costs less


def test_the_discrete_gaussian_cost_is_the_smaller_of_its_bounds():
    cost = DistributedDiscreteGaussian(0.3, 4, 5, 3, 50)
    tau, v, orders = cost.tau(), 1.2, np.array([1.1, 3.0, 400.0])
    added, mixed = orders * 5 / (2 * v) + 50 * tau, orders / 2 * (5 / v + 6 * tau / math.sqrt(v) + 50 * tau**2)
    assert mixed[0] < added[0] and added[2] < mixed[2]
    np.testing.assert_allclose(cost.rdp(orders), np.minimum(added, mixed))


def test_the_sum_of_few_coarse_shares_costs_more_than_a_discrete_gaussian():
    p = sum_of_discrete_gaussians(0.1, 4, 48)
    truth = divergence(p[24:-24], p[23:-25], 1.5)
    assert truth > 1.5 / (2 * 0.4)  # so tau is needed


@pytest.mark.parametrize("kind", KINDS)
def test_at_a_fine_scale_the_cost_is_the_gaussians(kind):
    orders = np.array([2, 3, 8, 32])
    for relation, moves in (("add-remove", 1), ("replace-one", 2)):
        halves = noise(dim=5000, kind=kind, noise_multiplier=1.3, scale=2.0**20, clip=1.0)
        cost = halves.release(3, relation).rdp(orders)
        ideal = 3 * orders * moves**2 / (2 * 1.3**2)
        assert np.all(cost >= ideal * (1 - 1e-12)) and np.all(cost <= ideal * 1.0001)
    assert halves.release().rdp(np.array([1.5])) <= halves.release().rdp(np.array([2.0]))
    coarse = noise(dim=5000, kind=kind, noise_multiplier=1.3, scale=64.0, clip=1.0).release(3).rdp(orders)
    assert np.all(coarse > 1.3 * 3 * orders / (2 * 1.3**2))  # 5,000 coordinates rounded on a grid of 1/64


@pytest.mark.parametrize("kind", KINDS)
def test_releases_say_what_they_are_and_add_up(kind):
    orders = np.array([1.5, 2, 8, 32])
    release = noise(kind=kind).release(4, "replace-one")
    assert release.relation == "replace-one" and release.steps == 4
    np.testing.assert_allclose(release.rdp(orders), release.of(1).rdp(orders) + release.of(3).rdp(orders))
    assert not release.of(0).rdp(orders).any()
    assert "replace-one" in release.describe() and "no amplification" in release.describe()
    zeroed = noise(kind=kind).release()
    assert zeroed.relation == "add-remove" and "replaced by zero" in zeroed.describe()


def test_replacing_moves_a_sum_twice_as_far():
    orders = np.array([2.0, 5.0])
    for cost, doubled in (
        (SkellamRelease(9.0, 4, 2, relation="replace-one"), SkellamRelease(9.0, 16, 4)),
        (
            DistributedDiscreteGaussian(0.3, 4, 4, 2, 3, relation="replace-one"),
            DistributedDiscreteGaussian(0.3, 4, 16, 4, 3),
        ),
    ):
        np.testing.assert_allclose(cost.rdp(orders), doubled.rdp(orders))


def test_coarse_shares_of_discrete_gaussian_noise_are_not_free():
    assert DistributedDiscreteGaussian(1e-19, 5, 4, 2, 3).tau() == math.inf
    assert np.all(np.isinf(DistributedDiscreteGaussian(1e-19, 5, 4, 2, 3).rdp(np.array([2.0]))))
    assert not DistributedDiscreteGaussian(1e-19, 5, 4, 2, 3, steps=0).rdp(np.array([2.0])).any()
