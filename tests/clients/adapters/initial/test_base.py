"""The declared source of a sample: who is in it, what it promises, and what is said of it."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from clients.adapters.initial.eva import EVA
from clients.adapters.initial.lora_sb import LoRASB
from fl.config import build
from fl.errors import ConfigError
from fl.keys import generator


def delta_of(epsilon: float, noise: float) -> float:
    """The exact delta of a Gaussian mechanism of sensitivity 1 (Balle and Wang, arXiv 1805.06530, theorem 8)."""
    cdf = stats.norm.cdf
    return float(cdf(0.5 / noise - epsilon * noise) - math.exp(epsilon) * cdf(-0.5 / noise - epsilon * noise))


@pytest.mark.parametrize("noise", [0.5, 1.0, 4.0, 60.0])
@pytest.mark.parametrize("n", [50, 10_000, 1_000_000])
def test_epsilon_is_that_of_one_gaussian_release(noise, n):
    found = LoRASB(source="private", noise=noise).epsilon(n)
    # The closed form of the accountant's minimum over real orders.
    orders = 1 + np.geomspace(1e-4, 1e5, 400_000)
    closed = orders / (2 * noise**2) - (math.log(1 / n) + np.log(orders)) / (orders - 1) + np.log1p(-1 / orders)
    assert found == pytest.approx(max(0.0, float(closed.min())), rel=1e-3, abs=1e-6)
    # A true bound, and not a loose one.
    assert delta_of(found, noise) <= 1 / n
    assert found == 0 or delta_of(found / 1.4, noise) > 1 / n


def test_epsilon_is_infinite_without_noise_and_needs_a_delta_below_one():
    assert all(LoRASB(source=s).epsilon(100) == math.inf for s in ("public", "client", "clients"))
    with pytest.raises(ConfigError, match="at least 2 examples"):
        LoRASB(source="private").epsilon(1)


def test_a_private_statement_has_the_mechanism_s_numbers():
    init = LoRASB(source="private", clip=0.5, noise=2.0, examples=32)
    text = init.statement(1000)
    for part in (
        "norm 0.5",
        "2 x 0.5",
        f"({init.epsilon(1000):.3g}, 0.001)",
        "one example, added or removed",
        "1/1000",
    ):
        assert part in text
    assert f"({init.epsilon(32):.3g}, 0.0312)" in init.statement()


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("public", ("48 public examples", "reveals nothing")),
        ("client", ("client 3,", "without noise", "no privacy guarantee")),
        ("clients", ("each client,", "without noise", "no privacy guarantee")),
    ],
)
def test_a_statement_says_whose_data_and_promises_nothing_untrue(source, said):
    text = EVA(source=source, examples=48, client=3).statement(100)
    assert all(part in text for part in said) and "second moments of layer inputs" in text
    assert "differentially" not in text and text.endswith(".")
    assert "summed gradients" in LoRASB(source=source).statement()


@pytest.mark.parametrize("source", ["public", "client", "clients"])
@pytest.mark.parametrize("total", [5, 64, 900])
def test_a_plain_sample_has_the_stated_size(source, total):
    picked = EVA(source=source, examples=64).sample(total, generator(1, "sample"))
    assert len(set(picked)) == len(picked) == min(64, total)
    assert (np.diff(picked) > 0).all() and 0 <= picked.min() <= picked.max() < total
    again = EVA(source=source, examples=64).sample(total, generator(1, "sample"))
    assert np.array_equal(picked, again)
    if total > 64:
        assert not np.array_equal(picked, EVA(source=source, examples=64).sample(total, generator(2, "sample")))


def test_a_private_sample_takes_each_example_by_itself():
    init = EVA(source="private", examples=60)
    taken = np.zeros((2000, 240))
    for row in range(2000):
        taken[row, init.sample(240, generator(row, "sample"))] = 1
    # Binomial: mean 60, variance 240 * 1/4 * 3/4; a sample of fixed size would have variance 0.
    assert taken.sum(1).mean() == pytest.approx(60, abs=0.6)
    assert taken.sum(1).var() == pytest.approx(45, rel=0.15)
    assert np.abs(taken.mean(0) - 0.25).max() < 0.045
    assert len(EVA(source="private", examples=64).sample(64, generator(0))) == 64
    assert len(EVA(source="private", examples=64).sample(0, generator(0))) == 0


@pytest.mark.parametrize(
    ("name", "value"),
    [("source", "server"), ("examples", 0), ("client", -1), ("clip", 0), ("noise", 0), ("eta0", 0), ("mode", "ipm")],
)
def test_wrong_settings_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=rf"adapter\.init\.{name}="):
        build({name: value}, "adapter.init", LoRASB)


def test_the_default_source_is_said_to_be_without_a_guarantee():
    assert LoRASB().source == "clients" and "no privacy guarantee" in LoRASB().statement()
