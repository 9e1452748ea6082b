import math

import numpy as np
import pytest

from fl.errors import ConfigError, ShoalError
from fl.keys import generator, key_bytes
from privacy.secure_aggregation import field, norm_check
from privacy.secure_aggregation.field import P
from privacy.secure_aggregation.norm_check import ROWS, NormCheck

QUERY = key_bytes("query")


def vector(check, norm, *key):
    x = generator("vector", *key).normal(size=check.length)
    return np.trunc(x / np.linalg.norm(x) * norm).astype(np.int64)


def judge(check, messages, query=QUERY, context="r", client=3):
    kept = [check.open(s, m, context, client, query) for s, m in enumerate(messages)]
    return check.accept([opening for _, opening in kept]), field.total(np.stack([share for share, _ in kept]))


def cheat(check, elements, numbers=None, bits=None, key="cheat"):
    """The best that a client can send for any field vector: true to the protocol but for the statement.

    ``numbers(y)`` are what it says the projections and the slack are, before they are cut into bits.
    """
    secret = key_bytes(key)
    commitment = check._commit(elements, secret, "r", 3)
    if bits is None:
        said = np.array(numbers([int(y) + 2 ** (check.width - 1) for y in field.decode(commitment[-1])]), object)
        said = [(int(n) % 2**check.width) for n in said]
        bits = (np.array(said, np.uint64)[None, :] >> np.arange(check.width, dtype=np.uint64)[:, None]) & np.uint64(1)
    else:
        bits = bits([int(y) + 2 ** (check.width - 1) for y in field.decode(commitment[-1])])
    return check._prove(commitment, bits, secret, "r", 3)


def slack_numbers(check, slack):
    return [(slack >> check.width * k) % 2**check.width for k in range(check.groups - ROWS)]


@pytest.mark.parametrize("servers", [2, 3])
@pytest.mark.parametrize(("length", "bound"), [(1, 1), (5, 40), (64, 1000), (65, 1000), (700, 200_000)])
def test_an_honest_vector_is_accepted_and_shares_add_up_to_it(length, bound, servers):
    check = NormCheck(length, bound, servers)
    for key, norm in enumerate((0, bound / 2, bound)):
        x = vector(check, norm, key)
        accepted, got = judge(check, check.prove(x, key_bytes("secret", key), "r", 3))
        assert accepted and field.decode(got).tolist() == x.tolist()


def test_the_bound_is_inclusive():
    check = NormCheck(2, 5)
    assert judge(check, check.prove(np.array([3, -4]), key_bytes("s"), "r", 3))[0]
    with pytest.raises(ShoalError, match=r"norm is 5\.09902; the bound is 5"):
        check.prove(np.array([5, 1]), key_bytes("s"), "r", 3)
    for large in (2**62, -(2**63)):
        with pytest.raises(ShoalError, match="bound is 5"):
            check.prove(np.array([large, large]), key_bytes("s"), "r", 3)


def test_shares_of_sums_are_sums_of_shares():
    check = NormCheck(90, 10_000)
    vectors = [vector(check, 9000, k) for k in range(6)]
    sums = [np.zeros(90, np.uint64), np.zeros(90, np.uint64)]
    for client, x in enumerate(vectors):
        messages = check.prove(x, key_bytes("secret", client), "r", client)
        for server, message in enumerate(messages):
            share, _ = check.open(server, message, "r", client, QUERY)
            sums[server] = field.reduce(sums[server] + share)
    assert field.decode(field.total(np.stack(sums))).tolist() == sum(vectors).tolist()


@pytest.mark.parametrize("excess", [1.01, 2.0, 5.0])
@pytest.mark.parametrize("said", ["zero", "true", "wrapped"])
def test_a_norm_above_the_bound_is_rejected_whatever_slack_is_said(excess, said):
    check = NormCheck(300, 10_000)
    x = vector(check, excess * 10_000)
    missing = 10_000**2 - int(x @ x)
    assert missing < 0
    slack = {"zero": 0, "true": missing, "wrapped": missing % P}[said]
    messages = cheat(check, field.encode(x), lambda y: y[:ROWS] + slack_numbers(check, slack))
    assert not judge(check, messages)[0]
    honest = vector(check, 10_000)
    slack = 10_000**2 - int(honest @ honest)
    messages = cheat(check, field.encode(honest), lambda y: y[:ROWS] + slack_numbers(check, slack))
    assert judge(check, messages)[0]  # the cheat's machinery itself is right


def test_squares_that_wrap_around_are_rejected():
    """Entries near the square root of p, with a sum of squares that is 4 mod p."""
    check = NormCheck(4, 1000)
    want = P + 4
    for a in range(math.isqrt(want), 0, -1):  # a sum of three squares for the rest is soon found
        rest = want - a * a
        b = math.isqrt(rest)
        c = math.isqrt(rest - b * b)
        d = math.isqrt(rest - b * b - c * c)
        if a * a + b * b + c * c + d * d == want:
            break
    x = np.array([a, b, c, d])
    assert (sum(int(v) ** 2 for v in x)) % P == 4 and a > 2**30
    messages = cheat(check, field.encode(x), lambda y: y[:ROWS] + slack_numbers(check, 1000**2 - 4))
    assert not judge(check, messages)[0]


def test_projections_catch_a_single_large_entry():
    """Each row misses its range with probability 1/2 at least; here, over many commitments, half of the rows do."""
    check = NormCheck(10, 100)
    x = field.encode(np.array([2 * 2 ** (check.width - 1) + 1] + [0] * 9))
    out = 0
    for k in range(30):
        projections = field.decode(check._commit(x, key_bytes(k), "r", 3)[-1])
        out += int((np.abs(projections) > 2 ** (check.width - 1)).sum())
    # 3840 rows, each out of range with probability 1/2: off by more than 0.06 with probability 2 exp(-27) = 2e-12
    assert abs(out / (30 * ROWS) - 0.5) < 0.06


def test_projections_are_those_of_rows_of_minus_one_zero_and_one():
    check = NormCheck(5000, 100)  # more than a chunk
    seed = key_bytes("rows")
    x = field.draw(key_bytes("x"), 5000)
    rows = np.stack([field.decode(check._project(np.eye(1, 5000, j, dtype=np.uint64)[0], seed)) for j in (0, 7, 4999)])
    assert set(np.unique(rows)) == {-1, 0, 1}
    few = np.zeros(5000, np.uint64)
    few[[0, 7, 4999]] = x[:3]
    expected = [sum(int(r) * int(v) for r, v in zip(row, x[:3], strict=True)) % P for row in rows.T]
    assert check._project(few, seed).tolist() == expected


def test_bits_that_are_none_are_rejected():
    """A slack below zero, as a field element in the place of one bit: all sums are right, only b (b - 1) is not 0."""
    check = NormCheck(20, 1000)
    x = vector(check, 1100)

    def bits(y):
        out = np.array(y[:ROWS] + [0] * (check.groups - ROWS), np.uint64)
        out = (out[None, :] >> np.arange(check.width, dtype=np.uint64)[:, None]) & np.uint64(1)
        out[0, ROWS] = (1000**2 - int(x @ x)) % P
        return out

    messages = cheat(check, field.encode(x), bits=bits)
    openings = [check.open(s, m, "r", 3, QUERY)[1] for s, m in enumerate(messages)]
    checks = sum(np.frombuffer(o, "<u8")[-(ROWS + 1) :].astype(object) for o in openings) % P
    assert not checks.any()  # the linear statements hold
    assert not check.accept(openings)


def test_every_part_of_the_proof_counts():
    """One element changed by one, in each part: x, its masks, q, bits, their masks, q_g."""
    check = NormCheck(130, 1000)
    messages = check.prove(vector(check, 900), key_bytes("s"), "r", 3)
    head = 32 * 3
    for start, size in zip(np.cumsum([0, *check._sizes()]), check._sizes(), strict=False):
        for at in (int(start), int(start) + size // 2, int(start) + size - 1):
            body = np.frombuffer(messages[1][head:], "<u8").copy()
            body[at] = (int(body[at]) + 1) % P
            assert not judge(check, [messages[0], messages[1][:head] + body.tobytes()])[0]
    for server, at in [(0, 0), (0, 40), (0, 70), (0, 100), (1, 5), (1, 40), (1, 70)]:  # blinds, hashes, the seed
        bad = [bytearray(m) for m in messages]
        bad[server][at] ^= 1
        assert not judge(check, [bytes(m) for m in bad])[0]


def test_a_proof_is_for_one_client_and_one_round():
    check = NormCheck(30, 1000)
    messages = check.prove(vector(check, 900), key_bytes("s"), "r", 3)
    assert judge(check, messages)[0] and judge(check, messages, key_bytes("another query"))[0]
    assert not judge(check, messages, client=4)[0]
    assert not judge(check, messages, context="r2")[0]


def test_what_is_no_proof_is_refused():
    check = NormCheck(30, 1000)
    messages = check.prove(vector(check, 900), key_bytes("s"), "r", 3)
    for server in (0, 1):
        with pytest.raises(ShoalError, match="bytes"):
            check.open(server, messages[server][:-1], "r", 3, QUERY)
    with pytest.raises(ShoalError, match="not below"):
        check.open(1, messages[1][:-8] + P.to_bytes(8, "little"), "r", 3, QUERY)
    with pytest.raises(ShoalError, match="1 openings"):
        check.accept([check.open(0, messages[0], "r", 3, QUERY)[1]])
    with pytest.raises(ShoalError, match="must be int64"):
        check.prove(np.zeros(30), key_bytes("s"), "r", 3)


def test_what_a_server_holds_and_sees_is_uniform_but_for_zeros():
    """Each message alone, and the opened values, over many proofs of one and the same vector."""
    check = NormCheck(64, 1000)
    x = np.full(64, 100)
    opened, explicit = [], []
    for k in range(200):
        messages = check.prove(x, key_bytes("uniform", k), "r", 3)
        explicit.append(np.frombuffer(messages[1][96:], "<u8")[:64])
        openings = [np.frombuffer(check.open(s, m, "r", 3, QUERY)[1][96:], "<u8") for s, m in enumerate(messages)]
        opened.append(field.reduce(openings[0].astype(np.uint64) + openings[1].astype(np.uint64)))
    sizes = np.cumsum([check.columns, 1, check.groups, check.groups])
    f, _, g, _, zeros = np.split(np.stack(opened), sizes, axis=1)
    assert not zeros.any()
    for values in (np.stack(explicit).ravel(), f.ravel(), g.ravel()):
        counts = np.bincount((values >> np.uint64(58)).astype(np.int64), minlength=8)
        # chi-square with 7 degrees of freedom: above 50 with probability 1.4e-8
        assert ((counts - len(values) / 8) ** 2 / (len(values) / 8)).sum() < 50


@pytest.mark.parametrize("hashed", [bytes(32), (P - 2 * norm_check.POINTS - 1).to_bytes(32, "little"), b"\xff" * 32])
def test_the_query_point_is_none_of_the_polynomials(monkeypatch, hashed):
    """At such a point an entry would be opened as it is."""
    monkeypatch.setattr(norm_check, "derive", lambda *_: hashed)
    assert 2 * norm_check.POINTS < NormCheck(64, 1000)._point(QUERY) < P


def test_soundness_and_sizes():
    check = NormCheck(100_000, 300_000)
    assert check.soundness_log2() < -53
    assert check.elements < 1.1 * 100_000
    assert 2 ** (check.width - 1) >= 300_000 * math.sqrt(math.log(2 * ROWS * 2**40))


def test_settings_that_could_wrap_around_are_refused():
    NormCheck(100_000, 363_000)
    with pytest.raises(ConfigError, match=r"norm_check\.bound=400000 .*smaller scale"):
        NormCheck(100_000, 400_000)
    for length, bound, servers in ((0, 5, 2), (5, 0, 2), (5, 5, 1)):
        with pytest.raises(ConfigError, match="at least 2 servers"):
            NormCheck(length, bound, servers)


@pytest.mark.slow
def test_a_hundred_thousand_entries():
    check = NormCheck(100_000, 300_000)
    x = vector(check, 299_999)
    accepted, got = judge(check, check.prove(x, key_bytes("s"), "r", 3))
    assert accepted and (field.decode(got) == x).all()
