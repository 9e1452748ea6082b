"""Gradient codes: every survivor set decodes, and none beyond."""

import itertools

import numpy as np
import pytest

from fl.coding.codes import CACHE, RESIDUAL, Cyclic, Fractional, make_code
from fl.errors import ShoalError
from fl.keys import generator


def _gap(code, late, gradients):
    """The decoded sum's largest error, relative to the largest entry of the true one."""
    survivors = [i for i in range(code.n) if i not in late]
    weights = code.decode(survivors)
    assert weights is not None
    assert not weights[list(late)].any()
    found = sum(weights[i] * code.encode(i, gradients) for i in survivors)
    true = gradients.astype(np.float64).sum(0)
    return np.abs(found - true).max() / np.abs(true).max()


@pytest.mark.parametrize("make", [Cyclic, Fractional])
def test_every_survivor_set_decodes(make):
    code = make(12, 3)
    gradients = generator(0, "g").standard_normal((12, 7)).astype(np.float32)
    for late in range(4):
        for some in itertools.combinations(range(12), late):
            assert _gap(code, some, gradients) < 1e-9


@pytest.mark.parametrize(("n", "s"), [(20, 8), (64, 7), (256, 15), (256, 27)])
def test_larger_codes_decode(n, s):
    code, rng = Cyclic(n, s, seed=1), generator(n, s)
    gradients = rng.standard_normal((n, 5))
    worst = max(_gap(code, tuple(rng.choice(n, s, replace=False)), gradients) for _ in range(20))
    assert worst < 1e-8


@pytest.mark.parametrize("make", [Cyclic, Fractional])
def test_one_straggler_too_many_is_refused(make):
    code = make(12, 3)
    for late in itertools.combinations(range(12), 4):
        assert code.decode([i for i in range(12) if i not in late]) is None


def test_too_few_answers_have_a_residual_that_shows():
    """What the decoder's check rests on: without it, s + 1 stragglers would give a wrong gradient, not none."""
    code = Cyclic(12, 3)
    found = []
    for late in itertools.combinations(range(12), 4):
        alive = np.array([i for i in range(12) if i not in late])
        assert code._solve(alive) is None
        part = code._matrix[alive].T
        found.append(np.abs(part @ np.linalg.lstsq(part, np.ones(12), rcond=None)[0] - 1).max())
    assert min(found) > 1e3 * RESIDUAL


def test_support_and_load():
    code = Cyclic(10, 4, seed=3)
    assert (code.chunks == (np.arange(10)[:, None] + np.arange(5)) % 10).all()
    assert (code.weights != 0).all()
    assert np.allclose((code.weights**2).sum(1), 1)
    groups = Fractional(9, 2)
    assert (groups.chunks == np.repeat([[0, 1, 2], [3, 4, 5], [6, 7, 8]], 3, axis=0)).all()


def test_fractional_is_exact():
    gradients = np.arange(24.0).reshape(12, 2)
    code = Fractional(12, 3)
    weights = code.decode([1, 6, 7, 9, 10, 11, 4, 5, 8])
    assert weights is not None and set(weights) == {0.0, 1.0}
    assert (sum(weights[i] * code.encode(i, gradients) for i in range(12)) == gradients.sum(0)).all()


def test_uncoded_needs_everybody():
    code = make_code(5, 0)
    assert isinstance(code, Fractional)
    assert (code.decode(range(5)) == 1).all()
    assert code.decode(range(4)) is None


def test_auto_prefers_repetition():
    assert isinstance(make_code(12, 3), Fractional)
    assert isinstance(make_code(12, 4), Cyclic)
    assert isinstance(make_code(12, 3, "cyclic"), Cyclic)


def test_codes_are_drawn_from_their_key():
    assert (Cyclic(9, 2, seed=4).weights == Cyclic(9, 2, seed=4).weights).all()
    assert (Cyclic(9, 2, seed=4).weights != Cyclic(9, 2, seed=5).weights).any()


def test_weights_are_kept_by_survivor_set(monkeypatch):
    code, calls = Cyclic(40, 1), []
    solve = code._solve
    monkeypatch.setattr(code, "_solve", lambda alive: calls.append(0) or solve(alive))
    first = code.decode(range(39))
    assert code.decode([*range(38, -1, -1)]) is first
    assert len(calls) == 1
    many = Fractional(300, 1)
    for late in range(300):
        many.decode(i for i in range(300) if i != late)
    assert len(many._known) == CACHE


@pytest.mark.parametrize(("n", "s"), [(4, 4), (4, -1), (4, 9)])
def test_too_many_stragglers_for_a_code(n, s):
    with pytest.raises(ShoalError, match=f"tolerates 0 to 3 stragglers, not {s}"):
        make_code(n, s)


def test_repetition_needs_whole_groups():
    with pytest.raises(ShoalError, match="12 is no multiple of 5"):
        make_code(12, 4, "fractional")
