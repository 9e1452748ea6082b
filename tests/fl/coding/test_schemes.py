"""Sequential gradient coding: every job is decoded at its deadline, at the load of the formula, or it is said."""

import copy
import itertools

import numpy as np
import pytest

from fl.coding.schemes import GC, MSGC, SRSGC, Scheme
from fl.coding.stragglers import Arbitrary, Bursty
from fl.errors import ShoalError
from fl.keys import generator
from tests.oracles import coding

M_SGC = [(8, 1, 2, 3), (8, 2, 3, 3), (8, 2, 4, 2), (10, 1, 3, 4), (6, 2, 3, 5), (6, 2, 3, 6), (4, 1, 2, 0)]
SR_SGC = [(8, 1, 2, 3), (8, 2, 3, 3), (10, 1, 3, 4), (12, 2, 5, 6), (12, 3, 4, 5), (12, 1, 4, 8)]
JOBS = 12


def _gradients(scheme: Scheme, seed: int, d: int = 3) -> dict[int, np.ndarray]:
    rng = generator(seed, "gradients")
    return {job: rng.standard_normal((len(scheme.shares), d)).astype(np.float32) for job in range(1, scheme.jobs + 1)}


def _check(scheme: Scheme, pattern: np.ndarray, seed: int) -> None:
    """Every job is decoded at its deadline, to 1e-9 of its largest entry."""
    gradients = _gradients(scheme, seed)
    found = coding.run(scheme, pattern, gradients)
    assert sorted(found) == list(range(1, scheme.jobs + 1))
    for job, decoded in found.items():
        true = gradients[job].astype(np.float64).sum(0)
        assert decoded is not None, f"job {job}"
        assert np.abs(decoded - true).max() < 1e-9 * np.abs(gradients[job]).sum()


@pytest.mark.parametrize(("n", "B", "W", "lam"), M_SGC)
@pytest.mark.parametrize("kind", ["auto", "cyclic"])
def test_msgc_meets_every_deadline(n, B, W, lam, kind):
    for seed in range(30 if kind == "auto" else 5):
        scheme = MSGC(n, JOBS, B, W, lam, kind)
        pattern = scheme.model.draw(n, JOBS + scheme.delay, generator(seed, "stragglers"))
        _check(scheme, pattern, seed)
        scheme = MSGC(n, JOBS, B, W, lam, kind)
        _check(scheme, Bursty(W, B, lam).draw(n, JOBS + scheme.delay, generator(seed, "bursty")), seed)
        scheme = MSGC(n, JOBS, B, W, lam, kind)
        other = Arbitrary(W - 1 + B, B, lam)
        _check(scheme, other.draw(n, JOBS + scheme.delay, generator(seed, "arbitrary")), seed)


@pytest.mark.parametrize(("n", "B", "W", "lam"), SR_SGC)
def test_srsgc_meets_every_deadline(n, B, W, lam):
    for seed in range(60):
        for model in (SRSGC(n, JOBS, B, W, lam).model, Bursty(W, B, lam)):
            _check(SRSGC(n, JOBS, B, W, lam), model.draw(n, JOBS + B, generator(seed, "stragglers")), seed)


@pytest.mark.parametrize("s", [0, 1, 2, 4])
def test_gc_decodes_every_round(s):
    for seed in range(20):
        scheme = GC(6, JOBS, s)
        _check(scheme, scheme.model.draw(6, JOBS, generator(seed, "stragglers")), seed)


@pytest.mark.parametrize(("n", "B", "W", "lam", "rounds"), [(3, 2, 3, 2, 5), (3, 1, 2, 2, 5), (4, 1, 3, 3, 4)])
@pytest.mark.parametrize("kind", [SRSGC, MSGC])
def test_every_pattern_of_the_model_is_tolerated(kind, n, B, W, lam, rounds):
    scheme = kind(n, rounds, B, W, lam, "cyclic")
    assert _walk(scheme, rounds, np.zeros((0, n), dtype=bool)) > 1000


def _walk(scheme, rounds, past) -> int:
    """Go through all patterns that conform, to ``rounds`` rounds; how many there are."""
    seen = 0
    for late in coding.patterns(scheme.n, 1):
        if not scheme.model.admits(past, late[0]):
            continue
        after = copy.copy(scheme)
        after.done(len(past) + 1, ~late[0])
        due = len(past) + 1 - scheme.delay
        assert due < 1 or after.decodable(due)
        seen += 1
        if len(past) + 1 < rounds:
            seen += _walk(after, rounds, np.concatenate([past, late]))
    return seen


@pytest.mark.parametrize(("n", "B", "W", "lam"), [(4, 1, 2, 3), (4, 2, 3, 2), (5, 1, 3, 3)])
def test_models_are_what_the_table_says(n, B, W, lam):
    L, s = W - 1 + B, SRSGC(n, 1, B, W, lam).code.s
    found = {True: 0, False: 0}
    for seed in range(200):
        rng = generator(seed, "pattern")
        pattern = rng.random((6, n)) < rng.choice([0.05, 0.15, 0.3])
        right = [coding.bursty(w, B, W, lam) or w.sum(1).max() <= s for w in coding.windows(pattern, W)]
        assert SRSGC(n, 1, B, W, lam).model.conforms(pattern) == all(right)
        right = [coding.bursty(w, B, W, lam) or coding.arbitrary(w, B, L, lam) for w in coding.windows(pattern, L)]
        assert MSGC(n, 1, B, W, lam).model.conforms(pattern) == all(right)
        found[all(right)] += 1
        assert GC(n, 1, 2).model.conforms(pattern) == (pattern.sum(1).max() <= 2)
    assert min(found.values()) > 20


def test_a_burst_beyond_the_model_is_reported():
    scheme = MSGC(6, 4, 1, 2, 2)
    pattern = np.zeros((5, 6), dtype=bool)
    pattern[1:3, 4] = True  # two rounds in a row, where B = 1: job 2 is worked on in rounds 2 and 3
    assert not scheme.model.conforms(pattern)
    found = coding.run(scheme, pattern, _gradients(scheme, 0))
    assert [job for job, gradient in found.items() if gradient is None] == [2]


def test_too_many_stragglers_are_reported():
    scheme = MSGC(6, 3, 1, 2, 2)
    pattern = np.zeros((4, 6), dtype=bool)
    pattern[1, :3] = True
    assert coding.run(scheme, pattern, _gradients(scheme, 0))[1] is None
    repeat = SRSGC(6, 3, 1, 2, 2)  # s = 1
    pattern[2, :2] = True  # they repeat job 2 in round 3
    assert [j for j, g in coding.run(repeat, pattern, _gradients(repeat, 0)).items() if g is None] == [2]
    with pytest.raises(AssertionError, match="job 2"):
        _check(GC(6, 3, 2), pattern[:3], 0)


@pytest.mark.parametrize(
    "scheme",
    [
        *(GC(n, 20, s) for n, s in [(9, 0), (9, 2), (8, 4)]),
        *(SRSGC(n, 20, B, W, lam) for n, B, W, lam in SR_SGC),
        *(MSGC(n, 20, B, W, lam) for n, B, W, lam in M_SGC),
    ],
)
def test_work_is_the_load_of_the_formula(scheme):
    """With D2 empty (lambda = n) a worker whose chunks have all arrived idles, so there the load is the most."""
    assert np.isclose(scheme.shares.sum(), 1)
    pattern = scheme.model.draw(scheme.n, scheme.jobs + scheme.delay, generator(1, "stragglers"))
    seen = set()
    for round, late in enumerate(pattern, start=1):
        work = [sum(scheme.shares[t.chunks].sum() for t in tasks) for tasks in scheme.assign(round)]
        scheme.done(round, ~late)
        if scheme.delay < round <= scheme.jobs:
            seen.add(round)
            bound = np.full(scheme.n, scheme.load)
            full = isinstance(scheme, MSGC) and scheme.code is None
            assert (np.array(work) <= bound + 1e-12).all() if full else np.allclose(work, bound, rtol=1e-12)
    assert seen


def test_golden_loads():
    assert MSGC(256, 1, 1, 2, 27).load == pytest.approx(0.00754, abs=5e-6)
    assert SRSGC(256, 1, 2, 3, 23).load == pytest.approx(0.0508, abs=5e-5)
    assert GC(256, 1, 15).load == pytest.approx(0.0625)
    assert GC(256, 1, 0).load == pytest.approx(0.00390625)
    assert MSGC(10, 1, 1, 3, 4).load == pytest.approx(3 * 5 / (10 * 11))
    assert MSGC(6, 1, 2, 3, 6).load == pytest.approx(4 / 12)
    assert SRSGC(256, 1, 2, 3, 23).code.s == 12


def test_delays():
    assert [s.delay for s in (GC(8, 1, 3), SRSGC(8, 1, 2, 3, 3), MSGC(8, 1, 2, 4, 2))] == [0, 2, 4]


def test_memory_does_not_grow():
    for scheme in (GC(6, 500, 2), SRSGC(6, 500, 2, 3, 2), MSGC(6, 500, 2, 3, 2)):
        pattern = scheme.model.draw(6, 60, generator(2, "stragglers"))
        for round, late in enumerate(pattern, start=1):
            scheme.done(round, ~late)
            assert len(scheme.got) <= scheme.delay + 1


def test_assign_changes_nothing_and_the_state_comes_back():
    pattern = Bursty(3, 2, 2).draw(6, 20, generator(3, "stragglers"))
    for make in (lambda: SRSGC(6, 15, 2, 3, 2), lambda: MSGC(6, 15, 2, 3, 2)):
        one, two = make(), make()
        for round, late in enumerate(pattern, start=1):
            again = make()
            again.restore(two.state())
            two = again
            first = [[(t.job, t.part) for t in tasks] for tasks in one.assign(round)]
            assert first == [[(t.job, t.part) for t in tasks] for tasks in one.assign(round)]
            assert first == [[(t.job, t.part) for t in tasks] for tasks in two.assign(round)]
            held, before = dict(one.got), {job: bits.copy() for job, bits in one.got.items()}
            one.done(round, ~late)
            assert all((held[job] == bits).all() for job, bits in before.items())  # arrays are replaced, not changed
            two.done(round, ~late)
            due = round - one.delay
            assert due < 1 or one.decode(due) == two.decode(due)


def test_the_last_rounds_hold_no_work_beyond_the_last_job():
    scheme = MSGC(5, 3, 1, 2, 1)
    for round in range(1, 5):
        jobs = {t.job for tasks in scheme.assign(round) for t in tasks}
        assert jobs == {job for job in (round, round - 1) if 1 <= job <= 3}
        scheme.done(round, np.ones(5, dtype=bool))


def test_repeats_are_as_few_as_they_can_be():
    scheme = SRSGC(8, 5, 1, 2, 4)  # s = 2
    late = np.isin(np.arange(8), [1, 3, 4, 6])
    scheme.done(1, ~late)
    jobs = [tasks[0].job for tasks in scheme.assign(2)]
    assert [i for i, job in enumerate(jobs) if job == 1] == [1, 3]
    assert all(len(tasks) == 1 for tasks in scheme.assign(2))


@pytest.mark.parametrize(("B", "W", "lam"), [(0, 2, 1), (2, 2, 1), (3, 2, 1), (1, 2, 7), (1, 2, -1)])
def test_impossible_models_are_refused(B, W, lam):
    for make in (MSGC, SRSGC):
        with pytest.raises(ShoalError, match="1 <= B < W and 0 <= lambda <= 6"):
            make(6, 5, B, W, lam)


def test_selective_repeat_needs_whole_windows():
    with pytest.raises(ShoalError, match="B that divides W - 1, not B = 2 and W = 4"):
        SRSGC(6, 5, 2, 4, 1)


def test_parts_of_a_job_are_all_its_data():
    """Each worker's tasks of a job, taken once each, are D1 once and D2 (lambda + 1) times over."""
    scheme = MSGC(6, 5, 2, 3, 2)
    counts = np.zeros(len(scheme.shares), dtype=int)
    for worker, part in itertools.product(range(6), range(scheme.parts)):
        counts[scheme._task(1, worker, part).chunks] += 1
    assert (counts[:12] == 1).all() and (counts[12:] == 3).all() and len(counts) == 24
