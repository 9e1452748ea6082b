import math

import numpy as np
import pytest

from fl.keys import generator
from fl.metrics import Spread, accuracy, macro_f1, perplexity, spread


def test_accuracy():
    assert accuracy(np.array([0, 1, 1, 2]), np.array([0, 1, 2, 2])) == 0.75
    assert accuracy(np.array([], int), np.array([], int)) is None


def test_macro_f1_by_hand():
    # class 0: TP 2, FP 1, FN 0 -> 4/5;  class 1: TP 1, FP 0, FN 1 -> 2/3;  class 2: TP 1, FP 1, FN 1 -> 1/2
    true = np.array([0, 0, 1, 1, 2, 2])
    predicted = np.array([0, 0, 1, 2, 2, 0])
    assert macro_f1(predicted, true) == pytest.approx((4 / 5 + 2 / 3 + 1 / 2) / 3, rel=1e-15)


def test_macro_f1_counts_a_class_only_predicted_and_not_one_that_is_absent():
    # class 5: TP 1, FN 1 -> 2/3; class 9 is never true: 0; classes 0..4 and 6..8 do not occur
    assert macro_f1(np.array([5, 9]), np.array([5, 5])) == pytest.approx((2 / 3 + 0) / 2)
    assert macro_f1(np.array([7, 7]), np.array([7, 7])) == 1.0
    assert macro_f1(np.array([1, 0]), np.array([0, 1])) == 0.0
    assert macro_f1(np.array([], int), np.array([], int)) is None


def test_macro_f1_is_scikit_learns():
    sklearn = pytest.importorskip("sklearn.metrics")
    for trial in range(20):
        draw = generator(trial, "labels")
        true, predicted = draw.integers(0, 6, size=(2, int(draw.integers(1, 12)))) * 3 - 4
        expected = sklearn.f1_score(true, predicted, average="macro", zero_division=0)
        assert macro_f1(predicted, true) == pytest.approx(expected, rel=1e-14)


def test_lengths_have_to_agree():
    with pytest.raises(ValueError, match=r"\(2,\).*\(3,\)"):
        accuracy(np.zeros(2), np.zeros(3))


def test_perplexity():
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(50_257)) == pytest.approx(50_257)
    assert perplexity(709.0) < math.inf
    assert perplexity(1e4) == math.inf
    assert perplexity(math.inf) == math.inf
    assert perplexity(math.nan) is None
    assert perplexity(None) is None


def test_spread_by_hand():
    values = [v / 100 for v in range(1, 24)]  # 0.01 ... 0.23: 23 clients, a worst decile of two
    result = spread([None, *values, math.nan])
    assert result.mean == pytest.approx(0.12)
    assert result.std == pytest.approx(math.sqrt((23**2 - 1) / 12) / 100)  # of n consecutive whole numbers
    assert result.worst_decile == pytest.approx(0.015)
    assert spread(values, higher_is_better=False).worst_decile == pytest.approx(0.225)


def test_the_worst_decile_has_at_least_one_client():
    assert spread([0.9, 0.2, 0.7]).worst_decile == 0.2
    assert spread([0.9, 0.2, 0.7], higher_is_better=False).worst_decile == 0.9
    assert spread([0.5]) == Spread(0.5, 0.0, 0.5)


def test_spread_of_nothing_and_of_infinity():
    assert spread([]) == spread([None, None]) == Spread(None, None, None)
    assert spread([1.0, math.inf], higher_is_better=False) == Spread(math.inf, None, math.inf)
