import itertools

import pytest

from fl.errors import ShoalError
from fl.keys import generator
from privacy.secure_aggregation.shamir import PRIME, SHARE_BYTES, combine, split

SECRET = bytes(range(200, 232))


def test_the_modulus_is_prime_and_above_all_secrets():
    assert PRIME > 2**256
    odd, twos = PRIME - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in (2, 3, 5, 7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71):  # Miller-Rabin
        x = pow(base, odd, PRIME)
        assert x in (1, PRIME - 1) or any((x := x * x % PRIME) == PRIME - 1 for _ in range(twos - 1))


@pytest.mark.parametrize("secret", [bytes(32), b"\xff" * 32, SECRET])
def test_any_t_of_n_shares_give_the_secret(secret):
    shares = dict(enumerate(split(secret, 3, 6, b"seed"), start=1))
    assert {len(share) for share in shares.values()} == {SHARE_BYTES}
    for chosen in itertools.combinations(shares, 3):
        assert combine({x: shares[x] for x in chosen}, 3) == secret
    assert combine(shares, 3) == secret


def test_fewer_shares_are_refused_and_say_nothing():
    shares = dict(enumerate(split(SECRET, 3, 5, b"seed"), start=1))
    two = {x: shares[x] for x in (2, 4)}
    with pytest.raises(ShoalError, match="2 shares .* 3 are needed"):
        combine(two, 3)
    assert combine(two, 2) != SECRET
    # Every secret is consistent with two shares: for each there is a third share that gives it.
    for other in (bytes(32), SECRET[::-1]):
        f = {0: int.from_bytes(other, "little"), **{x: int.from_bytes(s, "little") for x, s in two.items()}}
        third = 0
        for x, value in f.items():
            for m in f:
                if m != x:
                    value = value * (1 - m) * pow(x - m, -1, PRIME) % PRIME
            third += value
        assert combine({1: (third % PRIME).to_bytes(SHARE_BYTES, "little"), **two}, 3) == other


def test_an_altered_share_gives_another_secret():
    shares = dict(enumerate(split(SECRET, 2, 3, b"seed"), start=1))
    altered = {**shares, 1: (int.from_bytes(shares[1], "little") ^ 1).to_bytes(SHARE_BYTES, "little")}
    assert combine(altered, 2) != SECRET


def test_a_result_that_is_no_secret_is_refused():
    shares = {x: (2**256 + x).to_bytes(SHARE_BYTES, "little") for x in (1, 2)}  # on the line 2^256 + x
    with pytest.raises(ShoalError, match="do not belong together"):
        combine(shares, 2)


@pytest.mark.parametrize("share", [b"", bytes(32), b"\xff" * 33, PRIME.to_bytes(33, "little")])
def test_what_is_no_share_is_refused(share):
    with pytest.raises(ShoalError, match="share at 1"):
        combine({1: share, 2: bytes(33)}, 2)


@pytest.mark.parametrize(("secret", "threshold", "shares"), [(b"short", 2, 3), (SECRET, 0, 3), (SECRET, 4, 3)])
def test_impossible_sharings_are_refused(secret, threshold, shares):
    with pytest.raises(ShoalError, match="threshold"):
        split(secret, threshold, shares, b"seed")


def test_a_single_share_of_a_fixed_secret_is_uniform():
    draws = generator("shamir")
    high = [split(bytes(32), 2, 2, draws.bytes(32))[0][31] for _ in range(4096)]
    counts = [sum(1 for value in high if value // 16 == k) for k in range(16)]
    # chi-square with 15 degrees of freedom: above 64.3 with probability 4.6e-8
    assert sum((count - 256) ** 2 / 256 for count in counts) < 64.3
