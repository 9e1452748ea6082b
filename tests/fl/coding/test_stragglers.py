"""Straggler models against their definitions."""

import numpy as np
import pytest

from fl.coding.stragglers import Arbitrary, Bursty, Either
from fl.keys import generator
from tests.oracles import coding

PARAMETERS = [(1, 1, 2), (1, 2, 1), (1, 3, 2), (2, 3, 2), (2, 4, 3), (3, 4, 2)]


def _random(n, rounds, seed):
    rng = generator(seed, "pattern")
    return rng.random((rounds, n)) < rng.choice([0.05, 0.15, 0.3])


@pytest.mark.parametrize(("B", "W", "lam"), PARAMETERS)
def test_bursty_is_its_definition(B, W, lam):
    found = {True: 0, False: 0}
    for seed in range(300):
        pattern = _random(4, 6, seed)
        right = coding.bursty(pattern, B, W, lam)
        assert Bursty(W=W, lam=lam, B=B).conforms(pattern) == right
        found[right] += 1
    assert min(found.values()) > 20


@pytest.mark.parametrize(("N", "W", "lam"), PARAMETERS)
def test_arbitrary_is_its_definition(N, W, lam):
    found = {True: 0, False: 0}
    for seed in range(300):
        pattern = _random(4, 6, seed)
        right = coding.arbitrary(pattern, N, W, lam)
        assert Arbitrary(W=W, lam=lam, N=N).conforms(pattern) == right
        found[right] += 1
    assert min(found.values()) > 20


def test_every_small_pattern():
    model, other = Bursty(W=3, lam=2, B=2), Arbitrary(W=3, lam=2, N=1)
    either = Either(3, (Bursty(W=2, B=1, lam=1), Bursty(W=3, B=3, lam=2)))
    for pattern in coding.patterns(3, 4):
        assert model.conforms(pattern) == coding.bursty(pattern, 2, 3, 2)
        assert other.conforms(pattern) == coding.arbitrary(pattern, 1, 3, 2)
        windows = coding.windows(pattern, 3)
        assert either.conforms(pattern) == all(coding.bursty(w, 1, 2, 1) or coding.bursty(w, 3, 3, 2) for w in windows)


@pytest.mark.parametrize(("B", "W", "lam"), PARAMETERS)
def test_drawn_patterns_conform_and_reach_the_limits(B, W, lam):
    model = Bursty(W=W, lam=lam, B=B)
    pattern = model.draw(8, 60, generator(B, W, lam))
    assert coding.bursty(pattern, B, W, lam)
    assert max(window.any(0).sum() for window in coding.windows(pattern, W)) == lam
    longest = max(
        np.ptp(np.flatnonzero(column)) + 1
        for window in coding.windows(pattern, W)
        for column in window.T
        if column.any()
    )
    assert longest == B
    assert coding.arbitrary(Arbitrary(W=W, lam=lam, N=B).draw(8, 60, generator(W)), B, W, lam)


def test_a_burst_of_two_after_a_break():
    """A burst counts from first to last: late, in time, late again is one of three rounds."""
    pattern = np.array([[1], [0], [1]], dtype=bool)
    assert not Bursty(W=3, lam=1, B=2).conforms(pattern)
    assert Arbitrary(W=3, lam=1, N=2).conforms(pattern)
    assert Bursty(W=2, lam=1, B=1).conforms(pattern)
