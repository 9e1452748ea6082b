"""What a trusted server does with clients' updates, whatever the noise: clip, weigh, add up, count, refuse."""

import math
from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.fedex import FedEx
from clients.adapters.initial.eva import EVA
from clients.adapters.space import Space
from clients.behaviours.base import ReplyFields
from clients.layout import Layout
from fl.compose import compose
from fl.config import build
from fl.errors import ConfigError, ShoalError
from fl.experiment import Settings
from fl.network import Instant
from fl.sampling import Available, Fixed, Poisson
from fl.schedules.synchronous import Synchronous
from fl.state import ServerState, Update
from privacy.central import Central
from privacy.client_level import clipped
from privacy.dp_ftrl import DPFTRL
from privacy.ledger import spent
from privacy.secure_aggregation.settings import SecAggPlus
from tests.helpers import ENCODER, go

SERVERS = [Central, DPFTRL]
LAYOUT = Layout(("A", "B", "head"), ((3, 5), (7, 3), (2, 4)))


@lru_cache(maxsize=1)
def _settings() -> Settings:
    return build(compose([*ENCODER])[0], "", Settings)


def settings(clients: int = 8, per_round: int | None = None, rounds: int = 4, **parts) -> Settings:
    """The tiny experiment with equal weights, Poisson sampling and further ``parts``."""
    base = _settings()
    given = {
        "aggregator": FedAvg("uniform"),
        "sampling": Poisson(),
        "schedule": Synchronous(rounds),
        "clients": replace(base.clients, number=clients, per_round=per_round),
        **parts,
    }
    return replace(base, **given)


def space(layout: Layout = LAYOUT, **parts) -> Space:
    return Space(layout, tuple(layout.names), **parts)


def state(made: Space | None = None) -> ServerState:
    made = made or space()
    return ServerState(np.arange(made.layout.size, dtype=np.float64), made)


def update(client: int, vector: np.ndarray, examples: int = 5, round: int = 1) -> Update:
    return Update(client, round, 0, vector, examples)


def guard_of(privacy, made: Settings | None = None, where: Space | None = None):
    made = made or settings()
    return privacy.guard(made, [5] * made.clients.number, where or space())


def silent(kind=Central, **more):
    """A mechanism whose noise is too small to see."""
    return kind(epsilon=None, noise_multiplier=1e-12, delta=0.1, **more)


def vectors(number: int, size: int = LAYOUT.size) -> list[np.ndarray]:
    rng = np.random.default_rng(7)
    return [rng.normal(size=size) * scale for scale in np.linspace(0.1, 3, number) / math.sqrt(size)]


@pytest.mark.parametrize("kind", SERVERS)
def test_the_sum_of_clipped_updates_over_the_public_cohort(kind):
    """Two of three expected clients answer: the divisor is still three. One norm is above C, one below."""
    guard, server = guard_of(silent(kind, clip=0.5), settings(per_round=3)), state()
    small, large = np.full(LAYOUT.size, 0.01), np.linspace(-2, 5, LAYOUT.size)
    [one] = guard.collect(server, [update(4, large), update(1, small)], 1, 0.1)
    expected = (small + large * 0.5 / np.linalg.norm(large)) / 3
    assert one.vector.dtype == np.float64
    np.testing.assert_allclose(one.vector, expected, rtol=0, atol=1e-9)
    assert (one.client, one.round, one.start_version, one.examples, one.columns) == (0, 1, 0, 1, None)
    assert one.start is server.vector and one.loss is None


def test_an_update_is_clipped_as_a_whole():
    """All tensors together: 1 (1 + 1 + 1) clipped to C, not each tensor to C."""
    vector = np.zeros(LAYOUT.size)
    vector[[0, 15, 36]] = 1.0  # one entry in each tensor
    guard = guard_of(silent(clip=1.0), settings(clients=1, per_round=1), space())
    [one] = guard.collect(state(), [update(0, vector)], 1, 0.1)
    assert np.linalg.norm(one.vector) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("scale", [0.0, 1e-300, 0.3, 1.0, 1e3, 1e30])
def test_no_update_is_longer_than_the_bound_and_zero_stays_zero(scale):
    vector = np.linspace(-1, 2, 33)
    vector = vector / np.linalg.norm(vector) * scale
    short, norm = clipped(vector, 0.7)
    assert norm == pytest.approx(scale)
    assert np.linalg.norm(short) <= 0.7 * (1 + 1e-12)
    if scale <= 0.7:
        assert np.array_equal(short, vector)
    else:
        np.testing.assert_allclose(short / 0.7, vector / scale, rtol=1e-12)


@pytest.mark.parametrize("kind", SERVERS)
def test_one_client_moves_the_sum_by_the_clip_norm_at_most(kind):
    """Adding or removing any client, at any size of its update, before noise and times the divisor."""
    made = settings(clients=5)
    updates = [update(c, v * 10**c) for c, v in enumerate(vectors(5))]
    every = guard_of(silent(kind, clip=0.4), made).collect(state(), updates, 1, 0.1)[0].vector
    for left in range(5):
        others = [u for u in updates if u.client != left]
        without = guard_of(silent(kind, clip=0.4), made).collect(state(), others, 1, 0.1)[0].vector
        assert np.linalg.norm(every - without) * 5 <= 0.4 * (1 + 1e-6)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_round_without_answers_is_noise_and_is_counted(kind):
    guard = guard_of(kind(epsilon=None, noise_multiplier=1.0))
    [one] = guard.collect(state(), [], 1, 0.1)
    assert np.all(one.vector != 0) and one.vector.shape == (LAYOUT.size,)
    assert guard.book.steps == 1 and guard.epsilon > 0
    assert guard.counts_secret


def test_only_what_trains_in_the_round_is_in_the_update():
    made = space(phases=(("A", "head"), ("B",)))
    guard, server = guard_of(Central(), settings(), made), state(made)
    for round, groups in ((1, ("A", "head")), (2, ("B",)), (3, ("A", "head"))):
        [one] = guard.collect(server, [], round, 0.1)
        assert np.array_equal(one.columns, made.columns(groups))
        assert one.vector.shape == one.columns.shape


@pytest.mark.parametrize("kind", SERVERS)
def test_the_order_of_arrival_changes_no_bit(kind):
    updates = [update(c, v) for c, v in enumerate(vectors(6))]
    a = guard_of(kind()).collect(state(), updates, 1, 0.1)[0].vector
    b = guard_of(kind()).collect(state(), updates[::-1], 1, 0.1)[0].vector
    assert np.array_equal(a, b)


# Weights


@pytest.mark.parametrize("kind", SERVERS)
def test_weights_by_examples_are_capped(kind):
    made = settings(clients=4, aggregator=FedAvg("examples"))
    vector = np.full(LAYOUT.size, 0.01)
    for examples, weight in ((1, 0.1), (5, 0.5), (10, 1.0), (10**6, 1.0)):
        guard = guard_of(silent(kind, weight_cap=10), made)
        [one] = guard.collect(state(), [update(2, vector, examples)], 1, 0.1)
        np.testing.assert_allclose(one.vector, weight * vector / 4, atol=1e-11)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_list_of_weights_is_relative_to_the_largest(kind):
    """Sensitivity C; the divisor is the expected weight of a cohort: 3 clients of mean weight 2.5/4."""
    made = settings(clients=4, per_round=3, aggregator=FedAvg([1.0, 4.0, 2.0, 3.0]))
    vector = np.full(LAYOUT.size, 0.01)
    for client, weight in ((0, 0.25), (1, 1.0), (3, 0.75)):
        guard = guard_of(silent(kind), made)
        assert guard.weight(update(client, vector)) == weight  # the noise is for one of 1
        [one] = guard.collect(state(), [update(client, vector)], 1, 0.1)
        np.testing.assert_allclose(one.vector, weight * vector / (3 * 2.5 / 4), atol=1e-11)


@pytest.mark.parametrize(("cap", "examples"), [(None, 1), (10, 10), (1000, 77)])
def test_what_a_reply_tells_beside_the_update(cap, examples):
    """Losses and tokens come from the data without noise; the number of examples leaves as far as it weighs."""
    made = settings(aggregator=FedAvg("uniform" if cap is None else "examples"))
    reply = ReplyFields(3, 1, 0, "layout", np.ones(LAYOUT.size, np.float32), 77, 5, 900, 2.5)
    told = guard_of(Central(weight_cap=cap), made).release(reply, np.arange(LAYOUT.size))
    assert (told.loss, told.tokens, told.examples) == (None, 0, examples)
    assert told.update is reply.update


# What is refused, before anything loads


def refused(privacy, match: str, **parts) -> None:
    with pytest.raises(ConfigError, match=match):
        privacy.check(settings(**parts))


class Endless(Synchronous):
    def participations(self) -> int | None:
        return None


def test_what_is_accounted_for_passes():
    for kind in SERVERS:
        kind().check(settings())
        kind(weight_cap=9).check(settings(aggregator=FedAvg("examples")))
        # A deadline drops a client for its own slowness alone: its own part of the sum is zero then.
        kind().check(settings(schedule=Synchronous(3, deadline_s=1.0)))
        kind().check(settings(local=replace(_settings().local, steps=None, epochs=1.0)))


@pytest.mark.parametrize("kind", SERVERS)
def test_weights_without_a_bound_are_refused(kind):
    refused(kind(), r"aggregator\.weights='examples' .*privacy\.weight_cap", aggregator=FedAvg("examples"))


@pytest.mark.parametrize("kind", SERVERS)
def test_a_cap_that_caps_nothing_is_refused(kind):
    refused(kind(weight_cap=10), r"privacy\.weight_cap=10")


@pytest.mark.parametrize("kind", SERVERS)
def test_rules_that_need_single_updates_are_refused(kind):
    refused(kind(), "aggregator='FedEx' .*mean update alone", aggregator=FedEx("uniform"))


@pytest.mark.parametrize("kind", SERVERS)
def test_mixed_ranks_are_refused(kind):
    refused(kind(), r"adapter\.rank=\[2, 4\]", adapter=replace(_settings().adapter, rank=[2, 4]))


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("sampling", [Poisson, Fixed, Available])
def test_over_selection_is_refused(kind, sampling):
    refused(kind(), r"sampling\.over_selection=0\.5", sampling=sampling(0.5))


@pytest.mark.parametrize("kind", SERVERS)
def test_stopping_over_how_many_answered_is_refused(kind):
    refused(kind(), r"schedule\.min_clients=2 .*secret", schedule=Synchronous(3, min_clients=2))


@pytest.mark.parametrize("kind", SERVERS)
def test_a_schedule_without_a_bound_is_refused(kind):
    refused(kind(), "schedule='Endless' .*worst case", schedule=Endless(3))


@pytest.mark.parametrize("kind", SERVERS)
@pytest.mark.parametrize("source", ["client", "clients", "private"])
def test_starts_from_clients_data_are_refused(kind, source):
    adapter = _settings().adapter
    refused(kind(), rf"adapter\.init\.source='{source}'", adapter=replace(adapter, init=EVA(source=source)))
    kind().check(settings(adapter=replace(adapter, init=EVA(source="public"))))


@pytest.mark.parametrize("kind", SERVERS)
def test_data_that_decide_who_is_available_are_refused(kind):
    """With epochs a client's data decide how long a round is."""
    local = replace(_settings().local, steps=None, epochs=1.0)
    with pytest.raises(ConfigError, match=r"local\.epochs=1\.0 .*available"):
        kind().check(settings(local=local, network=Instant(availability=0.5), sampling=Available()))


@pytest.mark.parametrize("kind", SERVERS)
def test_secure_aggregation_is_refused(kind):
    """The server would clip a sum."""
    refused(kind(), "secure_aggregation='secagg' .*hides", secure_aggregation=SecAggPlus())


def test_an_experiment_is_refused_before_it_loads(tmp_path):
    with pytest.raises(ConfigError, match=r"aggregator\.weights='examples'"):
        go(tmp_path / "run", "privacy=central")
    assert not (tmp_path / "run").exists()


def test_neither_target_nor_noise_is_refused():
    for kind in SERVERS:
        with pytest.raises(ConfigError, match=r"privacy\.epsilon=None"):
            kind(epsilon=None)


@pytest.mark.parametrize("kind", SERVERS)
def test_one_client_has_no_delta_of_its_own(kind):
    with pytest.raises(ConfigError, match=r"privacy\.delta=1\.0"):
        guard_of(kind(), settings(clients=1))
    assert guard_of(kind(delta=0.01), settings(clients=1)).book.delta == 0.01
    assert guard_of(kind()).book.delta == 1 / 8


# What is refused while a run goes on


@pytest.mark.parametrize("kind", SERVERS)
def test_two_updates_of_one_client_are_refused(kind):
    vector = np.ones(LAYOUT.size)
    with pytest.raises(ShoalError, match="two updates of one client"):
        guard_of(kind()).collect(state(), [update(3, vector), update(3, 2 * vector)], 1, 0.1)


@pytest.mark.parametrize("kind", SERVERS)
def test_a_round_is_summed_once(kind):
    guard = guard_of(kind())
    guard.collect(state(), [], 2, 0.1)
    for round in (1, 2):
        with pytest.raises(ShoalError, match=f"Round {round} can't be summed"):
            guard.collect(state(), [], round, 0.1)


@pytest.mark.parametrize("kind", SERVERS)
def test_training_stops_before_the_target_is_exceeded(kind):
    """The noise is given, and its cost reaches the target in an early round."""
    guard = guard_of(kind(epsilon=4.0, noise_multiplier=1.5, delta=1e-3), settings(rounds=50))
    round = 0
    while guard.stopped() is None:
        round += 1
        guard.collect(state(), [], round, 0.1)
    assert 0 < round < 50 and guard.epsilon <= 4.0
    assert guard.book.limit == round and "epsilon 4" in guard.stopped()
    assert spent((guard.book.running.of(round + 1),), 1e-3, "rdp") > 4.0
    with pytest.raises(ShoalError, match="spent"):
        guard.collect(state(), [], round + 1, 0.1)
    assert guard.book.steps == round


@pytest.mark.parametrize("kind", SERVERS)
def test_calibrated_noise_spends_the_target_in_the_last_round(kind):
    guard = guard_of(kind(epsilon=2.0), settings(rounds=6))
    told = []
    for round in range(1, 7):
        assert guard.stopped() is None
        guard.collect(state(), [], round, 0.1)
        told.append(guard.epsilon)
    assert told == sorted(told) and told[0] < told[-1]
    assert 1.98 < told[-1] <= 2.0
    assert guard.stopped() is None  # it ends by itself


@pytest.mark.parametrize("kind", SERVERS)
def test_noise_is_the_contents_and_replays(kind):
    """The same sum gets the same noise; another sum, version, round or seed another one."""

    def noise(entry=0.01, round=1, seed=0, version=0):
        made = settings(clients=4, seed=seed)
        guard = guard_of(kind(epsilon=None, noise_multiplier=1.0), made)
        server = state().replace(version=version)
        vector = np.full(LAYOUT.size, entry)
        [one] = guard.collect(server, [update(0, vector, round=round)], round, 0.1)
        return one.vector * 4 - vector

    first = noise()
    assert np.array_equal(first, noise())
    for other in (noise(entry=-0.01), noise(round=2), noise(seed=1), noise(version=1)):
        assert abs(np.corrcoef(first, other)[0, 1]) < 0.7  # of 44 independent numbers: above with probability 2e-7
