"""byzfl's rules, where it is installed: an implementation by others, for those rules that mean the same there.

Krum there has one neighbour more, and the geometric median a fixed smoothing and three steps.
"""

import importlib.util

import numpy as np
import pytest
import torch

from aggregators.robust import ARC, NNM, Clipping, Mean
from benchmarks.robust import load
from tests.aggregators.robust.cases import RULES, F, N, case, outcome

pytestmark = pytest.mark.skipif(importlib.util.find_spec("byzfl") is None, reason="byzfl is not installed")

SAME = {
    "mean": ("Average", {}),
    "median": ("Median", {}),
    "trimmed_mean": ("TrMean", {"f": F}),
    "meamed": ("Meamed", {"f": F}),
    "mda": ("MDA", {"f": F}),
    "clipping": ("CenteredClipping", {"L": 3, "tau": 2.0}),
}
BEFORE = {"NNM": (NNM(), {"f": F}), "ARC": (ARC(), {"f": F}), "Clipping": (Clipping(2.0), {"c": 2.0})}


@pytest.mark.parametrize("name", SAME)
@pytest.mark.parametrize("trial", range(4))
def test_rules_agree_with_byzfl(name, trial):
    theirs, settings = SAME[name]
    rows = case("byzfl", trial)[0]
    expected = getattr(load(None), theirs)(**settings)(rows.astype(np.float32))
    np.testing.assert_allclose(outcome(RULES[name][0], rows), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", BEFORE)
def test_pre_aggregators_agree_with_byzfl(name):
    pre, settings = BEFORE[name]
    rows = case("byzfl", "pre")[0]
    expected = getattr(load(None), name)(**settings)(torch.from_numpy(rows.astype(np.float32))).mean(dim=0)
    assert len(rows) == N
    np.testing.assert_allclose(outcome(Mean(), rows, F, pre), expected, rtol=1e-4, atol=1e-4)
