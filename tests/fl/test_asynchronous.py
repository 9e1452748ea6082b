"""The asynchronous schedules against their slow twins, and what is true of them whatever the clients do."""

import gc
import hashlib
import itertools
import json
import math
import weakref
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error

import fl.schedules.asynchronous as engine
from aggregators.fedavg import FedAvg
from aggregators.server_optimizers import SGD
from aggregators.staleness import Constant, Exponential, Hinge, Polynomial
from fl.clock import ticks
from fl.errors import ConfigError, RunStopped
from fl.messages import BUDGET
from fl.network import GilbertElliott, Instant, Linear, Lognormal, Trace, Uniform
from fl.schedules.fedasync import FedAsync
from fl.schedules.fedbuff import FedBuff
from fl.schedules.fedfix import FedFix
from fl.schedules.synchronous import Synchronous
from fl.tasks import Tasks
from privacy.base import Guard
from tests.fl.asynchronous_worlds import BARE, EQUAL, F80, STEPS, play, world
from tests.oracles import asynchronous as twin

M, SLOWEST = 10, 1000  # clients, and ticks of the slowest client's job
DURATIONS = twin.f80(M, SLOWEST)
SIZES = [3, 20, 7, 11, 2, 9, 30, 5, 8, 5]
P = [s / sum(SIZES) for s in SIZES]
PLAIN, SQRT = FedAvg(staleness=Constant()), FedAvg(staleness=Polynomial(0.5))


def s_of(exponent):
    return lambda staleness: (1 + staleness) ** -exponent


def share(q, alpha=1.0):
    return lambda client, count, steps: alpha * P[client] / q[client]


def seen(alpha=1.0):
    return lambda client, count, steps: alpha * P[client] * steps / count


def flat(value):
    return lambda client, count, steps: value


DT = SLOWEST // 2
Q = {
    name: twin.contributions(name, DURATIONS, size) for name, size in (("fedasync", 1), ("fedbuff", 4), ("fedfix", DT))
}
OBSERVED = {"weights": "unbiased", "rates": "observed"}
CASES = {
    "fedasync mix": (FedAsync(rounds=60, alpha=0.6), SQRT, flat(0.6), {"buffer": 1, "mix": True, "factor": s_of(0.5)}),
    "fedasync delta": (
        FedAsync(rounds=60, mode="delta", alpha=0.3), PLAIN, flat(0.3), {"buffer": 1},
    ),
    "fedasync unbiased": (
        FedAsync(rounds=60, mode="delta", alpha=0.1, weights="unbiased"), PLAIN, share(Q["fedasync"], 0.1),
        {"buffer": 1},
    ),
    "fedasync unbiased mix": (
        FedAsync(rounds=60, alpha=0.1, weights="unbiased"), SQRT, share(Q["fedasync"], 0.1),
        {"buffer": 1, "mix": True, "factor": s_of(0.5)},
    ),
    "fedasync observed": (
        FedAsync(rounds=60, mode="delta", alpha=0.1, **OBSERVED), PLAIN, seen(0.1), {"buffer": 1},
    ),
    "fedbuff": (FedBuff(rounds=25, buffer=4), SQRT, flat(1 / 4), {"buffer": 4, "factor": s_of(0.5)}),
    "fedbuff unbiased": (FedBuff(rounds=25, buffer=4, weights="unbiased"), PLAIN, share(Q["fedbuff"]), {"buffer": 4}),
    "fedbuff observed": (
        FedBuff(rounds=25, buffer=4, **OBSERVED), SQRT, seen(), {"buffer": 4, "factor": s_of(0.5)},
    ),
    "fedfix": (FedFix(rounds=30, tick_s=DT / 1e6), PLAIN, share(Q["fedfix"]), {"period": DT}),
    "fedfix identical": (
        FedFix(rounds=30, tick_s=DT / 1e6, weights="identical"), SQRT, flat(1 / M), {"period": DT, "factor": s_of(0.5)},
    ),
    "fedfix observed": (FedFix(rounds=30, tick_s=DT / 1e6, **OBSERVED), PLAIN, seen(), {"period": DT}),
    "fedfix with empty ticks": (
        FedFix(rounds=60, tick_s=60e-6, weights="identical"), PLAIN, flat(1 / M), {"period": 60},
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_every_arrival_version_and_state_is_that_of_the_slow_twin(case):
    schedule, rule, weight, options = CASES[case]
    problem = twin.Quadratics.drawn(1, M, 5, 0.05, STEPS)
    played = play(schedule, world(problem.update, M, network=F80, exact=True, sizes=SIZES, aggregator=rule))
    arrivals, steps = twin.play(DURATIONS, problem.update, np.zeros(5), schedule.rounds, weight, **options)
    assert [(ticks(e["virtual_s"]), e["client"], e["version"], e["staleness"]) for e in played.arrivals] == [
        (a.tick, a.client, a.start_version, a.staleness) for a in arrivals
    ]
    assert [(ticks(e["virtual_s"]), e["version"], e["accepted"]) for e in played.steps] == [
        (s.tick, s.version, len(s.staleness)) for s in steps
    ]
    assert [e["staleness"] for e in played.steps] == [np.mean(s.staleness) if s.staleness else None for s in steps]
    np.testing.assert_allclose(played.states, [s.state for s in steps], rtol=1e-11, atol=1e-13)
    assert np.abs(played.states[-1]).max() > 0.05
    assert max(a.staleness for a in arrivals) >= 1
    if case == "fedfix with empty ticks":
        assert any(not s.staleness for s in steps)


def test_a_client_s_jobs_are_numbered_and_all_that_is_said_of_them_fits():
    played = play(FedBuff(rounds=30, buffer=4), world(drift(), M, network=F80))
    for client in range(M):
        mine = [e for e in played.arrivals if e["client"] == client]
        assert [e["round"] for e in mine] == list(range(1, len(mine) + 1))
        for before, after in itertools.pairwise(mine):  # a place that becomes free is filled at once
            assert after["sent_s"] == before["virtual_s"]
        for e in mine:
            assert e["sent_s"] == e["began_s"] <= e["done_s"] == e["virtual_s"]
            assert ticks(e["virtual_s"]) - ticks(e["sent_s"]) == DURATIONS[client]
            assert e["accepted"] and e["steps"] == STEPS


# Equal devices


def drift(scale=0.1):
    """A local update that depends on every bit of the start and on who computes it."""

    def update(client, start):
        return (np.sin(7 * start + client + np.arange(len(start))) * scale).astype(start.dtype)

    return update


T = SLOWEST / 1e6
UNIFORM = FedAvg(weights="uniform", staleness=Constant())
BY_SIZE = FedAvg(staleness=Constant())
OF_EQUALS = {
    "fedfix, dt = T": (FedFix(rounds=12, tick_s=T), BY_SIZE),
    "fedfix, dt > T": (FedFix(rounds=12, tick_s=2.5 * T), BY_SIZE),
    "fedfix, identical": (FedFix(rounds=12, tick_s=T, weights="identical"), UNIFORM),
    "fedfix, observed": (FedFix(rounds=12, tick_s=T, **OBSERVED), BY_SIZE),
    "fedbuff, c = M": (FedBuff(rounds=12, buffer=M), UNIFORM),
    "fedbuff, unbiased": (FedBuff(rounds=12, buffer=M, weights="unbiased"), BY_SIZE),
    "fedbuff, observed": (FedBuff(rounds=12, buffer=M, **OBSERVED), BY_SIZE),
    "fedbuff, sqrt of age": (FedBuff(rounds=12, buffer=M), FedAvg(weights="uniform")),
}


@pytest.mark.parametrize("case", OF_EQUALS)
@pytest.mark.parametrize("optimizer", [SGD(), SGD(lr=0.7, momentum=0.9)], ids=["plain", "momentum"])
def test_equal_devices_give_fedavg_bit_for_bit(case, optimizer):
    schedule, rule = OF_EQUALS[case]
    given = {"network": EQUAL, "sizes": SIZES, "aggregator": rule, "optimizer": optimizer}
    played = play(schedule, world(drift(), M, **given))
    whole = play(Synchronous(rounds=12), world(drift(), M, **given))
    assert [s.tobytes() for s in played.states] == [s.tobytes() for s in whole.states]
    assert len({s.tobytes() for s in whole.states}) == 12
    assert [e["staleness"] for e in played.steps] == [0.0] * 12
    assert [e["version"] for e in played.steps] == list(range(1, 13))
    if case != "fedfix, dt > T":
        assert [e["virtual_s"] for e in played.steps] == [e["virtual_s"] for e in whole.steps]


@pytest.mark.parametrize("schedule", [FedBuff(rounds=3, buffer=140), FedFix(rounds=3, tick_s=0.6)], ids=["buff", "fix"])
def test_equal_devices_stay_together_whatever_numbers_they_have(schedule):
    """From client 128 on, a client's number takes a byte more of a message."""
    network = Uniform(seconds_per_step=0.1, latency_s=0.01, down_mbps=0.1, up_mbps=0.1)
    given = {"number": 140, "network": network, "aggregator": UNIFORM, "size": 3}
    played, whole = play(schedule, world(drift(), **given)), play(Synchronous(rounds=3), world(drift(), **given))
    assert len({e["virtual_s"] for e in played.arrivals[:140]}) == 1
    assert [s.tobytes() for s in played.states] == [s.tobytes() for s in whole.states]


def test_with_a_long_tick_fedfix_is_fedavg_whatever_the_devices():
    given = {"network": F80, "sizes": SIZES, "aggregator": BY_SIZE}
    whole = play(Synchronous(rounds=8), world(drift(), M, **given))
    for tick in (SLOWEST, SLOWEST + 1, 7 * SLOWEST):
        played = play(FedFix(rounds=8, tick_s=tick / 1e6), world(drift(), M, **given))
        assert [s.tobytes() for s in played.states] == [s.tobytes() for s in whole.states]
        assert played.steps[-1]["virtual_s"] == 8 * tick / 1e6
    shorter = play(FedFix(rounds=8, tick_s=(SLOWEST - 1) / 1e6), world(drift(), M, **given))
    assert shorter.states[-1].tobytes() != whole.states[-1].tobytes()


def test_with_a_short_tick_fedfix_tends_to_fedasync():
    """A tick lets everyone wait for a part of it; with none to wait for, every update is a step of its own.

    Unbiased weights are for one server step, of which a tick of dt makes dt sum_j 1 / T_j as few as arrivals would.
    """
    problem = twin.Quadratics.drawn(2, M, 5, 0.02, STEPS)
    until = 4 * SLOWEST
    speed = sum(1 / t for t in DURATIONS)
    for weights, alpha in (("identical", 1 / M), ("unbiased", 1.0)):

        def run(schedule, lr=1.0, weights=weights):
            given = {"network": F80, "sizes": SIZES, "aggregator": PLAIN, "optimizer": SGD(lr=lr), "exact": True}
            timed = replace(schedule, rounds=10**6, until_s=until / 1e6, weights=weights)
            return play(timed, world(problem.update, M, **given))

        each = run(FedAsync(mode="delta", alpha=alpha)).states[-1]
        gaps = []
        for tick in (250, 50, 10, 1):
            lr = speed * tick if weights == "unbiased" else 1.0
            gaps.append(float(np.linalg.norm(run(FedFix(tick_s=tick / 1e6), lr).states[-1] - each)))
        assert gaps[0] > gaps[1] > gaps[2] > 10 * gaps[3]
        assert gaps[3] < 1e-12 < 0.1 < np.linalg.norm(each)


# Weights in the long run


FIVE = twin.f80(5, SLOWEST)  # 1000, 800, 600, 400, 200: after 12000 ticks everything is as at the start
PERIOD, JOBS = 12_000, 137
HALF = {"number": 5, "size": 5, "network": F80, "sizes": SIZES[:5], "aggregator": PLAIN, "exact": True}
P5 = np.array(SIZES[:5]) / sum(SIZES[:5])


def one_hot(client, start):
    """Coordinate i of the server's state then adds up what the contributions of client i counted for."""
    return np.eye(len(start))[client]


def test_a_period_of_the_five_clients_has_that_many_jobs():
    assert [PERIOD % t for t in FIVE] == [0] * 5
    assert sum(PERIOD // t for t in FIVE) == JOBS


@pytest.mark.parametrize(
    ("schedule", "q"),
    [
        (FedAsync(rounds=5 * JOBS, mode="delta", alpha=1.0, weights="unbiased"), twin.contributions("fedasync", FIVE)),
        (FedBuff(rounds=JOBS, buffer=5, weights="unbiased"), twin.contributions("fedbuff", FIVE, 5)),
        (FedFix(rounds=5 * PERIOD // 500, tick_s=500e-6), twin.contributions("fedfix", FIVE, 500)),
    ],
    ids=["fedasync", "fedbuff", "fedfix"],
)
def test_unbiased_contributions_match_the_shares_and_add_up_to_one(schedule, q):
    """qbar_i d_i = p_i: here to rounding, since the run ends where a period of the devices ends."""
    w = world(one_hot, **HALF)
    total = play(schedule, w).states[-1] / schedule.rounds
    np.testing.assert_allclose(total, P5, atol=1e-12)
    assert abs(total.sum() - 1) < 1e-12
    assert schedule.contributions(FIVE) == pytest.approx(q, rel=1e-12)
    # Those that count the same for each contribution are not near p, but at q.
    same = replace(schedule, weights="identical")
    total = play(same, world(one_hot, **HALF)).states[-1]
    np.testing.assert_allclose(total / total.sum(), np.array(q) / sum(q), atol=1e-12)
    assert np.abs(total / total.sum() - P5).max() > 0.1


@pytest.mark.parametrize(
    "schedule",
    [
        FedAsync(rounds=8 * JOBS, mode="delta", alpha=1.0, **OBSERVED),
        FedBuff(rounds=8 * JOBS // 4, buffer=4, **OBSERVED),
        FedFix(rounds=120, tick_s=500e-6, **OBSERVED),
    ],
    ids=["fedasync", "fedbuff", "fedfix"],
)
def test_counted_rates_come_to_the_same_like_one_over_time(schedule):
    """With k contributions counted, one is worth p_i n / k, which is off by some steps of n: O(1 / k) of p_i."""
    played = play(schedule, world(one_hot, **HALF))
    states = np.concatenate([np.zeros((1, 5)), played.states])
    half = len(states) // 2
    off = np.abs((states[half:] - states[half]) / np.arange(len(states) - half).clip(1)[:, None] - P5)[-1]
    counts = Counter(e["client"] for e in played.arrivals)
    for client in range(5):
        assert off[client] <= 3 * P5[client] / (counts[client] / 2)
    assert abs((states[-1] - states[half]).sum() / (len(states) - 1 - half) - 1) < 0.02


@pytest.mark.slow
@pytest.mark.parametrize(
    "schedule",
    [
        FedAsync(rounds=18_000, mode="delta", alpha=1.0, **OBSERVED),
        FedBuff(rounds=4500, buffer=4, **OBSERVED),
    ],
    ids=["fedasync", "fedbuff"],
)
def test_counted_rates_come_within_1e_4(schedule):
    network = Linear(seconds_per_step=2e-4, spread=0.6, **BARE)  # 1000, 700, 400 ticks
    played = play(schedule, world(one_hot, 3, 3, network, exact=True, sizes=[3, 2, 5], aggregator=PLAIN))
    half = schedule.rounds // 2
    total = (played.states[-1] - played.states[half - 1]) / (schedule.rounds - half)
    np.testing.assert_allclose(total, [0.3, 0.2, 0.5], atol=1e-4)
    assert abs(total.sum() - 1) < 1e-4


@pytest.mark.parametrize("scheme", ["fedasync", "fedfix"])
def test_identical_weights_minimise_the_surrogate_and_unbiased_ones_the_objective(scheme):
    """The surrogate weighs f_i by 1 / T_i (FedFix: by 1 / ceil(T_i / dt)). What is left is of the order of K lr."""
    problem = twin.Quadratics.drawn(3, 5, 5, 0.005, STEPS)
    q = twin.contributions(scheme, FIVE, 500)
    best, surrogate = problem.optimum(P5), problem.optimum(q)
    if scheme == "fedasync":
        schedule, tail = FedAsync(rounds=9 * JOBS, mode="delta", alpha=0.2), JOBS
    else:
        schedule, tail = FedFix(rounds=320, tick_s=500e-6), 24
    ends = {}
    for weights in ("identical", "unbiased"):
        states = play(replace(schedule, weights=weights), world(problem.update, **HALF)).states
        ends[weights] = np.mean(states[-tail:], axis=0)  # over a period of the devices

    def gap(weights, where):
        return float(np.linalg.norm(ends[weights] - where))

    assert np.linalg.norm(best - surrogate) > 0.8
    assert gap("identical", surrogate) < 0.02
    assert gap("unbiased", best) < 0.02
    assert gap("identical", best) > 0.8
    assert gap("unbiased", surrogate) > 0.8


# Time


def test_ticks_are_whole_numbers():
    """A client that takes a tick and ticks of 0.01 s: 60 contributions in 60 ticks. Floats miss some of them."""
    network = Uniform(seconds_per_step=0.01 / STEPS, **BARE)
    played = play(FedFix(rounds=60, tick_s=0.01), world(drift(), 1, network=network))
    assert [e["accepted"] for e in played.steps] == [1] * 60
    assert played.steps[-1]["virtual_s"] == 0.6
    begun, heard = 0.0, 0
    for k in range(1, 61):  # as it would be in floats: done at begun + T, heard at the first k dt that is not before
        if begun + 0.01 <= k * 0.01:
            begun, heard = k * 0.01, heard + 1
    assert heard == 50


def test_every_pair_of_a_tick_and_a_duration_on_a_grid_contributes_at_every_ceil():
    for dt in (1, 2, 3, 7, 29):
        for t in (1, 3, 6, 14, 29, 57, 58):
            network = Uniform(seconds_per_step=t / 100 / STEPS, **BARE)
            played = play(FedFix(rounds=2 * math.ceil(t / dt), tick_s=dt / 100), world(drift(), 1, 1, network))
            heard = [e["round"] for e in played.steps if e["accepted"]]
            assert heard == [math.ceil(t / dt), 2 * math.ceil(t / dt)], (dt, t)


def test_what_arrives_at_a_tick_counts_in_it_and_what_arrives_after_it_does_not():
    for late in (0, 1):
        network = Linear(seconds_per_step=(1000 + late) / STEPS / 1e6, spread=(500 + late) / (1000 + late), **BARE)
        played = play(FedFix(rounds=2, tick_s=500e-6, weights="identical"), world(drift(), 2, network=network))
        assert [e["accepted"] for e in played.steps] == [1, 1 if late else 2]
        assert ticks(played.steps[-1]["virtual_s"]) == 1000


def test_the_run_ends_at_its_time():
    w = world(drift(), M, network=F80)
    played = play(FedBuff(rounds=10**6, buffer=5, until_s=2 * T), w)
    assert w.clock.now == 2 * SLOWEST
    expected = sum(2 * SLOWEST // t for t in DURATIONS)  # with what arrives in the last tick
    assert len(played.arrivals) == expected
    assert len(played.steps) == expected // 5
    assert expected % 5  # some wait in the buffer, and a checkpoint of the end can be made all the same
    assert w.keep is not None
    w.keep()


def test_the_learning_rate_follows_the_time_where_that_ends_the_run():
    w = world(drift(), M, network=F80)
    w.local = replace(w.local, lr=1.0, lr_schedule="linear", lr_final=0.0)
    played = play(FedAsync(rounds=1000, until_s=4 * T), w)
    rates = {(r.client, r.round): r.extra["lr"] for r in w.grid.requests}
    assert max(rates.values()) == 1.0 and min(rates.values()) < 0.1
    assert len(played.steps) < 100  # by these it would have gone on at 0.9
    for e in played.arrivals:
        assert rates[e["client"], e["round"]] == pytest.approx(1 - e["sent_s"] / (4 * T), abs=1.1e-3)


def test_equal_seeds_give_the_same_log_and_others_another():
    def log(seed):
        network = Lognormal(
            seconds_per_step=1e-3, dropout=0.2, rejoin_s=0.01, availability=0.8, availability_period_s=0.05
        )
        w = world(drift(), M, network=network, seed=seed, per_round=6)
        played = play(FedBuff(rounds=20, buffer=3), w)
        text = json.dumps([played.arrivals, played.steps, w.server.vector.tolist()])
        return hashlib.sha256(text.encode()).hexdigest()

    assert log(1) == log(1)
    assert len({log(seed) for seed in range(5)}) == 5


# The batcher

QUEUES = {
    "bare": F80,
    "queues": Lognormal(
        seconds_per_step=0.02, latency_s=0.001, down_mbps=0.3, up_mbps=0.2, server_down_mbps=2.0, server_up_mbps=1.5,
    ),
    "lossy": Lognormal(
        seconds_per_step=0.02, latency_s=0.02, down_mbps=0.05, up_mbps=0.02, server_up_mbps=0.2, dropout=0.4,
        rejoin_s=0.1, availability=0.7, availability_period_s=1.0, on_leave="lose",
    ),
}  # fmt: skip
SCHEDULES = {
    "fedasync": FedAsync(rounds=60),
    "fedbuff": FedBuff(rounds=20, buffer=4),
    "fedfix": FedFix(rounds=20, tick_s=0.11, **OBSERVED),
}


class Eager(Tasks):
    """Computes each job when it is given out."""

    def give(self, *arguments, **named):
        task = super().give(*arguments, **named)
        if task.lost_at is None:
            self._compute()
        return task


@pytest.mark.parametrize("network", QUEUES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_it_makes_no_difference_when_work_is_computed(monkeypatch, schedule, network):
    given = {"network": QUEUES[network], "sizes": SIZES, "per_round": 7}
    w = world(drift(), M, **given)
    lazy = play(SCHEDULES[schedule], w)
    monkeypatch.setattr(engine, "Tasks", Eager)
    brute = world(drift(), M, **given)
    eager = play(SCHEDULES[schedule], brute)
    assert lazy.arrivals == eager.arrivals
    assert lazy.steps == eager.steps
    assert [s.tobytes() for s in lazy.states] == [s.tobytes() for s in eager.states]
    assert {len(p) for p in brute.grid.pushes} == {1}
    assert max(len(p) for p in w.grid.pushes) > 3
    assert len(lazy.steps) == SCHEDULES[schedule].rounds


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_work_that_is_lost_is_never_computed(schedule):
    w = world(drift(), M, network=QUEUES["lossy"])
    played = play(SCHEDULES[schedule], w)
    lost = {(e["client"], e["round"]) for e in played.arrivals if e["reason"] == "error"}
    heard = {(e["client"], e["round"]) for e in played.arrivals if e["accepted"]}
    computed = w.grid.jobs
    assert len(lost) > 5
    assert len(computed) == len(set(computed))
    assert heard <= set(computed)
    assert not lost & set(computed)


@pytest.mark.parametrize(
    "schedule",
    [FedAsync(rounds=600), FedBuff(rounds=60, buffer=10), FedFix(rounds=40, tick_s=250e-6)],
    ids=["a", "b", "f"],
)
def test_the_grid_sees_few_large_pushes(schedule):
    """All that is outstanding is computed when the first of it is due, so between two pushes lies at least the fastest
    client's time: in it M clients of F-80 begin ``T_min sum_i 1 / T_i`` jobs, 8.26 of 20."""
    number = 20
    durations = twin.f80(number, SLOWEST)
    w = world(drift(), number, network=F80)
    played = play(schedule, w)
    end, fastest = ticks(played.steps[-1]["virtual_s"]), min(durations)
    assert len(w.grid.pushes) <= end // fastest
    if not isinstance(schedule, FedFix):
        bound = fastest * sum(1 / t for t in durations)
        assert bound > 8.2
        assert len(w.grid.jobs) / len(w.grid.pushes) > 0.95 * bound  # the run ends within such a time
    assert len(w.grid.pushes[0]) == number


def test_jobs_of_several_versions_are_computed_together():
    w = world(drift(), M, network=F80)
    play(FedAsync(rounds=100), w)
    version = {(r.client, r.round): r.version for r in w.grid.requests}
    assert max(len({version[job] for job in push}) for push in w.grid.pushes) > 3


# Memory


@pytest.mark.parametrize(
    "schedule", [FedAsync(rounds=300), FedBuff(rounds=60, buffer=3), FedFix(rounds=60, tick_s=110e-6)]
)
def test_only_live_versions_are_kept(schedule):
    """At most one for each client: whoever is at work on an old version, and the present one."""
    made, kept = [], []

    class Watched(Tasks):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            made.append(self)

    w = world(drift(), M, network=F80)
    references = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "Tasks", Watched)
        for event in schedule.run(w):
            if event["event"] != "round":
                continue
            (tasks,) = made
            live = {t.start.version for t in tasks.out.values()}
            assert set(tasks.versions.states) == set(tasks.versions.held) == live
            assert sum(tasks.versions.held.values()) == len(tasks.out) <= M
            assert event["live_versions"] <= M
            kept.append(event["live_versions"])
            references.append(weakref.ref(w.server.vector))
            w.grid.requests.clear()
    gc.collect()
    alive = sum(r() is not None for r in references)
    assert alive <= M + 1 < w.server.version
    assert max(kept) > 3


# What is not counted


def faulty(reply):
    return [replace(reply, update=np.full_like(reply.update, np.nan))]


def failed(reply):
    return [Error(0, "crashed")]


def twice(reply):
    return [reply, replace(reply, update=np.full_like(reply.update, 9.0))]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_bad_replies_are_rejected_and_their_clients_go_on(schedule):
    given = {"network": F80, "aggregator": PLAIN}
    faults = {(2, 1): faulty, (3, 2): failed, (9, 3): faulty}
    short = replace(SCHEDULES[schedule], **({"tick_s": 110e-6} if schedule == "fedfix" else {}))
    played = play(short, world(drift(), M, faults=faults, **given))
    bad = {(e["client"], e["round"]): e["reason"] for e in played.arrivals if not e["accepted"]}
    assert bad == {(2, 1): "not_finite", (3, 2): "error", (9, 3): "not_finite"}
    assert max(e["round"] for e in played.arrivals if e["client"] == 2 and e["accepted"]) > 1
    assert all(np.isfinite(s).all() for s in played.states)
    for event in played.steps:
        assert event["sampled"] == event["accepted"] + sum(event["rejected"].values())
    assert sum((Counter(e["rejected"]) for e in played.steps), Counter()) == {"error": 1, "not_finite": 2}
    assert sum(e["client_steps"] for e in played.steps) == STEPS * sum(e["accepted"] for e in played.steps)


def test_of_a_reply_that_comes_twice_the_first_counts():
    plain = play(FedBuff(rounds=9, buffer=4), world(drift(), M, network=F80))
    again = play(FedBuff(rounds=9, buffer=4), world(drift(), M, network=F80, fault=lambda request: twice))
    assert again.arrivals == plain.arrivals
    assert [s.tobytes() for s in again.states] == [s.tobytes() for s in plain.states]


def test_endless_rejections_stop_the_run():
    for schedule in (FedAsync(rounds=500), FedBuff(rounds=500, buffer=3)):
        w = world(drift(), M, network=F80, fault=lambda request: faulty)
        with pytest.raises(RunStopped, match=r"last 100 replies were all rejected: {'not_finite': 100}.*resume"):
            play(schedule, w)
        assert w.server.version == 0
    # FedFix steps by time, so it comes to its end, with nothing learnt.
    w = world(drift(), M, network=F80, fault=lambda request: faulty)
    played = play(FedFix(rounds=40, tick_s=200e-6), w)
    assert (w.server.round, w.server.version, sum(e["accepted"] for e in played.steps)) == (40, 0, 0)


def test_what_is_too_old_is_rejected():
    for most in (0, 3, 8):
        w = world(drift(), M, network=F80)
        played = play(FedAsync(rounds=150, max_staleness=most), w)
        for e in played.arrivals:
            assert e["accepted"] == (e["staleness"] <= most)
            assert e["reason"] == (None if e["accepted"] else "stale")
        assert sum(not e["accepted"] for e in played.arrivals) > 5
        stale = next(e for e in played.arrivals if not e["accepted"])
        assert stale["steps"] == STEPS and stale["bytes_up"] > 0  # it was work, and it was sent


def test_a_job_is_given_up_at_its_deadline_and_its_place_is_free():
    """Jobs of client i take 1000 - 89 i ticks; at 700 those of 0 to 3 are given up, and others come in."""
    w = world(drift(), M, network=F80, per_round=4)
    played = play(FedBuff(rounds=40, buffer=2, deadline_s=700e-6), w)
    for e in played.arrivals:
        late = DURATIONS[e["client"]] > 700
        assert (e["accepted"], e["reason"]) == (not late, "late" if late else None)
        assert late or ticks(e["virtual_s"]) - ticks(e["sent_s"]) == DURATIONS[e["client"]]
    assert {e["client"] for e in played.arrivals if not e["accepted"]} == {0, 1, 2, 3}
    moments = sorted({ticks(e["sent_s"]) for e in played.arrivals})
    given_up = [ticks(e["sent_s"]) + 700 for e in played.arrivals if not e["accepted"]]
    assert any(t in moments for t in given_up)
    # What arrives at the deadline counts.
    exact = play(FedAsync(rounds=40, deadline_s=1000e-6), world(drift(), M, network=F80))
    assert all(e["accepted"] for e in exact.arrivals)
    short = play(FedAsync(rounds=40, deadline_s=999e-6), world(drift(), M, network=F80))
    assert {e["client"] for e in short.arrivals if not e["accepted"]} == {0}


@pytest.mark.parametrize("schedule", [FedAsync(rounds=200), FedBuff(rounds=50, buffer=4)], ids=["a", "b"])
def test_no_more_than_the_places_are_at_work(schedule):
    played = play(schedule, world(drift(), M, network=F80, per_round=3))
    changes = sorted(
        [(ticks(e["virtual_s"]), -1) for e in played.arrivals] + [(ticks(e["sent_s"]), 1) for e in played.arrivals]
    )
    busy = np.cumsum([c for _, c in changes])
    assert busy.max() == 3
    assert {e["client"] for e in played.arrivals} == set(range(M))  # whoever is free is as likely to be chosen


def test_a_client_with_a_spent_budget_takes_part_no_more():
    spent = Error(0, f"{BUDGET}: 3 jobs")

    def fault(request):
        return spent if request.round > 2 and request.client < 9 else None

    played = play(FedAsync(rounds=120), world(drift(), M, network=F80, fault=fault))
    jobs = Counter(e["client"] for e in played.arrivals)
    assert jobs.pop(9) == 120 - 18
    assert jobs == dict.fromkeys(range(9), 3)
    assert sum(e["reason"] == "budget" for e in played.arrivals) == 9
    # With nobody left the run says so and ends.
    played = play(FedAsync(rounds=120), world(drift(), M, network=F80, fault=lambda r: spent if r.round > 2 else None))
    assert len(played.steps) == 20
    assert played.stop == "no client takes part any more"


def test_nobody_is_asked_more_often_than_the_schedule_promises():
    """Rejected jobs count too: what a client may spend is reckoned from this number."""

    def fault(request):
        return faulty if request.round % 2 else None

    for schedule in (FedAsync(rounds=30), FedBuff(rounds=6, buffer=5), FedFix(rounds=30, tick_s=30e-6)):
        w = world(drift(), 3, network=F80, fault=fault)
        play(schedule, w)
        most = max(Counter(c for c, _ in w.grid.jobs).values())
        assert most <= schedule.participations() == 30
    w = world(drift(), 1, network=F80, fault=fault)
    played = play(FedAsync(rounds=30), w)
    assert (len(w.grid.jobs), w.server.round, played.stop) == (30, 15, "no client takes part any more")


def test_a_guard_may_end_the_run():
    class Over(Guard):
        left = 25

        def stopped(self):
            self.left -= 1
            return "over" if self.left < 0 else None

    played = play(FedBuff(rounds=500, buffer=7), world(drift(), M, network=F80, guard=Over()))
    assert played.stop == "over"
    assert 0 < len(played.steps) < 500


# Who is there

WINDOWS = "client,seconds_per_step,latency_s,down_mbps,up_mbps,from_s,until_s\n"


def test_a_client_begins_as_soon_as_it_is_there(tmp_path):
    """Client 0 comes back after 1 s. Client 1 leaves at 0.1 s and is back at 0.5 s, which is sooner."""
    path = tmp_path / "devices.csv"
    path.write_text(WINDOWS + "0,0.002,0,,,1,9\n1,0.002,0,,,0,0.01\n1,0.002,0,,,0.5,9\n")
    played = play(FedAsync(rounds=300), world(drift(), 2, network=Trace(path=str(path))))
    first = next(e for e in played.arrivals if e["client"] == 0)
    assert first["sent_s"] == 1.0
    back = [e["sent_s"] for e in played.arrivals if e["client"] == 1 and e["sent_s"] > 0]
    assert back[0] == 0.5
    assert back[1] == 0.51


def test_where_nobody_comes_any_more_the_run_ends(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text(WINDOWS + "0,0.002,0,,,0,0.1\n1,0.002,0,,,0,0.2\n")
    played = play(FedAsync(rounds=300), world(drift(), 2, network=Trace(path=str(path))))
    assert played.stop == "no client takes part any more"
    assert len(played.steps) == 10 + 20


def test_a_lost_client_is_back_after_its_time():
    network = Uniform(seconds_per_step=0.002, dropout=0.3, rejoin_s=1.0, **BARE)
    played = play(FedAsync(rounds=100), world(drift(), M, network=network))
    lost = [e for e in played.arrivals if not e["accepted"]]
    assert len(lost) > 20
    for e in lost:
        assert e["reason"] == "error"
        assert 1.0 <= e["virtual_s"] - e["sent_s"] <= 1.0101
        assert (e["steps"], e["bytes_up"], e["loss"]) == (None, 0, None)
        assert ticks(e["done_s"]) == ticks(e["virtual_s"]) - 10**6  # it was at work until then


def test_fedfix_goes_on_where_nobody_is_there():
    network = Uniform(seconds_per_step=0.002, availability=0.2, availability_period_s=1.0, **BARE)
    played = play(FedFix(rounds=100, tick_s=0.05, **OBSERVED), world(drift(), 2, network=network))
    counts = [e["accepted"] for e in played.steps]
    assert len(counts) == 100 and 0 in counts and max(counts) >= 1
    for before, event in zip(played.steps, played.steps[1:]):
        if not event["accepted"]:
            assert event["version"] == before["version"]
            assert (event["update_norm"], event["loss"], event["staleness"]) == (0.0, None, None)
            assert (event["bytes_up"], event["client_steps"]) == (0, 0)


# What is refused once the clients are known


@pytest.mark.parametrize(
    ("network", "per_round"),
    [
        (Uniform(dropout=0.1), M), (Uniform(availability=0.5), M), (GilbertElliott(), M), (Instant(), M), (F80, M - 1),
        (Uniform(server_up_mbps=1.0), M), (Uniform(server_down_mbps=1.0), M),
    ],
    ids=["dropout", "availability", "varies", "no time", "per_round", "queue up", "queue down"],
)  # fmt: skip
def test_rates_from_the_model_need_clients_that_work_all_the_time(network, per_round):
    for schedule in (FedAsync(weights="unbiased"), FedBuff(weights="unbiased"), FedFix(tick_s=0.1)):
        w = world(drift(), M, network=network, per_round=per_round)
        with pytest.raises(
            ConfigError, match=r"schedule\.rates=.*observed, unless all clients are at work all the time"
        ):
            play(schedule, w)
        if isinstance(network, Instant):
            continue
        w = world(drift(), M, network=network, per_round=per_round)
        assert len(play(replace(schedule, rounds=5, rates="observed"), w).steps) == 5


def test_a_tick_is_at_least_a_microsecond():
    with pytest.raises(ConfigError, match=r"tick_s.*at least one microsecond"):
        FedFix(tick_s=4e-7)
    assert FedFix(tick_s=6e-7).period == 1


def test_staleness_rules_weigh_by_the_versions_in_between():
    """The factor of every contribution, read off the state: one-hot updates, constant weights."""
    for rule in (Polynomial(0.5), Hinge(slope=2.0, threshold=3), Exponential(half_life=4.0)):
        w = world(one_hot, M, M, F80, exact=True, aggregator=FedAvg(staleness=rule))
        played = play(FedAsync(rounds=80, mode="delta", alpha=0.5), w)
        states = [np.zeros(M), *played.states]
        for before, after, event in zip(states, states[1:], played.arrivals):
            moved = np.zeros(M)
            moved[event["client"]] = 0.5 * rule.factor(event["staleness"])
            np.testing.assert_allclose(after - before, moved, atol=1e-14)
        assert max(e["staleness"] for e in played.arrivals) > 6
