"""Jobs take the time that their formulas say, wait their turn on the server's links, and are lost or paused as set."""

import json
from itertools import count

import numpy as np
import pytest

from fl.clock import EventQueue, Priority, ticks
from fl.fleet import Fleet, Job, Times, transfer
from fl.keys import generator
from fl.network import GilbertElliott, Instant, Linear, Lognormal, Network, Trace, Uniform
from tests.oracles import queues

TICK = 8.0  # 10^6 bits a second: a byte a tick
HEADER = "client,seconds_per_step,latency_s,up_mbps,down_mbps,from_s,until_s"
BARE = {"latency_s": 0.0, "down_mbps": None, "up_mbps": None}


def windows(tmp_path, *rows: tuple[int, int, int], **settings) -> Trace:
    """Clients with windows (client, from, until) in ticks, a tick for each step, and links of a byte a tick."""
    path = tmp_path / "trace.csv"
    lines = [f"{c},1e-6,0,{TICK},{TICK},{a * 1e-6:.6f},{b * 1e-6:.6f}" for c, a, b in rows]
    path.write_text("\n".join([HEADER, *lines]) + "\n")
    return Trace(path=str(path), **settings)


# Times without a queue


def test_instant_takes_no_time():
    fleet = Instant().fleet(0, 4)
    assert fleet.job(3, 1, 50, 10**9, 10**9) == Times(0, 0, 0, None)
    assert fleet.jobs(77, [(3, 1, 50, 10**9, 10**9)]) == [Job(began=77, done=77, arrived=77, dropped_at=None)]


def test_uniform_times_follow_from_sizes():
    network = Uniform(seconds_per_step=0.2, latency_s=0.05, down_mbps=40.0, up_mbps=8.0)
    times = network.fleet(0, 6).job(3, 1, 10, 1_000_000, 2_000_000)
    assert times.down == 250_000  # 0.05 s, and 8 Mbit at 40 Mbit/s
    assert times.compute == 2_000_000
    assert times.up == 2_050_000  # 16 Mbit at 8 Mbit/s
    assert times.total == 4_300_000
    assert network.fleet(9, 6).job(5, 7, 10, 1_000_000, 2_000_000) == times


def test_unlimited_rates_leave_the_latency():
    network = Uniform(seconds_per_step=0, latency_s=0.5, down_mbps=None, up_mbps=None)
    assert network.fleet(0, 1).job(0, 1, 10, 10**9, 10**9) == Times(500_000, 0, 500_000)


def test_parts_are_rounded_before_they_are_added():
    network = Uniform(seconds_per_step=0.6e-6, latency_s=0.6e-6, down_mbps=None, up_mbps=None)
    assert network.fleet(0, 1).job(0, 1, 1, 0, 0).total == 3  # 1.8 microseconds in all
    slow = Uniform(seconds_per_step=0, latency_s=0.6e-6, down_mbps=40.0, up_mbps=None, server_down_mbps=40.0)
    assert slow.fleet(0, 1).job(0, 1, 1, 3, 0) == Times(1 + 1, 0, 1)  # 0.6 at the server; 0.6 + 0.6; 0.6


def test_times_add_up_exactly_on_a_grid_of_a_hundredth_of_a_second():
    """In floats, sums of 0.01 s miss what is meant: ten of them are not 0.1, and 29 of 0.01 are not 0.29."""
    assert sum([0.01] * 10) != 0.1
    for hundredths in range(1, 120):
        fleet, now = Uniform(seconds_per_step=0.01, **BARE).fleet(0, 1), 0
        for k in range(1, 61):
            now = fleet.upload(0, fleet.begin(0, k, now, hundredths, 5, 5).done, 5)
            assert now == 10_000 * hundredths * k
            assert now % ticks(0.01 * hundredths) == 0  # a tick of the server that it must not miss


MODELS: list[Network] = [
    Uniform(dropout=0.4),
    Lognormal(dropout=0.4, link_sigma=1.0),
    Linear(dropout=0.4, spread=0.7, shuffle=True),
    GilbertElliott(dropout=0.4, p_gb=0.4),
]


@pytest.mark.parametrize("network", MODELS, ids=lambda n: type(n).__name__)
def test_without_the_server_s_links_a_round_and_single_jobs_are_undisturbed_jobs(network):
    fleet, other, start = network.fleet(5, 9), network.fleet(5, 9), 12_345
    asked = [(c, 4 + c, 3 * c + 1, 10_000 * c + 7, 5000 * c + 3) for c in (7, 2, 8, 0, 4)]
    lost = 0
    for one, job in zip(asked, fleet.jobs(start, asked), strict=True):
        times = fleet.job(*one)
        assert job.began == start + times.down
        assert job.done == job.began + times.compute
        assert job.dropped_at == (None if times.dropped_at is None else start + times.dropped_at)
        gone = job.dropped_at is not None and job.dropped_at <= job.done
        assert job.arrived == (job.done if gone else start + times.total)
        begun = other.begin(one[0], one[1], start, *one[2:])
        assert (begun.began, begun.done, begun.dropped_at) == (job.began, job.done, job.dropped_at)
        assert gone or other.upload(one[0], begun.done, one[4]) == job.arrived
        duration = fleet.duration(one[0], *one[2:])
        assert duration == (None if isinstance(network, GilbertElliott) else times.total)
        lost += job.dropped_at is not None
    assert 0 < lost < len(asked)


def test_a_bad_job_takes_longer():
    network = GilbertElliott(p_gb=0.5, p_bg=0.5, slowdown=6.0, seconds_per_step=0.2, seconds_per_job=1.0, **BARE)
    fleet = network.fleet(3, 2)
    for k in range(40):
        assert fleet.job(1, k, 5, 9, 9).total == (12_000_000 if network.bad(3, 1, k) else 2_000_000)
    assert fleet.job(1, 3, 0, 9, 9, "keys").total == 0


# What is lost


def test_dropouts_follow_their_probability_and_their_key():
    fleet = Uniform(dropout=0.3).fleet(0, 50)
    jobs = [fleet.job(c, r, 10, 1000, 1000) for c in range(40) for r in range(50)]
    lost = [job.dropped_at for job in jobs if job.dropped_at is not None]
    assert len(lost) / len(jobs) == pytest.approx(0.3, abs=0.035)
    assert all(0 <= at < job.total for job in jobs if (at := job.dropped_at) is not None)
    assert np.mean(lost) / jobs[0].total == pytest.approx(0.5, abs=0.05)
    assert fleet.job(3, 9, 10, 1000, 1000) == Uniform(dropout=0.3).fleet(0, 9).job(3, 9, 10, 1000, 1000)
    fleets = [Uniform(dropout=0.3).fleet(seed, 4) for seed in range(5)]
    fates = {tuple(fleet.job(3, r, 1, 0, 0).dropped_at is None for r in range(20)) for fleet in fleets}
    assert len(fates) == 5
    stages = {tuple(fleet.job(3, r, 0, 0, 0, *s).dropped_at is None for r in range(20)) for s in ((), ("keys",))}
    assert len(stages) == 2
    assert all(Uniform(dropout=1.0).fleet(0, 50).job(c, 1, 1, 0, 0).dropped_at is not None for c in range(50))
    assert all(Uniform(dropout=0.0).fleet(0, 50).job(c, 1, 1, 0, 0).dropped_at is None for c in range(50))


def test_a_client_dies_at_the_same_share_of_its_work_however_long_that_is():
    short, long = (Uniform(dropout=1.0).fleet(0, 2).job(1, 1, steps, 0, 0) for steps in (10, 1000))
    assert short.dropped_at / short.total == pytest.approx(long.dropped_at / long.total, abs=1e-4)


def test_a_lost_client_rejoins():
    network = Uniform(rejoin_s=30.0, availability=0.5, availability_period_s=100.0)
    fleet = network.fleet(0, 8)
    for client in range(8):
        back = fleet.rejoins(client, 1, ticks(10))
        assert back == network.next_available(0, client, ticks(40)) == fleet.next_available(client, ticks(40))
    assert len({fleet.rejoins(c, 1, ticks(10)) for c in range(8)} - {ticks(40)}) > 1
    assert Uniform().fleet(0, 1).rejoins(0, 1, 17) == 17


def test_a_client_lost_for_good_does_not_rejoin(tmp_path):
    fleet = windows(tmp_path, (0, 0, 10), rejoin_s=5e-6).fleet(0, 1)
    assert (fleet.rejoins(0, 1, 4), fleet.rejoins(0, 1, 5)) == (9, None)


def test_who_was_lost_in_a_round_is_away_until_it_rejoins():
    fleet = Uniform(dropout=0.5, rejoin_s=100.0).fleet(1, 12)
    jobs = fleet.jobs(0, [(c, 1, 10, 1000, 1000) for c in range(12)])
    assert 0 < sum(job.dropped_at is None for job in jobs) < 12
    kept = Fleet(fleet.network, 1, 12)
    kept.restore(json.loads(json.dumps(fleet.state())))
    for client, job in enumerate(jobs):
        back = 0 if job.dropped_at is None else job.dropped_at + ticks(100)
        for one in (fleet, kept):
            assert one.next_available(client, 0) == back
            assert one.available(client, max(0, back - 1)) == (back == 0)
            assert one.available(client, back)
    assert fleet.cycle == ticks(3600) + ticks(100)
    fleet.jobs(ticks(200), [])
    assert fleet.state()["away"] == []
    now = Uniform(dropout=1.0).fleet(1, 2)
    now.jobs(0, [(0, 1, 10, 1000, 1000)])
    assert now.available(0, 0)  # no time to wait: a round that ends early may ask it again


# Windows that close


@pytest.mark.parametrize("on_leave", ["finish", "lose", "pause"])
def test_work_within_its_windows_against_the_slow_twin(tmp_path, on_leave):
    rows = [(0, 3, 5), (0, 5, 9), (0, 12, 13), (1, 0, 4), (2, 1, 20), (3, 0, 6), (3, 16, 20), (4, 0, 20)]
    network = windows(tmp_path, *rows, repeat_s=20e-6, on_leave=on_leave)
    cut = 0
    for client in range(5):

        def on(now, client=client):
            return network.available(0, client, now)

        for start in range(0, 41, 3):
            for down, steps in ((0, 0), (0, 5), (2, 0), (3, 4), (1, 11), (20, 37)):
                began, there = queues.work(start, down, on, on_leave)
                done, there = queues.work(began, steps, on, on_leave) if there else (began, False)
                got = network.fleet(0, 5).begin(client, 1, start, steps, down, 6)
                assert (got.began, got.done, got.dropped_at) == (began, done, None if there else done)
                cut += not there
                if there:
                    assert network.fleet(0, 5).upload(client, done, 6) == done + 6  # an upload goes through
    assert (cut > 50) == (on_leave == "lose")


def test_work_that_pauses_for_good_is_lost(tmp_path):
    fleet = windows(tmp_path, (0, 0, 10), (0, 20, 25), on_leave="pause").fleet(0, 1)
    assert fleet.begin(0, 1, 4, 11, 0, 0).done == 25
    assert fleet.begin(0, 1, 4, 12, 0, 0).dropped_at == 25
    assert fleet.begin(0, 1, 30, 1, 0, 0).dropped_at == 30
    assert fleet.jobs(4, [(0, 1, 12, 0, 9)]) == [Job(began=4, done=25, arrived=25, dropped_at=25)]


def test_a_client_that_leaves_may_be_lost_before(tmp_path):
    lost = windows(tmp_path, (0, 0, 4000), on_leave="lose", dropout=1.0).fleet(0, 1)
    for k in range(1, 30):
        share = generator(0, "network", 0, k).random(2)[1]
        assert lost.begin(0, k, 0, 10_000, 0, 0).dropped_at == min(int(share * 10_000), 4000)


def test_lost_work_rejoins_in_the_next_window(tmp_path):
    fleet = windows(tmp_path, (0, 0, 10), (0, 20, 25), on_leave="lose").fleet(0, 1)
    begun = fleet.begin(0, 1, 3, 9, 0, 0)
    assert begun.dropped_at == 10
    assert fleet.rejoins(0, 1, begun.dropped_at) == 20


# The server's links


def random_round(key: int) -> tuple[Network, list[tuple[int, int, int, int, int]]]:
    """Sizes, rates and steps of a few ticks, so that messages meet and ties occur."""
    rng = generator("fleet", key)
    n = int(rng.integers(1, 8))
    network = Uniform(
        seconds_per_step=1e-6, latency_s=float(rng.integers(3)) * 1e-6, down_mbps=TICK, up_mbps=TICK / 2,
        server_down_mbps=[None, TICK, TICK / 3][rng.integers(3)],
        server_up_mbps=[None, TICK, TICK / 3][rng.integers(3)],
        dropout=[0.0, 0.4][rng.integers(2)],
    )  # fmt: skip
    sizes = rng.integers(0, 12, (n, 3)).tolist()
    return network, [(int(c), 1, *s) for c, s in zip(rng.permutation(n), sizes, strict=True)]


def link_ticks(size: int, mbps: float | None) -> int:
    return 0 if mbps is None else round(size * TICK / mbps)


def through(messages: list[tuple[int, int]], mbps: float | None) -> list[int]:
    """A link's slow twin; one that is not limited holds nobody up."""
    if mbps is None:
        return [ready for ready, _ in messages]
    return queues.fifo([(ready, link_ticks(size, mbps)) for ready, size in messages])


@pytest.mark.parametrize("block", range(4))
def test_a_round_s_messages_wait_their_turn(block):
    waited = 0
    for key in range(block * 40, block * 40 + 40):
        network, asked = random_round(key)
        start, latency = 3, ticks(network.latency_s)
        by_client = sorted(asked)
        turns = through([(start, down) for _, _, _, down, _ in by_client], network.server_down_mbps)
        began = {one[0]: turn + latency + one[3] for one, turn in zip(by_client, turns, strict=True)}
        done = {c: began[c] + steps for c, _, steps, _, _ in asked}
        jobs = dict(zip((one[0] for one in asked), network.fleet(0, 9).jobs(start, asked), strict=True))
        there = [c for c in done if jobs[c].dropped_at is None or jobs[c].dropped_at > done[c]]
        there.sort(key=lambda c: (done[c], c))
        size = {one[0]: one[4] for one in asked}
        turns = through([(done[c], size[c]) for c in there], network.server_up_mbps)
        arrived = dict(zip(there, (t + latency + 2 * size[c] for t, c in zip(turns, there, strict=True)), strict=True))
        for c, job in jobs.items():
            assert (job.began, job.done, job.arrived) == (began[c], done[c], arrived.get(c, done[c]))
            assert job.dropped_at is None or start <= job.dropped_at <= job.arrived
            waited += c in arrived and arrived[c] - start > network.fleet(0, 9).job(*asked[list(done).index(c)]).total
    assert waited > 20


@pytest.mark.parametrize("key", range(40))
def test_asynchronous_messages_wait_their_turn(key):
    """Clients start at moments of their own; uploads take turns in the order in which work is done."""
    rng = generator("asynchronous", key)
    n = 12
    network = Uniform(
        seconds_per_step=1e-6, latency_s=2e-6, down_mbps=TICK, up_mbps=None, server_down_mbps=TICK, server_up_mbps=TICK
    )
    starts = np.sort(rng.integers(0, 40, n)).tolist()
    down, steps, up = rng.integers(0, 9, (3, n)).tolist()
    fleet, queue = network.fleet(0, n), EventQueue()
    for c in range(n):
        queue.push(starts[c], Priority.SERVER_TICK, c)
    begun, arrived = {}, {}
    for popped in count():
        if not queue:
            break
        event = queue.pop()
        c = event.client
        if event.priority == Priority.SERVER_TICK:
            begun[c] = fleet.begin(c, 1, event.time, steps[c], down[c], up[c])
            queue.push(begun[c].done, Priority.COMPUTE_DONE, c)
        else:
            arrived[c] = fleet.upload(c, event.time, up[c])
        if popped % 3 == 0:  # a checkpoint in between changes nothing
            kept, fleet = fleet.state(), network.fleet(0, n)
            fleet.restore(json.loads(json.dumps(kept)))
    turns = queues.fifo(list(zip(starts, down, strict=True)))
    done = [turn + 2 + down[c] + steps[c] for c, turn in enumerate(turns)]
    assert [begun[c].done for c in range(n)] == done
    order = sorted(range(n), key=lambda c: (done[c], c))
    turns = queues.fifo([(done[c], up[c]) for c in order])
    assert [arrived[c] for c in order] == [turn + 2 for turn in turns]


def test_the_server_s_link_and_the_client_s_own_follow_one_another():
    network = Uniform(
        seconds_per_step=1.0, latency_s=0.25, down_mbps=16.0, up_mbps=8.0, server_down_mbps=80.0, server_up_mbps=40.0
    )
    fleet = network.fleet(0, 2)
    first, second = fleet.jobs(0, [(0, 1, 2, 10**6, 10**6), (1, 1, 2, 10**6, 10**6)])
    assert first == Job(began=850_000, done=2_850_000, arrived=2_850_000 + 200_000 + 1_250_000, dropped_at=None)
    assert second == Job(began=950_000, done=2_950_000, arrived=3_050_000 + 200_000 + 1_250_000, dropped_at=None)
    assert fleet.job(0, 1, 2, 10**6, 10**6).total == first.arrived == fleet.duration(0, 2, 10**6, 10**6)
    assert transfer(10**6, 16.0, 0.25) == 750_000


def test_a_round_that_is_over_leaves_nothing_on_the_links():
    fleet = Uniform(server_down_mbps=1.0, server_up_mbps=1.0).fleet(0, 3)
    asked = [(c, 1, 10, 10**6, 10**6) for c in range(3)]
    first = fleet.jobs(0, asked)
    again = fleet.jobs(ticks(5), asked)  # over after 5 s, with messages of over 8 s on the links
    assert [j.arrived - ticks(5) for j in again] == [j.arrived for j in first]
    assert [j.began - ticks(5) for j in again] == [j.began for j in first]


def test_a_job_that_is_lost_at_work_leaves_its_turn_to_the_next():
    network = Uniform(seconds_per_step=1.0, dropout=0.5, server_up_mbps=1.0, **BARE)
    asked = [(c, 1, 10, 0, 10**6) for c in range(20)]
    jobs = network.fleet(0, 20).jobs(0, asked)
    sending = [j for j in jobs if j.dropped_at is None or j.dropped_at > j.done]
    assert 0 < len(sending) < 20
    assert [j.arrived for j in sending] == [ticks(10 + 8 * (k + 1)) for k in range(len(sending))]
    assert any(j.dropped_at is not None for j in sending)
