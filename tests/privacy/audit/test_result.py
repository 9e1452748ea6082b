import json

import numpy as np
import pytest
from scipy import stats

from privacy.audit.result import Bound, clopper_pearson

BOUND = Bound(2.3196, 0.0, 0.95, 4.0, "one-run audit", "100 canaries, 37 of 40 guesses right")


def test_the_sentence_names_the_bound_its_basis_and_the_claim():
    start = "With 95 % confidence, epsilon is at least 2.31 (one-run audit, 100 canaries, 37 of 40 guesses right)"
    assert BOUND.sentence() == f"{start}; this audit could have shown at most 4.00."
    assert BOUND.sentence(3.0) == (f"{start}; the ledger claims at most 3. This audit could have shown at most 4.00.")
    assert BOUND.sentence(2.0).endswith(
        "claims at most 2. The claim fails: at this confidence, what ran is not the mechanism in the ledger."
    )
    assert BOUND.sentence(8.0).endswith("could have shown at most 4.00, so it can't test that claim.")
    assert "at delta 1e-05 (" in Bound(1.0, 1e-5, 0.95, 4.0, "a", "b").sentence()


@pytest.mark.parametrize(("claimed", "contradicts"), [(2.3, True), (2.3196, False), (2.4, False)])
def test_only_a_larger_bound_contradicts(claimed, contradicts):
    assert BOUND.contradicts(claimed) is contradicts
    assert ("The claim fails" in BOUND.sentence(claimed)) is contradicts


def test_it_goes_into_json_and_back():
    assert Bound(**json.loads(json.dumps(BOUND.as_plain()))) == BOUND


def test_the_limits_are_where_the_tails_are_the_error():
    low, high = clopper_pearson(7, 20, 0.01)
    assert stats.binom.sf(6, 20, low) == pytest.approx(0.01)
    assert stats.binom.cdf(7, 20, high) == pytest.approx(0.01)
    low, high = clopper_pearson(np.array([0, 20]), 20, 0.05)
    assert low[0] == 0 and high[1] == 1
    assert high[0] == pytest.approx(1 - 0.05 ** (1 / 20)) and low[1] == pytest.approx(0.05 ** (1 / 20))
