"""Who is asked: the right number, uniformly, reproducibly, and only those who are there."""

import dataclasses
import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from omegaconf import OmegaConf

import configs
import fl.sampling
from fl.config import build
from fl.errors import ConfigError
from fl.sampling import Available, Fixed, Poisson, Sampling

RULES = [Fixed(), Available(), Poisson()]


@pytest.mark.parametrize("rule", [*RULES, Fixed(0.5), Available(0.5), Poisson(0.5)], ids=repr)
def test_a_sample_is_a_sorted_pure_function_of_its_key(rule):
    def draw(seed, round, candidates=range(20)):
        return rule.sample(seed, round, candidates, 20, 5)

    assert draw(1, 2) == draw(1, 2) == draw(1, 2, list(range(20))[::-1])
    assert draw(1, 2) == sorted(set(draw(1, 2)))
    assert len({tuple(draw(s, r)) for s, r in itertools.product(range(5), range(5))}) > 20


@pytest.mark.parametrize("rule", RULES, ids=repr)
def test_only_available_clients_are_asked(rule):
    for round in range(50):
        assert set(rule.sample(0, round, [1, 4, 6], 20, 5)) <= {1, 4, 6}
    assert rule.sample(0, 1, [], 20, 5) == []


@pytest.mark.parametrize("rule", [Fixed(), Available()], ids=repr)
def test_a_fixed_number_is_asked_or_all_there_are(rule):
    for round in range(20):
        assert len(rule.sample(3, round, range(20), 20, 5)) == 5
    assert rule.sample(3, 1, [2, 7, 9], 20, 5) == [2, 7, 9]
    assert rule.sample(3, 1, range(5), 5, 5) == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("rule", [Fixed(), Available()], ids=repr)
def test_every_cohort_is_equally_likely(rule):
    rounds = 6000
    counts = Counter(tuple(rule.sample(5, round, range(4), 4, 2)) for round in range(rounds))
    assert len(counts) == 6
    expected = rounds / 6
    chi_square = sum((n - expected) ** 2 / expected for n in counts.values())
    assert chi_square < 20.5  # 0.999 quantile at 5 degrees of freedom


def test_poisson_takes_each_client_by_itself():
    number, per_round, rounds = 8, 2, 4000
    chosen = np.zeros((rounds, number))
    for round in range(rounds):
        chosen[round, Poisson().sample(7, round, range(number), number, per_round)] = 1
    sizes = chosen.sum(1)
    assert sizes.min() == 0  # an empty cohort is possible
    assert sizes.max() > per_round
    rate = Poisson().rate(number, per_round)
    assert rate == 0.25
    assert np.abs(chosen.mean(0) - rate).max() < 4 * np.sqrt(rate * (1 - rate) / rounds)
    together = chosen.T @ chosen / rounds
    off_diagonal = together[~np.eye(number, dtype=bool)]
    assert np.abs(off_diagonal - rate**2).max() < 0.02
    assert abs(sizes.var() - number * rate * (1 - rate)) < 0.15  # a fixed size would give 0


def test_poisson_does_not_depend_on_who_else_is_there():
    for round in range(30):
        everyone = set(Poisson().sample(0, round, range(20), 20, 6))
        some = set(Poisson().sample(0, round, range(0, 20, 2), 20, 6))
        assert some == everyone & set(range(0, 20, 2))


def test_poisson_rate_stops_at_one():
    assert Poisson(1.0).rate(10, 8) == 1.0
    assert Poisson(0.5).rate(10, 4) == pytest.approx(0.6)
    assert Poisson(1.0).sample(0, 1, range(10), 10, 8) == list(range(10))


@pytest.mark.parametrize(
    ("over", "per_round", "asked"),
    [(0, 10, 10), (0.1, 10, 11), (0.25, 10, 13), (0.07, 100, 107), (0.01, 1, 2), (1, 3, 6)],
)
def test_over_selection_asks_the_ceiling(over, per_round, asked):
    assert len(Fixed(over).sample(0, 1, range(200), 200, per_round)) == asked


@pytest.mark.parametrize("kind", [Fixed, Available, Poisson])
def test_over_selection_asks_more_and_keeps_the_first(kind):
    assert kind().quota(5) is None
    assert kind(0.4).quota(5) == 5
    for round in range(20):
        few, many = (set(kind(x).sample(0, round, range(30), 30, 5)) for x in (0, 1))
        assert few <= many


def test_when_a_round_may_start():
    assert Fixed().needed(10, 4) == 4
    assert Fixed(0.5).needed(10, 4) == 4
    assert Fixed().needed(3, 4) == 3
    assert Available().needed(10, 4) == 1
    assert Poisson().needed(10, 4) == 0


def test_settings_are_checked():
    assert build({"_target_": "fl.sampling.Fixed", "over_selection": 0.5}, "sampling") == Fixed(0.5)
    with pytest.raises(ConfigError, match=r"sampling.over_selection=-0.1"):
        build({"_target_": "fl.sampling.Poisson", "over_selection": -0.1}, "sampling")


@pytest.mark.parametrize("path", sorted(Path(configs.__file__).parent.glob("sampling/*.yaml")), ids=lambda p: p.stem)
def test_every_option_names_every_setting_with_its_default(path):
    assert path.read_text().startswith("# ")
    values = OmegaConf.to_container(OmegaConf.load(path))
    kind = getattr(fl.sampling, values.pop("_target_").removeprefix("fl.sampling."))
    assert issubclass(kind, Sampling)
    defaults = {f.name: f.default for f in dataclasses.fields(kind) if f.init}
    assert values == defaults
