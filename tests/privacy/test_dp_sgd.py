"""DP-SGD as a whole: how noise is planned, what the statement says, and runs that keep to their budgets."""

from __future__ import annotations

import math

import numpy as np
import pytest

from clients.local.training import CLIP
from fl.compose import compose
from fl.errors import ConfigError
from fl.experiment import Settings
from fl.records import read_events, read_run
from fl.run import resume
from privacy import accounting
from privacy.accounting import SampledGaussian
from privacy.dp_sgd import DPSGD, DPSGDGuard, gradient_noise
from tests.helpers import ENCODER, SHARED, clients, go, metrics, rounds, vector, weights
from tests.test_resume import change, interrupt, killed_at, moments, same_end

DP = ("privacy=dp_sgd", "privacy.epsilon=8", "local=sgd")


def guard(*more: str, sizes: tuple[int, ...] = (100,)) -> DPSGDGuard:
    settings = Settings.of(compose([*ENCODER, "privacy=dp_sgd", *more])[0])
    return settings.privacy.guard(settings, list(sizes), None)


def epsilon(noise: float, rate: float, steps: int, delta: float, accountant: str = "rdp") -> float:
    return accounting.epsilon([SampledGaussian(noise, rate, steps)], delta, accountant)


# Settings that are refused


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("privacy.epsilon=null",), r"privacy\.epsilon=None.*a target, where privacy\.noise_multiplier is null"),
        (("privacy.adaptive=true", "privacy.clipping=per_layer"), r"privacy\.clipping='per_layer'.*flat, where"),
        (("privacy.adaptive=true", "privacy.clipping=per_adapter"), r"privacy\.clipping='per_adapter'.*flat, where"),
        (("privacy.delta=1",), r"privacy\.delta=1\.0"),
        (("privacy.noise_multiplier=0",), r"privacy\.noise_multiplier=0\.0"),
        (("privacy.accountant=gdp",), r"privacy\.accountant='gdp'"),
    ],
)
def test_settings_that_mean_nothing_are_refused(more, said):
    with pytest.raises(ConfigError, match=said):
        guard(*more)


def test_a_client_with_one_example_needs_a_delta():
    with pytest.raises(ConfigError, match=r"privacy\.delta=1\.0 .*below 1.*partition\.min_size"):
        guard(sizes=(100, 1))
    assert guard("privacy.delta=0.01", sizes=(100, 1)).books[1].delta == 0.01


def test_a_noise_with_which_nobody_takes_a_step_is_refused():
    with pytest.raises(ConfigError, match=r"privacy\.noise_multiplier=0\.1 .*lets some client take a step"):
        guard("privacy.noise_multiplier=0.1", "privacy.epsilon=0.5")
    some = guard("privacy.noise_multiplier=1", "privacy.epsilon=1", sizes=(9, 4000))
    assert [book.limit for book in some.books.values()] == [0, 4]
    assert some.stopped() is None


def test_a_start_that_costs_more_than_the_target_is_refused():
    start = ("adapter=lora_sb", "adapter.init.source=private", "adapter.init.noise=0.3", "model.head_std=0.02")
    with pytest.raises(ConfigError, match=r"privacy\.epsilon=0\.5 .*still cost"):
        guard(*start, "privacy.epsilon=0.5")


def test_the_noise_of_the_count_has_to_leave_something():
    with pytest.raises(ConfigError, match=r"privacy\.count_noise=0\.4 .*above 0\.5, half the noise multiplier 1"):
        guard("privacy.adaptive=true", "privacy.noise_multiplier=1")  # batch_size/20
    with pytest.raises(ConfigError, match="count_noise=0.5"):
        gradient_noise(1.0, 0.5)


# Noise


@pytest.mark.parametrize("accountant", ["rdp", pytest.param("prv", marks=pytest.mark.slow)])
def test_noise_is_calibrated_for_every_step_that_a_client_may_be_asked_for(accountant):
    """To 1 in 1,000: a little less noise is too little. Little data needs more of it."""
    mine = guard(
        "schedule.rounds=5", "local.steps=3", "privacy.epsilon=2", f"privacy.accountant={accountant}", sizes=(50, 400)
    )
    assert mine.rates == [8 / 50, 8 / 400]
    for book, size, rate in zip(mine.books.values(), (50, 400), mine.rates, strict=True):
        assert (book.limit, book.delta) == (15, 1 / size)
        noise = book.running.noise_multiplier
        assert epsilon(noise, rate, 15, 1 / size, accountant) <= 2
        assert epsilon(noise / 1.003, rate, 15, 1 / size, accountant) > 2
    assert mine.books[0].running.noise_multiplier > 1.5 * mine.books[1].running.noise_multiplier


def test_a_private_start_is_paid_from_the_same_budget():
    start = ("adapter=lora_sb", "adapter.init.source=private", "adapter.init.noise=5", "model.head_std=0.02")
    plain, paid = guard("privacy.epsilon=2"), guard("privacy.epsilon=2", *start)
    assert paid.books[0].running.noise_multiplier > plain.books[0].running.noise_multiplier
    assert paid.books[0].once == (SampledGaussian(5.0, 0.64, 1),)
    paid.books[0].grant(1, "a", paid.books[0].limit)
    assert 1.98 < paid.epsilon <= 2
    assert "5" in paid.rows([100])[0]["mechanism"].partition(";")[0]


def test_fewer_participations_need_less_noise_and_bound_the_steps():
    all_, few = guard("schedule.rounds=6"), guard("schedule.rounds=6", "privacy.participations=2")
    assert few.books[0].running.noise_multiplier < all_.books[0].running.noise_multiplier
    assert (few.books[0].limit, all_.books[0].limit) == (4, 12)
    more = guard("schedule.rounds=3", "privacy.participations=9")
    assert more.books[0].limit == 6


def test_given_noise_and_a_target_stop_at_the_last_step_within_it():
    mine = guard("schedule.rounds=100", "privacy.noise_multiplier=1", "privacy.epsilon=3")
    book = mine.books[0]
    assert 0 < book.limit < 200
    assert epsilon(1, 0.08, book.limit, 0.01) <= 3 < epsilon(1, 0.08, book.limit + 1, 0.01)
    assert guard("privacy.noise_multiplier=1", "privacy.epsilon=null").books[0].limit is None
    bounded = guard("privacy.noise_multiplier=1", "privacy.epsilon=null", "privacy.participations=1")
    assert bounded.books[0].limit == 2


def test_what_a_job_is_told():
    mine = guard("privacy.clip=0.7", "privacy.clipping=per_layer", "privacy.noise_multiplier=1.5", sizes=(100, 5))
    job = mine.job(0, 1, "a", np.arange(100), {})
    assert (job.private.clip, job.private.noise, job.private.expected) == (0.7, 1.5, 8.0)
    assert (job.private.clipping, job.private.adaptive, len(job.batches)) == ("per_layer", None, 2)
    small = mine.job(1, 1, "a", np.arange(5), {})
    assert small.private.expected == 5 and all(len(b) == 5 for b in small.batches)


def test_adaptive_clipping_shares_the_budget_between_gradient_and_count():
    """Sensitivities C and 1/2: together the two releases have the noise multiplier that the book counts."""
    mine = guard("privacy.adaptive=true", "privacy.noise_multiplier=0.7", "privacy.quantile=0.6", "privacy.clip=0.1")
    job = mine.job(0, 1, "a", np.arange(100), {})
    noise, count = job.private.noise, job.private.adaptive.noise
    assert count == 8 / 20
    assert noise**-2 + (2 * count) ** -2 == pytest.approx(0.7**-2, rel=1e-12)
    assert mine.books[0].running.noise_multiplier == 0.7
    assert (job.private.clip, job.private.adaptive.quantile, job.private.adaptive.rate) == (0.1, 0.6, 0.2)
    later = mine.job(0, 2, "a", np.arange(100), {CLIP: np.array([0.33])})
    assert later.private.clip == 0.33
    assert gradient_noise(1.0, 5.0) == pytest.approx((1 - 0.01) ** -0.5, rel=1e-12)  # the authors' z_delta
    other = guard("privacy.adaptive=true", "privacy.noise_multiplier=0.7", "privacy.count_noise=1")
    assert other.job(0, 1, "a", np.arange(100), {}).private.adaptive.noise == 1


# What papers print


def test_fed_sb_counts_with_one_over_batches_as_delta():
    """SNLI at 3 clients, 6 epochs of batches of 32: the noise that its code takes for epsilon 1 costs 2.05 at 1/n."""
    snli = ("privacy.accountant=prv", "privacy.paper=fed_sb", "privacy.epsilon=null", "local.steps=null",
            "local.epochs=6", "local.batch_size=32", "schedule.rounds=1")  # fmt: skip
    for noise, printed, real in ((0.523, 1.0, 2.05), (0.436, 3.0, 4.8)):
        mine = guard(*snli, f"privacy.noise_multiplier={noise}", sizes=(183_122,))
        mine.books[0].grant(1, "a", mine.local.num_steps(183_122))
        assert mine.books[0].steps == 6 * 5723
        made = mine.statement()
        assert made.epsilon == pytest.approx(real, abs=0.06)
        (said,) = made.also
        assert float(said.split()[1]) == pytest.approx(printed, abs=0.06)
        assert "1/batches = 0.000175 (Fed-SB's code)" in said and "Counted otherwise" in made.text()


def test_fedsvd_counts_one_round():
    mine = guard("privacy.paper=fedsvd", "schedule.rounds=4", "privacy.noise_multiplier=1")
    for round in range(1, 5):
        mine.books[0].grant(round, "a", 2)
    (said,) = mine.statement().also
    assert said.startswith(f"epsilon {epsilon(1, 0.08, 2, 0.01):.4g} by one round's steps alone")
    assert mine.statement().epsilon == epsilon(1, 0.08, 8, 0.01)


def test_the_statement_has_every_part():
    mine = guard("privacy.adaptive=true", "privacy.count_noise=20", "privacy.epsilon=4", sizes=(50, 400))
    made = mine.statement()
    assert (made.unit, made.relation, made.target, made.epsilon) == (
        "example of one client",
        "adding or removing it",
        4,
        0,
    )
    assert "rate batch_size/n_i (0.02 to 0.16)" in made.sampling and "expected batch" in made.sampling
    assert "L2 norm C = 1 over all that trains, C following the 0.5 quantile" in made.clipping
    assert "run's seed" in made.noise and "run's seed" in made.against
    assert made.participation.startswith("up to 2 of 2 rounds")
    assert len(made.holders) == 2 and made.delta == 1 / 50
    text = made.text()
    for part in ("Sampling", "Clipping", "Noise", "Participation", "Holds against", "Not covered"):
        assert f"{part}: " in text


# Whole runs


def test_a_run_spends_what_it_says_and_no_more_than_its_target(tmp_path):
    go(tmp_path / "run", *DP)
    run = read_run(tmp_path / "run")
    said = run["privacy_statement"]
    assert 7.9 < said["epsilon"] <= 8 and said["target"] == 8
    assert run["final"]["epsilon"] == said["epsilon"] == rounds(tmp_path / "run")[-1]["epsilon"]
    for row in said["holders"]:
        noise = float(row["mechanism"].rpartition("noise multiplier ")[2].rstrip(")"))
        assert row["steps"] == 4 and row["rate"] == 8 / row["examples"]
        assert row["epsilon"] == pytest.approx(epsilon(noise, row["rate"], 4, 1 / row["examples"]), rel=5e-3)
    seen = [r["epsilon"] for r in rounds(tmp_path / "run")]
    assert seen == sorted(set(seen)) and len(seen) == 2
    # Nothing computed from the drawn examples leaves a client without noise.
    assert all(c["loss"] is None and c["tokens"] == 0 for c in clients(tmp_path / "run"))
    assert all(r["loss"] is None for r in rounds(tmp_path / "run"))


@pytest.mark.parametrize("adaptive", ["false", "true"])
def test_killed_and_resumed_a_run_spends_and_trains_the_same(tmp_path, adaptive):
    more = (*DP, "clients.number=3", "clients.per_round=2", "schedule.rounds=3", "network=lognormal",
            f"privacy.adaptive={adaptive}", "privacy.count_noise=4")  # fmt: skip
    total = moments(tmp_path / "whole", *more)
    for k in (total // 2, 3 * total // 4):
        killed_at(k, tmp_path / str(k), *more)
        resume(tmp_path / str(k), shared=SHARED, quiet=True)
        same_end(tmp_path / str(k), tmp_path / "whole")
    assert read_run(tmp_path / "whole")["privacy_statement"]["epsilon"] > 0


def test_a_budget_spent_under_other_settings_is_not_carried_on(tmp_path):
    interrupt(tmp_path / "run", 2, *DP)
    change(tmp_path / "run", lambda config: config["privacy"].update(epsilon=80.0))
    with pytest.raises(ConfigError, match="the settings that the budget was spent under"):
        resume(tmp_path / "run", shared=SHARED, quiet=True)


def test_a_run_ends_when_every_budget_is_spent(tmp_path, monkeypatch):
    """Two of four rounds: then no client takes part any more, and that is no failure."""
    # Runs of other settings draw other noise: here the same, so that the states can be compared.
    monkeypatch.setattr("privacy.dp_sgd.noise_root", lambda settings: "one")
    go(tmp_path / "run", *DP, "schedule.rounds=4", "privacy.participations=2")
    run, events = read_run(tmp_path / "run"), read_events(tmp_path / "run")
    assert run["status"] == "completed" and run["final"]["rounds"] == 2
    (stop,) = [e for e in events if e["event"] == "stop"]
    assert stop["reason"] == "every client has spent its privacy budget" and stop["round"] == 2
    assert [e["round"] for e in events if e["event"] == "round"] == [1, 2]
    assert all(row["steps"] == row["limit"] == 4 for row in run["privacy_statement"]["holders"])
    go(tmp_path / "two", *DP, "schedule.rounds=2")
    assert weights(tmp_path / "two") == weights(tmp_path / "run")


def test_the_filter_cuts_a_clients_last_job(tmp_path):
    """Given noise and a target that allows each client an odd number of steps, at two a round."""
    go(tmp_path / "probe", *DP)
    holders = read_run(tmp_path / "probe")["privacy_statement"]["holders"]
    target = max(epsilon(1.0, row["rate"], 3, row["delta"]) for row in holders) + 1e-9
    go(tmp_path / "run", "privacy=dp_sgd", "local=sgd", "privacy.noise_multiplier=1.0", f"privacy.epsilon={target}",
       "schedule.rounds=4")  # fmt: skip
    run = read_run(tmp_path / "run")
    assert all(row["steps"] == 3 for row in run["privacy_statement"]["holders"])
    assert run["privacy_statement"]["epsilon"] <= target
    assert [c["steps"] for c in clients(tmp_path / "run", 2)] == [1] * 4
    assert [e for e in metrics(tmp_path / "run") if e["event"] == "stop"]


def test_a_client_whose_budget_is_spent_is_left_out_and_others_go_on(tmp_path):
    """Sizes differ, so do the limits at one noise: a client with little data stops first."""
    more = ("privacy=dp_sgd", "local=sgd", "privacy.noise_multiplier=1.0", "partition=quantity", "schedule.rounds=3")
    go(tmp_path / "probe", *more, "privacy.epsilon=null")
    holders = read_run(tmp_path / "probe")["privacy_statement"]["holders"]
    assert read_run(tmp_path / "probe")["privacy_statement"]["target"] is None
    costs = sorted({row["epsilon"] for row in holders})
    assert len(costs) > 1
    target = math.sqrt(costs[-1] * costs[-2])
    go(tmp_path / "run", *more, f"privacy.epsilon={target}")
    after = read_run(tmp_path / "run")["privacy_statement"]["holders"]
    assert [row["steps"] < 6 for row in after] == [row["epsilon"] > target for row in holders]
    assert all(row["epsilon"] <= target for row in after)
    assert rounds(tmp_path / "run")[-1]["rejected"] == {"budget": 1} or [row["steps"] for row in after].count(6) == 3


def test_a_run_is_the_same_for_any_cohort_size(tmp_path):
    for size in (1, 4):
        go(tmp_path / str(size), *DP, f"engine.cohort_size={size}", "schedule.rounds=3")
    mine, other = vector(tmp_path / "1"), vector(tmp_path / "4")
    assert np.abs(mine - other).max() < 1e-5 < 1e-2 < np.abs(mine).max()


def test_the_defaults_are_a_target_of_three():
    assert (DPSGD().epsilon, DPSGD().noise_multiplier, DPSGD().accountant) == (3.0, None, "rdp")
