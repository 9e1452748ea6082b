"""The subset of least diameter against all subsets."""

import numpy as np
import pytest
import torch

from aggregators import robust
from aggregators.robust import (
    MDA,
    NoPre,
)
from fl.keys import generator
from tests.aggregators.robust.cases import case, outcome
from tests.oracles import robust as naive


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
