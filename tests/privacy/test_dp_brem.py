"""DP-BREM: what one example and one client can do to the server's momentum, the noise on it, and what is spent."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant
from scipy.stats import chi2

from aggregators.dp_brem import CENTRE
from clients.adapters.space import Space
from clients.layout import Layout
from clients.local.client_momentum import ClientMomentum
from clients.local.training import Work
from clients.worker import Worker
from fl.compose import compose
from fl.errors import ConfigError, ShoalError
from fl.experiment import Settings
from fl.run import resume
from fl.schedules.synchronous import Synchronous
from fl.state import ServerState, Update
from privacy.accounting import ORDERS
from privacy.base import BudgetSpent
from privacy.dp_brem import DPBREM, DPBREMGuard, centred_mean, clipped
from tests.helpers import ENCODER, final, go, rounds, same_metrics, vector, weights
from tests.oracles.cohorts import build
from tests.oracles.models import token_set

WORDS = ("local=client_momentum", "local.steps=1", "aggregator=dp_brem", "privacy=dp_brem", "privacy.rate=0.3")
SIZES = [40, 100, 250]


def settings(*more: str) -> Settings:
    return Settings.of(compose([*ENCODER, *WORDS, *more])[0])


def guard(*more: str, sizes: list[int] = SIZES) -> DPBREMGuard:
    s = settings(*more)
    assert isinstance(s.privacy, DPBREM)
    return DPBREMGuard(s.privacy, s, sizes)


# What one client can do.


def test_clipping_gives_the_nearest_point_of_the_ball():
    rng = np.random.default_rng(0)
    for scale in (1e-3, 0.3, 1.0, 7.0, 1e30):
        v = scale * rng.normal(size=50)
        length, found = np.linalg.norm(v), clipped(v, 2.0)
        np.testing.assert_allclose(found, v * min(1.0, 2.0 / length), rtol=1e-14)
        assert np.linalg.norm(found) <= 2.0 * (1 + 1e-14)
    assert clipped(np.zeros(3), 2.0).tolist() == [0, 0, 0]
    assert clipped(np.full(3, 9.0), None).tolist() == [9, 9, 9]


def test_clipping_enlarges_no_distance():
    rng = np.random.default_rng(1)
    for _ in range(2000):
        v = rng.normal(size=4) * rng.exponential(2.0)
        w = v + rng.normal(size=4) * 10 ** rng.uniform(-6, 1)
        assert np.linalg.norm(clipped(v, 1.0) - clipped(w, 1.0)) <= np.linalg.norm(v - w) * (1 + 1e-9)


def test_without_a_clip_the_centre_is_the_mean_of_the_momenta():
    momenta, centre = np.random.default_rng(2).normal(size=(5, 7)), np.full(7, 3.0)
    np.testing.assert_allclose(centred_mean(momenta, centre, None), momenta.mean(0), rtol=1e-12, atol=1e-14)


def test_whatever_clients_send_moves_the_centre_by_c_and_k_of_n_by_2_k_c_over_n():
    rng = np.random.default_rng(3)
    centre, honest = rng.normal(size=9), rng.normal(size=(10, 9))
    for scale in (0.1, 1.0, 1e30):
        sent = np.concatenate([honest[:7], scale * rng.normal(size=(3, 9))])
        moved = centred_mean(sent, centre, 0.5)
        assert np.linalg.norm(moved - centre) <= 0.5 * (1 + 1e-12)
        assert np.linalg.norm(moved - centred_mean(honest, centre, 0.5)) <= 2 * 3 * 0.5 / 10 * (1 + 1e-12)
    # Both bounds are reached: all in one direction; from one side to the other.
    away = centre + 9 * np.eye(9)[0]
    assert np.linalg.norm(centred_mean([away] * 4, centre, 0.5) - centre) == pytest.approx(0.5)
    other = centred_mean([away] * 3 + [2 * centre - away], centre, 0.5)
    assert np.linalg.norm(other - centred_mean([away] * 4, centre, 0.5)) == pytest.approx(2 * 0.5 / 4)


# What one example can do: the real client code on two data sets, with the others' draws equal.


@pytest.mark.parametrize(("clip", "record_clip"), [(None, 0.05), (0.02, 0.05), (0.004, 50.0)])
def test_one_example_moves_the_clipped_sum_by_its_share_of_the_momentum_at_most(clip, record_clip):
    beta, rate, examples, steps = 0.8, 0.4, 12, 10
    cohort, data, local = (
        build("bert", dtype=torch.float32),
        token_set("classification", examples),
        ClientMomentum(beta=beta),
    )
    worker = Worker(cohort, {"train": data}, local, seed=0)
    watch = guard(
        "privacy.noise_multiplier=1", "privacy.epsilon=null", f"privacy.record_clip={record_clip}", sizes=[examples]
    )
    rng = np.random.default_rng(4)
    theta, centre = cohort.initial.numpy().astype(np.float32), np.zeros(cohort.layout.size)
    mine, theirs, share, ratios = {}, {}, 0.0, []
    for step in range(1, steps + 1):
        drawn = rng.random(examples) < rate
        drawn[0] = step % 4 == 2  # the example that only one side has
        both = []
        for memory, batch in ((mine, np.flatnonzero(drawn)), (theirs, np.flatnonzero(drawn[1:]) + 1)):
            private = replace(watch.private(0, (0, step), memory), expected=rate * examples)
            both.append(worker.fit([Work(0, step, theta, [batch], 0.3, memory, private=private)])[0])
        mine, theirs = both[0].memory, both[1].memory
        share = beta * share + (1 - beta) * drawn[0]
        sums = [centred_mean([fit.sent.astype(np.float64) / -0.3], centre, clip) for fit in both]
        bound = min(np.inf if clip is None else 2 * clip, record_clip / (rate * examples) * share)
        shift = np.linalg.norm(sums[0] - sums[1])
        assert shift <= bound * (1 + 1e-4) + 1e-7
        ratios.append(shift / bound if bound else 0.0)
        # The same released values on both sides: from the first, with noise.
        centre = sums[0] + 0.01 * rng.normal(size=len(centre))
        theta = theta - (0.3 * centre).astype(np.float32)
    assert ratios[0] == 0  # it has not taken part yet
    if clip is None:
        assert ratios[1] == pytest.approx(1, rel=1e-3)  # the bound is reached


# Noise and the server's half.

SPACE = Space(Layout(("theta",), ((20_000,),)))


def phi(watch: DPBREMGuard, vectors: np.ndarray, round: int = 1, lr: float = 0.5, centre: float = 0.0) -> np.ndarray:
    extra = {CENTRE: np.full(20_000, centre)} if centre else {}
    server = ServerState(np.zeros(20_000, np.float32), SPACE, extra=extra)
    updates = [Update(c, round, 0, v, 7) for c, v in enumerate(vectors)]
    found = watch.collect(server, updates, round, lr)
    assert len(found) == 1
    np.testing.assert_array_equal(found[0].vector, -lr * found[0].extra[CENTRE])
    return found[0].extra[CENTRE]


@pytest.mark.parametrize("number", [1, 3])
def test_the_noise_of_the_sum_is_r_sigma_whatever_the_number_of_clients(number):
    watch = guard(
        "privacy.noise_multiplier=0.7", "privacy.epsilon=null", "privacy.record_clip=2", "privacy.client_clip=0.5"
    )
    sent = 0.01 * np.random.default_rng(5).normal(size=(number, 20_000)).astype(np.float32)
    quiet = centred_mean(sent.astype(np.float64) / -0.5, np.full(20_000, 0.1), 0.5)
    noise = number * (phi(watch, sent, centre=0.1) - quiet)
    # chi-square with 20,000 degrees of freedom; fails for one seed in ten million
    low, high = chi2.ppf([5e-8, 1 - 5e-8], 20_000) * 1.4**2
    assert low < (noise**2).sum() < high
    assert abs(noise.mean()) < 5.4 * 1.4 / np.sqrt(20_000)


def test_no_reply_is_so_large_that_it_swallows_the_noise():
    """In a plain mean, a number of 1e30 would round all others and the noise away: what is left tells of examples."""
    watch = guard("privacy.noise_multiplier=0.7", "privacy.epsilon=null", "privacy.client_clip=null")
    sent = np.zeros((2, 20_000), np.float32)
    sent[0] = 1e30
    noise = 2 * phi(watch, sent) + (1 / 0.3) / np.sqrt(20_000)  # it counts as the longest honest one, R/p
    low, high = chi2.ppf([5e-8, 1 - 5e-8], 20_000) * 0.7**2  # one seed in ten million
    assert low < (noise**2).sum() < high


def test_the_same_round_has_the_same_noise_and_any_other_content_or_round_its_own():
    watch = guard("privacy.noise_multiplier=1", "privacy.epsilon=null", "privacy.client_clip=null")
    sent = np.zeros((2, 20_000), np.float32)
    first = phi(watch, sent)
    np.testing.assert_array_equal(phi(watch, sent), first)
    changed = sent.copy()
    changed[0, 0] = 1e-3
    for other in (phi(watch, sent, round=2), phi(watch, changed), phi(watch, sent[:1]), phi(watch, sent, centre=1e-3)):
        # of independent draws: |r| below 6/sqrt(20,000), two in a billion above
        assert abs(np.corrcoef(first, other)[0, 1]) < 6 / np.sqrt(20_000)


def test_no_update_gives_no_step_and_the_order_of_arrivals_does_not_matter():
    watch = guard("privacy.noise_multiplier=1", "privacy.epsilon=null")
    server = ServerState(np.zeros(20_000, np.float32), SPACE)
    assert watch.collect(server, [], 1, 0.5) == []
    rng = np.random.default_rng(6)
    updates = [Update(c, 1, 0, rng.normal(size=20_000).astype(np.float32), 7) for c in range(3)]
    one, two = (watch.collect(server, order, 1, 0.5)[0].vector for order in (updates, updates[::-1]))
    np.testing.assert_array_equal(one, two)


# What is spent.


def test_noise_counts_in_units_of_what_one_example_of_the_client_moves():
    watch = guard("privacy.noise_multiplier=0.5", "privacy.epsilon=null", "privacy.record_clip=3")
    assert [book.running.noise_multiplier for book in watch.books.values()] == pytest.approx([6.0, 15.0, 37.5])
    assert [watch.private(c, (0,), {}).expected for c in range(3)] == pytest.approx([12.0, 30.0, 75.0])
    assert watch.private(0, (0,), {}).noise == 0
    assert watch.private(0, (0,), {}).clip == 3


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_target_is_met_by_all_clients_and_used_up_by_the_one_that_needs_most(beta):
    watch = guard("privacy.epsilon=2", "schedule.rounds=20", f"local.beta={beta}")
    assert watch.epsilon == 0
    for book in watch.books.values():
        assert book.limit == 20
        book.steps = 20
    spent = [book.epsilon for book in watch.books.values()]
    assert 2 * 0.98 < spent[0] <= 2
    assert spent[0] > spent[1] > spent[2] > 0
    assert watch.stopped() is not None


def test_without_momentum_the_accountant_is_opacus_s():
    watch = guard(
        "privacy.noise_multiplier=0.02",
        "privacy.epsilon=null",
        "local.beta=0",
        "privacy.rate=0.05",
        "schedule.rounds=1000",
        "privacy.delta=1e-5",
        sizes=[1000],
    )
    opacus = RDPAccountant()
    opacus.history = [(1.0, 0.05, 1000)]
    watch.books[0].steps = 1000
    assert watch.epsilon == pytest.approx(opacus.get_epsilon(1e-5, alphas=list(ORDERS)), rel=1e-6)
    assert watch.epsilon == pytest.approx(12.0, rel=5e-3)


def test_with_momentum_it_is_at_least_the_gaussian_that_takes_part_always():
    """Full participation leaves nothing to bound: one Gaussian release with mu = |A s| / sigma_eff, exactly."""
    watch = guard(
        "privacy.noise_multiplier=0.1",
        "privacy.epsilon=null",
        "privacy.rate=1",
        "privacy.delta=1e-5",
        "schedule.rounds=30",
        sizes=[100],
    )
    watch.books[0].steps = 30
    mu = np.sqrt(((1 - 0.9 ** np.arange(1, 31)) ** 2).sum()) / 10
    exact = RDPAccountant()
    exact.history = [(1 / mu, 1.0, 1)]
    # The exact curve of a Gaussian lies below its Renyi bound and above 0.85 of it here.
    assert 0.85 * exact.get_epsilon(1e-5) < watch.epsilon < 1.1 * exact.get_epsilon(1e-5)


def test_given_noise_stops_a_client_before_it_would_exceed_the_target():
    watch = guard("privacy.noise_multiplier=0.05", "privacy.epsilon=1", "schedule.rounds=20")
    first, last = watch.books[0].limit, watch.books[2].limit
    assert 0 < first < last <= 20
    for round in range(1, first + 1):
        assert watch.job(0, round, "f", np.arange(40), {}) is not None
    with pytest.raises(BudgetSpent):
        watch.job(0, first + 1, "f", np.arange(40), {})
    assert watch.books[0].epsilon <= 1
    assert watch.books[0].running.of(first + 1).epsilon(1 / 40) > 1
    assert watch.stopped() is None  # others go on


def test_batches_are_poisson_and_a_job_asked_for_again_is_the_same_job():
    watch = guard("privacy.noise_multiplier=1", "privacy.epsilon=null", "schedule.rounds=400", sizes=[200])
    jobs = [watch.job(0, round, "f", np.arange(200), {}) for round in range(1, 401)]
    drawn = np.concatenate([job.batches[0] for job in jobs])
    # 80,000 draws at rate 0.3: within 6 standard deviations, two in a billion outside
    assert abs(len(drawn) - 24_000) < 6 * np.sqrt(80_000 * 0.21)
    assert len({len(job.batches[0]) for job in jobs}) > 10
    again = watch.job(0, 400, "f", np.arange(200), {})
    np.testing.assert_array_equal(again.batches[0], jobs[-1].batches[0])
    assert watch.books[0].steps == 400
    with pytest.raises(ShoalError, match="asked twice"):
        watch.job(0, 400, "g", np.arange(200), {})


# What is refused.


@dataclass(frozen=True)
class Unbounded(Synchronous):
    def participations(self) -> int | None:
        return None


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["local=sgd"], "local"),
        (["aggregator=fedavg"], "aggregator"),
        (["privacy.epsilon=null"], "privacy.epsilon"),
        (["privacy.accountant=prv"], "privacy.accountant"),
        (["schedule.max_update_norm=0.3"], "schedule.max_update_norm"),
        (["secure_aggregation=secagg"], "secure_aggregation"),
        (["schedule._target_=tests.privacy.test_dp_brem.Unbounded"], "schedule"),
        (["adapter=rolora"], "local"),
    ],
)
def test_what_is_not_accounted_for_is_refused(words, key):
    with pytest.raises(ConfigError) as error:
        settings(*words)
    assert error.value.key == key


def test_the_largest_honest_reply_may_pass_the_server_s_check():
    settings("schedule.max_update_norm=0.34")  # lr R/p = 1/3
    settings("privacy.accountant=prv", "local.beta=0")
    with pytest.raises(ConfigError, match="one example"):
        guard(sizes=[1, 40])


# Runs.


def test_without_clips_noise_and_momentum_a_run_is_fedsgd(tmp_path):
    words = (
        "local.steps=1",
        "local.lr=0.1",
        "local.batch_size=1000",
        "schedule.rounds=3",
        "aggregator.weights=uniform",
    )
    free = (
        "privacy.epsilon=null",
        "privacy.noise_multiplier=1e-12",
        "privacy.record_clip=1e3",
        "privacy.client_clip=null",
    )
    go(tmp_path / "brem", *WORDS, *words, *free, "local.beta=0", "privacy.rate=1")
    go(tmp_path / "sgd", "local=sgd", *words)
    np.testing.assert_allclose(vector(tmp_path / "brem"), vector(tmp_path / "sgd"), rtol=1e-4, atol=1e-6)


def test_a_run_that_is_cut_off_goes_on_with_the_same_momenta_noise_and_books(tmp_path, monkeypatch):
    words = (*WORDS, "schedule.rounds=4", "clients.per_round=3", "privacy.epsilon=5")
    go(tmp_path / "whole", *words)
    collect = DPBREMGuard.collect

    def interrupted(self, server, updates, round, lr):
        if round == 3:
            raise KeyboardInterrupt
        return collect(self, server, updates, round, lr)

    with monkeypatch.context() as patch:
        patch.setattr(DPBREMGuard, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut", *words)
    resume(tmp_path / "cut", quiet=True)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert same_metrics(tmp_path / "cut", tmp_path / "whole")
    told = [r["epsilon"] for r in rounds(tmp_path / "whole")]
    assert told == sorted(told) and told[0] > 0
    assert final(tmp_path / "whole")["epsilon"] == told[-1] <= 5
    assert all(r["loss"] is None for r in rounds(tmp_path / "whole"))


def test_a_client_that_sends_absurd_numbers_ruins_the_plain_mean_and_not_the_clipped_one(tmp_path):
    """Here the server lets them through, as it must where it never sees a client's own numbers."""
    attack = ("attack=faulty", "attack.kind=huge_norm", "attack.clients=[1]", "schedule.max_update_norm=1e31")
    words = (
        *WORDS,
        *attack,
        "local.lr=0.5",
        "schedule.rounds=1",
        "privacy.epsilon=null",
        "privacy.noise_multiplier=1e-3",
    )
    go(tmp_path / "clipped", *words, "privacy.client_clip=0.2")
    # |phi| is at most C and the noise: 0.001 R |N(0, I)| / 4, whose norm is below 1.1 sqrt(d)
    assert rounds(tmp_path / "clipped")[0]["update_norm"] <= 0.5 * (0.2 + 0.001 / 4 * 1.1 * np.sqrt(4000))
    assert final(tmp_path / "clipped")["rejected_updates"] == 0
    go(tmp_path / "plain", *words, "privacy.client_clip=null")
    assert (
        rounds(tmp_path / "plain")[0]["update_norm"] > 0.5 * (1 / 0.3) / 4 * 0.8
    )  # as far as R/p of one client of four goes


# The method's claim, on softmax regression: private and robust together.


def accuracy(clip: float | None, sigma: float, attack: str | None, beta: float = 0.9) -> float:
    """After 150 rounds of 20 clients, 4 of them hostile: ``ipm`` sends -10 times the honest mean, ``alie`` stays near.

    Inner product manipulation (Xie et al., arXiv 1903.03936) and "a little is enough" (Baruch et al., arXiv
    1902.06156; here 4 standard deviations off), both with knowledge of all honest momenta.
    """
    rng = np.random.default_rng(7)
    classes, features, clients, hostile, rate, record_clip = 5, 12, 20, 4, 0.2, 1.0
    means = rng.normal(size=(classes, features))
    mix = rng.dirichlet(np.ones(classes), clients)
    labels = [rng.choice(classes, 100, p=p) for p in mix]
    inputs = [means[y] + 0.5 * rng.normal(size=(100, features)) for y in labels]
    tested = rng.integers(0, classes, 2000)
    test = means[tested] + 0.5 * rng.normal(size=(2000, features))
    theta, phi = np.zeros((features, classes)), np.zeros(features * classes)
    momenta = np.zeros((clients, features * classes))
    for _ in range(150):
        for c in range(clients):
            drawn = rng.random(100) < rate
            x, y = inputs[c][drawn], labels[c][drawn]
            scores = np.exp(x @ theta - (x @ theta).max(1, keepdims=True))
            errors = scores / scores.sum(1, keepdims=True) - np.eye(classes)[y]
            grads = (x[:, :, None] * errors[:, None, :]).reshape(len(x), -1)  # (batch, d)
            grads *= np.minimum(1, record_clip / np.linalg.norm(grads, axis=1, keepdims=True))
            momenta[c] = beta * momenta[c] + (1 - beta) * grads.sum(0) / (rate * 100)
        sent, honest = momenta.copy(), momenta[hostile:]
        if attack == "ipm":
            sent[:hostile] = -10 * honest.mean(0)
        elif attack == "alie":
            sent[:hostile] = honest.mean(0) - 4 * honest.std(0)
        noise = sigma * record_clip * rng.normal(size=len(phi))
        phi = centred_mean(sent, phi, clip, noise)
        theta = theta - 1.0 * phi.reshape(theta.shape)
    return float(((test @ theta).argmax(1) == tested).mean())


def test_centred_clipping_holds_where_a_plain_mean_does_not_with_noise_and_without():
    sigma = 2 / (0.2 * 100)  # sigma_eff = 2
    found = {
        (clip, noise, attack): accuracy(clip, noise, attack)
        for clip in (None, 0.1)
        for noise in (0.0, sigma)
        for attack in (None, "ipm", "alie")
    }
    print(found)
    for noise in (0.0, sigma):
        assert found[None, noise, None] > 0.9
        assert found[None, noise, "ipm"] < 0.2  # it climbs: worse than guessing
        for attack in (None, "ipm", "alie"):
            assert found[0.1, noise, attack] > 0.85
            assert found[0.1, noise, attack] > found[None, noise, None] - 0.05


def test_the_statement_names_every_part():
    watch = guard("privacy.noise_multiplier=0.1", "privacy.epsilon=null")
    text = watch.statement().text()
    for part in (
        "DP-BREM",
        "one example",
        "adding or removing",
        "momentum (beta 0.9)",
        "Poisson",
        "rate 0.3",
        "R = 1",
        "C = 0.5",
        "0.1 x R",
        "2 rounds",
        "trusted",
        "public",
    ):
        assert part in text, part
    assert len(watch.statement().holders) == 3
