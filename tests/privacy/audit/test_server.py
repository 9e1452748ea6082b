"""The client-level audit of a trusted server: it contradicts each planted fault's claim, and not the mechanism's."""

from dataclasses import replace

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from clients.layout import Layout
from fl.errors import ConfigError
from fl.records import read_run
from fl.sampling import Available, Fixed, Poisson
from privacy.central import Central
from privacy.dp_ftrl import DPFTRL
from tests.helpers import go, rounds, same_metrics
from tests.privacy.audit.faults import FAULTS, server
from tests.privacy.test_client_level import guard_of, settings, space, state, update

WIDE = space(Layout(("A", "B"), ((4, 500), (500, 4))))
CLIENTS, ROUNDS, CANARIES = 240, 8, 400
# The bound is wrong with this probability, so a correct mechanism is contradicted with no larger one.
FALSE_ALARM = 1e-7


def audited(kind, sampling, per_round: int, fault: str = "", seed: int = 0, **more):
    """The log after a run at the server, in which clients send small updates."""
    privacy = kind(delta=1e-4, audit=True, **{"audit_canaries": CANARIES, **more})
    guard = guard_of(privacy, settings(CLIENTS, per_round, ROUNDS, sampling=sampling, seed=seed), WIDE)
    server(guard, fault)
    rng, held = np.random.default_rng(seed), state(WIDE)
    for round in range(1, ROUNDS + 1):
        asked = np.flatnonzero(rng.random(CLIENTS) < per_round / CLIENTS)[:10].tolist()
        updates = [update(c, 0.05 * rng.normal(size=WIDE.layout.size), round=round) for c in asked]
        guard.collect(held, updates, round, 0.1)
    return guard.audit


KINDS = {
    "central, poisson": (Central, Poisson(), 60, {"epsilon": 0.5}),
    "central, available": (Central, Available(), CLIENTS, {"epsilon": 0.5}),
    "dp_ftrl": (DPFTRL, Available(), CLIENTS, {"epsilon": 0.5}),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", [0, 1])
def test_the_mechanism_is_not_contradicted(kind, seed):
    privacy, sampling, per_round, more = KINDS[kind]
    log = audited(privacy, sampling, per_round, seed=seed, **more)
    assert not log.verdict(1 - FALSE_ALARM).contradicts
    found = log.verdict()
    assert found.releases == ROUNDS and not found.contradicts  # at these seeds
    assert found.bound.ceiling > 2 * found.claimed  # it could have been


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_contradicted(kind, fault):
    privacy, sampling, per_round, more = KINDS[kind]
    assert audited(privacy, sampling, per_round, fault, **more).verdict().contradicts


def test_adaptive_clipping_stays_where_it_is_and_is_not_contradicted():
    more = {"adaptive": True, "first_clip": 0.5, "count_noise": 40.0, "epsilon": 1.0}
    log = audited(Central, Poisson(), 60, **more)
    assert not log.verdict(1 - FALSE_ALARM).contradicts
    guard = guard_of(Central(audit=True, **more), settings(CLIENTS, 60, ROUNDS), WIDE)
    for round in range(1, ROUNDS + 1):
        guard.collect(state(WIDE), [], round, 0.1)
    # Canaries of which half are within C, and noise of 40 clients in a count over 60: 8 steps of exp(0.2 x).
    assert 0.2 < guard.clip < 5


def test_canaries_weigh_as_much_as_any_client_may():
    given = replace(settings(8), aggregator=FedAvg([1.0] * 7 + [2.0]))
    guard = guard_of(Central(epsilon=None, noise_multiplier=1e-9, audit=True, audit_canaries=64), given, WIDE)
    out = guard.collect(state(WIDE), [], 1, 0.1)[0].vector
    one = guard.audit.updates(1, 0, WIDE.layout.size, 1.0)
    assert np.allclose(out * guard.divisor, sum(u.vector / np.linalg.norm(u.vector) for u in one), atol=1e-6)


def test_a_claim_about_replaced_clients_has_no_audit():
    with pytest.raises(ConfigError, match=r"privacy.audit.*sampling=poisson"):
        guard_of(Central(audit=True), settings(8, 4, sampling=Fixed()))
    guard_of(DPFTRL(audit=True), settings(8, 4, sampling=Fixed()))  # its claim counts on no sampling


@pytest.mark.parametrize("kind", ["central", "dp_ftrl"])
def test_a_run_records_the_verdict_and_states_the_same_epsilon(tmp_path, kind):
    more = ("aggregator.weights=uniform", "sampling=poisson", f"privacy={kind}", "privacy.epsilon=2")
    go(tmp_path / "plain", *more)
    go(tmp_path / "audited", *more, "privacy.audit=true", "privacy.audit_canaries=64")
    plain, audited = read_run(tmp_path / "plain"), read_run(tmp_path / "audited")
    assert audited["final"]["epsilon"] == plain["final"]["epsilon"]
    assert audited["privacy_statement"] == plain["privacy_statement"]
    assert "audit" not in plain
    assert audited["audit"]["unit"] == "client" and audited["audit"]["releases"] == len(rounds(tmp_path / "audited"))
    assert audited["audit"]["contradicts"] is False and "estimate" in audited["audit"]
    assert not same_metrics(tmp_path / "plain", tmp_path / "audited")  # canaries move the model
