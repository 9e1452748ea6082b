"""Unlimited staleness: which updates are inverted, when inversion ends, what is kept, and what is refused."""

from __future__ import annotations

import os
import signal
from dataclasses import fields

import numpy as np
import pytest
import torch

from aggregators.inversion import Inversion, Inverted, waves
from aggregators.staleness import Treatment
from clients.adapters.space import Space
from clients.inversion import Estimate, Inverter, Search
from clients.layout import Layout
from clients.local.optimizers import SGD
from clients.local.proximal import FedProx
from clients.local.training import LocalTraining, Work
from clients.worker import Worker
from fl import checkpoint
from fl.compose import compose
from fl.errors import ConfigError
from fl.experiment import Experiment, Settings
from fl.records import RunFolder
from fl.run import resume
from fl.state import ServerState, Update
from tests.helpers import ENCODER, SHARED, go, rounds, same_metrics, weights

SPACE = Space(Layout(("theta",), ((4,),)))
RUN = (
    "schedule=fedfix", "schedule.rounds=9", "schedule.tick_s=1", "network=uniform", "network.slow_clients=[3]",
    "network.slow_factor=4", "network.seconds_per_step=0.2", "network.latency_s=0", "local=sgd", "local.steps=3",
    "local.batch_size=64", "local.lr=0.1", "model.head_std=0.2", "aggregator.staleness=inversion",
)  # fmt: skip
QUICK = ("aggregator.staleness.iterations=8", "aggregator.staleness.samples=4", "aggregator.staleness.tokens=4")


class Linear:
    """Stands for an `Inverter` of clients whose update is ``D - w / 2``: an estimate of D is off by ``error``."""

    def __init__(self, error: float = 0.0, distance: float = 0.1):
        self.error, self.distance = error, distance
        self.begun: list[float] = []

    def use(self, base):
        pass

    def first(self, client: int) -> Estimate:
        return Estimate(np.full((1, 1, 4), -9.0, np.float32), np.zeros((1, 1), np.float32))

    def invert(self, starts, deltas, first, columns=None):
        self.begun += [float(f.x[0, 0, 0]) for f in first]
        found = [(d + s / 2 + self.error)[None, None].astype(np.float32) for s, d in zip(starts, deltas, strict=True)]
        return [Estimate(x, np.zeros((1, 1), np.float32)) for x in found], [self.distance] * len(starts)

    def changes(self, starts, estimates, columns=None):
        return [(e.x[0, 0] - s / 2).astype(np.float32) for s, e in zip(starts, estimates, strict=True)]


def server(version: int) -> ServerState:
    return ServerState(np.full(4, version, np.float32), SPACE, version=version)


def update(client: int, version: int, data: float | None = None, job: int = 1) -> Update:
    """What ``client``, with the data D = 10 (client + 1), sends from the server's ``version``."""
    start = np.full(4, version, np.float32)
    vector = np.full(4, 10.0 * (client + 1) if data is None else data, np.float32) - start / 2
    return Update(client, job, version, vector, 5, start=start, loss=0.5)


def treatment(inverter: Linear | None = None, **settings) -> Inverted:
    return Inverted(Inversion(**settings), inverter or Linear())  # type: ignore[arg-type]


def test_a_stale_update_becomes_what_its_estimated_data_give_from_the_present_version():
    old, new = update(0, 2), update(1, 8)
    found = treatment().apply(server(8), [old, new])
    np.testing.assert_array_equal(found[0].vector, 10 - np.full(4, 8) / 2)
    same = [f.name for f in fields(Update) if f.name not in ("vector", "start", "start_version")]
    assert [getattr(found[0], n) for n in same] == [getattr(old, n) for n in same] and found[0].start_version == 8
    np.testing.assert_array_equal(found[0].start, server(8).vector)
    assert found[1] is new


@pytest.mark.parametrize(("least", "inverted"), [(1, 2), (3, 2), (4, 1), (7, 0)])
def test_young_updates_are_left_alone(least, inverted):
    made = treatment(min_staleness=least)
    updates = [update(0, 5), update(1, 2), update(2, 8)]
    found = made.apply(server(8), updates)
    assert sum(f is not u for f, u in zip(found, updates, strict=True)) == inverted == made.numbers()["inverted"]
    assert found[2] is updates[2]
    assert made.numbers() == {
        "inverted": 0, "inversion_distance": None, "inversion_error": None, "staleness_error": None
    }  # fmt: skip


@pytest.mark.parametrize("distance", [1.0, 1.5, float("inf"), float("nan")])
def test_an_estimate_that_explains_nothing_is_not_used(distance):
    made, stale = treatment(Linear(distance=distance)), update(0, 2)
    assert made.apply(server(8), [stale]) == [stale]
    assert not made.known and made.numbers()["inverted"] == 0


def test_the_errors_are_measured_on_the_next_update_of_the_client():
    """The estimate is off by the error, and the stale update by half of what the server has moved since."""
    made = treatment(Linear(error=0.25))
    made.apply(server(8), [update(0, 2), update(1, 3)])
    assert made.pairs == []
    made.apply(server(11), [update(0, 8)])
    assert made.pairs == [(4 * 0.25, 4 * (8 - 2) / 2)]
    made.apply(server(20), [update(1, 11, data=27.0), update(0, 20)])
    assert made.pairs[1:] == [(4 * 0.25, 4 * (20 - 8) / 2), (4 * (7 - 0.25), 4 * abs(-7 + (11 - 3) / 2))]
    numbers = made.numbers()
    assert numbers["inversion_error"] == pytest.approx((1 + 1 + 27) / 3)
    assert numbers["staleness_error"] == pytest.approx((12 + 24 + 12) / 3)


def steps_until_the_switch(made: Inverted, most: int = 12) -> tuple[int | None, list[bool]]:
    """One client that comes back every 3 versions; at which version inversion ends, and whether each was inverted."""
    inverted = []
    for version in range(3, 3 * most, 3):
        sent = update(0, version - 3)
        inverted.append(made.apply(server(version), [sent])[0] is not sent)
    return made.stopped, inverted


def test_inversion_ends_once_its_error_is_the_larger_one():
    """E2 is 6 each time, and E1 four times the error."""
    assert steps_until_the_switch(treatment(Linear(error=1.4), window=3)) == (None, [True] * 11)
    made = treatment(Linear(error=1.6), window=3)
    stopped, inverted = steps_until_the_switch(made)
    assert (stopped, inverted) == (12, [True] * 3 + [False] * 8)
    assert made.known == {}
    assert steps_until_the_switch(treatment(Linear(error=1.6), window=3, switch_ratio=1.1))[0] is None
    assert steps_until_the_switch(treatment(Linear(error=1.4), window=5, switch_ratio=0.9))[0] == 18


def test_the_window_forgets():
    made = treatment(Linear(error=9.0), window=2, switch_ratio=5)
    made.pairs = [(1.0, 1e9)]
    steps_until_the_switch(made, 5)
    assert made.stopped == 9 and made.pairs == [(36, 6), (36, 6)]


def test_the_hand_over_is_gradual():
    made = treatment(handover=3)
    assert made.share(10) == 1
    made.stopped = 10
    assert [made.share(v) for v in (10, 11, 12, 13, 20)] == [0.75, 0.5, 0.25, 0, 0]
    stale = update(0, 4)
    found = made.apply(server(11), [stale])[0]
    np.testing.assert_allclose(found.vector, (stale.vector + update(0, 11).vector) / 2)
    assert made.apply(server(13), [stale]) == [stale]


def test_the_search_goes_on_from_the_clients_last_estimate():
    inverter = Linear(error=0.5)
    made = treatment(inverter)
    made.apply(server(5), [update(0, 1), update(2, 1)])
    made.apply(server(9), [update(2, 5), update(1, 5)])
    assert inverter.begun == [-9, -9, -9, 30.5]


def test_only_the_clients_heard_last_are_kept():
    made = treatment(max_clients=2)
    for version, client in ((3, 0), (4, 1), (5, 0), (6, 2)):
        made.apply(server(version), [update(client, version - 2)])
    assert list(made.known) == [0, 2]


def test_what_is_done_does_not_depend_on_the_order_of_arrivals():
    sent = [update(c, v, job=v) for c, v in ((1, 2), (0, 5), (0, 2), (2, 3), (1, 4))]
    found = []
    for order in (sent, sent[::-1]):
        made = treatment(Linear(error=0.3), window=2)
        out = made.apply(server(9), order)
        assert [(u.client, u.round) for u in out] == [(u.client, u.round) for u in order]
        found.append((made.pairs, {(u.client, u.round): u.vector.tolist() for u in out}))
    assert found[0] == found[1]
    assert [[(u.client, u.start_version) for u in wave] for wave in waves(sent)] == [
        [(0, 2), (1, 2), (2, 3)], [(0, 5), (1, 4)]
    ]  # fmt: skip


def test_a_client_s_second_update_of_a_step_is_measured_against_its_first():
    made = treatment(Linear(error=0.5))
    made.apply(server(9), [update(0, 5), update(0, 2)])
    assert made.pairs == [(4 * 0.5, 4 * (5 - 2) / 2)]


def test_the_stale_error_is_that_of_the_client_s_last_update_though_it_was_young():
    made = treatment(Linear(error=0.5), min_staleness=3)
    made.apply(server(5), [update(0, 1)])
    young = update(0, 5)
    assert made.apply(server(6), [young]) == [young]
    made.apply(server(9), [update(0, 6)])
    assert made.pairs == [(4 * 0.5, 4 * (5 - 1) / 2), (4 * 0.5, 4 * (6 - 5) / 2)]


def test_a_run_that_goes_on_knows_that_inversion_has_ended():
    made, other = treatment(Linear(error=9.0), window=1), treatment(Linear(error=9.0), window=1)
    stopped, _ = steps_until_the_switch(made)
    other.restore(*made.parts())
    assert stopped == 6 == other.stopped and other.share(40) == 0


def test_a_checkpoint_keeps_what_matters_bit_for_bit(tmp_path):
    made, other = (treatment(Linear(error=0.3), window=4) for _ in range(2))
    for version in (4, 7):
        made.apply(server(version), [update(0, version - 3), update(1, version - 2)])
    arrays, meta = made.parts()
    checkpoint.save(tmp_path, arrays | {"server/vector": np.zeros(3)}, {"treatment": meta})
    loaded = checkpoint.load(tmp_path)
    assert loaded is not None
    other.restore(loaded[0], loaded[1]["treatment"])
    assert list(other.known) == list(made.known) == [0, 1] and other.pairs == made.pairs
    for one, two in zip(made.parts()[0].values(), other.parts()[0].values(), strict=True):
        assert one.tobytes() == two.tobytes() and one.dtype == two.dtype
    for version in (10, 13, 16):
        sent = [update(0, version - 3), update(1, version - 2)]
        mine, theirs = made.apply(server(version), sent), other.apply(server(version), sent)
        assert [u.vector.tobytes() for u in mine] == [u.vector.tobytes() for u in theirs]
    assert made.stopped == other.stopped


def test_the_factor_is_one():
    assert not Inversion().weighs and Inversion().factor(50) == 1


# With the model itself.


def experiment(*more: str) -> Experiment:
    return Experiment(Settings.of(compose([*ENCODER, *RUN, *more])[0]), SHARED)


def test_on_a_model_the_estimate_foretells_what_the_client_would_have_sent():
    """A client that alone has a class, while the server has gone on with others who have not."""
    made = experiment("aggregator.staleness.iterations=120")
    treated, local = made.settings.aggregator.staleness.treatment(made), made.settings.local
    worker = Worker(made.cohort(torch.float32, "sdpa", "cpu"), {"train": made.data.train}, local, seed=0)
    owned = made.data.train.labels == 2
    mine, others = np.flatnonzero(owned)[:40], np.flatnonzero(~owned)[:100]

    def sent(start: np.ndarray, examples: np.ndarray) -> np.ndarray:
        return worker.fit([Work(0, 1, start, [examples] * 3, local.lr)])[0].state - start

    old = worker.cohort.initial.numpy()
    for _ in range(20):
        old = old + sent(old, np.concatenate([mine, others]))
    new = old
    for _ in range(15):
        new = new + sent(new, others)
    stale = Update(0, 1, 3, sent(old, mine), len(mine), start=old)
    fresh = treated.apply(ServerState(new, worker.cohort.space, version=9), [stale])[0]
    truth = sent(new, mine)
    assert np.abs(fresh.vector - truth).sum() < 0.7 * np.abs(stale.vector - truth).sum()
    distance = treated.numbers()["inversion_distance"]
    assert distance is not None and 0 < distance < 0.2


def test_frozen_factors_stay_and_the_update_has_the_columns_that_train():
    made = experiment("adapter=ffa", *QUICK)
    treated = made.settings.aggregator.staleness.treatment(made)
    assert isinstance(treated, Inverted)
    space = treated.inverter.cohort.space
    columns = space.columns(space.trains(1))
    assert len(columns) < space.layout.size
    old = treated.inverter.cohort.initial.numpy()
    delta = treated.inverter.changes([old], [treated.inverter.first(7)], columns)[0]
    stale = Update(0, 1, 0, delta, 5, columns=columns, start=old)
    fresh = treated.apply(ServerState(old + np.float32(0.01), space, version=2), [stale])[0]
    assert fresh is not stale and fresh.vector.shape == columns.shape and fresh.columns is columns
    assert fresh.vector.dtype == np.float32


def test_a_run_says_what_was_inverted_and_goes_on_bit_for_bit_after_it_was_killed(tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    go(whole, *RUN, *QUICK)
    inverted = {e["round"]: e["inverted"] for e in rounds(whole)}
    assert inverted[3] == 1 and sum(inverted.values()) == 3
    assert any(e["staleness_error"] is not None for e in rounds(whole))
    child = os.fork()
    if child == 0:
        append = RunFolder.append

        def dying(folder, event):
            append(folder, event)
            if event["event"] == "round" and event["round"] == 7:
                os.kill(os.getpid(), signal.SIGKILL)

        RunFolder.append = dying  # type: ignore[method-assign]
        try:
            go(cut, *RUN, *QUICK)
        finally:
            os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    resume(cut, quiet=True, shared=SHARED)
    assert weights(cut) == weights(whole)
    assert same_metrics(cut, whole)


def test_without_stale_updates_a_run_is_the_one_without_inversion(tmp_path):
    still = ("network.slow_clients=null", *QUICK)
    go(tmp_path / "a", *RUN, *still)
    go(tmp_path / "b", *RUN, *[w for w in still if "staleness" not in w], "aggregator.staleness=constant")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert {e["inverted"] for e in rounds(tmp_path / "a")} == {0}


REFUSED = [
    (["secure_aggregation=secagg"], "secure_aggregation"),
    (["privacy=central", "privacy.epsilon=5"], "privacy"),
    (["local=adamw"], "local"),
    (["local=momentum", "local/optimizer=adamw"], "local"),
    (["local.lr_schedule=cosine"], "local.lr_schedule"),
    (["local.lr_warmup_rounds=2"], "local.lr_schedule"),
    (["model.dropout=0.1"], "model.dropout"),
    (["adapter.dropout=0.1"], "model.dropout"),
    (["adapter.rank=[2,4]", "adapter.alpha=[4,8]"], "adapter"),
    (["adapter=rolora"], "adapter"),
    (["aggregator=fedex", "aggregator/staleness=inversion"], "aggregator"),
    (["adapter=ffa", "aggregator=fedsvd", "aggregator/staleness=inversion"], "aggregator"),
]


@pytest.mark.parametrize(("words", "key"), REFUSED, ids=lambda v: v[0] if isinstance(v, list) else v)
def test_what_can_t_be_inverted_is_refused_before_anything_loads(words, key):
    settings = Settings.of(compose([*ENCODER, *RUN])[0])
    changed = _settings(words)
    with pytest.raises(ConfigError, match="aggregator.staleness=inversion") as refusal:
        Inversion().check(changed)
    assert refusal.value.key == key
    assert str(refusal.value).endswith(("aggregator.staleness.", "local=sgd."))
    Inversion().check(settings)


def _settings(words: list[str]) -> Settings:
    """The settings with nobody asked whether they go together."""
    from fl.config import build

    return build(compose([*ENCODER, *RUN, *words])[0], "", Settings)


@pytest.mark.parametrize(
    "words",
    [
        ["privacy=dp_sgd"],
        ["privacy=local", "privacy.epsilon=50"],
        ["local=fedprox", "local/optimizer=sgd"],
        ["local.clip_norm=1"],
        ["local=momentum"],
    ],
    ids=str,
)
def test_noise_that_is_in_the_update_and_algorithms_that_unroll_are_welcome(words):
    Inversion().check(_settings(words))


def test_clients_must_take_all_their_examples_at_every_step():
    made = experiment("local.batch_size=40")
    largest = max(len(p) for p in made.data.parts)
    assert largest > 40
    with pytest.raises(ConfigError, match=rf"local.batch_size=40 .*at least {largest}, all examples of a client"):
        made.settings.aggregator.staleness.treatment(made)


def test_too_few_coordinates_to_match_are_refused_with_the_count():
    made = experiment(*QUICK, "aggregator.staleness.matched=0.1")
    with pytest.raises(ConfigError, match=r"matched=0.1 .*524 numbers of 4 samples of 4 tokens: this keeps 3\d\d of"):
        made.settings.aggregator.staleness.treatment(made)
    enough = experiment(*QUICK, "aggregator.staleness.matched=0.5")
    assert isinstance(enough.settings.aggregator.staleness.treatment(enough), Treatment)


def test_fedprox_and_plain_training_give_other_estimates():
    """The inverter has the client's own algorithm, not a fixed one."""
    made = experiment(*QUICK)
    cohort = made.cohort(torch.float32, "eager", "cpu")
    changes = []
    for local in (LocalTraining(steps=3, lr=0.1, optimizer=SGD()), FedProx(steps=3, lr=0.1, optimizer=SGD(), mu=2.0)):
        inverter = Inverter(cohort, local, Search(), 4, 4, seed=0)
        changes.append(inverter.changes([cohort.initial.numpy()], [inverter.first(0)])[0])
    assert np.abs(changes[1]).sum() < 0.95 * np.abs(changes[0]).sum()
