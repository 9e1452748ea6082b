"""Local DP: what leaves a client, what it costs, and what is refused."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.fedex import FedEx
from clients.adapters.initial.eva import EVA
from clients.behaviours.base import ReplyFields
from fl.errors import ConfigError
from fl.records import read_run
from fl.sampling import Available
from fl.schedules.synchronous import Synchronous
from privacy.accounting import SampledGaussian, epsilon
from privacy.base import BudgetSpent
from privacy.central import Central
from privacy.local_dp import LocalDP
from tests.helpers import clients, final, go, rounds
from tests.privacy.test_central import UNIFORM, WIDE, within_chi_square
from tests.privacy.test_client_level import Endless, guard_of, settings, space, state, update, vectors
from tests.privacy.test_dp_ftrl import exact_epsilon

ALL = np.arange(WIDE.layout.size)


def reply(vector: np.ndarray, client: int = 3, round: int = 1) -> ReplyFields:
    return ReplyFields(client, round, 0, "layout", vector, 77, 5, 900, 2.5)


def sent(privacy: LocalDP, vector: np.ndarray, client: int = 3, round: int = 1, seed: int = 0) -> np.ndarray:
    guard = guard_of(privacy, settings(seed=seed), WIDE)
    return guard.release(reply(vector, client, round), ALL[: len(vector)]).update


def given(z: float, **more) -> LocalDP:
    return LocalDP(epsilon=None, noise_multiplier=z, **more)


@pytest.mark.parametrize("norm", [0.0, 0.1, 3.0])
def test_the_noise_of_an_update(norm):
    """z C around the clipped update, for a zero update too."""
    vector = np.linspace(-1, 2, WIDE.layout.size)
    vector *= norm / np.linalg.norm(vector)
    noise = sent(given(1.3, clip=0.7), vector) - vector * min(1.0, 0.7 / max(norm, 1e-9))
    assert within_chi_square(noise, 1.3 * 0.7) and not within_chi_square(noise, 1.3 * 0.7 * 1.05)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0, 1e4])
def test_an_update_is_clipped_before_the_noise(scale):
    vector = vectors(1)[0] / np.linalg.norm(vectors(1)[0]) * scale
    told = sent(given(1e-12, clip=0.7), vector)
    assert np.linalg.norm(told) <= 0.7 + 1e-9
    np.testing.assert_allclose(told, vector * min(1, 0.7 / max(scale, 1e-9)), atol=1e-9)


def test_the_type_of_an_update_stays():
    assert sent(given(1.0), np.ones(5, np.float32)).dtype == np.float32


def test_noise_is_the_contents_and_replays():
    vector = np.zeros(2000)
    first = sent(given(1.0), vector)
    assert np.array_equal(first, sent(given(1.0), vector))
    other_content = sent(given(1.0), np.full(2000, 1e-5))
    for other in (
        sent(given(1.0), vector, client=2), sent(given(1.0), vector, round=2), sent(given(1.0), vector, seed=1),
        other_content,
    ):  # fmt: skip
        assert abs(np.corrcoef(first, other)[0, 1]) < 5.4 / math.sqrt(2000)  # above with probability 7e-8


def test_a_request_that_comes_twice_is_answered_with_the_same_noise():
    guard, vector = guard_of(given(1.0)), np.zeros(2000)
    guard.job(3, 1, "request", ALL, {})
    first = guard.release(reply(vector), ALL[:2000]).update
    again = guard.release(reply(vector + 1e-9), ALL[:2000]).update
    np.testing.assert_allclose(first, again, atol=2e-9, rtol=0)
    guard.job(3, 1, "another", ALL, {})
    assert abs(np.corrcoef(first, guard.release(reply(vector), ALL[:2000]).update)[0, 1]) < 5.4 / math.sqrt(2000)


def test_nothing_else_leaves():
    told = guard_of(given(1.0)).release(reply(np.ones(5, np.float32)), ALL[:5])
    assert (told.loss, told.tokens, told.examples) == (None, 0, 1)


def test_the_same_noise_in_the_mean_takes_the_root_of_m_more_than_a_trusted_server():
    """z C/sqrt(m) against z C/m for the same z: measured."""
    m, z = 16, 1.2
    local = guard_of(given(z), settings(clients=m), WIDE)
    zero = np.zeros(WIDE.layout.size)
    mean = np.mean([local.release(reply(zero, c), ALL).update for c in range(m)], axis=0)
    central = guard_of(Central(epsilon=None, noise_multiplier=z), settings(clients=m), WIDE)
    [one] = central.collect(state(WIDE), [update(c, zero) for c in range(m)], 1, 0.1)
    assert within_chi_square(mean, z / math.sqrt(m)) and within_chi_square(one.vector, z / m)
    assert np.std(mean) / np.std(one.vector) == pytest.approx(math.sqrt(m), rel=0.05)


# What it costs


def test_an_answer_costs_a_gaussian_whose_mean_moves_by_twice_the_clip_norm():
    guard = guard_of(given(4.0, delta=1e-5), settings(rounds=7))
    for round in range(1, 8):
        assert guard.job(2, round, "x", ALL, {}) is None
        assert guard.books[2].epsilon == epsilon([SampledGaussian(2.0, 1.0, round)], 1e-5)
    exact = exact_epsilon(2 * math.sqrt(7) / 4.0, 1e-5)
    assert exact < guard.epsilon == guard.books[2].epsilon < 1.1 * exact
    assert [book.steps for book in guard.books] == [0, 0, 7, 0, 0, 0, 0, 0]


def test_a_job_that_comes_twice_costs_once():
    guard = guard_of(LocalDP(), settings(rounds=4))
    for _ in range(3):
        guard.job(0, 1, "same", ALL, {})
    assert guard.books[0].steps == 1
    guard.job(0, 1, "another", ALL, {})
    assert guard.books[0].steps == 2


def test_a_client_that_has_spent_its_budget_answers_no_more():
    guard = guard_of(LocalDP(participations=2), settings(clients=3, rounds=9))
    for round in (1, 4):
        guard.job(0, round, "x", ALL, {})
    assert 2.97 < guard.books[0].epsilon <= 3.0
    with pytest.raises(BudgetSpent, match="client 0 has answered in all 2 rounds"):
        guard.job(0, 5, "x", ALL, {})
    assert guard.stopped() is None
    for client in (1, 2):
        for round in (5, 6):
            guard.job(client, round, "x", ALL, {})
    assert "every client" in guard.stopped()


def test_a_target_beside_given_noise_is_where_a_client_stops():
    guard = guard_of(LocalDP(epsilon=4.0, noise_multiplier=3.0), settings(rounds=50))
    taken = guard.books[0].limit
    running, delta = guard.books[0].running, guard.books[0].delta
    assert 0 < taken < 50
    for round in range(1, taken + 1):
        guard.job(0, round, "x", ALL, {})
    with pytest.raises(BudgetSpent):
        guard.job(0, taken + 1, "x", ALL, {})
    assert epsilon([running.of(taken)], delta) <= 4.0 < epsilon([running.of(taken + 1)], delta)


def test_noise_is_planned_for_the_rounds_in_which_a_client_may_answer():
    def z(**more):
        return guard_of(LocalDP(**more), settings(rounds=16)).std

    assert z(participations=1) < z(participations=4) < z() == z(participations=16) == z(participations=99)
    assert z(epsilon=6.0) < z() < z(epsilon=1.0)
    assert z(clip=2.0) == pytest.approx(2 * z())
    # The server knows whom it asked, so sampling changes nothing.
    rare = guard_of(LocalDP(), settings(rounds=16, per_round=1, sampling=Available()))
    assert rare.std == z()


def test_restored_books_go_on():
    begun, later = (guard_of(LocalDP(participations=3), settings(rounds=9)) for _ in range(2))
    for round, client in ((1, 0), (1, 4), (2, 0)):
        begun.job(client, round, "x", ALL, {})
    later.restore(json.loads(json.dumps(begun.state())))
    assert later.state() == begun.state() and later.epsilon == begun.epsilon > 0
    later.job(0, 2, "x", ALL, {})
    later.job(0, 3, "x", ALL, {})
    with pytest.raises(BudgetSpent):
        later.job(0, 4, "x", ALL, {})
    with pytest.raises(ConfigError, match="spent under"):
        guard_of(LocalDP(participations=2), settings(rounds=9)).restore(begun.state())


# What is refused


def refused(match: str, **parts) -> None:
    with pytest.raises(ConfigError, match=match):
        LocalDP().check(settings(**parts))


def test_what_is_accounted_for_passes():
    """The server's part is post-processing: any rule, ranks, and which answers it takes."""
    for parts in (
        {"aggregator": FedEx("uniform")}, {"aggregator": FedAvg([1.0] * 8)}, {"sampling": Available(0.5)},
        {"schedule": Synchronous(3, deadline_s=1.0, min_clients=3)},
    ):  # fmt: skip
        LocalDP().check(settings(**parts))
    LocalDP().check(settings(adapter=replace(settings().adapter, rank=[2, 4])))


def test_weights_by_examples_are_refused():
    refused(r"aggregator\.weights='examples' .*secret", aggregator=FedAvg("examples"))


def test_epochs_are_refused():
    refused(r"local\.epochs=1\.0 .*local\.steps", local=replace(settings().local, steps=None, epochs=1.0))


def test_a_schedule_without_a_bound_is_refused():
    refused("schedule='Endless' .*worst case", schedule=Endless(3))


def test_starts_from_clients_data_are_refused():
    refused(r"adapter\.init\.source='clients'", adapter=replace(settings().adapter, init=EVA(source="clients")))


def test_a_bound_on_norms_that_the_noise_breaks_is_refused():
    made = settings(schedule=Synchronous(4, max_update_norm=100.0))
    with pytest.raises(ConfigError, match=r"schedule\.max_update_norm=100\.0 .*at least"):
        guard_of(given(1.0), made, WIDE)  # sqrt(36000) = 190
    guard_of(given(1.0), made, space())


def test_the_statement_names_everything():
    guard = guard_of(LocalDP(clip=0.7, delta=1e-3, participations=3), settings(rounds=5))
    guard.job(1, 1, "x", ALL, {})
    text = guard.statement().text()
    for part in (
        "Local differential privacy", f"({guard.epsilon:.4g}, 0.001)-differential privacy was spent of a budget of 3",
        "for one client", "replacing all of its data", "RDP accountant", "none is assumed", "L2 norm C = 0.7",
        f"Gaussian, {guard.std / 0.7:.4g} x C on each update", "up to 3 of 5 rounds of a client; 0 to 1 taken",
        "Holds against: the server",
    ):  # fmt: skip
        assert part in text, part
    assert [row["steps"] for row in guard.statement().holders] == [0, 1, 0, 0, 0, 0, 0, 0]


def test_a_run(tmp_path):
    """Client 0..3 in three rounds; the noise is for two, so nobody answers in the third and the run ends."""
    go(tmp_path / "run", "privacy=local", UNIFORM, "privacy.participations=2", "schedule.rounds=3")
    run = read_run(tmp_path / "run")
    assert final(tmp_path / "run")["rounds"] == 2 and 2.9 < run["final"]["epsilon"] <= 3.0
    assert "every client has answered" in run["final"]["stopped"]
    assert [event["accepted"] for event in rounds(tmp_path / "run")] == [4, 4]
    for event in clients(tmp_path / "run"):
        assert (event["loss"], event["tokens"], event["examples"]) == (None, 0, 1)


def test_a_run_of_a_rule_that_needs_single_updates(tmp_path):
    go(tmp_path / "run", "privacy=local", UNIFORM, "aggregator=fedex", "adapter.rank=[2,2]", "schedule.rounds=3")
    assert final(tmp_path / "run")["rounds"] == 3 and 2.9 < final(tmp_path / "run")["epsilon"] <= 3.0
