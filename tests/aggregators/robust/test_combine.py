"""The way through `combine`: conditions, types, what is refused and what comes back."""

import numpy as np
import pytest
import torch

from aggregators import robust
from aggregators.robust import (
    ARC,
    ARCNNM,
    NNM,
    Bucketing,
    FLTrust,
    FoolsGold,
    Krum,
    Mean,
    MultiKrum,
    NoPre,
)
from fl.errors import ConfigError, RunStopped
from tests.aggregators.robust.cases import RULES, F, N, case, outcome, root

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
