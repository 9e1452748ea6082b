"""DP-BREM+: what one example moves the integers by, the noise on their sum, what is spent, refused, and said."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from aggregators.dp_brem import CENTRE
from clients.adapters.space import Space
from clients.layout import Layout
from clients.local.client_momentum import ClientMomentum
from clients.local.training import Work
from clients.worker import Worker
from fl.compose import compose
from fl.errors import ConfigError, ShoalError
from fl.experiment import Settings
from fl.keys import generator
from fl.records import read_run
from fl.run import resume
from fl.state import ServerState, Update
from privacy.accounting import epsilon
from privacy.dp_brem import clipped
from privacy.dp_brem_plus import CentredCodec, DPBREMPlus, DPBREMPlusGuard
from privacy.momentum import Momentum, RoundedMomentum
from tests.helpers import ENCODER, final, go, rounds, same_metrics, vector, weights
from tests.oracles.cohorts import build
from tests.oracles.models import token_set

BREM = ("local=client_momentum", "local.steps=1", "aggregator=dp_brem", "privacy.rate=0.3")
WORDS = (*BREM, "privacy=dp_brem_plus", "secure_aggregation=shares")
SIZES = [40, 100, 250]
SPACE = Space(Layout(("theta",), ((2_000,),)))
GIVEN = ("privacy.epsilon=null", "privacy.noise_multiplier=0.7")


def settings(*more: str) -> Settings:
    return Settings.of(compose([*ENCODER, *WORDS, *more])[0])


def guard(*more: str, sizes: list[int] = SIZES, space: Space = SPACE) -> DPBREMPlusGuard:
    s = settings(*more)
    assert isinstance(s.privacy, DPBREMPlus)
    made = s.privacy.guard(s, sizes, space)
    assert isinstance(made, DPBREMPlusGuard)
    return made


# What one example can do: the real client code on two data sets, with the others' draws equal.


@pytest.mark.parametrize(("clip", "record_clip"), [(0.5, 0.05), (0.02, 0.05), (30.0, 0.05)])
def test_one_example_moves_the_integers_by_what_is_counted_at_most(clip, record_clip):
    """With C = 30 a step is as long as 1/20 of the example's move, and moves exceed their unrounded bound."""
    beta, rate, examples, steps, lr = 0.8, 0.4, 12, 10, 0.3
    cohort, data = build("bert", dtype=torch.float32), token_set("classification", examples)
    worker = Worker(cohort, {"train": data}, ClientMomentum(beta=beta), seed=0)
    words = ("privacy.noise_multiplier=1", "privacy.epsilon=null", f"local.beta={beta}", f"privacy.rate={rate}")
    where = Space(Layout(("theta",), ((cohort.layout.size,),)))
    watch = guard(
        *words, f"privacy.record_clip={record_clip}", f"privacy.client_clip={clip}", sizes=[examples], space=where
    )
    running = watch.books[0].running
    assert isinstance(running, RoundedMomentum)
    codec = CentredCodec(cohort.layout.size, clip, 1, 0.0, lr)
    unit = watch.scale * record_clip / (rate * examples)  # integer steps in R/b
    rng = generator("draws")
    theta, centre = cohort.initial.numpy().astype(np.float32), np.zeros(cohort.layout.size, np.float32)
    mine, theirs, share, beyond = {}, {}, 0.0, 0
    for step in range(1, steps + 1):
        drawn = rng.random(examples) < rate
        drawn[0] = step % 4 == 2  # the example that only one side has
        both = []
        for memory, batch in ((mine, np.flatnonzero(drawn)), (theirs, np.flatnonzero(drawn[1:]) + 1)):
            private = replace(watch.private(0, (0, step), memory), expected=rate * examples)
            both.append(worker.fit([Work(0, step, theta, [batch], lr, memory, private=private)])[0])
        mine, theirs = both[0].memory, both[1].memory
        share = beta * share + (1 - beta) * drawn[0]
        x, y = (codec.encode(fit.sent, 1, rng, {CENTRE: centre}) for fit in both)
        moved = np.linalg.norm(x - y)
        if step == 1:
            assert moved == 0  # it has not taken part yet
        else:
            # 1e-4 of the move for gradients that are computed in float32
            assert moved <= unit * (share * (1 + 1e-4) + running.rounding)
        beyond += moved > unit * share * (1 + 1e-3)
        centre = (x / codec.scale + centre + 0.01 * rng.normal(size=len(centre))).astype(np.float32)
        theta = theta - np.float32(lr) * centre
    assert (beyond > 0) == (clip == 30.0)


@pytest.mark.parametrize("beta", [0.0, 0.5, 0.9, 0.99])
def test_float32_moves_a_momentum_by_less_than_is_counted(beta):
    """The client's recursion and what it sends, against float64, for gradients of length R/p = n R/b (here R/b = 1)."""
    n, lr, d = 50, np.float64(0.137), 400
    counted = 8 * n * 2.0**-24 / (1 - beta) / 2  # for one of two neighbours
    rng, momentum, true, worst = generator("float32", beta), np.zeros(d, np.float32), np.zeros(d), 0.0
    for _ in range(300):
        g = rng.normal(size=d) + 1
        g = (n * g / np.linalg.norm(g)).astype(np.float32)
        momentum = np.float32(beta) * momentum + np.float32(1 - beta) * g
        # exact arithmetic of the coefficients that are used: their own rounding is a change of beta, on both sides
        true = np.float64(np.float32(beta)) * true + np.float64(np.float32(1 - beta)) * g
        sent = np.float32(-lr) * momentum
        worst = max(worst, float(np.linalg.norm(sent / np.float64(np.float32(-lr)) - true)))
    assert 1e-3 * counted < worst < counted


def test_the_rounding_that_is_counted_is_its_formula():
    watch = guard(*GIVEN, "privacy.record_clip=2", "local.beta=0.5")
    for size, book in zip(SIZES, watch.books.values(), strict=True):
        b = 0.3 * size
        integers = np.sqrt(2_000) / (watch.scale * 2 / b)
        floats = 8 * size * 2.0**-24 / 0.5
        running = book.running
        assert isinstance(running, RoundedMomentum)
        assert running == replace(RoundedMomentum(0.7 * b, 0.3, 0.5), rounding=running.rounding)
        assert running.rounding == pytest.approx(integers + floats)
    assert watch.scale == 2.0**20 / 0.5  # the finest that can be proved in 2,000 numbers
    assert watch.noise == pytest.approx(0.7 * 2 * watch.scale)


# The client's half and the server's.


def test_what_is_encoded_is_the_clipped_distance_from_the_centre():
    rng, codec = generator("codec"), CentredCodec(300, 0.5, 3, 0.0, 0.2)
    phi, centre = rng.normal(size=300).astype(np.float32), rng.normal(size=300).astype(np.float32)
    for near in (1e-3, 1.0):
        momentum = centre + np.float32(near) * (phi - centre)
        integers = codec.encode(np.float32(-0.2) * momentum, 1, rng, {CENTRE: centre})
        expected = clipped(momentum.astype(np.float64) - centre, 0.5)
        np.testing.assert_allclose(integers / codec.scale, expected, atol=0.5 / codec.scale + 5e-7)


@pytest.mark.parametrize("arrays", [{}, {CENTRE: np.zeros(2)}, {CENTRE: np.array([0, 0, np.nan])}])
def test_a_request_without_its_centre_is_refused(arrays):
    with pytest.raises(ShoalError, match="centre"):
        CentredCodec(3, 0.5, 3, 0.0, 0.2).encode(np.zeros(3), 1, generator(0), arrays)


def test_the_sum_is_a_step_from_the_centre_that_was_sent():
    watch, moved = guard(*GIVEN), generator("sum").normal(size=2_000)
    kept = generator("centre").normal(size=2_000)
    server = ServerState(np.zeros(2_000, np.float32), SPACE, extra={CENTRE: kept})
    told = watch.broadcast(server)[CENTRE]
    assert told.dtype == np.float32
    (one,) = watch.collect(server, [Update(0, 1, 0, moved, 3)], 1, 0.5)
    np.testing.assert_array_equal(one.extra[CENTRE], told.astype(np.float64) + moved)
    np.testing.assert_array_equal(one.vector, -0.5 * one.extra[CENTRE])
    assert watch.collect(server, [], 1, 0.5) == []
    assert not watch.broadcast(ServerState(np.zeros(2_000, np.float32), SPACE))[CENTRE].any()


# What is spent.


@pytest.mark.parametrize("beta", [0.0, 0.9])
def test_a_target_is_met_by_all_clients_and_used_up_by_the_one_that_needs_most(beta):
    watch = guard("privacy.epsilon=2", "schedule.rounds=20", f"local.beta={beta}")
    assert watch.epsilon == 0
    for book in watch.books.values():
        book.steps = 20
    spent = [book.epsilon for book in watch.books.values()]
    assert 2 * 0.98 < spent[0] <= 2
    assert spent[0] > spent[1] > spent[2] > 0


def test_rounding_that_is_coarse_against_an_example_s_move_costs():
    def spent(clip: float) -> float:
        watch = guard(*GIVEN, f"privacy.client_clip={clip}")
        watch.books[2].steps = 10
        return watch.books[2].epsilon

    bare = epsilon([Momentum(0.7 * 75, 0.3, 0.9, 10)], 1 / 250)
    assert bare < spent(0.5) < spent(500.0) < spent(5e4)


# What is refused.


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["secure_aggregation=none"], "secure_aggregation"),
        (["secure_aggregation=secagg"], "secure_aggregation"),
        (["privacy.client_clip=null"], "privacy.client_clip"),
        (["privacy.accountant=prv", "local.beta=0"], "privacy.accountant"),
        (["aggregator=fedavg"], "aggregator"),
        (["local=sgd"], "local"),
        (["adapter=rolora"], "local"),
        (["schedule._target_=tests.privacy.test_dp_brem.Unbounded"], "schedule"),
        (["evaluation.aggregation_error=true"], "evaluation.aggregation_error"),
        (["privacy.epsilon=null"], "privacy.epsilon"),
    ],
)
def test_what_is_not_accounted_for_or_proved_is_refused(words, key):
    with pytest.raises(ConfigError) as error:
        settings(*words)
    assert error.value.key == key


def test_a_clip_far_below_the_noise_is_refused_before_the_first_round():
    with pytest.raises(ConfigError, match=r"privacy\.client_clip=1e-06.*2\^32 steps"):
        guard(*GIVEN, "privacy.client_clip=1e-6")
    guard(*GIVEN, "privacy.client_clip=1e-3")


# Runs.


def test_without_noise_it_is_dp_brem_to_within_rounding(tmp_path, monkeypatch):
    # Two mechanisms draw other batches: here the same, so that the rest can be compared.
    monkeypatch.setattr("privacy.dp_brem.noise_root", lambda settings: "one")
    words = ("privacy.epsilon=null", "privacy.noise_multiplier=1e-12", "schedule.rounds=3", "privacy.client_clip=0.3")
    go(tmp_path / "plus", *WORDS, *words)
    go(tmp_path / "brem", *BREM, "privacy=dp_brem", *words)
    apart = np.abs(vector(tmp_path / "plus") - vector(tmp_path / "brem"))
    # three rounds of lr 0.1: half a step of rounding and float32 each, and what later gradients make of it
    assert apart.max() < 1e-5
    assert np.abs(vector(tmp_path / "plus")).max() > 1e-3


def test_a_run_states_its_claim_and_goes_on_after_a_sum_was_opened(tmp_path, monkeypatch):
    """Cut off between the opened sum and the checkpoint: the round's sum is opened again, with the same noise."""
    words = (*WORDS, "schedule.rounds=3", "clients.per_round=3", "privacy.epsilon=5", "checkpoint_every=2")
    go(tmp_path / "whole", *words)
    collect = DPBREMPlusGuard.collect
    opened: dict[int, list[np.ndarray]] = {}

    def interrupted(self, server, updates, round, lr):
        opened.setdefault(round, []).append(updates[0].vector)
        if round == 3 and len(opened[3]) == 1:
            raise KeyboardInterrupt
        return collect(self, server, updates, round, lr)

    with monkeypatch.context() as patch:
        patch.setattr(DPBREMPlusGuard, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt):
            go(tmp_path / "cut", *words)
        resume(tmp_path / "cut", quiet=True)
    np.testing.assert_array_equal(*opened[3])
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")
    assert same_metrics(tmp_path / "cut", tmp_path / "whole")
    # The claim
    run = read_run(tmp_path / "whole")
    said, told = run["privacy_statement"], [r["epsilon"] for r in rounds(tmp_path / "whole")]
    assert told == sorted(told) and told[0] > 0 and final(tmp_path / "whole")["epsilon"] == told[-1] == said["epsilon"]
    assert told[-1] <= said["target"] == 5
    top = max(said["holders"], key=lambda row: row["epsilon"])
    assert top["epsilon"] == told[-1] and top["steps"] == 3
    assert all("rounded momentum" in row["mechanism"] for row in said["holders"])
    for key in ("unit", "relation", "sampling", "clipping", "noise", "participation", "accountant", "delta"):
        assert said[key], key
    for words in ("2 servers", "discrete Gaussian", "(one is counted)", "1 of the 2 servers", "if the servers keep to"):
        assert words in run["privacy"], words
    assert "trusted" not in run["privacy"]


def test_a_client_that_sends_absurd_numbers_moves_the_centre_by_its_share_of_the_clip(tmp_path):
    attack = ("attack=faulty", "attack.kind=huge_norm", "attack.clients=[1]")
    quiet = ("privacy.epsilon=null", "privacy.noise_multiplier=1e-12", "schedule.rounds=1", "privacy.client_clip=0.2")
    words = (*WORDS, *quiet, "local.lr=0.5")
    go(tmp_path / "attacked", *words, *attack)
    go(tmp_path / "honest", *words)
    assert final(tmp_path / "attacked")["rejected_updates"] == 0
    apart = np.linalg.norm(vector(tmp_path / "attacked") - vector(tmp_path / "honest"))
    assert 1e-3 < apart <= 0.5 * 2 * 0.2 / 4 * (1 + 1e-4)
