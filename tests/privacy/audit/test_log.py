"""The log of an audited run: what counts once, what a checkpoint keeps, which delta is tested, who takes part."""

import json

import numpy as np
import pytest

from fl.errors import ConfigError
from fl.keys import generator
from privacy.accounting import SampledGaussian
from privacy.audit import one_run
from privacy.audit.client import directions
from privacy.audit.evidence import log_likelihood_ratios
from privacy.audit.log import DELTAS, FEWEST, SPARE, ClientLog, ExampleLog, claim_to_test, log_of, room
from privacy.base import Guard
from privacy.ledger import Book

M = 200


def book(steps: int = 10, delta: float = 1e-5, noise: float = 5.0) -> Book:
    return Book(SampledGaussian(noise, 0.5, 1), delta, "rdp", steps=steps)


def log(**more) -> ExampleLog:
    return ExampleLog(3, M, 0.5, 7, book(**more))


def seen(made, noise: float, steps: int, *key) -> np.ndarray:
    """Releases of the Gaussian mechanism, in units of what a canary adds."""
    rng = generator(*key)
    signal = np.zeros((steps, M + SPARE))
    signal[:, :M] = made.included & (rng.random((steps, M)) < 0.5)
    return signal + noise * rng.standard_normal(signal.shape)


def test_scores_add_up_over_jobs_and_a_job_that_comes_again_counts_once():
    made, whole = log(), log()
    parts = [seen(made, 0.5, 2, "job", i) for i in range(3)]
    for i, part in enumerate(parts):
        made.add(("private", i), part)
        made.add(("private", i), part)
    whole.add(("all",), np.concatenate(parts))
    assert made.verdict().releases == 6
    assert np.allclose(made.scores + made.newest[2], whole.newest[2])
    assert made.verdict().bound == whole.verdict().bound
    assert made.verdict().bound.epsilon > 1


def test_a_checkpoint_brings_everything_back():
    made, other = log(), log()
    made.add(("a",), seen(made, 0.5, 2, "a"))
    made.add(("b",), seen(made, 0.5, 2, "b"))
    other.restore(json.loads(json.dumps(made.state())))
    for which in (made, other):
        which.add(("b",), seen(made, 0.5, 2, "b"))  # asked for again after the restart
        which.add(("c",), seen(made, 0.5, 2, "c"))
    assert other.verdict() == made.verdict() and other.verdict().releases == 6
    assert np.array_equal(other.scores, made.scores)


def test_a_checkpoint_of_another_audit_is_refused():
    with pytest.raises(ConfigError, match=r"privacy.audit.*began with: 0 canaries"):
        log().restore(None)
    other = ExampleLog(3, M + 1, 0.5, 7, book())
    with pytest.raises(ConfigError, match=rf"began with: {M + 1} canaries"):
        log().restore(other.state())


def test_nothing_released_gives_no_verdict_and_a_guard_without_an_audit_has_no_log():
    assert log().verdict() is None
    assert log_of(Guard()) is None


def test_the_verdict_says_what_was_found():
    made = log()
    made.add(("a",), seen(made, 1e-9, 8, "a"))
    found = made.verdict()
    assert found.contradicts and found.as_plain()["contradicts"]
    assert "client 7, 8 releases" in found.sentence() and "The claim fails" in found.sentence()
    assert (found.unit, found.canaries, found.claimed) == ("example", M, pytest.approx(made.book.epsilon))
    assert json.loads(json.dumps(found.as_plain()))["bound"]["epsilon"] == found.bound.epsilon


def test_a_claim_at_a_large_delta_is_tested_where_the_audit_can_show_most():
    guesses = one_run.default_guesses(M)
    large = book(delta=0.1)
    assert one_run.ceiling(M, guesses, 0.1) == 0
    delta, claimed = claim_to_test(large, M, guesses, 0.95)
    margins = {d: one_run.ceiling(M, guesses, d) - book(delta=d).epsilon for d in DELTAS}
    assert delta == max(margins, key=margins.get)
    assert claimed == pytest.approx(book(delta=delta).epsilon)
    tiny = book(delta=1e-12)
    assert claim_to_test(tiny, M, guesses, 0.95) == (1e-12, pytest.approx(tiny.epsilon))


def test_room_for_canaries():
    assert room(1000, 500) == 500 - SPARE
    assert room(100, 500) == 100
    assert room(100, SPARE + FEWEST) == FEWEST
    with pytest.raises(ConfigError, match=r"privacy.audit.*95 scalars"):
        room(100, SPARE + FEWEST - 1)


def clients(rate: float = 1.0, **more) -> ClientLog:
    return ClientLog(3, M, rate, 10, book(), **more)


def taken(made: ClientLog, round: int) -> list[int]:
    return [u.client - 10 for u in made.updates(round, round - 1, 50, 2.0)]


def test_canary_clients_send_long_vectors_along_their_directions():
    made = clients()
    updates = made.updates(4, 3, 50, 2.0)
    assert taken(made, 4) == np.flatnonzero(made.included).tolist()
    for update in updates:
        along = directions(M, 50, 3, "audit directions")[update.client - 10]
        assert np.allclose(update.vector, 200 * along, rtol=1e-6)
        assert (update.round, update.start_version) == (4, 3)


def test_canary_clients_take_part_by_their_own_draws_at_the_rate_of_a_client():
    made = clients(rate=0.3)
    counts = np.zeros(M)
    for round in range(1, 101):
        counts[taken(made, round)] += 1
    assert np.all(counts[~made.included] == 0)
    # 100 draws each of about 100 canaries at 0.3: 6 deviations are exceeded with probability 2e-9.
    number = 100 * made.included.sum()
    assert abs(counts.sum() - 0.3 * number) < 6 * np.sqrt(0.21 * number)
    assert set(taken(made, 1)) != set(taken(made, 2))


def test_canary_clients_keep_to_the_participations_that_are_accounted_for():
    made = clients(most=2, separation=3)
    assert [round for round in range(1, 10) if taken(made, round)] == [1, 4]


def test_where_clipping_adapts_half_of_the_canaries_are_within_the_norm():
    lengths = {u.client - 10: np.linalg.norm(u.vector) for u in clients(adaptive=True).updates(1, 0, 50, 2.0)}
    assert all(length == pytest.approx(1.98 if i % 2 == 0 else 200, rel=1e-6) for i, length in lengths.items())


def test_a_server_log_remembers_peaks_through_a_checkpoint():
    made, other = clients(), clients()
    rng = generator("releases")
    releases = [rng.standard_normal(50) for _ in range(4)]
    for round in (1, 2):
        made.see(round, releases[round - 1], 0.5)
    other.restore(json.loads(json.dumps(made.state())))
    for which in (made, other):
        for round in (3, 4):
            which.see(round, releases[round - 1], 0.5)
    unit = directions(M, 50, 3, "audit directions")
    cosines = np.stack([unit @ r / np.linalg.norm(r) for r in releases])
    assert np.allclose(other.peak, cosines.max(axis=0))
    assert other.verdict() == made.verdict()
    made.see(5, np.zeros(50), 0.5)
    assert np.array_equal(made.peak, np.maximum(other.peak, 0))


def test_tree_noise_is_undone():
    """Scores are those of the tree's nodes: what a node sums, and noise that is its own."""
    made = clients(most=6)
    unit = directions(M + SPARE, 50, 3, "audit directions")
    rng = generator("tree")
    nodes, sums, before, expected = {}, [], np.zeros(50), np.zeros(M)
    for leaf in range(1, 8):
        made.book.steps = leaf
        sums.append(rng.standard_normal(50))
        level = (leaf & -leaf).bit_length() - 1
        nodes = {h: node for h, node in nodes.items() if h > level}
        noise = rng.standard_normal(50)
        nodes[level] = sum(sums[leaf - 2**level :]) + noise
        prefix = sum(nodes.values())
        made.see(leaf, prefix - before, 0.5)
        before = prefix
        count = min(leaf, 6) - min(leaf - 2**level, 6)  # participations within the node
        if count:
            row = (unit @ nodes[level])[None] / 0.5 / count
            expected += log_likelihood_ratios(row[:, :M], row[:, M:], 1.0)
    assert made.verdict().releases == 6  # the seventh round's node has no canary
    assert np.allclose(made.scores + made.newest[2], expected)
