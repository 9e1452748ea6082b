"""DP-FedAvg: its noise, what a round costs under each sampling, adaptive clipping, whole runs."""

import json
import math

import numpy as np
import pytest
from flwr.supercore.differential_privacy import adaptive_clip_inputs_inplace
from scipy.stats import chi2

from aggregators.fedavg import FedAvg
from clients.layout import Layout
from fl.errors import ConfigError, ShoalError
from fl.network import Instant
from fl.records import read_run
from fl.run import resume
from fl.sampling import Available, Fixed, Poisson
from privacy.central import Central
from privacy.dp_sgd import gradient_noise
from tests.helpers import SHARED, clients, final, go, rounds
from tests.privacy.test_client_level import guard_of, settings, space, state, update, vectors
from tests.test_resume import killed_at, moments, same_end

WIDE = space(Layout(("A", "B"), ((3, 5000), (7000, 3))))
UNIFORM = "aggregator.weights=uniform"


def within_chi_square(values: np.ndarray, std: float) -> bool:
    """Whether independent normal ``values`` have ``std``: a false alarm has probability 1e-7."""
    return chi2.ppf(5e-8, values.size) < np.sum((values / std) ** 2) < chi2.isf(5e-8, values.size)


def test_the_noise_of_a_round():
    """z C on the sum, over the public cohort; independent of the round before."""
    guard = guard_of(Central(epsilon=None, noise_multiplier=1.3, clip=0.7), settings(per_round=5), WIDE)
    seen = [guard.collect(state(WIDE), [], round, 0.1)[0].vector for round in (1, 2)]
    for vector in seen:
        assert within_chi_square(vector, 1.3 * 0.7 / 5)
        assert not within_chi_square(vector, 1.3 * 0.7 / 5 * 1.05)
    assert abs(np.corrcoef(*seen)[0, 1]) < 5.4 / math.sqrt(WIDE.layout.size)  # above with probability 7e-8


def test_noise_does_not_shrink_with_the_number_that_answered():
    for number in (0, 1, 8):
        guard = guard_of(Central(epsilon=None, noise_multiplier=1.0, clip=1e-9), settings(), WIDE)
        updates = [update(c, np.ones(WIDE.layout.size)) for c in range(number)]
        assert within_chi_square(guard.collect(state(WIDE), updates, 1, 0.1)[0].vector, 1e-9 / 8)


# What rounds cost


def after(steps: int, privacy: Central, sampling) -> float:
    guard = guard_of(privacy, settings(clients=50, per_round=1, rounds=steps, sampling=sampling))
    server = state()
    for round in range(1, steps + 1):
        guard.collect(server, [], round, 0.1)
    return guard.epsilon


@pytest.mark.parametrize(
    ("sampling", "z", "accountant", "epsilon", "within"),
    [
        (Poisson(), 1.1, "rdp", 3.5876, 1e-3),
        (Poisson(), 1.1, "prv", 3.260, 0.02),
        (Available(), 1.1, "rdp", 548.4, 0.1),  # no amplification; Opacus' orders, which are coarser here, give 551
        (Fixed(), 2.2, "rdp", 6.99, 0.01),  # replace-one: the sum moves by 2 C
    ],
)
def test_golden_epsilons_of_1000_rounds(sampling, z, accountant, epsilon, within):
    """q = 1/50, delta = 1e-5; dp-accounting and Opacus give the same numbers."""
    privacy = Central(epsilon=None, noise_multiplier=z, delta=1e-5, accountant=accountant)
    assert after(1000, privacy, sampling) == pytest.approx(epsilon, abs=within)


def test_epsilon_falls_with_noise_and_rises_with_the_rate_and_with_rounds():
    def cost(z=1.0, per_round=4, steps=5):
        made = settings(clients=40, per_round=per_round, rounds=steps)
        guard = guard_of(Central(epsilon=None, noise_multiplier=z), made)
        for round in range(1, steps + 1):
            guard.collect(state(), [], round, 0.1)
        return guard.epsilon

    assert cost(z=2.0) < cost() < cost(z=0.7)
    assert cost(per_round=2) < cost() < cost(per_round=8)
    assert cost(steps=2) < cost() < cost(steps=9)


def test_replacing_costs_more_than_adding_and_no_amplification_more_than_any():
    z = {}
    for sampling in (Poisson(), Fixed(), Available()):
        guard = guard_of(Central(epsilon=2.0), settings(clients=40, per_round=4, sampling=sampling))
        z[type(sampling)] = guard.book.running.noise_multiplier
    assert z[Poisson] < z[Fixed] and z[Poisson] < z[Available]


def test_prv_does_not_cover_a_fixed_cohort():
    with pytest.raises(ConfigError, match=r"privacy\.accountant='prv' .*rdp"):
        guard_of(Central(accountant="prv"), settings(sampling=Fixed(), per_round=2))


@pytest.mark.parametrize("sampling", [Poisson(), Fixed()])
def test_amplification_needs_everybody_to_be_available(sampling):
    made = settings(sampling=sampling, network=Instant(availability=0.5))
    with pytest.raises(ConfigError, match=r"network\.availability=0\.5 .*sampling=available"):
        Central().check(made)
    Central().check(settings(sampling=Available(), network=Instant(availability=0.5)))


@pytest.mark.parametrize(("sampling", "refused"), [(Poisson(), True), (Fixed(), True), (Available(), False)])
def test_amplification_needs_updates_of_this_round(sampling, refused):
    guard = guard_of(Central(), settings(sampling=sampling))
    late = [update(0, vectors(1)[0], round=1)]
    if refused:
        with pytest.raises(ShoalError, match=r"earlier round.*sampling=available"):
            guard.collect(state(), late, 2, 0.1)
    else:
        assert len(guard.collect(state(), late, 2, 0.1)) == 1


# Adaptive clipping

ADAPTIVE = {"epsilon": None, "adaptive": True}


def norms(number: int, round: int) -> np.ndarray:
    return np.random.default_rng((3, round)).uniform(0.5, 1.5, number)


def clips(first: float, number: int = 200, steps: int = 200, **more) -> list[float]:
    """The clip norm over rounds in which the norms of ``number`` clients are U(0.5, 1.5)."""
    made = settings(clients=number, rounds=steps, sampling=Available())
    privacy = Central(**ADAPTIVE, noise_multiplier=1.0, first_clip=first, **more)
    guard, server = guard_of(privacy, made), state()
    direction = np.zeros(server.layout.size)
    direction[3] = 1.0
    found = [guard.clip]
    for round in range(1, steps + 1):
        updates = [update(c, direction * norm, round=round) for c, norm in enumerate(norms(number, round))]
        guard.collect(server, updates, round, 0.1)
        found.append(guard.clip)
    return found


@pytest.mark.parametrize("first", [0.1, 5.0])
def test_the_clip_norm_comes_to_the_median(first):
    """Its spread in the end is sqrt(eta/2) s_b/m = 0.016, so a mean of 100 rounds is within 0.03."""
    found = clips(first)
    assert found[0] == first
    assert 0.97 < np.mean(found[100:]) < 1.02


@pytest.mark.parametrize("first", [0.1, 5.0])
def test_where_the_wrong_sign_diverges(first):
    """Flower's rule takes its bit of clipped updates for one of updates that are not: the same loop runs away."""
    clip = first
    for round in range(1, 201):
        bits = [adaptive_clip_inputs_inplace([np.array([norm])], clip) for norm in norms(200, round)]
        clip *= math.exp(-0.2 * (np.mean(bits) - 0.5))
    assert clip < 1e-6 or clip > 1e6


def test_other_quantiles():
    assert np.mean(clips(1.0, quantile=0.8)[100:]) == pytest.approx(1.3, abs=0.04)


def test_the_noise_is_of_the_norm_that_clipped():
    """A round in which C moves by much: its noise is of the old C, the next one's of the new."""
    privacy = Central(**ADAPTIVE, noise_multiplier=1.0, first_clip=0.5, clip_rate=20.0, quantile=0.9, count_noise=2.0)
    guard = guard_of(privacy, settings(), WIDE)
    z = gradient_noise(1.0, 2.0)
    before = guard.clip
    first = guard.collect(state(WIDE), [], 1, 0.1)[0].vector
    after = guard.clip
    second = guard.collect(state(WIDE), [], 2, 0.1)[0].vector
    assert not 0.5 < after / before < 2
    assert within_chi_square(first, z * before / 8) and within_chi_square(second, z * after / 8)


def test_a_round_without_answers_leaves_the_norm_where_it_is_on_average():
    """The count is one of b_i - 1/2, so that nobody stands for one half; its noise has s_b = m/20 over m."""
    privacy = Central(**ADAPTIVE, noise_multiplier=0.5, clip_rate=1.0)
    moves = []
    for seed in range(400):
        guard = guard_of(privacy, settings(clients=100, seed=seed))
        guard.collect(state(), [], 1, 0.1)
        moves.append(-math.log(guard.clip / 0.1))
    assert within_chi_square(np.array(moves), 1 / 20)
    assert abs(np.mean(moves)) < 5.4 / 20 / math.sqrt(400)


def test_the_counts_cost_is_in_the_total():
    """(z^-2 - (2 s_b)^-2)^-1/2 for the update: together they cost what z alone does."""
    plain = guard_of(Central(epsilon=3.0), settings(clients=100))
    both = guard_of(Central(epsilon=3.0, adaptive=True), settings(clients=100))
    z, s = plain.noise_multiplier, both.count_noise
    assert s == 5.0 and both.total_noise == z
    assert both.noise_multiplier > z
    assert both.noise_multiplier**-2 + (2 * s) ** -2 == pytest.approx(z**-2, rel=1e-9)
    for guard in (plain, both):
        guard.collect(state(), [], 1, 0.1)
    assert plain.epsilon == both.epsilon


def test_a_count_that_costs_more_than_all_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.count_noise=0\.4 .*clients\.per_round"):
        guard_of(Central(adaptive=True, noise_multiplier=1.0))


# Resuming


@pytest.mark.parametrize("adaptive", [False, True])
def test_restored_books_go_on_bit_for_bit(adaptive):
    def made():
        return guard_of(Central(adaptive=adaptive, count_noise=3.0), settings(rounds=9))

    updates = [[update(c, v * r, round=r) for c, v in enumerate(vectors(5))] for r in range(10)]
    whole, begun, later = made(), made(), made()
    ends = [whole.collect(state(), updates[r], r, 0.1)[0].vector for r in range(1, 8)]
    for r in range(1, 5):
        begun.collect(state(), updates[r], r, 0.1)
    later.restore(json.loads(json.dumps(begun.state())))
    assert (later.epsilon, later.clip) == (begun.epsilon, begun.clip)
    for r in range(5, 8):
        assert np.array_equal(later.collect(state(), updates[r], r, 0.1)[0].vector, ends[r - 1])
    assert later.state() == whole.state() and later.epsilon == whole.epsilon > begun.epsilon


def test_books_of_other_settings_are_refused():
    begun = guard_of(Central(), settings(rounds=9))
    for other in (
        guard_of(Central(epsilon=5.0), settings(rounds=9)),
        guard_of(Central(), settings(rounds=9, per_round=3)),
        guard_of(Central(delta=1e-3), settings(rounds=9)),
    ):
        with pytest.raises(ConfigError, match="spent under"):
            other.restore(begun.state())


# The statement


@pytest.mark.parametrize(
    ("sampling", "words"),
    [
        (Poisson(), ["Poisson", "rate 0.375", "adding or removing all of its data"]),
        (Fixed(), ["3 of 8 clients drawn without replacement", "replacing all of its data"]),
        (Available(), ["no amplification", "adding or removing all of its data"]),
    ],
)
def test_the_statement_names_everything(sampling, words):
    guard = guard_of(Central(clip=0.7, delta=1e-3), settings(per_round=3, sampling=sampling))
    guard.collect(state(), [], 1, 0.1)
    text = guard.statement().text()
    z = guard.noise_multiplier
    for part in (
        "DP-FedAvg", f"({guard.epsilon:.4g}, 0.001)-differential privacy was spent of a budget of 3", "for one client",
        "RDP accountant", "L2 norm C = 0.7", "uniform weights", f"Gaussian, {z:.4g} x C", "all 4 rounds of a client",
        "1 rounds taken", "the server is trusted", "held-out", *words,
    ):  # fmt: skip
        assert part in text, part
    assert guard.statement().holders[0]["steps"] == 1


def test_the_statement_tells_of_adaptive_clipping_and_weights():
    text = guard_of(Central(adaptive=True, count_noise=5.0)).statement().text()
    assert "begins at 0.1" in text and "0.5 quantile" in text and "noise 5" in text
    made = settings(aggregator=FedAvg("examples"))
    assert "min(n_i/20, 1)" in guard_of(Central(weight_cap=20), made).statement().text()
    made = settings(aggregator=FedAvg([1.0] * 8))
    assert "w_i/max w" in guard_of(Central(), made).statement().text()


# Whole runs


def test_a_run(tmp_path):
    go(tmp_path / "run", "privacy=central", UNIFORM, "sampling=poisson", "clients.per_round=3", "schedule.rounds=3")
    run = read_run(tmp_path / "run")
    assert run["status"] == "completed" and 2.9 < run["final"]["epsilon"] <= 3.0
    assert "DP-FedAvg" in run["privacy"] and run["privacy_statement"]["holders"][0]["steps"] == 3
    told = [event["epsilon"] for event in rounds(tmp_path / "run")]
    assert told == sorted(told) and told[-1] == run["final"]["epsilon"]
    for event in clients(tmp_path / "run"):
        assert event["loss"] is None and event["tokens"] == 0 and event["examples"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ("adapter=ffa", "adapter/init=orthonormal", "aggregator=fedsvd"),
        ("adapter=lora_xs", "aggregator=fedsb"),
        ("adapter=rolora", "aggregator=rolora"),
    ],
    ids=lambda w: w[-1],
)
def test_low_rank_schemes_run_under_it(tmp_path, words):
    go(tmp_path / "run", *words, "adapter.rank=4", "privacy=central", UNIFORM, "schedule.rounds=3")
    assert final(tmp_path / "run")["rounds"] == 3 and 2.9 < final(tmp_path / "run")["epsilon"] <= 3.0
    assert all(event["update_norm"] > 0 for event in rounds(tmp_path / "run"))


def test_a_run_stops_before_its_target(tmp_path):
    more = ("privacy.noise_multiplier=1.5", "sampling=available", "schedule.rounds=40")
    go(tmp_path / "run", "privacy=central", UNIFORM, *more, "local.steps=1")
    end = final(tmp_path / "run")
    assert 0 < end["rounds"] < 40 and end["epsilon"] <= 3.0 and "privacy budget" in end["stopped"]


def test_killed_and_resumed_ends_the_same(tmp_path):
    words = ("privacy=central", UNIFORM, "privacy.adaptive=true", "privacy.count_noise=3", "sampling=poisson",
             "clients.per_round=3", "local.steps=1", "schedule.rounds=4", "server_optimizer=fedadam")  # fmt: skip
    count = moments(tmp_path / "whole", *words)
    killed_at(int(0.7 * count), tmp_path / "run", *words)
    resume(tmp_path / "run", shared=SHARED, quiet=True)
    same_end(tmp_path / "run", tmp_path / "whole")


def test_a_run_goes_on_where_nobody_answers(tmp_path):
    """A round in which every reply is bad: to stop over it would tell. All that moves is noise."""
    bad = ("attack=faulty", "attack.kind=nan", "attack.fraction=1", "sampling=poisson")
    go(tmp_path / "run", "privacy=central", UNIFORM, "schedule.rounds=3", *bad)
    found = rounds(tmp_path / "run")
    assert [event["accepted"] for event in found] == [0, 0, 0] and 2.9 < final(tmp_path / "run")["epsilon"] <= 3.0
    assert all(event["update_norm"] > 0 for event in found)
