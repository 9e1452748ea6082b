"""A scalar in one byte: what it stands for, how far off it is, and what is refused."""

import numpy as np
import pytest

from fl.errors import ShoalError
from fl.one_byte.codec import decode, encode
from tests.oracles import one_byte

SMALLEST, LARGEST = np.exp(-63 / 8), np.exp(63 / 8)


def there_and_back(values) -> np.ndarray:
    return decode(encode(np.asarray(values, float), "int8log"), "int8log").astype(np.float64)


def spread(low: float, high: float) -> np.ndarray:
    """Numbers of both signs, many to a level."""
    sizes = np.geomspace(low, high, 20011)
    return np.concatenate([sizes, -sizes])


def test_a_scalar_is_one_byte():
    payload = encode(spread(1e-9, 1e9), "int8log")
    assert payload.dtype == np.uint8 and len(payload) == 2 * 20011
    assert len(set(payload.tolist())) == 255


def test_the_error_is_bounded_over_the_whole_range():
    inside = spread(SMALLEST, LARGEST)
    error = np.abs(there_and_back(inside) - inside)
    assert (error <= 1.000001 * np.expm1(1 / 16) * np.abs(inside)).all()
    assert error.max() > 0 and (error / np.abs(inside)).max() > 0.064  # the bound is reached
    below = np.concatenate([spread(1e-12, SMALLEST), [0.0]])
    assert (np.abs(there_and_back(below) - below) <= 1.000001 * SMALLEST / 2).all()
    assert np.abs(there_and_back(below) - below).max() > 0.49 * SMALLEST


def test_signs_are_kept_and_zero_is_zero():
    values = spread(SMALLEST, LARGEST)
    assert np.array_equal(np.sign(there_and_back(values)), np.sign(values))
    assert np.array_equal(there_and_back(-values), -there_and_back(values))
    assert encode(np.zeros(1), "int8log").tolist() == [0] and encode(np.array([-0.0, 1e-9]), "int8log").tolist() == [
        0,
        0,
    ]
    assert there_and_back([0.0]).tolist() == [0.0]


def test_it_is_the_level_that_a_search_over_all_of_them_finds():
    values = np.concatenate([spread(1e-6, 1e6)[::97], [0.0]])
    assert there_and_back(values) == pytest.approx([one_byte.one_byte(g) for g in values], rel=1e-6, abs=0)


def test_levels_come_back_as_they_are():
    levels = np.array(one_byte.levels())
    assert there_and_back(levels) == pytest.approx(levels, rel=1e-6, abs=0)
    once = there_and_back(spread(1e-6, 1e6))
    assert np.array_equal(there_and_back(once), once)


def test_beyond_the_range_it_saturates():
    assert there_and_back([1e9, -1e300]) == pytest.approx([LARGEST, -LARGEST], rel=1e-6)


def test_four_bytes_are_float32():
    values = spread(1e-9, 1e9)
    payload = encode(values, "none")
    assert payload.dtype == np.uint8 and len(payload) == 4 * len(values)
    assert np.array_equal(decode(payload, "none"), values.astype(np.float32))


@pytest.mark.parametrize("quantiser", ["int8log", "none"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_does_not_travel(quantiser, bad):
    with pytest.raises(ShoalError, match="finite"):
        encode(np.array([1.0, bad]), quantiser)


def test_bytes_that_stand_for_nothing_are_refused():
    with pytest.raises(ShoalError, match="no number"):
        decode(np.array([3, 128], np.uint8), "int8log")
    with pytest.raises(ShoalError, match="no number"):
        decode(np.frombuffer(np.array([np.nan], "<f4").tobytes(), np.uint8), "none")
    with pytest.raises(ShoalError, match="whole number"):
        decode(np.zeros(3, np.uint8), "none")
