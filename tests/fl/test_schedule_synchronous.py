"""Synchronous rounds against clients that are made up: what is waited for, counted, and how long it takes."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from aggregators.fedavg import FedAvg
from aggregators.server_optimizers import SGD
from clients.adapters.space import Space
from clients.layout import Layout
from clients.local.training import LocalTraining
from fl.clock import Clock, ticks
from fl.downlink import Downlink
from fl.engine.flower import ensure_identity
from fl.errors import RunStopped
from fl.messages import TrainReply, TrainRequest, payload_bytes
from fl.network import Instant, Lognormal, Trace, Uniform
from fl.sampling import Available, Fixed, Poisson
from fl.schedules.base import World
from fl.schedules.synchronous import Synchronous
from fl.state import ServerState
from fl.validation import Validator

LAYOUT = Layout(("a", "b"), ((2,), (3,)))
SIZE = 5
Answer = Callable[[TrainRequest], list[TrainReply | Error]]


def honest(request: TrainRequest) -> list[TrainReply | Error]:
    """One reply: the client's number plus one in every coordinate, for as many examples and local steps."""
    c = request.client
    update = np.full(SIZE, c + 1, np.float32)
    return [TrainReply(c, request.round, request.version, request.layout, update, c + 1, c + 1, 10 * c, 0.5 + c)]


@dataclass
class FakeGrid:
    """A Flower grid over ``answers`` (client -> its replies), which come ``late_by`` pulls after the push."""

    number: int
    answers: dict[int, Answer] = field(default_factory=dict)
    late_by: int = 0
    stray: bool = False
    requests: list[TrainRequest] = field(default_factory=list)
    pushed: int = 0
    _waiting: list[tuple[int, str, Message]] = field(default_factory=list)

    def push_messages(self, messages):
        ids = []
        for message in messages:
            request = TrainRequest.from_record(message.content)
            assert message.metadata.dst_node_id == 50 + request.client
            self.requests.append(request)
            self.pushed += 1
            ids.append(f"m{self.pushed}")
            for reply in self.answers.get(request.client, honest)(request):
                self._waiting.append((self.late_by, ids[-1], self._message(reply, ids[-1])))
        return ids

    def pull_messages(self, ids):
        ready = [m for left, i, m in self._waiting if left == 0 and i in set(ids)]
        self._waiting = [(max(0, left - 1), i, m) for left, i, m in self._waiting if not (left == 0 and i in set(ids))]
        return [self._message(Error(0, "stray"), "nobody's"), *ready] if self.stray else ready

    @staticmethod
    def _message(reply: TrainReply | Error, answered: str) -> Message:
        metadata = Metadata(1, f"r{answered}", 1, 0, answered, "", 0.0, 60.0, "train")
        if isinstance(reply, Error):
            return make_message(metadata, error=reply)
        return make_message(metadata, content=reply.to_record())


def world(grid: FakeGrid, per_round: int | None = None, network=None, sampling=None, **more) -> World:
    ensure_identity(1)
    n = grid.number
    return World(
        grid, [50 + c for c in range(n)], 3, per_round or n, ServerState(np.zeros(SIZE, np.float32), Space(LAYOUT)),
        FedAvg(), SGD(), sampling or Fixed(), network or Instant(), LocalTraining(steps=1, lr=0.25),
        Validator(LAYOUT.hash, SIZE, 1e4, 1000), Downlink(Space(LAYOUT), False), **more,
    )  # fmt: skip


def play(schedule: Synchronous, w: World):
    """All events of a run, as (client events of each round, round events)."""
    ours, rounds = [[]], []
    for event in schedule.run(w):
        if event["event"] == "client":
            ours[-1].append(event)
        else:
            rounds.append(event)
            ours.append([])
    return ours[:-1], rounds


def seconds_of(network, event: dict, steps: int) -> float:
    """A job's time by hand: down, steps and up, each rounded to whole microseconds."""
    down = network.latency_s + 8 * event["bytes_down"] / (network.down_mbps * 1e6)
    up = network.latency_s + 8 * event["bytes_up"] / (network.up_mbps * 1e6)
    return (ticks(down) + ticks(steps * network.seconds_per_step) + ticks(up)) / 1e6


# Time


def test_a_round_lasts_as_long_as_its_slowest_client():
    network = Uniform(seconds_per_step=0.5, latency_s=0.125, down_mbps=0.01, up_mbps=0.002)
    w = world(FakeGrid(4), network=network)
    ours, rounds = play(Synchronous(rounds=3), w)
    before = 0.0
    for events, event in zip(ours, rounds, strict=True):
        times = [before + seconds_of(network, e, e["client"] + 1) for e in events]
        assert [e["virtual_s"] for e in events] == pytest.approx(times, abs=2e-6)
        assert times == sorted(times)  # client c takes c + 1 steps
        assert event["virtual_s"] == events[-1]["virtual_s"] == pytest.approx(max(times), abs=2e-6)
        before = event["virtual_s"]
    assert before > 3 * 4 * 0.5
    assert w.clock.now_s == before


def test_bytes_are_those_of_the_messages():
    grid = FakeGrid(3)
    ours, (event,) = play(Synchronous(rounds=1), world(grid))
    sent = {r.client: payload_bytes(r.to_record()) for r in grid.requests}
    back = {r.client: payload_bytes(honest(r)[0].to_record()) for r in grid.requests}
    assert {e["client"]: e["bytes_down"] for e in ours[0]} == sent
    assert {e["client"]: e["bytes_up"] for e in ours[0]} == back
    assert (event["bytes_down"], event["bytes_up"]) == (sum(sent.values()), sum(back.values()))
    assert min(back.values()) > 4 * SIZE


def test_events_come_in_the_order_of_time_then_client():
    ours, _ = play(Synchronous(rounds=2), world(FakeGrid(20)))
    assert [e["client"] for e in ours[0]] == list(range(20))  # all at the same tick
    ours, _ = play(Synchronous(rounds=2), world(FakeGrid(20), network=Lognormal(speed_sigma=2)))
    order = [(e["virtual_s"], e["client"]) for e in ours[0]]
    assert order == sorted(order)
    assert [c for _, c in order] != list(range(20))


def test_a_client_that_is_refused_was_busy_all_the_same():
    """Its reply arrives when its steps are done; only an error has no steps behind it."""

    def bad(request):
        (reply,) = honest(request)
        return [TrainReply(**{**vars(reply), "update": np.full(SIZE, np.nan, np.float32), "steps": 40})]

    def failed(request):
        return [Error(0, "crashed")]

    network = Uniform(seconds_per_step=1.0, latency_s=0.5, down_mbps=None, up_mbps=None)
    w = world(FakeGrid(3, {1: bad, 2: failed}), network=network)
    (events,), (event,) = play(Synchronous(rounds=1), w)
    assert {e["client"]: e["virtual_s"] for e in events} == {0: 2.0, 1: 41.0, 2: 1.0}
    assert event["virtual_s"] == 41.0
    assert (event["rejected"], event["client_steps"]) == ({"error": 1, "not_finite": 1}, 1)


# Updates


def test_the_mean_of_the_updates_is_added_and_the_version_counts_up():
    w = world(FakeGrid(3))
    _, rounds = play(Synchronous(rounds=2), w)
    mean = (1 * 1 + 2 * 2 + 3 * 3) / 6  # client c sends c + 1 for c + 1 examples
    np.testing.assert_allclose(w.server.vector, np.full(SIZE, 2 * mean), rtol=1e-6)
    assert (w.server.version, w.server.round) == (2, 2)
    assert [e["version"] for e in rounds] == [1, 2]
    assert [e["update_norm"] for e in rounds] == pytest.approx([mean * SIZE**0.5] * 2, rel=1e-6)
    assert [e["loss"] for e in rounds] == [1.5, 1.5]
    assert rounds[0] | {"bytes_down": 0, "bytes_up": 0, "update_norm": 0} == {
        "event": "round", "round": 1, "version": 1, "virtual_s": 0.0, "sampled": 3, "accepted": 3, "rejected": {},
        "bytes_down": 0, "bytes_up": 0, "client_steps": 6, "tokens": 30, "loss": 1.5, "update_norm": 0, "epsilon": None,
        "bytes_once": 0, "aggregation_error": None, "staleness": 0.0,
            "live_versions": 1,
    }  # fmt: skip


def test_clients_start_from_the_newest_version_and_the_scheduled_learning_rate():
    grid = FakeGrid(2)
    w = world(grid)
    w.local = LocalTraining(steps=1, lr=1.0, lr_schedule="linear")
    play(Synchronous(rounds=3), w)
    asked = [(r.client, r.round, r.version, r.extra["lr"]) for r in grid.requests]
    assert asked == [(c, k, k - 1, w.local.lr_at(k, 3)) for k in (1, 2, 3) for c in (0, 1)]
    assert len({lr for *_, lr in asked}) == 3
    np.testing.assert_array_equal(grid.requests[0].state, np.zeros(SIZE))
    assert grid.requests[4].state.tolist() == pytest.approx([2 * 5 / 3] * SIZE, rel=1e-6)


def test_it_goes_on_from_where_the_server_is():
    first, w = world(FakeGrid(3), network=Lognormal()), world(FakeGrid(3), network=Lognormal())
    play(Synchronous(rounds=2), first)
    w.server, w.clock = first.server, Clock(first.clock.now)
    ours, rounds = play(Synchronous(rounds=4), w)
    whole = world(FakeGrid(3), network=Lognormal())
    all_ours, all_rounds = play(Synchronous(rounds=4), whole)
    assert (ours, rounds) == (all_ours[2:], all_rounds[2:])
    np.testing.assert_array_equal(w.server.vector, whole.server.vector)


def test_rounds_that_are_done_are_not_done_again():
    w = world(FakeGrid(2))
    play(Synchronous(rounds=2), w)
    assert play(Synchronous(rounds=2), w) == ([], [])


# What a network may do


def test_a_reply_that_comes_twice_counts_once():
    def twice(request):
        return honest(request) * 2

    def another(request):
        (reply,) = honest(request)
        return [reply, TrainReply(**{**vars(reply), "update": np.full(SIZE, 99, np.float32)})]

    w = world(FakeGrid(3, {0: twice, 2: another}), network=Uniform())
    (events,), (event,) = play(Synchronous(rounds=1), w)
    plain = world(FakeGrid(3), network=Uniform())
    (once,), (alone,) = play(Synchronous(rounds=1), plain)
    np.testing.assert_array_equal(w.server.vector, plain.server.vector)
    assert (event["sampled"], event["accepted"], event["rejected"]) == (3, 3, {"duplicate": 2})
    assert [e for e in events if e["accepted"]] == once
    again = [e for e in events if not e["accepted"]]
    assert [(e["client"], e["reason"], e["bytes_down"]) for e in again] == [(0, "duplicate", 0), (2, "duplicate", 0)]
    # It was received, so its bytes count; sent was the request once.
    assert event["bytes_down"] == alone["bytes_down"] == sum(e["bytes_down"] for e in events)
    assert event["bytes_up"] == sum(e["bytes_up"] for e in events) > alone["bytes_up"]


def test_a_bad_reply_first_is_the_one_that_counts():
    def bad_then_good(request):
        return [Error(0, "crashed"), *honest(request)]

    _, (event,) = play(Synchronous(rounds=1), world(FakeGrid(2, {1: bad_then_good})))
    assert (event["accepted"], event["rejected"]) == (1, {"duplicate": 1, "error": 1})


def test_replies_may_take_their_time_and_strangers_are_ignored():
    w, plain = world(FakeGrid(3, late_by=2, stray=True)), world(FakeGrid(3))
    assert play(Synchronous(rounds=2), w) == play(Synchronous(rounds=2), plain)


def test_a_reply_in_another_clients_name_is_unexpected():
    def impostor(request):
        (reply,) = honest(request)
        return [TrainReply(**{**vars(reply), "client": 0})]

    _, (event,) = play(Synchronous(rounds=1), world(FakeGrid(3, {1: impostor})))
    assert event["rejected"] == {"unexpected": 1}


# Dropouts, deadlines, over-selection


def test_dropouts_are_those_of_the_network_model():
    network = Uniform(dropout=0.4, seconds_per_step=1.0, latency_s=0, down_mbps=None, up_mbps=None)
    ours, rounds = play(Synchronous(rounds=6), world(FakeGrid(5), network=network))
    lost = 0
    start = 0
    for k, (events, event) in enumerate(zip(ours, rounds, strict=True), 1):
        for e in events:
            job = network.fleet(3, 12).job(e["client"], k, e["client"] + 1, e["bytes_down"], 0)
            assert e["accepted"] == (job.dropped_at is None)
            assert e["reason"] == (None if e["accepted"] else "error")
            assert ticks(e["virtual_s"]) == start + (job.total if e["accepted"] else job.dropped_at)
            assert e["accepted"] or (e["bytes_up"], e["steps"], e["loss"]) == (0, None, None)
            lost += not e["accepted"]
        assert event["accepted"] == sum(e["accepted"] for e in events)
        start = ticks(event["virtual_s"])
    assert 5 < lost < 20


SLOW = Uniform(seconds_per_step=1.0, latency_s=0.0, down_mbps=None, up_mbps=None)  # client c takes c + 1 seconds


def test_after_the_deadline_a_client_is_late():
    w = world(FakeGrid(5), network=SLOW)
    ours, rounds = play(Synchronous(rounds=2, deadline_s=3.5), w)
    assert [(e["client"], e["accepted"], e["reason"]) for e in ours[0]] == [
        (0, True, None), (1, True, None), (2, True, None), (3, False, "late"), (4, False, "late"),
    ]  # fmt: skip
    assert [e["virtual_s"] for e in rounds] == [3.5, 7.0]
    assert (rounds[0]["accepted"], rounds[0]["rejected"]) == (3, {"late": 2})
    # It did the work, and its bytes were sent.
    late = ours[0][4]
    assert (late["steps"], late["examples"], late["loss"]) == (5, 5, 4.5)
    for name in ("steps", "tokens", "bytes_up", "bytes_down"):
        assert rounds[0]["client_steps" if name == "steps" else name] == sum(e[name] for e in ours[0])


def test_what_arrives_at_the_deadline_counts():
    _, (event,) = play(Synchronous(rounds=1, deadline_s=3.0), world(FakeGrid(5), network=SLOW))
    assert event["accepted"] == 3


def test_a_round_does_not_wait_for_its_deadline_when_all_have_answered():
    _, rounds = play(Synchronous(rounds=2, deadline_s=60), world(FakeGrid(3), network=SLOW))
    assert [e["virtual_s"] for e in rounds] == [3.0, 6.0]


def test_a_deadline_that_nobody_meets_stops_the_run():
    w = world(FakeGrid(3), network=SLOW)
    with pytest.raises(RunStopped, match=r"0 accepted updates of 3 clients asked.*'late': 3.*resume"):
        play(Synchronous(rounds=1, deadline_s=0.5), w)
    assert (w.server.round, w.server.version) == (0, 0)


def test_over_selection_keeps_the_first_that_answer():
    grid = FakeGrid(10)
    w = world(grid, per_round=4, network=SLOW, sampling=Fixed(over_selection=0.5))
    (events,), (event,) = play(Synchronous(rounds=1), w)
    asked = sorted(r.client for r in grid.requests)
    assert len(asked) == 6
    assert [e["client"] for e in events if e["accepted"]] == asked[:4]  # the slower the higher its number
    assert [e["reason"] for e in events] == [None] * 4 + ["late"] * 2
    assert event["virtual_s"] == asked[3] + 1.0
    assert event["bytes_down"] == sum(e["bytes_down"] for e in events)


def test_over_selection_waits_for_k_good_ones():
    def bad(request):
        return [Error(0, "crashed")]

    grid = FakeGrid(4, {0: bad})
    w = world(grid, per_round=2, network=SLOW, sampling=Fixed(over_selection=1))
    _, (event,) = play(Synchronous(rounds=1), w)
    assert (event["accepted"], event["rejected"], event["virtual_s"]) == (2, {"error": 1, "late": 1}, 3.0)


def test_min_clients_counts_accepted_updates():
    _, (event,) = play(Synchronous(rounds=1, min_clients=3, deadline_s=3.5), world(FakeGrid(5), network=SLOW))
    assert event["accepted"] == 3
    with pytest.raises(RunStopped, match=r"schedule\.min_clients is 4"):
        play(Synchronous(rounds=1, min_clients=4, deadline_s=3.5), world(FakeGrid(5), network=SLOW))


# Who is asked


def test_a_round_waits_until_enough_are_available(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text(
        "client,seconds_per_step,latency_s,down_mbps,up_mbps,from_s,until_s\n"
        "0,1,0,,,0,100\n1,1,0,,,5,100\n2,1,0,,,40,100\n"
    )
    grid = FakeGrid(3)
    ours, _ = play(Synchronous(rounds=1), world(grid, per_round=2, network=Trace(path=str(path))))
    assert sorted(r.client for r in grid.requests) == [0, 1]
    assert [e["virtual_s"] for e in ours[0]] == [6.0, 7.0]
    grid = FakeGrid(3)
    play(Synchronous(rounds=1), world(grid, per_round=2, network=Trace(path=str(path)), sampling=Available()))
    assert [r.client for r in grid.requests] == [0]
    path.write_text(path.read_text().replace("2,1,0,,,40,100", "2,1,0,,,200,300"))
    with pytest.raises(RunStopped, match="Round 1 needs 3 clients .* never be that many"):
        play(Synchronous(rounds=1), world(FakeGrid(3), network=Trace(path=str(path))))


@pytest.mark.parametrize("network", [Uniform(availability=0.3), Instant(availability=0.3, availability_period_s=1)])
def test_waiting_for_what_never_comes_ends(network):
    """Ten clients that are on for three tenths of the time each, out of step, are never all on."""
    w = world(FakeGrid(10), network=network)
    with pytest.raises(RunStopped, match=r"never be that many\. Lower clients\.per_round"):
        play(Synchronous(rounds=1), w)
    _, (event,) = play(Synchronous(rounds=1), world(FakeGrid(10), per_round=2, network=network))
    assert event["accepted"] == 2


def test_repeated_windows_that_never_meet_end_too(tmp_path):
    path = tmp_path / "devices.csv"
    path.write_text("client,seconds_per_step,latency_s,down_mbps,up_mbps,from_s,until_s\n0,1,0,,,0,10\n1,1,0,,,20,30\n")
    network = Trace(path=str(path), repeat_s=60)
    with pytest.raises(RunStopped, match="never be that many"):
        play(Synchronous(rounds=1), world(FakeGrid(2), network=network))
    ours, _ = play(Synchronous(rounds=3), world(FakeGrid(2), per_round=1, network=network))
    assert [len(events) for events in ours] == [1, 1, 1]


def test_a_poisson_round_may_be_empty_and_is_then_nothing():
    grid = FakeGrid(4)
    w = world(grid, per_round=1, sampling=Poisson(), network=SLOW)
    ours, rounds = play(Synchronous(rounds=12, deadline_s=60, min_clients=1), w)
    sizes = [e["sampled"] for e in rounds]
    assert 0 in sizes and max(sizes) > 1
    before = (0, 0.0)
    for events, event in zip(ours, rounds, strict=True):
        assert len(events) == event["sampled"] == event["accepted"]
        if not events:
            assert (event["version"], event["virtual_s"]) == before
            assert (event["loss"], event["update_norm"], event["bytes_down"]) == (None, 0.0, 0)
        before = (event["version"], event["virtual_s"])
    assert [e["round"] for e in rounds] == list(range(1, 13))
