"""What secure aggregation refuses before anything loads, and the codec of sums in fixed point."""

from dataclasses import replace

import numpy as np
import pytest

from aggregators.fedavg import FedAvg
from aggregators.fedex import FedEx
from aggregators.fedsb import FedSB
from aggregators.fedsvd import FedSVD
from aggregators.flora import FLoRA
from aggregators.rolora import RoLoRA
from clients.adapters.initial.eva import EVA
from clients.adapters.lora import LoRA
from fl.errors import ConfigError, ShoalError
from fl.keys import generator
from fl.sampling import Available, Fixed, Poisson
from fl.schedules.fedbuff import FedBuff
from privacy.secure_aggregation.settings import SecAggPlus, SecureAggregation
from tests.privacy.test_client_level import settings


def made(**parts):
    return settings(**{"sampling": Fixed(), **parts})


def with_evaluation(base):
    return replace(base, evaluation=replace(base.evaluation, aggregation_error=True))


def with_start(base, source):
    return replace(base, adapter=replace(base.adapter, init=EVA(source=source)))


REFUSED = {
    "a rule of single updates": (made(aggregator=FedEx()), "secure_aggregation", "which FedEx is not"),
    "another one": (made(aggregator=FLoRA()), "secure_aggregation", "which FLoRA is not"),
    "given weights": (made(aggregator=FedAvg([1.0] * 8)), "aggregator.weights", "integers"),
    "mixed ranks": (made(adapter=LoRA(rank=[2, 4])), "adapter.rank", "one rank"),
    "no rounds": (made(schedule=FedBuff(4)), "schedule", "in rounds"),
    "aggregation error": (with_evaluation(made()), "evaluation.aggregation_error", "single updates"),
    "a start from all clients": (with_start(made(), "clients"), "adapter.init.source", "public or private"),
    "a start from one client": (with_start(made(), "client"), "adapter.init.source", "public or private"),
    "poisson sampling": (made(sampling=Poisson()), "sampling", "fixed or available"),
    "over-selection": (made(sampling=Fixed(0.2)), "sampling.over_selection", "dropout=0.1"),
    "two clients": (made(clients=2), "clients.number", "neighbours that stay"),
    "two a round": (made(clients=8, per_round=2), "clients.per_round", "neighbours that stay"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_sums_can_not_do_is_refused(case):
    given, key, text = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        SecAggPlus().check(given)
    assert caught.value.key == key
    assert text in str(caught.value)
    SecureAggregation().check(given)  # without it, all of these may be


ALLOWED = {
    "fedavg": made(),
    "examples": made(aggregator=FedAvg("examples")),
    "rolora": made(aggregator=RoLoRA()),
    "fedsb": made(aggregator=FedSB()),
    "fedsvd": made(aggregator=FedSVD()),
    "available": made(sampling=Available()),
    "public start": with_start(made(), "public"),
    "private start": with_start(made(), "private"),
    "over-selection that is planned for": made(clients=20, per_round=10, sampling=Fixed(0.1)),
}


@pytest.mark.parametrize("case", ALLOWED)
def test_what_sums_can_do_is_allowed(case):
    SecAggPlus().check(ALLOWED[case])


def test_over_selection_needs_as_many_dropouts():
    """11 of 10 asked: one is late. At 50 % more, a third of them is."""
    given = made(clients=20, per_round=10, sampling=Fixed(0.5))
    with pytest.raises(ConfigError, match=r"33% of the clients asked\. Set secure_aggregation\.dropout=0\.34"):
        SecAggPlus(dropout=0.3).check(given)
    SecAggPlus(dropout=0.34).check(given)


def test_few_clients_with_over_selection_are_those_asked():
    """4 a round are too few for these fractions, 6 asked are enough."""
    few = SecAggPlus(colluding=0.0, dropout=0.4)
    with pytest.raises(ConfigError):
        few.check(made(clients=3, per_round=3))
    few.check(made(clients=12, per_round=3, sampling=Fixed(0.6)))


def test_the_statement_names_its_assumptions():
    text = SecAggPlus(colluding=0.25).statement()
    for part in ("never a single one", "keeps to the protocol", "25% of the clients", "local steps", "evaluations"):
        assert part in text
    assert SecureAggregation().statement() == ""


# The codec


def updates(number: int, size: int = 300) -> list[np.ndarray]:
    return [generator(6, "update", c).normal(0, 0.5, size).astype(np.float32) for c in range(number)]


@pytest.mark.parametrize("bits", [32, 64])
@pytest.mark.parametrize("weights", [[1] * 5, [3, 1, 100, 40, 7]])
def test_a_sum_in_fixed_point_is_the_weighted_mean(bits, weights):
    codec = SecAggPlus(modulus_bits=bits).codec(300, 5, max(weights))
    given = updates(5)
    total = sum(codec.encode(u, w, generator(1, w), {}) for u, w in zip(given, weights))
    mean = np.average([u.astype(np.float64) for u in given], axis=0, weights=weights)
    bound = 5 / codec.quantiser.scale / sum(weights)
    assert np.abs(codec.decode(total, 5) - mean).max() <= bound
    assert (codec.length, codec.dtype, codec.most, codec.least) == (301, np.dtype(f"<u{bits // 8}"), 5, 1)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 4.01, -4.01])
def test_an_update_out_of_range_is_refused(bad):
    codec = SecAggPlus(clip=4.0).codec(10, 5, 1)
    update = np.full(10, bad, np.float32)
    with pytest.raises(ShoalError):
        codec.encode(update, 1, generator(1), {})
    codec.encode(np.clip(np.nan_to_num(update, nan=0.0), -4, 4), 1, generator(1), {})


@pytest.mark.parametrize("weight", [0, -1, 8])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ShoalError):
        SecAggPlus().codec(10, 5, 7).encode(np.zeros(10, np.float32), weight, generator(1), {})


def test_what_can_not_be_a_sum_is_refused():
    """Left-over masks are uniform: the weight, or a coordinate, is then out of range."""
    codec = SecAggPlus().codec(300, 5, 100)
    total = sum(codec.encode(u, 10, generator(1), {}) for u in updates(5))
    assert codec.decode(total, 5) is not None
    for at, change in ((300, 2**20), (300, -46), (7, 2**30)):
        broken = total.copy()
        broken[at] = (int(broken[at]) + change) % 2**32
        with pytest.raises(ShoalError, match="not the sum of 5"):
            codec.decode(broken, 5)
