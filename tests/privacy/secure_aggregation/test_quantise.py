import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl.config import build
from fl.errors import ConfigError, ShoalError
from fl.keys import generator
from privacy.secure_aggregation.quantise import Quantiser, finest_scale


def total(encoded):
    out = np.zeros_like(encoded[0])
    for vector in encoded:
        out += vector
    return out


@settings(max_examples=60, deadline=None)
@given(
    clients=st.integers(1, 12),
    clip=st.floats(1e-3, 1e3),
    max_weight=st.integers(1, 500),
    bits=st.sampled_from([32, 64]),
    stochastic=st.booleans(),
    seed=st.integers(0, 2**32),
)
def test_weighted_sums_are_within_the_stated_error(clients, clip, max_weight, bits, stochastic, seed):
    quantiser = Quantiser(clip, clients, finest_scale(clip, clients, max_weight, bits), max_weight, bits)
    draws = generator(seed)
    vectors = [draws.uniform(-clip, clip, 30) for _ in range(clients)]
    vectors[0][:2] = clip, -clip
    weights = [int(w) for w in draws.integers(1, max_weight, clients, endpoint=True)]
    rounding = draws if stochastic else None
    got, weight = quantiser.decode(
        total([quantiser.encode(x, w, rounding) for x, w in zip(vectors, weights, strict=True)])
    )
    exact = sum(w * x for w, x in zip(weights, vectors, strict=True))
    assert weight == sum(weights)
    slack = 1e-12 * clients * max_weight * clip  # float64
    assert np.abs(got - exact).max() <= quantiser.error_bound(clients, stochastic) + slack


@pytest.mark.parametrize("bits", [32, 64])
def test_the_worst_case_of_an_accepted_setting_does_not_wrap_around_and_one_more_is_refused(bits):
    room = (2 ** (bits - 1) - 1) // 7
    scale = min(room, 2**40) / 3.0
    clients = 7 if bits == 32 else 2**22
    quantiser = Quantiser(1.0, clients, scale, 3, bits)
    one = quantiser.integers(np.array([1.0, -1.0]), 3)
    assert [int(v) * clients for v in one] == [clients * round(3 * scale), -clients * round(3 * scale)]
    assert int(one[0]) * clients < 2 ** (bits - 1)
    got, weight = quantiser.decode(_sum_of_equal(quantiser, clients))
    np.testing.assert_allclose(got, [3 * clients, -3 * clients], rtol=1e-9)
    assert weight == 3 * clients
    with pytest.raises(ConfigError, match="could wrap around"):
        Quantiser(1.0, clients + (1 if bits == 32 else 2**23), scale, 3, bits)


def _sum_of_equal(quantiser, clients):
    """The sum of equal vectors by doubling, modulo 2^b."""
    power, out = quantiser.encode(np.array([1.0, -1.0]), 3), None
    while clients:
        if clients & 1:
            out = power if out is None else out + power
        power, clients = power + power, clients >> 1
    return out


def test_the_refusal_says_the_numbers_and_a_way_out_that_works():
    with pytest.raises(ConfigError) as raised:
        Quantiser(2.0, 100, 2.0**20, 50, 32)
    text = str(raised.value)
    assert "100 clients x 104857600" in text and "2147483647 = 2^31 - 1" in text and "modulus_bits=64" in text
    limit = float(text.split("Use a scale below ")[1].split(",")[0])
    Quantiser(2.0, 100, limit * 0.999, 50, 32)
    Quantiser(2.0, 100, 2.0**20, 50, 64)


def test_noise_needs_head_room():
    Quantiser(1.0, 1000, 2.0**20, noise_room=2**29)
    with pytest.raises(ConfigError, match="noise_room 1073741824"):
        Quantiser(1.0, 1024, 2.0**20, noise_room=2**30)
    quantiser = Quantiser(1.0, 3, 8.0, noise_room=100)
    noise = np.array([-50, 0, 50])
    got, weight = quantiser.decode(quantiser.encode(np.zeros(3), noise=noise) * np.uint32(2))
    assert (got * 8).tolist() == [-100, 0, 100] and weight == 2
    with pytest.raises(ShoalError, match="must be integers"):
        quantiser.encode(np.zeros(3), noise=noise * 1.0)


@pytest.mark.parametrize(
    ("key", "value"),
    [("clip", 0.0), ("clip", np.inf), ("scale", -1.0), ("scale", np.nan), ("clients", 0), ("max_weight", 0),
     ("modulus_bits", 16), ("norm", "l1"), ("outside", "wrap"), ("noise_room", -1)],
)  # fmt: skip
def test_settings_out_of_range_are_refused_with_their_name(key, value):
    with pytest.raises(ConfigError, match=rf"quantiser\.{key}="):
        Quantiser(**{"clip": 1.0, "clients": 2, "scale": 8.0, key: value})
    with pytest.raises(ConfigError, match=rf"quantiser\.{key}="):
        build({"clip": 1.0, "clients": 2, "scale": 8.0, key: value}, "quantiser", Quantiser)


def test_a_scale_beyond_float64_is_refused():
    with pytest.raises(ConfigError, match=r"must not exceed 2\^40"):
        Quantiser(1.0, 2, 2.0**41, modulus_bits=64)


def test_finest_scale_is_the_finest():
    for clients, weight, bits in [(10, 1, 32), (1000, 300, 32), (5, 7, 64)]:
        scale = finest_scale(0.7, clients, weight, bits)
        Quantiser(0.7, clients, scale, weight, bits)
        with pytest.raises(ConfigError):
            Quantiser(0.7, clients, 2 * scale, weight, bits)
    with pytest.raises(ConfigError, match="leave a client 2 integers"):
        finest_scale(1.0, 2**30 - 1, 3, 32)


def test_stochastic_rounding_is_unbiased_and_between_the_neighbours():
    quantiser = Quantiser(10.0, 2, 4.0)
    x = np.repeat([0.1, -0.1, 1.3, 2.25], 100_000)
    whole = quantiser.integers(x, generator=generator(3))
    assert (whole >= np.floor(4 * x)).all() and (whole <= np.ceil(4 * x)).all()
    errors = (whole - 4 * x).reshape(4, -1).mean(axis=1)
    # Hoeffding: each mean of 1e5 numbers in an interval of length 1 is off by 0.01 with probability 2 exp(-20) = 4e-9
    assert np.abs(errors).max() < 0.01
    assert (whole[-100_000:] == 9).all()
    assert (quantiser.integers(x) == np.rint(4 * x)).all()


@pytest.mark.parametrize(("norm", "vector"), [("coordinate", [0.5, -1.01]), ("l2", [0.8, -0.8])])
def test_a_vector_outside_the_range_is_refused_or_clipped_as_declared(norm, vector):
    with pytest.raises(ShoalError, match="allowed is 1"):
        Quantiser(1.0, 2, 2.0**20, norm=norm).integers(np.array(vector))
    clipped = Quantiser(1.0, 2, 2.0**20, norm=norm, outside="clip").integers(np.array(vector)) / 2.0**20
    expected = np.clip(vector, -1, 1) if norm == "coordinate" else np.array(vector) / np.linalg.norm(vector)
    np.testing.assert_allclose(clipped, expected, atol=1e-6)
    inside = np.array([0.5, -0.5])
    assert (Quantiser(1.0, 2, 2.0**20, norm=norm, outside="clip").integers(inside) == inside * 2**20).all()


def test_the_norm_of_the_integers_is_within_its_bound():
    quantiser = Quantiser(1.0, 2, 16.0, 3, norm="l2")
    for length in (1, 100, 5000):
        x = generator(length).normal(size=length)
        x *= 1 / np.linalg.norm(x) * (1 - 1e-12)
        assert np.linalg.norm(quantiser.integers(x, 3, generator(1))) <= quantiser.norm_bound(length)
        assert np.linalg.norm(quantiser.integers(x, 3)) <= quantiser.norm_bound(length, stochastic=False)


@pytest.mark.parametrize("vector", [[np.nan], [np.inf], [[1.0]]])
def test_what_is_no_finite_vector_is_refused_even_where_clipping_is_on(vector):
    with pytest.raises(ShoalError, match="finite"):
        Quantiser(1.0, 2, 8.0, outside="clip").encode(np.array(vector))


@pytest.mark.parametrize("weight", [0, 4, -1, 1.5])
def test_weights_are_integers_in_their_range(weight):
    with pytest.raises(ShoalError, match="integers 1 to 3"):
        Quantiser(1.0, 2, 8.0, 3).encode(np.zeros(2), weight)


def test_a_sum_of_another_ring_is_not_decoded():
    with pytest.raises(ShoalError, match="must be a vector"):
        Quantiser(1.0, 2, 8.0).decode(np.zeros(3, np.uint64))
