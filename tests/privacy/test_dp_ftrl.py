"""DP-FTRL: the noise of prefix sums, what the tree costs, who is left out, whole runs."""

import itertools
import json
import math

import numpy as np
import pytest
from scipy.optimize import brentq
from scipy.special import log_ndtr

from aggregators.fedsvd import FedSVD
from clients.adapters.rolora import RoLoRA
from clients.layout import Layout
from fl.errors import ConfigError
from fl.records import read_run
from fl.run import resume
from fl.sampling import Available, Fixed
from privacy.accounting import TreeGaussian, epsilon
from privacy.dp_ftrl import DPFTRL, TreeRounds
from tests.helpers import SHARED, final, go, rounds
from tests.privacy.test_central import UNIFORM, within_chi_square
from tests.privacy.test_client_level import LAYOUT, guard_of, settings, silent, space, state, update, vectors
from tests.test_resume import killed_at, moments, same_end

WIDE = space(Layout(("A", "B"), ((3, 3000), (4000, 3))))


def released(steps: int, z: float = 1.3, clip: float = 0.7) -> list[np.ndarray]:
    """The noise of the prefix sum after each of ``steps`` rounds (index 0: none), in the sum's own units."""
    privacy = DPFTRL(epsilon=None, noise_multiplier=z, clip=clip)
    guard = guard_of(privacy, settings(per_round=5, rounds=steps), WIDE)
    total, found = np.zeros(WIDE.layout.size), [np.zeros(WIDE.layout.size)]
    for round in range(1, steps + 1):
        total = total + guard.collect(state(WIDE), [], round, 0.1)[0].vector * 5
        found.append(total)
    return found


def test_the_noise_of_a_prefix_is_that_of_its_nodes():
    """popcount(t) z^2 C^2 after t rounds: less than the t z^2 C^2 of independent rounds from the third on."""
    for t, noise in enumerate(released(21)[1:], 1):
        assert within_chi_square(noise, 1.3 * 0.7 * math.sqrt(t.bit_count())), t


def test_prefixes_share_the_noise_of_the_nodes_that_they_share():
    """S_5 = node(1..4) + node(5), S_6 = node(1..4) + node(5..6), S_7 = S_6 + node(7), S_8 = node(1..8)."""
    noise = released(8, z=1.0, clip=1.0)
    covariance = {(4, 5): 1, (4, 6): 1, (4, 7): 1, (5, 6): 1, (6, 7): 2, (7, 8): 0, (4, 8): 0, (1, 2): 0, (2, 3): 1}
    # The standard deviation of a product of them is 4 at most: beyond 5.4 of the mean's with probability 7e-8.
    within = 5.4 * 4 / math.sqrt(WIDE.layout.size)
    for (s, t), expected in covariance.items():
        assert np.mean(noise[s] * noise[t]) == pytest.approx(expected, abs=within), (s, t)


def test_increments_add_up_to_the_prefix_sum():
    guard, server = guard_of(silent(DPFTRL, clip=0.4), settings(per_round=3, rounds=9)), state()
    total, expected = np.zeros(LAYOUT.size), np.zeros(LAYOUT.size)
    for round in range(1, 10):
        vector = vectors(9)[round - 1]
        total += guard.collect(server, [update(2, vector, round=round)], round, 0.1)[0].vector
        expected += vector * min(1.0, 0.4 / np.linalg.norm(vector)) / 3
    np.testing.assert_allclose(total, expected, atol=1e-9)


# What a tree costs


def decomposition(t: int) -> list[tuple[int, int]]:
    """The nodes (first round, rounds) of 1..t, by hand: the largest block that fits, again and again."""
    nodes, start = [], 0
    while start < t:
        size = 1 << (t - start).bit_length() - 1
        nodes.append((start, size))
        start += size
    return nodes


def patterns(leaves: int, participations: int, separation: int):
    """All sets of rounds in which a client may take part."""
    for number in range(participations + 1):
        for taken in itertools.combinations(range(leaves), number):
            if all(b - a >= separation for a, b in itertools.pairwise(taken)):
                yield taken


def exact_sensitivity(leaves: int, participations: int, separation: int) -> float:
    """How far one client moves all releases, in standard deviations of a node's noise: over all of its patterns.

    The releases are Gaussian with covariance B B^T, B the nodes of each prefix; a pattern with aligned updates moves
    them by its prefix counts a, so by sqrt(a^T (B B^T)^-1 a).
    """
    nodes = sorted({node for t in range(1, leaves + 1) for node in decomposition(t)})
    b = np.array([[float(node in decomposition(t)) for node in nodes] for t in range(1, leaves + 1)])
    inverse = np.linalg.inv(b @ b.T)
    worst = 0.0
    for taken in patterns(leaves, participations, separation):
        a = np.array([sum(r < t for r in taken) for t in range(1, leaves + 1)], dtype=float)
        worst = max(worst, a @ inverse @ a)
    return math.sqrt(worst)


def exact_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a Gaussian mechanism whose mean moves by ``mu`` deviations (Balle and Wang 2018, theorem 5)."""

    def gap(eps: float) -> float:
        return math.exp(log_ndtr(mu / 2 - eps / mu)) - math.exp(eps + log_ndtr(-mu / 2 - eps / mu)) - delta

    return brentq(gap, 0, 200)


@pytest.mark.parametrize("leaves", range(1, 10))
@pytest.mark.parametrize(("participations", "separation"), [(1, 1), (2, 1), (3, 1), (9, 1), (2, 3), (3, 2), (4, 4)])
def test_the_cost_bounds_that_of_all_patterns_of_a_client(leaves, participations, separation):
    exact = exact_sensitivity(leaves, participations, separation)
    tree = TreeRounds(2.0, participations, separation, leaves).tree
    assert exact <= tree.sensitivity() * (1 + 1e-9)
    if participations == 1:
        assert exact == pytest.approx(tree.sensitivity())
    privacy = DPFTRL(epsilon=None, noise_multiplier=2.0, delta=1e-3, participations=participations,
                     min_separation=separation)  # fmt: skip
    guard = guard_of(privacy, settings(rounds=leaves))
    for round in range(1, leaves + 1):
        guard.collect(state(), [], round, 0.1)
    assert exact_epsilon(exact / 2.0, 1e-3) < guard.epsilon
    if participations == 1:
        assert guard.epsilon < 1.25 * exact_epsilon(exact / 2.0, 1e-3)  # what Renyi costs more


def test_what_is_spent_is_the_tree_cut_off_there():
    guard = guard_of(DPFTRL(epsilon=3.0, participations=2), settings(rounds=12))
    z, told = guard.noise_multiplier, []
    assert guard.epsilon == 0
    for round in range(1, 13):
        guard.collect(state(), [], round, 0.1)
        told.append(guard.epsilon)
        assert told[-1] == epsilon([TreeGaussian(z, round, 2, 1)], 1 / 8)
    assert told == sorted(told) and 2.97 < told[-1] <= 3.0


def test_fewer_and_rarer_participations_need_less_noise():
    def z(**more):
        return guard_of(DPFTRL(**more), settings(rounds=32)).noise_multiplier

    assert z(participations=1) < z(participations=4, min_separation=8) < z(participations=4) < z()
    assert z(min_separation=8) == z(participations=4, min_separation=8)  # four fit into 32 rounds


# Who is left out


def counts(guard, asked: dict[int, list[int]]) -> list[float]:
    """How many updates each round counts: each is 1 in one coordinate."""
    vector, found = np.zeros(LAYOUT.size), []
    vector[7] = 1.0
    for round, who in asked.items():
        [one] = guard.collect(state(), [update(c, vector, round=round) for c in who], round, 0.1)
        found.append(float(np.round(one.vector[7] * guard.divisor, 6)))
    return found


def test_a_client_over_its_participations_is_left_out():
    guard = guard_of(silent(DPFTRL, participations=2), settings(rounds=5))
    assert counts(guard, {1: [0, 1], 2: [0], 3: [0, 1], 4: [0, 1, 2], 5: [0, 2]}) == [2, 1, 1, 1, 1]
    assert guard.left_out == 4
    assert "4 updates of clients over that bound were left out" in guard.statement().text()


def test_a_client_that_comes_too_soon_is_left_out():
    guard = guard_of(silent(DPFTRL, min_separation=3), settings(rounds=8))
    asked = {1: [0], 2: [0, 1], 3: [0], 4: [0, 1], 5: [1], 6: [0], 7: [0], 8: [1]}
    assert counts(guard, asked) == [1, 1, 0, 1, 1, 0, 1, 1]


def test_what_a_client_left_out_sends_changes_nothing():
    ends = []
    for more in (np.full(LAYOUT.size, 5.0), np.full(LAYOUT.size, -3.0)):
        guard = guard_of(DPFTRL(participations=1), settings(rounds=3))
        guard.collect(state(), [update(1, vectors(1)[0])], 1, 0.1)
        ends.append(guard.collect(state(), [update(0, vectors(2)[1]), update(1, more)], 2, 0.1)[0].vector)
    assert np.array_equal(*ends)


def test_no_assumption_on_sampling():
    for sampling in (Fixed(), Available()):
        DPFTRL().check(settings(sampling=sampling))
    fixed, available = (guard_of(DPFTRL(), settings(sampling=s, per_round=2)) for s in (Fixed(), Available()))
    assert fixed.noise_multiplier == available.noise_multiplier


def test_rules_that_change_the_basis_are_refused():
    with pytest.raises(ConfigError, match=r"aggregator='FedSVD' .*one basis"):
        DPFTRL().check(settings(aggregator=FedSVD("uniform")))


def test_adapters_that_train_in_turn_are_refused():
    with pytest.raises(ConfigError, match=r"adapter='RoLoRA' .*each round"):
        DPFTRL().check(settings(adapter=RoLoRA()))


def test_prv_does_not_cover_a_tree():
    with pytest.raises(ConfigError, match=r"privacy\.accountant='prv' .*rdp"):
        guard_of(DPFTRL(accountant="prv"))


# Resuming, the statement, whole runs


def test_restored_books_go_on_bit_for_bit():
    def made():
        return guard_of(DPFTRL(participations=4, min_separation=2), settings(rounds=9))

    updates = [[update(c, v * r, round=r) for c, v in enumerate(vectors(5))] for r in range(10)]
    whole = made()
    ends = [whole.collect(state(), updates[r], r, 0.1)[0].vector for r in range(1, 9)]
    for cut in range(1, 8):
        begun, later = made(), made()
        for r in range(1, cut + 1):
            begun.collect(state(), updates[r], r, 0.1)
        later.restore(json.loads(json.dumps(begun.state())))
        assert later.epsilon == begun.epsilon
        for r in range(cut + 1, 9):
            assert np.array_equal(later.collect(state(), updates[r], r, 0.1)[0].vector, ends[r - 1])
        assert later.state() == whole.state()
    with pytest.raises(ConfigError, match="spent under"):
        guard_of(DPFTRL(participations=3, min_separation=2), settings(rounds=9)).restore(whole.state())


def test_the_statement_names_everything():
    guard = guard_of(DPFTRL(clip=0.7, delta=1e-3, participations=3, min_separation=2), settings(rounds=8, per_round=3))
    guard.collect(state(), [], 1, 0.1)
    text = guard.statement().text()
    for part in (
        "DP-FTRL", f"({guard.epsilon:.4g}, 0.001)-differential privacy was spent of a budget of 3", "for one client",
        "adding or removing all of its data", "RDP accountant", "none is assumed", "L2 norm C = 0.7", "uniform weights",
        f"Gaussian, {guard.noise_multiplier:.4g} x C at each node",
        "at most 3 of 8 rounds of a client, 2 or more apart", "1 rounds taken", "the server is trusted",
    ):  # fmt: skip
        assert part in text, part
    assert guard.statement().holders[0]["mechanism"].startswith("1 binary trees over 1 rounds")


def test_a_run_with_momentum(tmp_path):
    go(tmp_path / "run", "privacy=dp_ftrl", UNIFORM, "server_optimizer=fedavgm", "schedule.rounds=3",
       "privacy.participations=2")  # fmt: skip
    run = read_run(tmp_path / "run")
    assert run["status"] == "completed" and 2.9 < run["final"]["epsilon"] <= 3.0
    assert "4 updates of clients over that bound were left out" in run["privacy"]
    assert len(rounds(tmp_path / "run")) == 3


def test_killed_and_resumed_ends_the_same(tmp_path):
    words = ("privacy=dp_ftrl", UNIFORM, "privacy.min_separation=2", "local.steps=1", "schedule.rounds=4",
             "server_optimizer=fedavgm")  # fmt: skip
    count = moments(tmp_path / "whole", *words)
    killed_at(int(0.8 * count), tmp_path / "run", *words)
    resume(tmp_path / "run", shared=SHARED, quiet=True)
    same_end(tmp_path / "run", tmp_path / "whole")
    assert final(tmp_path / "run")["epsilon"] > 0
