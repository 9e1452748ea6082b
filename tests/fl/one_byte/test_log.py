"""The log of the scalars: how it travels, and what applying it does."""

import numpy as np
import pytest

from fl.errors import ShoalError
from fl.one_byte.codec import encode
from fl.one_byte.directions import direction
from fl.one_byte.log import Entry, Rule, unpack
from tests.oracles import one_byte

SIZE, SEED = 30, 5


def rule(**changes) -> Rule:
    return Rule(**{"seed": SEED, "columns": np.arange(SIZE), "lrs": [0.1] * 9, "quantiser": "none", **changes})


def rounds(number: int, seed: int = 0) -> dict[int, dict[int, np.ndarray]]:
    """Scalars of rounds in which some of ``number`` peers send one to four each."""
    rng = np.random.default_rng(seed)
    return {
        t: {k: rng.standard_normal(rng.integers(1, 5)) for k in range(number) if rng.random() < 0.6}
        for t in range(1, 8)
    }


def entries(scalars: dict, quantiser: str = "none") -> list[Entry]:
    return [Entry.of(t, {k: encode(g, quantiser) for k, g in own.items()}) for t, own in scalars.items()]


@pytest.mark.parametrize("quantiser", ["int8log", "none"])
@pytest.mark.parametrize("number", [1, 3, 8, 9, 20])
def test_it_travels_and_comes_back(number, quantiser):
    log = entries(rounds(number), quantiser)
    packed = b"".join(e.pack(number, quantiser) for e in log)
    assert unpack(packed, 1, number, quantiser) == log
    width = {"int8log": 1, "none": 4}[quantiser]
    scalars = sum(len(g) for own in rounds(number).values() for g in own.values())
    senders = sum(len(own) for own in rounds(number).values())
    assert len(packed) == width * scalars + senders + len(log) * -(-number // 8)


@pytest.mark.parametrize("cut", range(1, 8))
def test_a_log_that_is_cut_off_is_refused_or_ends_with_a_round(cut):
    log = entries({1: {0: np.ones(2), 2: np.ones(3)}}, "int8log")
    packed = log[0].pack(3, "int8log")
    assert len(packed) == 8
    with pytest.raises(ShoalError, match="within a round"):
        unpack(packed[:cut], 1, 3, "int8log")


def test_peers_that_do_not_exist_are_refused():
    with pytest.raises(ShoalError, match="don't exist"):
        unpack(bytes([0b1000, 1, 64]), 1, 3, "int8log")


@pytest.mark.parametrize("norm", ["n", "sqrt_n"])
def test_applying_it_is_the_sum_of_the_definition(norm):
    theta = np.random.default_rng(1).standard_normal(SIZE).astype(np.float32)
    scalars, mine = rounds(4), theta.copy()
    for entry in entries(scalars):
        rule(norm=norm).apply([mine], entry)
    sent = {t: {k: g.astype(np.float32) for k, g in own.items()} for t, own in scalars.items()}
    right = one_byte.state(theta, sent, lambda t, k, s: direction(SIZE, SEED, t, k, s), 0.1, norm)
    assert mine == pytest.approx(right, abs=1e-5)
    assert np.abs(right - theta).max() > 0.1


def test_each_round_has_its_own_rate():
    theta, log = np.zeros(SIZE, np.float32), entries({1: {0: np.ones(1)}, 2: {0: np.ones(1)}})
    rule(lrs=[0.5, 0.0]).apply([theta], log[0])
    once = theta.copy()
    assert once == pytest.approx(-0.5 * direction(SIZE, SEED, 1, 0, 0))
    rule(lrs=[0.5, 0.0]).apply([theta], log[1])
    assert np.array_equal(theta, once)


def test_only_the_columns_that_train_move():
    theta = np.ones(SIZE, np.float32)
    rule(columns=np.array([3, 4, 9])).apply([theta], Entry.of(1, {0: encode(np.ones(1), "none")}))
    assert sorted(np.flatnonzero(theta != 1)) == [3, 4, 9]
    assert theta[[3, 4, 9]] == pytest.approx(1 - 0.1 * direction(3, SEED, 1, 0, 0))


def test_scalars_are_bounded_by_everybody():
    far, near = np.zeros(SIZE, np.float32), np.zeros(SIZE, np.float32)
    rule(clip_g=2.0).apply([far], Entry.of(1, {0: encode(np.array([-50.0, 1.0]), "none")}))
    rule().apply([near], Entry.of(1, {0: encode(np.array([-2.0, 1.0]), "none")}))
    assert np.array_equal(far, near)


def test_replicas_that_share_a_draw_are_those_that_draw_for_themselves():
    """Golden: the same bits, though a direction is drawn once for three of them."""
    rng = np.random.default_rng(2)
    starts = [rng.standard_normal(SIZE).astype(np.float32) for _ in range(3)]
    together, apart = [s.copy() for s in starts], [s.copy() for s in starts]
    for entry in entries(rounds(3)):
        rule().apply(together, entry)
        for own in apart:
            rule().apply([own], entry)
    assert all(np.array_equal(a, b) for a, b in zip(together, apart, strict=True))


def test_another_order_gives_other_bits():
    scalars = {1: {0: np.array([1.0, 0.3]), 1: np.array([-2.0, 0.7])}}
    (entry,) = entries(scalars)
    mine, reverse = np.ones(SIZE, np.float32), np.ones(SIZE, np.float32)
    rule().apply([mine], entry)
    for peer, sample, c in reversed(list(rule().steps(entry))):
        reverse -= c * direction(SIZE, SEED, 1, peer, sample)
    assert mine == pytest.approx(reverse, abs=1e-5)
    assert not np.array_equal(mine, reverse)


def test_an_empty_round_changes_nothing():
    theta = np.ones(SIZE, np.float32)
    rule().apply([theta], Entry.of(1, {}))
    assert np.array_equal(theta, np.ones(SIZE, np.float32))
    assert unpack(Entry.of(1, {}).pack(3, "int8log"), 1, 3, "int8log") == [Entry.of(1, {})]
