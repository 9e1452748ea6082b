"""Replicas stay equal bit for bit, whoever joins, leaves, or misses rounds."""

import hashlib

import numpy as np
import pytest

from fl.messages import MalformedMessage, PeerRequest
from fl.one_byte.codec import decode
from fl.one_byte.directions import direction
from fl.one_byte.log import Entry
from fl.one_byte.replicas import fingerprint
from tests.fl.one_byte.quadratics import SIZE, ask, go, node, samples
from tests.oracles import one_byte

ZERO = np.zeros(SIZE, np.float32)


def hashes(replicas, peers) -> set[str]:
    return {hashlib.sha256(replicas.replicas[p].state.tobytes()).hexdigest() for p in peers}


@pytest.mark.parametrize("quantiser", ["int8log", "none"])
@pytest.mark.parametrize("norm", ["n", "sqrt_n"])
def test_twenty_rounds_of_three_peers_and_a_late_joiner(quantiser, norm):
    """The golden row: three peers, two directions, twenty rounds; one hash, and a late joiner has it too."""
    replicas = node(4, quantiser=quantiser, norm=norm)
    log = go(replicas, [0, 1, 2], 20)
    assert len(hashes(replicas, [0, 1, 2])) == 1
    (answer,) = ask(replicas, [3], log, 1, ZERO, hash=1).values()
    assert hashes(replicas, [0, 1, 2, 3]) == {answer.arrays["hash"].tobytes().hex()}
    assert not np.array_equal(replicas.replicas[3].state, ZERO)
    assert len({id(replicas.replicas[p].state) for p in range(4)}) == 4  # arrays of their own


def test_the_replicas_are_what_the_definition_gives():
    replicas = node(3, quantiser="none")
    log = go(replicas, [0, 1, 2], 6)
    sent = {e.round: {k: decode(np.frombuffer(p, np.uint8), "none") for k, p in e.payloads} for e in log}
    right = one_byte.state(ZERO, sent, lambda t, k, s: direction(SIZE, 0, t, k, s), 0.1, "n")
    assert replicas.replicas[1].state == pytest.approx(right, abs=1e-5)
    # And the scalars are slopes at those replicas: the first ones, of theta_0, in closed form.
    slopes = [-samples(3)[12:24].mean(0) @ direction(SIZE, 0, 1, 1, s) for s in range(2)]
    assert sent[1][1] == pytest.approx(slopes, abs=0.5)
    assert np.linalg.norm(replicas.replicas[0].state) > 0.1


def test_the_sender_applies_what_its_byte_stands_for():
    """Were it to apply its own float, its replica would be another than the others'."""
    replicas = node(2, quantiser="int8log")
    log = go(replicas, [0, 1], 1)
    exact = node(2, quantiser="none")
    go(exact, [0, 1], 1)
    assert len(hashes(replicas, [0, 1])) == 1
    assert not np.array_equal(replicas.replicas[0].state, exact.replicas[0].state)
    assert [len(p) for _, p in log[0].payloads] == [2, 2]


def test_probes_in_place_would_part_the_replicas():
    """Golden: with the published trick three peers have three hashes after 20 rounds; restored from a copy, one."""
    targets = samples(3).reshape(3, 12, SIZE).mean(1)

    def z(t, k, s):
        return direction(SIZE, 0, t, k, s)

    for restore, number in ((False, 3), (True, 1)):
        found = one_byte.run_in_place(targets, z, 20, 2, 1e-2, 0.1, restore)
        assert len({own.tobytes() for own in found}) == number
        assert max(np.abs(a - found[0]).max() for a in found) < 1e-4


def test_joining_by_snapshot_is_joining_by_replay():
    replicas = node(4)
    log = go(replicas, [0, 1], 5)
    (donor,) = ask(replicas, [0], log, 6, snapshot=1).values()
    assert donor.arrays["state"].nbytes == 4 * SIZE
    ask(replicas, [2], log, 6, donor.arrays["state"])
    ask(replicas, [3], log, 1, ZERO)
    assert len(hashes(replicas, range(4))) == 1
    go(replicas, [0, 1, 2, 3], 3, log)
    assert len(hashes(replicas, range(4))) == 1


def test_leaving_and_coming_back_by_replay_is_never_having_left():
    replicas = node(3)
    log = go(replicas, [0, 1, 2], 4)
    go(replicas, [0, 2], 4, log)
    assert len(hashes(replicas, [0, 1])) == 2
    ask(replicas, [1], log, 5)
    assert len(hashes(replicas, [0, 1, 2])) == 1
    go(replicas, [0, 1, 2], 2, log)
    assert len(hashes(replicas, [0, 1, 2])) == 1


def test_a_request_that_comes_twice_is_answered_alike():
    replicas = node(2)
    log = go(replicas, [0, 1], 3)
    first = ask(replicas, [0], log, 3, probe=1, hash=1)[0]
    again = ask(replicas, [0], log, 3, probe=1, hash=1)[0]
    assert all(np.array_equal(first.arrays[name], again.arrays[name]) for name in ("scalars", "hash"))
    twice = Entry.of(4, {0: first.arrays["scalars"]})
    request = PeerRequest(1, 5, 4, np.zeros(0, np.float32), "", {"first": 4}, {"log": packed([twice], 2)})
    replicas.answer([request, request])
    ask(replicas, [0], [*log, twice], 4)
    assert len(hashes(replicas, [0, 1])) == 1


def packed(log, number, quantiser="int8log") -> np.ndarray:
    return np.frombuffer(b"".join(e.pack(number, quantiser) for e in log), np.uint8)


def refusal(replicas, version, first, log=(), state=ZERO[:0], peer=0, extra=()) -> str:
    arrays = {"log": log if isinstance(log, np.ndarray) else packed(log, len(replicas.parts))}
    request = PeerRequest(peer, 9, version, state, "", {"first": first, **dict(extra)}, arrays)
    (answer,) = replicas.answer([request])
    assert isinstance(answer, MalformedMessage)
    return str(answer)


def test_what_does_not_lead_on_is_refused_and_changes_nothing():
    replicas = node(2)
    log = go(replicas, [0], 4)
    before = hashes(replicas, [0])
    assert "no replica" in refusal(replicas, 4, 1, log, peer=1)
    assert "has applied 4" in refusal(replicas, 2, 1, log[:2])  # the past
    assert "has applied 4" in refusal(replicas, 6, 6, [Entry.of(6, {})])  # a gap
    assert "lead to 5" in refusal(replicas, 5, 4, log[3:])
    assert "lead to 99" in refusal(replicas, 99, 5, [])
    assert "numbers, not 3" in refusal(replicas, 4, 5, state=ZERO[:3])
    assert "first round" in refusal(replicas, 4, "x")
    assert "bytes" in refusal(replicas, 4, 5, np.zeros(2, np.float32))
    assert "no number" in refusal(replicas, 5, 5, [Entry(5, ((0, bytes([128])),))])
    assert "within a round" in refusal(replicas, 5, 5, np.array([3, 9, 1], np.uint8))
    assert hashes(replicas, [0]) == before and replicas.replicas[0].version == 4


def test_a_bad_request_does_not_hold_up_the_others():
    replicas = node(2)
    good = PeerRequest(0, 1, 0, ZERO, "", {"first": 1, "probe": 1}, {})
    bad = PeerRequest(1, 1, 7, ZERO, "", {"first": 1, "probe": 1}, {})
    one, other = replicas.answer([bad, good])
    assert isinstance(one, MalformedMessage) and len(other.arrays["scalars"]) == 2


def test_it_goes_on_from_a_checkpoint():
    replicas = node(3)
    log = go(replicas, [0, 1, 2], 3)
    other = node(3)
    other.restore({**replicas.arrays(), "server/vector": ZERO})
    go(replicas, [0, 1, 2], 2, list(log))
    go(other, [0, 1, 2], 2, list(log))
    assert hashes(replicas, range(3)) == hashes(other, range(3)) and len(hashes(other, range(3))) == 1


def test_a_fingerprint_is_of_the_raw_bytes():
    near = np.nextafter(np.float32(1), np.float32(2))
    ones = np.ones(4, np.float32)
    assert fingerprint(ones).shape == (32,)
    assert not np.array_equal(fingerprint(ones), fingerprint(np.array([1, 1, near, 1], np.float32)))


@pytest.mark.parametrize("quantiser", ["int8log", "none"])
def test_many_rounds_come_near_the_mean_of_all_peers_minima(quantiser):
    replicas = node(3, quantiser=quantiser, lrs=[0.1 / (1 + t / 20) for t in range(400)])
    go(replicas, [0, 1, 2], 400)
    right = samples(3).mean(0)
    assert np.linalg.norm(replicas.replicas[0].state - right) < 0.2 * np.linalg.norm(right)


def test_one_byte_goes_where_four_bytes_go():
    one, four = node(3, quantiser="int8log"), node(3, quantiser="none")
    go(one, [0, 1, 2], 20)
    go(four, [0, 1, 2], 20)
    gap = np.linalg.norm(one.replicas[0].state - four.replicas[0].state)
    assert 0 < gap < 0.1 * np.linalg.norm(four.replicas[0].state)
