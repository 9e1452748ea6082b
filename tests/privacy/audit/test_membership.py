import json
import math

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score, roc_curve

from fl.errors import ShoalError
from fl.keys import generator
from privacy.audit.membership import (
    attack,
    auc,
    calibrated_scores,
    found_at,
    likelihood_ratio_scores,
    roc,
    threshold_scores,
)


def scored(members, others, *key, shift=1.0):
    rng = generator(*key)
    return rng.normal(shift, 1, members), rng.normal(0, 1, others)


def test_roc_and_auc_are_those_of_scikit_learn_ties_included():
    members, others = (np.round(s, 1) for s in scored(70, 110, "sklearn"))
    truth, scores = np.repeat([1, 0], [70, 110]), np.concatenate([members, others])
    assert auc(members, others).value == pytest.approx(roc_auc_score(truth, scores))
    fpr, tpr = roc(members, others)
    expected = roc_curve(truth, scores, drop_intermediate=False)
    assert np.allclose(fpr, expected[0]) and np.allclose(tpr, expected[1])


def test_the_interval_is_delongs():
    members, others = scored(40, 60, "delong")
    wins = (members[:, None] > others[None, :]) * 1.0  # the structural components, by their definition
    value = wins.mean()
    variance = wins.mean(axis=1).var(ddof=1) / 40 + wins.mean(axis=0).var(ddof=1) / 60
    rate = auc(members, others, 0.9)
    half = 1.6448536 * math.sqrt(variance) / (value * (1 - value))
    logit = math.log(value / (1 - value))
    assert rate.low == pytest.approx(1 / (1 + math.exp(-(logit - half))))
    assert rate.high == pytest.approx(1 / (1 + math.exp(-(logit + half))))


def test_the_interval_holds_the_true_area():
    seeds, true, missed = 1000, stats.norm.cdf(1 / np.sqrt(2)), 0
    for s in range(seeds):
        rate = auc(*scored(60, 80, "coverage", s))
        missed += not rate.low <= true <= rate.high
    # DeLong's interval is approximate: 7 % are allowed at 95 %, more than the limit then has probability below 1e-6.
    assert missed <= stats.binom.isf(1e-6, seeds, 0.07)


def test_a_perfect_attack_still_has_an_interval():
    members, others = np.arange(30) + 100.0, np.arange(50.0)
    rate = auc(members, others)
    assert (rate.value, rate.high) == (1.0, 1.0)
    assert rate.low == pytest.approx(0.025 ** (1 / 30))
    rate = auc(others, members)
    assert (rate.value, rate.low) == (0.0, 0.0)
    assert rate.high == pytest.approx(1 - 0.025 ** (1 / 30))


def test_the_share_that_is_found_at_a_false_positive_rate():
    others = np.arange(2000.0)  # the 21st highest is 1979: 20 of 2000 are above it
    members = np.array([1979.0, 1979.5, 1980.0, 0.0])
    rate = found_at(members, others, 0.01)
    assert rate.value == 0.5 and rate.note == ""
    assert stats.binom.sf(1, 4, rate.low) == pytest.approx(0.025)
    assert found_at(members, others, 0.001).value == 0.0  # 2 of 2000 are above 1997
    assert found_at(np.array([1997.5, 1.0]), others, 0.001).value == 0.5


def test_too_few_others_for_a_rate_is_said():
    members, others = np.array([1.0, 3.0]), np.arange(0.0, 1.0, 1 / 999)
    rate = found_at(members, others, 0.001)
    assert rate.value == 1.0 and "999 others, where 1000 are needed" in rate.note
    assert "a rate below 0.003" in rate.note  # 1 - 0.05 ** (1 / 999)
    assert found_at(members, others, 0.01).note == ""
    assert found_at(members, np.arange(1000.0), 0.001).note == ""


def test_no_more_others_than_the_rate_are_above_the_threshold():
    for s in range(20):
        _, others = scored(2, 1500, "above", s)
        ties = np.round(others, 1)
        assert found_at(ties, ties, 0.01).value <= 0.01


def test_calibration_takes_the_difficulty_of_an_example_out():
    rng = generator("difficulty")
    difficulty = rng.gamma(2.0, 2.0, 2000)
    member = np.arange(2000) < 1000
    losses = difficulty * np.where(member, 0.8, 1.0)
    references = difficulty + rng.normal(0, 0.05, (3, 2000))
    plain, calibrated = threshold_scores(losses), calibrated_scores(losses, references)
    assert np.array_equal(plain, -losses)
    assert np.allclose(calibrated, references.mean(axis=0) - losses)
    assert auc(plain[member], plain[~member]).value < 0.65
    assert auc(calibrated[member], calibrated[~member]).value > 0.95
    assert np.array_equal(calibrated_scores(losses, references[0]), calibrated_scores(losses, references[:1]))


@pytest.mark.parametrize("models", [4, 16])
def test_the_likelihood_ratio_is_a_standardised_logit(models):
    p = generator("logit").uniform(0.1, 0.9, (models + 1, 6))
    logit = np.log(p / (1 - p))
    score = likelihood_ratio_scores(-np.log(p[0]), -np.log(p[1:]))
    deviation = logit[1:].std(axis=0, ddof=1)
    if models < 16:
        deviation = np.sqrt(np.mean(deviation**2))
    assert np.allclose(score, (logit[0] - logit[1:].mean(axis=0)) / deviation)


def test_losses_of_zero_and_huge_losses_have_finite_scores():
    losses = np.array([0.0, 1e9, 1.0])
    references = np.array([[0.0, 1e9, 1.1], [0.0, 1e9, 0.9]])
    assert np.isfinite(likelihood_ratio_scores(losses, references)).all()


def test_an_attack_on_a_model_that_memorises_and_on_one_that_does_not():
    leaks = attack(*scored(400, 1000, "leaks", shift=6), 1e-5)
    assert leaks.auc.low > 0.9 and leaks.found[0.001].low > 0.9 and leaks.epsilon > 2
    assert leaks.found[0.001].note == ""
    quiet = attack(*scored(400, 500, "quiet", shift=0), 1e-5, score="calibrated loss")
    assert quiet.auc.low < 0.5 < quiet.auc.high and quiet.epsilon == 0
    assert "too few to say" in quiet.found[0.001].note
    text = quiet.sentence()
    assert text.startswith("Membership inference by calibrated loss, 400 members against 500 others: AUC 0.")
    assert "at 0.1 % false positives (too few to say: 500 others, where 1000 are needed" in text
    plain = json.loads(json.dumps(leaks.as_plain()))
    assert plain["found"]["0.001"]["value"] == leaks.found[0.001].value
    assert plain["auc"]["low"] == leaks.auc.low and plain["epsilon"] == leaks.epsilon


def test_what_can_not_be_scored_is_refused():
    losses = np.ones(5)
    with pytest.raises(ShoalError, match="at least 2 reference model"):
        likelihood_ratio_scores(losses, losses)
    with pytest.raises(ShoalError, match=r"shape \(2, 4\): .* on each of the 5 examples"):
        calibrated_scores(losses, np.ones((2, 4)))
    with pytest.raises(ShoalError, match="losses has 1 values that are not numbers"):
        threshold_scores([1.0, np.nan])
    with pytest.raises(ShoalError, match="at least 2 members and 2 others"):
        auc(np.ones(1), np.ones(5))
