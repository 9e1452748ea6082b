"""The schedules in real time, over nodes that are threads: what is waited for, counted and given out."""

from dataclasses import dataclass

import numpy as np
import pytest
from flwr.app import Error
from flwr.common.constant import ErrorCode

from fl.errors import ConfigError
from fl.network import Instant, WallClock
from fl.sampling import Available, Fixed
from fl.schedules.fedasync import FedAsync
from fl.schedules.fedbuff import FedBuff
from fl.schedules.fedfix import FedFix
from fl.schedules.synchronous import Synchronous
from fl.secure import Plain
from fl.trace import Device
from fl.validation import Reason
from privacy.base import Guard, Statement
from tests.fl.asynchronous_worlds import STEPS, play, world
from tests.fl.deployment import deploy
from tests.helpers import clients, final, go, rounds, weights

SECONDS = (0.9, 1.37, 2.11, 0.71)  # of a job of each client
SCHEDULES = {
    "synchronous": Synchronous(rounds=5),
    "fedasync": FedAsync(rounds=14),
    "fedbuff": FedBuff(rounds=6, buffer=2),
    "fedfix": FedFix(rounds=8, tick_s=1.0, weights="identical"),
}


def update(client: int, start: np.ndarray) -> np.ndarray:
    """Half of the way to a point of the client's own."""
    return 0.5 * (client + 1 - start)


@pytest.fixture
def deployment(monkeypatch):
    made = deploy(monkeypatch, update)
    yield made
    made.close()


def world_of(deployment, number: int = 4, **more):
    """The world of clients that live in ``deployment``."""
    w = world(update, number, network=more.pop("network", WallClock()), **more)
    w.grid = deployment
    return w


def ready(deployment, *but: int, seconds=SECONDS):
    """Nodes that do their work, for all clients but some."""
    for client, each in enumerate(seconds):
        if client not in but:
            deployment.add(client, each)


def told(events):
    """What happened, without times."""
    keys = ("client", "round", "version", "staleness", "accepted", "reason")
    return [tuple(e[k] for k in keys) for e in events]


# As on the virtual clock


@dataclass(frozen=True)
class Known(Instant):
    """Devices whose jobs take the same times as the nodes'."""

    def device(self, seed, client, number):
        return Device(SECONDS[client] / STEPS, 0.0, None, None)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_does_what_it_does_on_the_virtual_clock(deployment, name):
    ready(deployment)
    w, v = world_of(deployment), world(update, 4, network=Known())
    real, virtual = play(SCHEDULES[name], w), play(SCHEDULES[name], v)
    assert told(real.arrivals) == told(virtual.arrivals)
    assert len(real.steps) == SCHEDULES[name].rounds
    for key in ("version", "accepted", "staleness", "live_versions", "client_steps"):
        assert [e[key] for e in real.steps] == [e[key] for e in virtual.steps]
    assert all(np.array_equal(a, b) for a, b in zip(real.states, virtual.states, strict=True))
    assert [e["virtual_s"] for e in real.arrivals] == pytest.approx([e["virtual_s"] for e in virtual.arrivals], abs=0.2)
    if name != "synchronous":
        assert {e["staleness"] for e in real.arrivals} > {0}
    assert {e["began_s"] for e in real.arrivals} == {e["done_s"] for e in real.arrivals} == {None}
    times = [(e["sent_s"], e["virtual_s"]) for e in real.arrivals]
    assert all(sent <= came for sent, came in times) and [c for _, c in times] == sorted(c for _, c in times)


def test_what_is_given_out_together_is_pushed_together(deployment):
    ready(deployment, seconds=(1.0,) * 4)
    play(FedBuff(rounds=3, buffer=4), world_of(deployment))
    assert [len(jobs) for _, jobs in deployment.pushes] == [4, 4, 4]


def test_the_ticks_of_fedfix_are_the_wall_s(deployment):
    ready(deployment)
    played = play(FedFix(rounds=4, tick_s=1.5, weights="identical"), world_of(deployment))
    assert [e["virtual_s"] for e in played.steps] == [1.5, 3.0, 4.5, 6.0]


def test_steps_that_a_busy_server_missed_are_left_out(deployment):
    """The evaluation after each step takes 3.4 ticks. What came meanwhile is in the next step: nobody starves."""
    ready(deployment)
    steps = []
    for event in FedFix(rounds=4, tick_s=1.0, weights="identical").run(world_of(deployment)):
        if event["event"] == "round":
            steps.append(event)
            deployment.sleep(3.4)
    assert [e["virtual_s"] for e in steps] == [1.0, 4.0, 7.0, 11.0]
    assert [e["accepted"] for e in steps] == [2, 2, 2, 2]  # the two that are at work, while the others wait for work


def test_a_planned_moment_is_not_slept_through(monkeypatch):
    deployment = deploy(monkeypatch, update, longest_s=1.0)
    deployment.add(0, 50.0)
    for event in FedFix(rounds=4, tick_s=4.3, weights="identical").run(world_of(deployment, 1)):
        assert deployment.time == pytest.approx(event["virtual_s"], abs=1e-5)
    deployment.close()


# Time that is over


def silent(reply):
    return []


def late_once(job: int) -> float:
    """The first job takes 7.5 seconds and the others one."""
    return 7.5 if job == 1 else 1.0


def test_a_synchronous_round_ends_at_its_deadline_without_the_late(deployment):
    ready(deployment, 2)
    deployment.add(2, 1.0, silent)
    played = play(Synchronous(rounds=3, deadline_s=5.0), world_of(deployment))
    assert [e["rejected"] for e in played.steps] == [{"late": 1}] * 3
    assert [e["accepted"] for e in played.steps] == [3] * 3
    lengths = np.diff([0.0, *(e["virtual_s"] for e in played.steps)])
    assert lengths.tolist() == pytest.approx([5.0] * 3, abs=0.1) and deployment.time < 15.1
    missed = [e for e in played.arrivals if e["client"] == 2]
    assert {(e["reason"], e["bytes_up"], e["steps"]) for e in missed} == {("late", 0, None)}
    assert all(e["bytes_down"] > 0 for e in missed)


def test_a_round_s_deadline_counts_from_where_training_is_asked_for(deployment, monkeypatch):
    """The stages of secure aggregation before it take real time."""
    ready(deployment)
    w = world_of(deployment)

    def stages(server, round, asked):
        deployment.sleep(3.0)
        return Plain(asked)

    monkeypatch.setattr(w, "exchange", stages)
    played = play(Synchronous(rounds=1, deadline_s=2.5), w)
    assert played.steps[0]["accepted"] == 4
    assert {e["sent_s"] for e in played.arrivals} == {3.0}


def test_what_a_slow_look_finds_came_in_time(deployment, monkeypatch):
    ready(deployment)
    pull = deployment.pull_messages

    def slowly(ids):
        deployment.sleep(10.0)
        return pull(ids)

    monkeypatch.setattr(deployment, "pull_messages", slowly)
    played = play(Synchronous(rounds=2, deadline_s=5.0), world_of(deployment))
    assert [(e["accepted"], e["rejected"]) for e in played.steps] == [(4, {})] * 2


def test_a_late_reply_of_an_earlier_round_is_dropped(deployment):
    ready(deployment, 2)
    deployment.add(2, late_once)
    w = world_of(deployment)
    played = play(Synchronous(rounds=4, deadline_s=5.0), w)
    mine = [(e["round"], e["accepted"], e["reason"]) for e in played.arrivals if e["client"] == 2]
    # It does the second round's job after the first one's, in time.
    assert mine == [(1, False, "late"), (2, True, None), (3, True, None), (4, True, None)]
    assert [e["version"] for e in played.arrivals if e["accepted"]] == [1 - 1] * 3 + [1] * 4 + [2] * 4 + [3] * 4
    assert "m1-2" in deployment.pulled and not deployment.replies  # taken off the grid all the same


@pytest.mark.parametrize("name", ["fedasync", "fedbuff", "fedfix"])
def test_at_its_deadline_a_job_frees_its_place(deployment, name):
    """Two places, three clients of whom one never answers."""
    ready(deployment, 0, seconds=SECONDS[:3])
    deployment.add(0, 1.0, silent)
    kinds = {"fedasync": FedAsync, "fedbuff": FedBuff, "fedfix": FedFix}
    more = {"fedasync": {}, "fedbuff": {"buffer": 2}, "fedfix": {"tick_s": 0.5, "weights": "identical"}}
    schedule = kinds[name](rounds=20, deadline_s=3.0, **more[name])
    w = world_of(deployment, 3, per_round=2)
    played = play(schedule, w)
    assert len(played.steps) == 20
    assert all(e["client"] != 0 for e in played.arrivals)
    alone = [t for t, jobs in deployment.pushes for c, *_ in jobs if c == 0]
    assert len(alone) == 1
    # While its place is taken one of the others works at a time; from then on both do.
    after = {c for t, jobs in deployment.pushes for c, *_ in jobs if t > alone[0] + 3}
    assert after == {1, 2}
    working = [e for e in played.arrivals if e["sent_s"] > alone[0] + 4]
    assert any(a["sent_s"] < b["virtual_s"] and b["sent_s"] < a["virtual_s"] for a in working for b in working
               if a["client"] < b["client"])  # fmt: skip


def test_a_reply_after_the_deadline_is_late_and_its_client_works_on(deployment):
    ready(deployment, 1)
    deployment.add(1, late_once)
    w = world_of(deployment)
    played = play(FedBuff(rounds=20, buffer=2, deadline_s=4.0), w)
    mine = [e for e in played.arrivals if e["client"] == 1]
    assert (mine[0]["round"], mine[0]["reason"]) == (1, "late") and mine[0]["bytes_up"] > 0
    assert mine[0]["virtual_s"] == pytest.approx(7.5, abs=0.1)
    assert all(e["accepted"] for e in mine[1:]) and len(mine) > 1
    assert sum(e["rejected"].get("late", 0) for e in played.steps) == 1
    # Nothing of that version is kept once it is over.
    assert max(e["live_versions"] for e in played.steps[-2:]) <= 4


def test_who_never_answers_is_asked_again_after_the_timeout(deployment):
    ready(deployment, 0, seconds=SECONDS[:2])
    deployment.add(0, 1.0, lambda reply: [] if reply.round == 1 else [reply])
    w = world_of(deployment, 2, network=WallClock(timeout_s=6.0, rejoin_s=2.0))
    played = play(FedAsync(rounds=12), w)
    mine = [(e["round"], e["reason"]) for e in played.arrivals if e["client"] == 0]
    assert mine[:3] == [(1, "error"), (2, None), (3, None)]
    given = [t for t, jobs in deployment.pushes for c, *_ in jobs if c == 0]
    assert given[:2] == pytest.approx([0.0, 8.0], abs=0.1)


def test_what_was_lost_and_comes_after_all_is_dropped(deployment):
    ready(deployment, 0, seconds=SECONDS[:2])
    deployment.add(0, late_once)
    w = world_of(deployment, 2, network=WallClock(timeout_s=6.0, rejoin_s=2.0))
    played = play(FedAsync(rounds=20), w)
    mine = [(e["round"], e["reason"]) for e in played.arrivals if e["client"] == 0]
    assert mine[:2] == [(1, "error"), (2, None)]
    assert "m1-0" in deployment.pulled and not deployment.replies


def test_without_a_deadline_a_synchronous_round_ends_at_the_timeout(deployment):
    ready(deployment, 0)
    deployment.add(0, 1.0, silent)
    w = world_of(deployment, network=WallClock(timeout_s=6.0, rejoin_s=0.0))
    played = play(Synchronous(rounds=2), w)
    assert [e["rejected"] for e in played.steps] == [{"error": 1}] * 2
    assert [e["virtual_s"] for e in played.steps] == pytest.approx([6.0, 12.0], abs=0.1)


def test_over_selection_waits_for_as_many_as_it_needs(deployment):
    ready(deployment)
    w = world_of(deployment, per_round=2, sampling=Fixed(over_selection=1.0))
    played = play(Synchronous(rounds=1), w)
    assert [(e["client"], e["reason"]) for e in played.arrivals] == [(3, None), (0, None), (1, "late"), (2, "late")]
    assert played.steps[0]["virtual_s"] == pytest.approx(1.0, abs=0.1)


def test_the_end_of_the_run_is_not_waited_for_twice(deployment):
    ready(deployment)
    w = world_of(deployment)
    play(FedAsync(rounds=1000, until_s=5.0), w)
    assert w.clock.now_s == 5.0
    assert deployment.time < 5.1
    assert 0 < w.server.round < 1000


def test_nothing_is_given_out_at_the_end(deployment):
    """The server is busy beyond the end. What has come by then counts."""
    ready(deployment)
    w, late = world_of(deployment), []
    for event in FedAsync(rounds=1000, until_s=5.0).run(w):
        if deployment.time < 3.0:
            continue
        deployment.sleep(max(0.0, 10.0 - deployment.time))
        late += [event["virtual_s"]] if event["event"] == "client" else []
    assert late[1:] == [5.0] * len(late[1:]) and len(late) > 1
    assert w.clock.now_s == 5.0
    assert max(t for t, _ in deployment.pushes) < 5.0


# What a network may do


def twice(reply):
    return [reply, reply]


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_reply_that_comes_twice_counts_once(deployment, monkeypatch, name):
    ready(deployment, 1, 3)
    deployment.add(1, SECONDS[1], twice)
    deployment.add(3, SECONDS[3], twice)
    real = play(SCHEDULES[name], world_of(deployment))
    virtual = play(SCHEDULES[name], world(update, 4, network=Known()))
    assert told(real.arrivals) == told(virtual.arrivals)
    assert np.array_equal(real.states[-1], virtual.states[-1])


@pytest.mark.parametrize("name", ["fedasync", "fedbuff", "fedfix"])
def test_a_node_that_goes_is_lost_and_works_again_when_it_is_back(deployment, name):
    ready(deployment, 2)
    deployment.add(2, SECONDS[2], gone=(3.0, 20.0))
    schedule = {"fedasync": FedAsync(rounds=90), "fedbuff": FedBuff(rounds=45, buffer=2)}.get(name)
    schedule = schedule or FedFix(rounds=36, tick_s=1.0, weights="identical")
    played = play(schedule, world_of(deployment, network=WallClock(rejoin_s=4.0)))
    assert len(played.steps) == schedule.rounds
    mine = [e for e in played.arrivals if e["client"] == 2]
    assert [e["accepted"] for e in mine if e["virtual_s"] < 3.0] == [True]
    lost = [e for e in mine if not e["accepted"]]
    assert {e["reason"] for e in lost} == {"error"}
    assert 2 <= len(lost) <= 5  # asked again every few seconds, and not all the time
    assert sum(e["accepted"] for e in mine if e["virtual_s"] > 20.0) >= 2
    assert [e["round"] for e in mine] == list(range(1, len(mine) + 1))
    assert max(b["virtual_s"] - a["virtual_s"] for a, b in zip(played.steps, played.steps[1:])) < 2.2


def test_a_round_goes_on_without_a_node_that_is_gone(deployment):
    ready(deployment, 2)
    deployment.add(2, SECONDS[2], gone=(3.0, 20.0))
    w = world_of(deployment, network=WallClock(rejoin_s=4.0), sampling=Available())
    played = play(Synchronous(rounds=16), w)
    assert len(played.steps) == 16
    mine = [(e["round"], e["reason"]) for e in played.arrivals if e["client"] == 2]
    assert mine[:2] == [(1, None), (2, "error")]
    assert mine[-1] == (16, None)
    asked = {c for t, jobs in deployment.pushes for c, *_ in jobs if 6.0 < t < 9.0}
    assert asked == {0, 1, 3}  # in the meantime it is not asked


def test_a_round_of_all_waits_until_a_lost_node_can_be_asked_again(deployment):
    ready(deployment, 2)
    deployment.add(2, 0.1, lambda reply: [Error(ErrorCode.NODE_UNAVAILABLE, "gone")] if reply.round == 1 else [reply])
    played = play(Synchronous(rounds=2), world_of(deployment, network=WallClock(rejoin_s=4.0)))
    assert [t for t, _ in deployment.pushes] == pytest.approx([0.0, 4.1], abs=0.05)
    assert [e["accepted"] for e in played.steps] == [3, 4]


@pytest.mark.parametrize("name", SCHEDULES)
def test_flower_s_word_that_a_node_is_gone_is_an_error(deployment, name):
    ready(deployment, 1)
    deployment.add(1, 0.1, lambda reply: [Error(ErrorCode.NODE_UNAVAILABLE, "gone")])
    sampling = Available() if name == "synchronous" else Fixed()
    played = play(SCHEDULES[name], world_of(deployment, sampling=sampling))
    assert len(played.steps) == SCHEDULES[name].rounds
    mine = [e for e in played.arrivals if e["client"] == 1]
    assert {e["reason"] for e in mine} == {"error"}
    assert [e["round"] for e in mine] == [1]  # it is asked again 10 seconds later


def test_a_message_that_could_not_be_sent_is_a_loss(deployment, monkeypatch):
    ready(deployment)
    push = deployment.push_messages
    monkeypatch.setattr(
        deployment, "push_messages", lambda ms: [None if i.endswith("-1") else i for i in push(ms)], raising=True
    )
    for schedule in (Synchronous(rounds=2), FedBuff(rounds=3, buffer=2)):
        played = play(schedule, world_of(deployment, network=WallClock(rejoin_s=0.5)))
        mine = [e for e in played.arrivals if e["client"] == 1]
        assert mine and {e["reason"] for e in mine} == {"error"}
        assert len(played.steps) == schedule.rounds


def test_without_any_node_an_asynchronous_run_stops(deployment):
    for client in range(4):
        deployment.add(client, 0.1, lambda reply: [Error(ErrorCode.NODE_UNAVAILABLE, "gone")])
    with pytest.raises(Exception, match="were all rejected"):
        play(FedAsync(rounds=100), world_of(deployment))
    assert len(deployment.requests) == 100


def test_clients_whose_budget_is_spent_end_the_run_at_once(deployment):
    for client in range(4):
        deployment.add(client, 1.0, lambda reply: [Error(2, "privacy budget spent: all")])
    played = play(FedAsync(rounds=5), world_of(deployment))
    assert played.stop == "no client takes part any more"
    assert {e["reason"] for e in played.arrivals} == {Reason.BUDGET}
    assert deployment.time < 1.1


# Going on


def test_a_run_that_goes_on_gives_out_the_same_jobs_anew(deployment):
    ready(deployment)
    w, events = world_of(deployment), []
    schedule = FedBuff(rounds=6, buffer=2, deadline_s=2.5)
    for event in schedule.run(w):
        events.append(event)
        if event["event"] == "round" and event["round"] == 2:
            kept, server, at = w.keep(), w.server, w.clock.now
            out = {(r["client"], r["job"], r["version"]) for r in kept[1]["out"]}
            break
    before = {(r.client, r.round): (r.version, r.state.tobytes(), dict(r.extra)) for r in deployment.requests}
    deployment.sleep(100.0)  # the server is away
    first = len(deployment.requests)
    again = world_of(deployment)
    again.server, again.kept = server, kept
    again.clock.advance(at)
    played = play(schedule, again)
    sent = deployment.requests[first:]
    assert {(r.client, r.round, r.version) for r in sent[: len(out)]} == out and out
    for r in sent[: len(out)]:
        assert before[r.client, r.round] == (r.version, r.state.tobytes(), dict(r.extra))
    jobs = [(e["client"], e["round"]) for e in [*events, *played.arrivals] if e["event"] == "client"]
    assert len(jobs) == len(set(jobs))
    assert all(e["accepted"] for e in played.arrivals)
    assert played.steps[-1]["round"] == 6
    assert played.steps[0]["virtual_s"] < at / 1e6 + 2.2  # the time in between is not counted
    for e in played.arrivals:
        assert e["virtual_s"] - e["sent_s"] == pytest.approx(SECONDS[e["client"]], abs=0.1)


def test_a_job_that_was_late_before_is_not_given_out_anew(deployment):
    ready(deployment, 1)
    deployment.add(1, 1e4)
    w, schedule = world_of(deployment), FedBuff(rounds=6, buffer=2, deadline_s=2.0)
    for event in schedule.run(w):
        if event["event"] == "round" and event["round"] == 4:
            break
    again = world_of(deployment)
    again.server, again.kept = w.server, w.keep()
    first = len(deployment.requests)
    played = play(schedule, again)
    mine = [e for e in played.arrivals if e["client"] == 1]
    assert [(e["round"], e["reason"]) for e in mine] == [(1, "error")]
    assert (1, 1) not in {(r.client, r.round) for r in deployment.requests[first:]}


class Private(Guard):
    def statement(self):
        return Statement("a mechanism", "client", epsilon=1.0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_private_run_does_not_go_on(deployment, name):
    ready(deployment)
    w = world_of(deployment, guard=Private())
    run = SCHEDULES[name].run(w)
    while next(run)["event"] != "round":
        pass
    again = world_of(deployment, guard=Private())
    again.fleet.restore(w.fleet.state())
    again.server, again.kept = w.server, w.keep() if w.keep else None
    with pytest.raises(ConfigError, match="can't go on"):
        play(SCHEDULES[name], again)


# Refusals, and runs in this process


def test_unbiased_weights_need_observed_rates(deployment):
    ready(deployment)
    with pytest.raises(ConfigError, match="observed"):
        play(FedFix(rounds=2), world_of(deployment))
    played = play(FedFix(rounds=6, rates="observed"), world_of(deployment))
    assert len(played.steps) == 6
    assert played.steps[-1]["version"] > 0


def test_rounds_of_planned_times_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="network"):
        go(tmp_path / "run", "schedule=gradient_coding", "partition=replicated", "network=wall_clock",
           "data.client_test_fraction=0")  # fmt: skip


def test_a_synchronous_run_leaves_the_same_adapter_as_on_the_virtual_clock(tmp_path):
    go(tmp_path / "virtual")
    go(tmp_path / "real", "network=wall_clock")
    assert weights(tmp_path / "real") == weights(tmp_path / "virtual")
    assert 0 < final(tmp_path / "real")["virtual_s"] <= final(tmp_path / "real")["wall_s"]


def test_a_private_run_spends_what_its_jobs_took(tmp_path):
    words = ("privacy=dp_sgd", "privacy.epsilon=null", "privacy.noise_multiplier=1", "schedule=fedbuff")
    more = ("schedule.buffer=4", "schedule.rounds=3", "aggregator.weights=uniform", "aggregator.staleness=constant")
    go(tmp_path / "virtual", *words, *more)
    go(tmp_path / "real", *words, *more, "network=wall_clock")
    assert final(tmp_path / "real")["epsilon"] == final(tmp_path / "virtual")["epsilon"] > 0
    jobs = [(e["client"], e["round"]) for e in clients(tmp_path / "real")]
    assert sorted(jobs) == [(c, k) for c in range(4) for k in (1, 2, 3)]


@pytest.mark.parametrize(
    "words", [("schedule=fedasync",), ("schedule=fedbuff", "schedule.buffer=2"),
              ("schedule=fedfix", "schedule.tick_s=0.02", "schedule.rates=observed")],
    ids=["fedasync", "fedbuff", "fedfix"],
)  # fmt: skip
def test_an_asynchronous_run_in_this_process(tmp_path, words):
    go(tmp_path / "run", *words, "schedule.rounds=4", "network=wall_clock")
    assert len(rounds(tmp_path / "run")) == 4
    assert rounds(tmp_path / "run")[-1]["version"] > 0
