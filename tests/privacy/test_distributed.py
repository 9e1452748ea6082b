"""Distributed differential privacy in rounds: what is refused, the noise of a sum, what is claimed and counted."""

import math
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import chi2

from aggregators.fedavg import FedAvg
from clients.adapters.initial.eva import EVA
from clients.adapters.space import Space
from clients.behaviours.base import ReplyFields
from clients.behaviours.faulty import Faulty
from clients.layout import Layout
from fl.errors import ConfigError, RunStopped, ShoalError
from fl.keys import generator
from fl.records import read_events, read_run
from fl.run import resume
from fl.sampling import Fixed
from fl.secure import UNMASK
from fl.state import ServerState
from privacy.discrete import DiscreteNoise
from privacy.distributed import Distributed
from privacy.ledger import spent
from privacy.secure_aggregation.settings import SecAggPlus
from tests.fl.secure_rounds import FEW, SIZE, SPACE, leaks, make, play, remember, update_of, watch
from tests.helpers import SHARED, final, go, rounds
from tests.privacy.test_client_level import settings, state
from tests.test_resume import killed_at, moments, same_end

KINDS = ("skellam", "discrete_gaussian")
UNIFORM = "aggregator.weights=uniform"
PRIVATE = ("privacy=distributed", "secure_aggregation=secagg", "clients.number=6", "local.batch_size=4", UNIFORM)


def fixed(clients: int = 6, rounds: int = 4, secure: SecAggPlus = FEW, **parts):
    """The settings of a run with secure aggregation."""
    return settings(clients, rounds=rounds, sampling=Fixed(), secure_aggregation=secure, **parts)


def guard_of(privacy: Distributed, made=None, space: Space = SPACE):
    made = made or fixed()
    return privacy.guard(made, [5] * made.clients.number, space)


def noisy(z: float, **more) -> Distributed:
    return Distributed(epsilon=None, noise_multiplier=z, **more)


def within_chi_square(values: np.ndarray, std: float) -> bool:
    """Whether independent normal ``values`` have ``std``: a false alarm has probability 1e-7."""
    return chi2.ppf(5e-8, values.size) < np.sum((values / std) ** 2) < chi2.isf(5e-8, values.size)


def clipped_mean(clients, round: int, clip: float) -> np.ndarray:
    plain = [update_of(c, round).astype(np.float64) for c in clients]
    return np.mean([u * min(1.0, clip / np.linalg.norm(u)) for u in plain], axis=0)


# Refusals


REFUSED = {
    "no secure aggregation": ({"secure_aggregation": settings().secure_aggregation}, {}, "secure_aggregation"),
    "weights of examples": ({"aggregator": FedAvg("examples")}, {}, "aggregator.weights"),
    "given weights": ({"aggregator": FedAvg([1.0] * 6)}, {}, "aggregator.weights"),
    "prv": ({}, {"accountant": "prv"}, "privacy.accountant"),
    "pld": ({}, {"accountant": "pld"}, "privacy.accountant"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_accounted_for_is_refused(case):
    parts, more, key = REFUSED[case]
    Distributed().check(fixed())
    with pytest.raises(ConfigError) as caught:
        Distributed(**more).check(replace(fixed(), **parts))
    assert caught.value.key == key


def test_refusals_of_all_mechanisms_at_client_level():
    with pytest.raises(ConfigError, match="adapter.init.source"):
        Distributed().check(replace(fixed(), adapter=replace(fixed().adapter, init=EVA(source="clients"))))
    with pytest.raises(ConfigError, match=r"privacy\.epsilon"):
        Distributed(epsilon=None)


@pytest.mark.parametrize(
    ("privacy", "secure", "text"),
    [
        (noisy(1.0, resolution=2.0**31), FEW, r"privacy\.resolution=2147483648\.0 is not allowed: below 2\^31"),
        (noisy(1.0, resolution=2.0**29), FEW, r"secure_aggregation\.modulus_bits=32 .*at least 3\d bits.*Lower"),
        (noisy(1.0, min_cohort=6), FEW, r"privacy\.min_cohort=6 .* at most 5: 6 clients are asked, and 1 of them"),
    ],
)
def test_plans_that_can_not_work_are_refused_before_training(privacy, secure, text):
    with pytest.raises(ConfigError, match=text):
        guard_of(privacy, fixed(secure=secure))
    guard_of(noisy(1.0, resolution=2.0**29), fixed(secure=replace(FEW, modulus_bits=64)))


@pytest.mark.parametrize(
    ("colluding", "dropout", "clients", "cohort"), [(0.1, 0.3, 6, 3), (0.0, 0.0, 6, 6), (0.07, 0.1, 100, 83)]
)
def test_the_cohort_that_the_noise_is_planned_for(colluding, dropout, clients, cohort):
    """Without those who collude and drop out, rounded as the protocol rounds them: 7 % of 100 are 7."""
    guard = guard_of(noisy(1.0), fixed(clients, secure=SecAggPlus(colluding=colluding, dropout=dropout)))
    assert guard.min_cohort == cohort


# Noise


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("survivors", [4, 6])
def test_the_noise_of_a_decoded_mean(kind, survivors):
    """z C / m at m survivors; with more there is more noise in the sum, of standard deviation z C sqrt(n / m)."""
    z, clip = 1.3, 0.05
    guard = guard_of(noisy(z, clip=clip, kind=kind, min_cohort=3))  # and one that may collude
    world = make(6, guard=guard, lost={("train", c) for c in range(survivors, 6)})
    play(world)
    rest = world.server.vector - clipped_mean(range(survivors), 1, clip)
    std = z * clip * math.sqrt(survivors / 3) / survivors
    assert within_chi_square(rest, std)
    assert not within_chi_square(rest, std * 1.2) and not within_chi_square(rest, std / 1.2)
    again = make(6, guard=guard_of(noisy(z, clip=clip, kind=kind, min_cohort=3)), seed=4)
    play(again)
    assert abs(np.corrcoef(rest, again.server.vector)[0, 1]) < 0.3  # another seed, other noise


@pytest.mark.parametrize("kind", KINDS)
def test_exactly_the_smallest_cohort_has_the_noise_that_is_claimed(kind):
    z, clip = 2.0, 0.1
    guard = guard_of(noisy(z, clip=clip, kind=kind), fixed(secure=SecAggPlus(colluding=0.0, dropout=0.3)))
    assert guard.min_cohort == 4
    world = make(6, secure=SecAggPlus(colluding=0.0, dropout=0.3), guard=guard, lost={("train", 0), ("train", 1)})
    play(world)
    rest = world.server.vector - clipped_mean(range(2, 6), 1, clip)
    assert within_chi_square(rest, z * clip / 4)


def test_every_client_adds_its_own_share_and_another_one_to_another_update():
    guard = guard_of(noisy(1.0))
    codec = guard.codec(SIZE, 1)
    one, other = (codec.encode(np.zeros(SIZE), 1, generator(5, c), {}).view(np.int32) for c in range(2))
    std = math.sqrt(codec.plan.share_variance)
    for share in (one, other):
        assert within_chi_square(share.astype(float), std)
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.2  # above with probability 1e-10
    assert within_chi_square((one.astype(float) - other) / math.sqrt(2), std)


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1e-3, 1.0, 1e6, 1e30])
def test_every_update_is_clipped(scale):
    """Whatever its size: what is encoded has at most the norm that the cost is computed from."""
    plan = guard_of(noisy(1e-9, clip=0.5)).codec(SIZE, 1).plan
    update = (update_of(0, 1) * np.float32(scale)).astype(np.float32)
    codec = guard_of(noisy(1e-9, clip=0.5)).codec(SIZE, 1)
    encoded = codec.encode(update, 1, generator(1), {}).view(np.int32).astype(np.int64)
    assert int(encoded @ encoded) <= plan.squared_l2
    norm = math.sqrt(int(encoded @ encoded)) / plan.scale
    wanted = min(0.5, float(np.linalg.norm(update.astype(np.float64))))
    assert norm == pytest.approx(wanted, abs=2 * math.sqrt(plan.padded) / plan.scale)


def test_an_update_that_is_not_finite_counts_as_zero():
    """The client stays in the sum and adds its noise: who drops out must not depend on data."""
    guard = guard_of(noisy(1e-6, clip=1.0))
    world = make(6, guard=guard, behaviour=Faulty(kind="nan", clients=[2]))
    *_, event = play(world)
    assert (event["accepted"], event["rejected"]) == (6, {})
    expected = clipped_mean([0, 1, 3, 4, 5], 1, 1.0) * 5 / 6
    np.testing.assert_allclose(world.server.vector, expected, atol=1e-4)
    codec = guard.codec(SIZE, 1)
    bad, zero = np.full(SIZE, np.nan, np.float32), np.zeros(SIZE, np.float32)
    same = [codec.encode(u, 1, generator(1), {}).tobytes() for u in (bad, zero)]
    assert same[0] == same[1]


def test_the_phases_of_an_adapter_have_noise_of_one_multiplier():
    """Two phases of two sizes: the larger one prices both."""
    layout = Layout(("A", "B"), ((100,), (60, 10)))
    space = Space(layout, ("A", "B"), (("A",), ("B",)))
    guard = guard_of(noisy(1.0, kind="skellam"), space=space)
    small, large = guard.codec(100, 1), guard.codec(600, 2)
    assert (small.length, large.length) == (128, 1024)
    assert small.plan.noise_multiplier == large.plan.noise_multiplier == 1.0
    assert small.plan.squared_l2 < large.plan.squared_l2 == guard.book.running.squared_l2


# What a round opens


def test_a_sum_of_too_few_for_the_claimed_noise_is_not_unmasked():
    guard = guard_of(noisy(1.0))
    assert guard.codec(SIZE, 1).least == 3 + 1
    world = make(6, guard=guard, lost={("train", c) for c in (0, 1, 2)})
    with pytest.raises(RunStopped, match="3 masked updates, and 4 are needed") as caught:
        play(world)
    assert caught.value.exit_code == 3
    assert all(m.content["header"].get("extra.stage") != UNMASK for m in world.grid.sent)
    assert guard.book.steps == 0
    enough = make(6, guard=guard, lost={("train", c) for c in (0, 1)})
    play(enough)
    assert guard.book.steps == 1


def test_a_sum_that_masks_were_left_in_is_refused():
    codec = guard_of(noisy(1.0)).codec(SIZE, 1)
    total = sum(codec.encode(update_of(c, 1), 1, generator(2, c), {}) for c in range(6))
    codec.decode(total, 6)
    uniform = generator(3).integers(0, 2**32, codec.length, dtype=np.uint32)
    with pytest.raises(ShoalError, match="not the sum of 6"):
        codec.decode(uniform, 6)


@pytest.mark.parametrize("kind", KINDS)
def test_the_server_never_sees_a_single_update(kind, monkeypatch):
    remember(monkeypatch)
    world = make(6, guard=guard_of(noisy(0.01, clip=100.0, kind=kind)), lost={("train", 1), (UNMASK, 2)})
    pulled, held, _ = watch(world)
    assert leaks(pulled, range(6), 1, 7 / SIZE**0.5) == []
    assert leaks(held, range(6), 1, 0.8) == []


# What is claimed


def test_what_sums_cost():
    made = fixed(rounds=5)
    guard = guard_of(noisy(1.1, clip=2.0, delta=1e-3), made)
    plan = DiscreteNoise(SIZE, 2.0, 1.1, 2.0**15, 6, 3, 32, "skellam", True)
    assert guard.book.running == plan.release()
    for done in range(3):
        assert guard.epsilon == pytest.approx(0 if done == 0 else spent((plan.release(done),), 1e-3, "rdp"))
        world = make(6, guard=guard)
        world.server = state(SPACE).replace(round=done, version=done, vector=np.zeros(SIZE, np.float32))
        play(world, done + 1)


def test_a_round_that_is_done_again_costs_nothing_more_and_one_beyond_the_budget_is_refused():
    guard = guard_of(noisy(1.0), fixed(rounds=2))
    server = ServerState(np.zeros(SIZE), SPACE)
    guard.collect(server, ["a sum"], 1, 0.1)
    guard.collect(server, ["a sum"], 1, 0.1)
    assert guard.book.steps == 1
    guard.collect(server, [], 2, 0.1)
    assert guard.book.steps == 1  # no sum was opened
    guard = guard_of(Distributed(epsilon=1e-3, noise_multiplier=1.0))
    assert guard.book.limit == 0 and "epsilon 0.001" in guard.stopped()
    with pytest.raises(ShoalError, match="budget is spent"):
        guard.collect(server, ["a sum"], 1, 0.1)


def test_the_books_of_other_settings_are_refused():
    guard, other = guard_of(noisy(1.0)), guard_of(noisy(1.1))
    guard.collect(ServerState(np.zeros(SIZE), SPACE), ["a sum"], 1, 0.1)
    same = guard_of(noisy(1.0))
    same.restore(guard.state())
    assert same.epsilon == guard.epsilon > 0
    with pytest.raises(ConfigError, match="settings that the budget was spent under"):
        other.restore(guard.state())


@pytest.mark.parametrize("kind", KINDS)
def test_the_statement_is_complete(kind):
    guard = guard_of(Distributed(epsilon=2.0, delta=1e-2, clip=0.3, kind=kind), fixed(rounds=3))
    made = guard.statement()
    assert made.unit == "client" and made.target == 2.0 and made.delta == 1e-2
    assert "to zero" in made.relation and "still adds its noise" in made.relation
    assert "who takes part is public" in made.relation
    assert "no amplification" in made.sampling and "6 clients" in made.sampling
    assert "C = 0.3" in made.clipping and "whole update" in made.clipping
    assert {"skellam": "Skellam", "discrete_gaussian": "discrete Gaussian"}[kind] in made.noise
    assert "3 honest clients" in made.noise and "seed" in made.noise
    assert "the server with up to 1 clients" in made.against and "keep to the protocol" in made.against
    (row,) = made.holders
    assert (row["clients"], row["steps"], row["delta"]) == (6, 0, 1e-2)
    text = made.text()
    for part in (made.mechanism, made.relation, made.sampling, made.clipping, made.noise, made.against):
        assert part.rstrip(".") in text


def test_a_target_is_reached_and_not_exceeded():
    guard = guard_of(Distributed(epsilon=2.0, delta=1e-2), fixed(rounds=3))
    assert 1.98 < spent((guard.book.running.of(3),), 1e-2, "rdp") <= 2.0
    assert guard.book.limit == 3


def test_nothing_but_the_update_leaves_a_client():
    made = ReplyFields(1, 1, 0, "x", np.zeros(SIZE, np.float32), 77, 3, 500, 0.5)
    out = guard_of(noisy(1.0)).release(made, np.arange(SIZE))
    assert (out.examples, out.tokens, out.loss) == (1, 0, None)


# Whole runs


def test_a_run_says_what_was_spent_and_stops_at_its_budget(tmp_path):
    """1.5 rounds' worth of budget: one round is run."""
    guard = guard_of(noisy(3.0, delta=1e-2))
    target = 1.2 * spent((guard.book.running.of(1),), 1e-2, "rdp")
    words = ["privacy.noise_multiplier=3", "privacy.delta=0.01", f"privacy.epsilon={target}", "schedule.rounds=3"]
    more = ("secure_aggregation.dropout=0.3",)
    done = go(tmp_path / "run", *PRIVATE, *words, *more)
    assert len(rounds(tmp_path / "run")) == 1
    events = read_events(tmp_path / "run")
    (stop,) = [e for e in events if e["event"] == "stop"]
    assert "privacy budget" in stop["reason"]
    found = read_run(tmp_path / "run")["privacy_statement"]
    assert 0 < found["epsilon"] == final(tmp_path / "run")["epsilon"] <= target
    assert found["holders"][0]["steps"] == 1
    assert "still adds its noise" in done.run["privacy"] and "never a single one" in done.run["privacy"]


def test_a_run_that_is_killed_ends_the_same(tmp_path):
    more = (
        *PRIVATE,
        "network=lognormal",
        "network.dropout=0.03",
        "secure_aggregation.dropout=0.4",
        "schedule.rounds=3",
    )
    total = moments(tmp_path / "whole", *more)
    k = 2 * total // 3
    killed_at(k, tmp_path / "cut", *more)
    resume(tmp_path / "cut", shared=SHARED, quiet=True)
    same_end(tmp_path / "cut", tmp_path / "whole")
    assert final(tmp_path / "whole")["epsilon"] > 0


def test_dp_sgd_under_secure_aggregation(tmp_path):
    """Both hold at once: the noise of each client is in the sum, and the statement covers both."""
    words = ("clients.number=6", "local.batch_size=4", UNIFORM, "privacy=dp_sgd", "privacy.noise_multiplier=1")
    plain = go(tmp_path / "plain", *words, "privacy.epsilon=null", "schedule.rounds=1")
    secure = go(tmp_path / "run", *words, "privacy.epsilon=null", "schedule.rounds=1", "secure_aggregation=secagg")
    assert secure.run["final"]["epsilon"] == plain.run["final"]["epsilon"] > 0
    assert secure.run["final"]["loss"] == pytest.approx(plain.run["final"]["loss"], rel=1e-4)
    text = secure.run["privacy"]
    assert text.startswith(plain.run["privacy"]) and "SecAgg+" in text
