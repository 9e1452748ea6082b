"""Integers of a bounded norm, shares among servers, and the noise that each of them adds."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import chi2

from aggregators.fedavg import FedAvg
from aggregators.fedex import FedEx
from clients.adapters.lora import LoRA
from fl.errors import ConfigError, ShoalError
from fl.keys import generator, key_bytes
from fl.schedules.fedbuff import FedBuff
from privacy.distributed import Distributed
from privacy.secure_aggregation import field
from privacy.secure_aggregation.norm_check import NormCheck
from privacy.secure_aggregation.primitives import public_key
from privacy.secure_aggregation.shares import Aggregator, ProofCodec, SecretShares, messages
from tests.privacy.secure_aggregation.test_settings import with_evaluation, with_start
from tests.privacy.test_client_level import settings

QUERY = key_bytes("query")


def aggregators(check: NormCheck, context: str = "r") -> list[Aggregator]:
    return [Aggregator(s, check, key_bytes("server", s), context) for s in range(check.servers)]


def sent(check: NormCheck, integers: np.ndarray, client: int, secret: bytes | None = None) -> list[bytes]:
    publics = [public_key(key_bytes("server", s)) for s in range(check.servers)]
    return messages(check, integers, secret or key_bytes("secret", client), publics, "r", client)


def add(servers: list[Aggregator], texts: list[bytes], client: int) -> bool:
    openings = [s.open(client, text, QUERY) for s, text in zip(servers, texts, strict=True)]
    accepted = servers[0].check.accept(openings)
    for s in servers:
        s.close(client, accepted)
    return accepted


def opened(servers: list[Aggregator], noise: float = 0.0) -> np.ndarray:
    return field.decode(field.total(np.stack([s.total(noise) for s in servers])))


# Integers


@pytest.mark.parametrize("size", [1, 7, 1000, 40_000])
def test_what_is_encoded_can_be_proved_and_decodes_to_within_half_a_step(size):
    codec = ProofCodec(size, 0.5, 10)
    for scale in (1e-3, 0.4, 3.0, 1e30):
        v = generator("update", size).normal(size=size)
        v *= scale / np.linalg.norm(v)
        integers = codec.encode(v, 1, generator(0), {})
        norm = np.linalg.norm(v)
        inside = v * min(1.0, 0.5 / norm)
        assert int(integers @ integers) <= codec.bound**2
        np.testing.assert_allclose(codec.decode(integers, 1), inside, rtol=0, atol=0.5001 / codec.scale)
        np.testing.assert_allclose(codec.decode(integers, 4), inside / 4, rtol=0, atol=0.126 / codec.scale)
    # It is the norm after rounding that is proved, wherever the rounding goes.
    worst = np.full(size, 0.5 / codec.scale) * (1 + 1e-9)
    assert np.linalg.norm(codec.encode(worst, 1, generator(0), {})) <= codec.bound


def test_a_float32_update_at_the_clip_is_clipped_in_float64():
    """Clipped in float32 it could be longer than the clip by 1e-7 of it, which is more than a proof allows."""
    codec = ProofCodec(3, 0.1, 10)
    for k in range(50):
        v = generator("long", k).normal(size=3).astype(np.float32)
        assert np.linalg.norm(codec.inside(v, {})) <= 0.1 * (1 + 1e-15)
        assert codec.inside(v, {}).dtype == np.float64


def test_the_resolution_is_the_finest_that_can_be_proved():
    for size, clip in ((10, 0.5), (3000, 2.0), (40_000, 1e-3)):
        codec = ProofCodec(size, clip, 10)
        NormCheck(size, codec.bound)
        with pytest.raises(ConfigError):
            NormCheck(size, 2 * codec.bound)
    assert ProofCodec(40_000, 0.5, 10).scale == 2.0**18 / 0.5


@pytest.mark.parametrize("bad", [np.array([1.0, np.nan]), np.array([np.inf, 0.0]), np.zeros(3)])
def test_what_is_no_update_is_not_encoded(bad):
    with pytest.raises(ShoalError, match="2 finite numbers"):
        ProofCodec(2, 1.0, 10).encode(bad, 1, generator(0), {})


# Shares and sums


@pytest.mark.parametrize("servers", [2, 3])
def test_the_servers_open_the_sum_of_those_that_proved_and_keep_nothing_of_others(servers):
    check = NormCheck(90, 10_000, servers)
    x = [np.rint(generator("x", c).normal(0, 900, 90)).astype(np.int64) for c in range(4)]
    group = aggregators(check)
    for c in (0, 1, 3):
        assert add(group, sent(check, x[c], c), c)
    for s, text in zip(group, sent(check, x[2], 2), strict=True):
        s.open(2, text, QUERY)
        s.close(2, False)
        s.close(2, True)  # it is forgotten
    assert opened(group).tolist() == (x[0] + x[1] + x[3]).tolist()


def test_a_message_is_for_one_client_server_and_round():
    check = NormCheck(20, 1000)
    texts = sent(check, np.full(20, 9), 1)
    assert add(aggregators(check), texts, 1)
    for group, client, order in (
        (aggregators(check), 2, texts),
        (aggregators(check, "another round"), 1, texts),
        (aggregators(check), 1, texts[::-1]),
    ):
        with pytest.raises(ShoalError):
            add(group, order, client)


def test_no_change_of_a_message_counts_and_none_breaks_a_server():
    """Fuzz: bits, lengths and noise. An authenticated cipher and a length are what comes before the proof."""
    check, rng = NormCheck(20, 1000), generator("fuzz")
    texts = sent(check, np.full(20, 9), 1)
    for k in range(300):
        bad = list(texts)
        at = k % 2
        text = bytearray(bad[at])
        kind = k % 5
        if kind == 0:
            text[int(rng.integers(len(text)))] ^= 1 << int(rng.integers(8))
        elif kind == 1:
            text = text[: int(rng.integers(len(text)))]
        elif kind == 2:
            text += rng.bytes(int(rng.integers(1, 99)))
        elif kind == 3:
            text = bytearray(rng.bytes(int(rng.integers(300))))
        else:
            text[:32] = bytes(32)  # a key of small order
        bad[at] = bytes(text)
        with pytest.raises(ShoalError):
            add(aggregators(check), bad, 1)


def test_each_server_holds_uniform_numbers():
    """Its share of a client's vector, and of the sum: not correlated with the vector, and even in every octant."""
    check = NormCheck(20_000, 500_000)
    x = np.rint(generator("plain").normal(0, 3000, 20_000)).astype(np.int64)
    group = aggregators(check)
    for s, text in zip(group, sent(check, x, 0), strict=True):
        s.open(0, text, QUERY)
        share = s._pending[0]
        s.close(0, True)
        for held in (share, s.total(0.0)):
            counts = np.bincount((held >> np.uint64(58)).astype(np.int64), minlength=8)
            # chi-square with 7 degrees of freedom: above 50 with probability 1.4e-8
            assert ((counts - 2500) ** 2 / 2500).sum() < 50
            low = np.bincount((held & np.uint64(7)).astype(np.int64), minlength=8)
            assert ((low - 2500) ** 2 / 2500).sum() < 50
            # |r| sqrt(n) is above 6 with probability 2e-9
            assert abs(np.corrcoef(held.astype(np.float64), x)[0, 1]) < 6 / np.sqrt(20_000)
    assert (opened(group) == x).all()


# Noise


@pytest.mark.parametrize("servers", [2, 3])
def test_the_opened_sum_has_the_noise_of_every_server_in_all_its_bits(servers):
    check, size, sigma = NormCheck(20_000, 500_000, servers), 20_000, 3e7
    group = aggregators(check)
    noise = opened(group, sigma).astype(np.float64)
    # chi-square with 20,000 degrees of freedom; fails for one key in ten million
    low, high = chi2.ppf([5e-8, 1 - 5e-8], size) * servers * sigma**2
    assert low < (noise**2).sum() < high
    for bits in (3, 5):  # noise that is drawn coarsely and scaled up leaves them bare
        counts = np.bincount(opened(group, sigma) & (2**bits - 1), minlength=2**bits)
        # chi-square: above it with probability 1e-8
        assert ((counts - size / 2**bits) ** 2 / (size / 2**bits)).sum() < chi2.isf(1e-8, 2**bits - 1)
    alone = field.decode(field.subtract(group[0].total(sigma), group[0].total(0.0))).astype(np.float64)
    one = chi2.ppf([5e-8, 1 - 5e-8], size) * sigma**2
    assert one[0] < (alone**2).sum() < one[1]  # each adds the whole of what is claimed


def test_the_same_sum_has_the_same_noise_and_any_other_its_own():
    check, sigma = NormCheck(20_000, 500_000), 1e4

    def noise(value: int, context: str = "r", sigma: float = sigma) -> list[np.ndarray]:
        group = aggregators(check)
        assert add(group, sent(check, np.full(20_000, value), 0, key_bytes("of", value)), 0)
        for s in group:
            s.context = context
        return [field.decode(field.subtract(s.total(sigma), s.total(0.0))).astype(np.float64) for s in group]

    first = noise(3)
    for mine, again in zip(first, noise(3), strict=True):
        np.testing.assert_array_equal(mine, again)
    # of independent draws: |r| below 6/sqrt(20,000), two in a billion above; another sigma must not be the same noise
    for other in (noise(4), noise(3, "another round"), noise(3, sigma=2 * sigma), first[::-1]):
        for mine, theirs in zip(first, other, strict=True):
            assert abs(np.corrcoef(mine, theirs)[0, 1]) < 6 / np.sqrt(20_000)


# Settings


def made(**parts):
    return settings(**{"secure_aggregation": SecretShares(), "aggregator": FedAvg("uniform"), **parts})


REFUSED = {
    "a rule of single updates": (made(aggregator=FedEx()), "secure_aggregation", "FedEx"),
    "weights": (made(aggregator=FedAvg("examples")), "aggregator.weights", "uniform"),
    "mixed ranks": (made(adapter=LoRA(rank=[2, 4])), "adapter.rank", "one rank"),
    "no rounds": (made(schedule=FedBuff(4)), "schedule", "in rounds"),
    "a start from clients' data": (with_start(made(), "clients"), "adapter.init.source", "public or private"),
    "aggregation error": (with_evaluation(made()), "evaluation.aggregation_error", "single updates"),
    "noise of clients": (made(privacy=Distributed()), "secure_aggregation", "secagg"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_shares_can_not_do_is_refused(case):
    given, key, text = REFUSED[case]
    with pytest.raises(ConfigError, match=text) as caught:
        SecretShares().check(given)
    assert caught.value.key == key


def test_what_they_can_do_is_not():
    SecretShares().check(made())
    SecretShares().check(with_start(made(), "public"))
