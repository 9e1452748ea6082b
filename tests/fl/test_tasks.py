"""Work on its way: start versions are held and released, and a checkpoint at any server step loses nothing of it."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Error

from aggregators.fedavg import FedAvg
from clients.adapters.space import Space
from clients.layout import Layout
from fl import checkpoint
from fl.clock import Clock, Priority
from fl.messages import BUDGET
from fl.network import Linear, Lognormal, Uniform
from fl.schedules.fedasync import FedAsync
from fl.schedules.fedbuff import FedBuff
from fl.schedules.fedfix import FedFix
from fl.state import ServerState
from fl.tasks import Tasks, Versions
from fl.validation import Reason
from tests.fl.asynchronous_worlds import BARE, EQUAL, F80, play, world

LAYOUT = Layout(("x",), ((4,),))


def wave(client, start):
    return (np.sin(5 * start + client + np.arange(len(start))) / 8).astype(start.dtype)


# Versions


def test_a_version_is_kept_until_it_is_released_as_often_as_it_was_held():
    versions, space = Versions(), Space(LAYOUT)
    states = [ServerState(np.full(4, v, np.float32), space, version=v, optimizer={"m": np.ones(4)}) for v in range(3)]
    held = [versions.hold(states[v]) for v in (0, 1, 0, 2)]
    assert held[0] is held[2]
    assert held[0].vector is states[0].vector
    assert (held[0].optimizer, held[0].base, held[0].extra) == ({}, {}, {})  # only what an update is read with
    assert len(versions) == 3
    versions.release(0)
    assert sorted(versions.states) == [0, 1, 2]
    versions.release(0)
    versions.release(2)
    assert sorted(versions.states) == [1] == sorted(versions.held)
    versions.release(1)
    assert len(versions) == 0 == len(versions.held)


# One job


def job(w, client=1, **named):
    tasks = Tasks(w)
    return tasks, tasks.give(client, 0.1, **named)


def test_a_job_is_planned_without_being_computed():
    w = world(wave, 3, network=EQUAL)
    tasks, task = job(w)
    assert (task.job, task.phase, task.sent, task.began, task.done) == (1, 1, 0, 0, 1000)
    assert tasks.peek() == 1000
    assert w.grid.pushes == []
    event = tasks.queue.pop()
    assert (event.priority, event.client, event.data) == (Priority.COMPUTE_DONE, 1, 1)
    tasks.upload(task)
    event = tasks.queue.pop()
    assert (event.time, event.priority) == (1000, Priority.ARRIVE)
    assert w.grid.pushes == []
    reply = tasks.take(task)
    assert w.grid.pushes == [[(1, 1)]]
    assert (tasks.out, tasks.arrived) == ({}, [task])
    np.testing.assert_array_equal(reply.update, wave(1, np.zeros(5, np.float32)))
    assert len(tasks.versions) == 1  # until a server step has used it
    (update,) = tasks.collect(None)
    assert (update.client, update.round, update.start_version, update.sent_ticks, update.arrived_ticks) == (
        1,
        1,
        0,
        0,
        1000,
    )
    assert (len(tasks.versions), tasks.counts, tasks.jobs) == (0, {1: 1}, {1: 1})


def test_the_size_of_an_upload_does_not_depend_on_what_is_computed():
    network = Uniform(seconds_per_step=0.001, latency_s=0, down_mbps=1.0, up_mbps=0.01)
    times = []
    for computed in (False, True):
        for version in (0, 300):
            w = world(wave, 3, network=network)
            w.server = w.server.replace(version=version)
            tasks, task = job(w)
            if computed:
                tasks._compute()
            tasks.queue.pop()
            done = w.clock.now
            tasks.upload(task)
            times.append(tasks.queue.pop().time - done)
    assert len(set(times)) == 1
    assert times[0] > 100_000


def test_updates_are_collected_in_the_order_of_their_arrival():
    w = world(wave, 6, network=F80)
    tasks = Tasks(w)
    for client in (3, 1, 5, 0):
        tasks.give(client, 0.1)
    for task in [tasks.out[c] for c in (5, 3, 1, 0)]:
        tasks.take(task)
    assert [u.client for u in tasks.collect(3)] == [5, 3, 1]
    assert [t.client for t in tasks.arrived] == [0]
    assert [u.client for u in tasks.collect(3)] == [0]


def test_what_came_of_a_job():
    def taken(fault=None, oldest=None, newer=0, **changes):
        w = world(wave, 3, network=EQUAL, faults={(1, 1): fault} if fault else {})
        tasks = Tasks(w, oldest)
        task = tasks.give(1, 0.1)
        for name, value in changes.items():
            setattr(task, name, value)
        w.server = w.server.replace(version=newer)
        result = tasks.take(task)
        assert len(tasks.versions) == (0 if hasattr(result, "reason") else 1)
        assert (task in tasks.arrived) == (not hasattr(result, "reason"))
        return getattr(result, "reason", None), len(w.grid.jobs)

    assert taken() == (None, 1)
    assert taken(lost_at=500) == (Reason.ERROR, 0)
    assert taken(given_up=True) == (Reason.LATE, 1)
    assert taken(oldest=2, newer=2) == (None, 1)
    assert taken(oldest=2, newer=3) == (Reason.STALE, 1)
    assert taken(lambda reply: [Error(0, "crashed")]) == (Reason.ERROR, 1)
    # What a reply is comes before when it came.
    assert taken(lambda reply: [replace(reply, version=9)], given_up=True) == (Reason.VERSION, 1)


def test_an_event_of_a_job_that_is_over_finds_nothing():
    w = world(wave, 3, network=EQUAL)
    tasks, task = job(w)
    assert tasks.find(1, 1) is task
    assert tasks.find(1, 2) is None
    assert tasks.find(0, 1) is None
    tasks.take(task)
    assert tasks.find(1, 1) is None
    assert tasks.give(1, 0.1).job == 2


# Checkpoints

LINKS = {"latency_s": 0.001, "down_mbps": 0.9, "up_mbps": 0.7}
NETWORKS = {
    "bare": F80,
    "links": Linear(seconds_per_step=2e-4, spread=0.8, **LINKS),
    "lossy": Lognormal(
        seconds_per_step=0.02, **LINKS, dropout=0.3, rejoin_s=0.05, server_up_mbps=0.8, server_down_mbps=0.9,
        availability=0.7, availability_period_s=0.5, on_leave="pause",
    ),
}  # fmt: skip
SIZES = [3, 20, 7, 11, 2, 9, 30, 5, 8, 5]
OBSERVED = {"weights": "unbiased", "rates": "observed"}
SCHEDULES = {
    "fedasync": FedAsync(rounds=40, max_staleness=6),
    "fedbuff": FedBuff(rounds=16, buffer=3, deadline_s=0.4, **OBSERVED),
    "fedfix": FedFix(rounds=16, **OBSERVED),
}


def parts_of(w):
    """What `fl.server_app.Server` saves of a world whose clients keep nothing."""
    arrays, server = w.server.parts()
    kept, schedule = w.keep()
    return arrays | kept, {"server": server, "clock": w.clock.now, "schedule": schedule, "fleet": w.fleet.state()}


def restored(folder, w):
    arrays, meta = checkpoint.load(folder)
    w.server = ServerState.from_parts(arrays, meta["server"], w.server.space)
    w.clock = Clock(meta["clock"])
    w.fleet.restore(meta["fleet"])
    w.kept = arrays, meta["schedule"]
    return meta["schedule"]


def resumed_everywhere(tmp_path, schedule, every=1, **given):
    """Play a run, and from a checkpoint of each server step the rest of it; returns what the checkpoints held."""
    whole, parts = [], []
    w = world(wave, 10, **given)
    for event in schedule.run(w):
        whole.append((event, w.server.vector.tobytes()))
        if event["event"] == "round":
            parts.append((len(whole), parts_of(w)))
    held = []
    for place, (arrays, meta) in parts[:-1:every]:
        checkpoint.save(tmp_path, arrays, meta)
        again = world(wave, 10, **given)
        held.append(restored(tmp_path, again))
        rest = [(event, again.server.vector.tobytes()) for event in schedule.run(again)]
        assert rest == whole[place:]
    return held


@pytest.mark.parametrize("network", NETWORKS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_checkpoint_at_any_step_goes_on_to_the_same_end(tmp_path, schedule, network):
    faults = {(2, 1): lambda reply: [replace(reply, update=reply.update * np.nan)]}
    given = {"network": NETWORKS[network], "sizes": SIZES, "per_round": 8, "faults": faults}
    chosen = SCHEDULES[schedule]
    if schedule == "fedfix":
        chosen = replace(chosen, tick_s={"bare": 1.5e-4, "links": 0.003, "lossy": 0.1}[network])
    held = resumed_everywhere(tmp_path, chosen, **given)
    kinds = Counter(k for meta in held for row in meta["out"] for k in ("request", "reply", "rejection") if k in row)
    assert kinds["request"] > 0  # tasks that are not computed yet
    if schedule != "fedfix" or network == "lossy":
        assert kinds["reply"] > 0  # and tasks that are
    if network == "lossy":
        assert any(row["lost_at"] is not None for meta in held for row in meta["out"])


@pytest.mark.parametrize(
    "schedule",
    [FedAsync(rounds=150, weights="unbiased", alpha=0.1), FedFix(rounds=150, tick_s=0.002)],
    ids=["async", "fix"],
)
def test_bytes_that_grow_with_the_version_do_not_move_a_resumed_run(tmp_path, schedule):
    """From version 128 on a version takes a byte more of each message, which is 80 ticks on these links."""
    network = Linear(seconds_per_step=2e-4, spread=0.8, latency_s=0.0, down_mbps=0.1, up_mbps=0.1)
    resumed_everywhere(tmp_path, schedule, every=70, network=network, aggregator=FedAvg(weights="uniform"))


def test_a_checkpoint_after_the_deadline_of_a_job_remembers_it(tmp_path):
    schedule = FedBuff(rounds=30, buffer=2, deadline_s=700e-6)
    held = resumed_everywhere(tmp_path, schedule, network=F80, per_round=4)
    assert any(row["given_up"] for meta in held for row in meta["out"])


def test_states_that_tasks_share_are_saved_once():
    w = world(wave, 10, network=F80)
    run = FedBuff(rounds=3, buffer=4).run(w)
    for _ in range(3):
        next(e for e in run if e["event"] == "round")
    arrays, meta = w.keep()
    versions = {row["version"] for row in meta["out"]}
    assert len(meta["out"]) <= 10
    assert {name for name in arrays if name.startswith("tasks/start/")} == {f"tasks/start/{v}" for v in versions}
    waiting = {row["version"] for row in meta["out"] if "request" in row}
    assert len([name for name in arrays if name.startswith("tasks/state/")]) <= len(waiting)


def test_a_client_that_retired_stays_away_after_a_resume(tmp_path):
    def fault(request):
        return Error(0, f"{BUDGET}: no more") if request.client < 4 and request.round > 1 else None

    held = resumed_everywhere(tmp_path, FedAsync(rounds=40), network=F80, fault=fault)
    assert held[-1]["retired"] == [0, 1, 2, 3]


def test_the_learning_rate_of_work_on_its_way_is_that_of_its_start():
    w = world(wave, 10, network=F80)
    w.local = replace(w.local, lr=1.0, lr_schedule="linear")
    played = play(FedAsync(rounds=40), w)
    assert {r.extra["lr"] for r in w.grid.requests} <= {1 - k / 40 for k in range(40)}
    for e in played.arrivals:
        (request,) = [r for r in w.grid.requests if (r.client, r.round) == (e["client"], e["round"])]
        assert request.extra["lr"] == pytest.approx(1 - e["version"] / 40)


def test_equal_devices_of_a_rate_take_equal_times_at_every_version():
    network = Uniform(seconds_per_step=0.001, **(BARE | {"up_mbps": 0.1}))
    played = play(FedBuff(rounds=200, buffer=2), world(wave, 2, network=network))
    assert {e["staleness"] for e in played.arrivals} == {0}
