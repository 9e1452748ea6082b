import numpy as np
import pytest

from fl.keys import generator
from privacy.secure_aggregation import field
from privacy.secure_aggregation.field import P


def numbers(count, *key):
    """Random elements and the extreme ones."""
    draws = generator("field", *key).integers(0, P, count, dtype=np.uint64)
    return np.concatenate([draws, np.array([0, 1, P - 1, 2**31 - 1, 2**31, 2**60, P // 2, P // 2 + 1], np.uint64)])


def test_the_modulus_is_prime():
    """Lucas and Lehmer's test of 2^61 - 1."""
    s = 4
    for _ in range(59):
        s = (s * s - 2) % P
    assert s == 0


def test_arithmetic_against_python_integers():
    a, b = (x.ravel() for x in np.meshgrid(numbers(60, 1), numbers(60, 2)))
    for got, exact in [
        (field.multiply(a, b), [int(x) * int(y) % P for x, y in zip(a, b, strict=True)]),
        (field.subtract(a, b), [(int(x) - int(y)) % P for x, y in zip(a, b, strict=True)]),
        (field.reduce(a + b), [(int(x) + int(y)) % P for x, y in zip(a, b, strict=True)]),
    ]:
        assert got.dtype == np.uint64 and got.tolist() == exact
    rows = np.stack([a, b, a, a])
    assert field.total(rows).tolist() == [sum(map(int, column)) % P for column in rows.T]
    assert int(field.total(np.full(100_000, P - 1, np.uint64))) == 100_000 * (P - 1) % P


def test_reduce_takes_any_number():
    values = [0, P - 1, P, P + 1, 2 * P, 2**63, 2**64 - 1]
    assert field.reduce(np.array(values, np.uint64)).tolist() == [v % P for v in values]


def test_signed_integers_round_trip():
    values = np.array([0, 1, -1, P // 2, -(P // 2), 12345, -12345])
    assert field.decode(field.encode(values)).tolist() == values.tolist()


@pytest.mark.parametrize("degree", [1, 2, 5])
def test_polynomials_are_evaluated_and_extended(degree):
    coefficients = [[int(v) for v in row] for row in generator("poly", degree).integers(0, P, (3, degree + 1))]

    def at(x):
        return [sum(c * x**k for k, c in enumerate(row)) % P for row in coefficients]

    values = np.array([at(x) for x in range(degree + 1)], np.uint64)  # (degree + 1, 3)
    for point in (degree + 1, 1000, P - 1):
        assert field.evaluate(values, point).tolist() == at(point)
    assert field.extend(values).tolist() == [at(x) for x in range(degree + 1, 2 * degree + 1)]


def test_draws_are_uniform_and_replay():
    drawn = field.draw(bytes(range(32)), 160_000)
    assert (drawn < P).all() and (field.draw(bytes(range(32)), 1000) == drawn[:1000]).all()
    counts = np.bincount((drawn >> np.uint64(57)).astype(np.int64), minlength=16)
    # chi-square with 15 degrees of freedom: above 64.3 with probability 4.6e-8
    assert ((counts - 10_000) ** 2 / 10_000).sum() < 64.3
