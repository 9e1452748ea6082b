"""Robust rules as a server applies them: against dense weight changes, under a gauge attack, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest

from aggregators.combining import ROOT, factored
from aggregators.fedavg import FedAvg
from aggregators.flexlora import FlexLoRA
from aggregators.robust.base import Mean
from aggregators.robust.centres import CenteredClipping, GeometricMedian
from aggregators.robust.coordinates import CoordinateMedian
from aggregators.robust.nearest import Krum, MultiKrum
from aggregators.robust.trust import FLTrust
from aggregators.server_optimizers import SGD
from clients.adapters.space import Module, Space
from clients.layout import Layout
from fl.errors import ConfigError, RunStopped
from fl.state import ServerState, Update

RANK, OUT, IN = 2, 5, 7
LAYOUT = Layout(("a", "b", "head"), ((RANK, IN), (OUT, RANK), (3,)))
SPACE = Space(LAYOUT, ("a", "b", "head"), modules=(Module("m", "a", "b", rank=RANK, scale=0.5),))
START = np.random.default_rng(0).standard_normal(LAYOUT.size)
SERVER = ServerState(START, SPACE)


def update(client: int, vector: np.ndarray) -> Update:
    return Update(client, 1, 0, vector, 10)


def drawn(n: int, scale: float = 0.1, seed: int = 1) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [scale * rng.standard_normal(LAYOUT.size) for _ in range(n)]


def dense(vector: np.ndarray) -> np.ndarray:
    """The weight change and the head of a state, as one long vector."""
    a, b = SPACE.tensor(vector, "a"), SPACE.tensor(vector, "b")
    return np.concatenate([(0.5 * b @ a).ravel(), SPACE.tensor(vector, "head")])


def regauged(vector: np.ndarray, by: float) -> np.ndarray:
    """The update of a client whose state has factors B by, A / by: the same model in other coordinates."""
    state = START + vector
    SPACE.tensor(state, "b")[...] *= by
    SPACE.tensor(state, "a")[...] /= by
    return state - START


def test_the_inner_products_of_factored_updates_are_those_of_the_dense_changes():
    vectors = drawn(6)
    gram = factored(SERVER, [update(i, v) for i, v in enumerate(vectors)]).gram.numpy()[:6, :6]
    changes = np.stack([dense(START + v) - dense(START) for v in vectors])
    assert np.allclose(gram, changes @ changes.T, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("columns", ["b", "a"])
def test_so_are_those_of_updates_of_one_factor(columns):
    where = SPACE.columns((columns,))
    vectors = [v[where] for v in drawn(4)]
    updates = [Update(i, 1, 0, v, 10, columns=where) for i, v in enumerate(vectors)]
    whole = np.zeros((4, LAYOUT.size))
    whole[:, where] = vectors
    changes = np.stack([dense(START + v) - dense(START) for v in whole])
    assert np.allclose(factored(SERVER, updates).gram.numpy()[:4, :4], changes @ changes.T, atol=1e-13)


@pytest.mark.parametrize("rule", [Krum(), MultiKrum(), GeometricMedian()])
def test_under_a_gauge_attack_the_product_sees_honest_updates_and_factors_see_outliers(rule):
    vectors = drawn(8)
    twisted = [*vectors[:-1], regauged(vectors[-1], 50.0)]
    plain = FlexLoRA(combine=rule, f=2, space="product", weights="uniform")
    both = [
        plain.aggregate(SERVER, [update(i, v) for i, v in enumerate(some)], SGD()).vector for some in (vectors, twisted)
    ]
    # the same models, so the same outcome, as a model: B' and A' come from one SVD
    assert np.allclose(dense(both[0]), dense(both[1]), atol=1e-10)
    factors = FedAvg(combine=Mean(), weights="uniform")
    moved = [
        factors.aggregate(SERVER, [update(i, v) for i, v in enumerate(some)]).vector for some in (vectors, twisted)
    ]
    assert np.abs(dense(moved[0]) - dense(moved[1])).max() > 1  # the mean of factors is another model


def test_coefficients_that_leave_a_rest_stay_with_the_servers_own_product():
    vectors = drawn(5)
    rule = CenteredClipping(tau=1e-6, start="zero", iterations=1)
    new = FlexLoRA(combine=rule, f=1, space="product", weights="uniform").aggregate(
        SERVER, [update(i, v) for i, v in enumerate(vectors)], SGD()
    )
    # everything is clipped to almost nothing: the model stays
    assert np.allclose(dense(new.vector)[: OUT * IN], dense(START)[: OUT * IN], atol=1e-5)


def test_fedavg_with_a_robust_rule_is_the_rule_on_the_rows():
    vectors = drawn(7)
    far = [v + 1e6 for v in drawn(2, seed=5)]
    updates = [update(i, v) for i, v in enumerate([*vectors, *far])]
    new = FedAvg(combine=CoordinateMedian(), f=2, weights="uniform").aggregate(SERVER, updates)
    assert np.allclose(new.vector - START, np.median(np.stack([*vectors, *far]), axis=0), atol=1e-9)
    assert new.version == SERVER.version + 1
    shuffled = FedAvg(combine=CoordinateMedian(), f=2, weights="uniform").aggregate(SERVER, updates[::-1])
    assert np.array_equal(new.vector, shuffled.vector)


def test_fltrust_measures_by_the_servers_own_update_and_counts_it_for_nothing_else():
    rng = np.random.default_rng(2)
    root = rng.standard_normal(LAYOUT.size)
    good, bad = 3 * root, -5 * root
    rule = FedAvg(combine=FLTrust(), weights="uniform")
    new = rule.aggregate(SERVER, [update(0, good), update(1, bad), update(ROOT, root)])
    # trust 1 and 0: the good one, at the length of the root
    assert np.allclose(new.vector - START, root, atol=1e-12)


def test_memory_is_kept_in_the_state_and_read_back():
    rule = FedAvg(combine=CenteredClipping(tau=0.5, start="last", iterations=1), f=1, weights="uniform")
    first = rule.aggregate(SERVER, [update(i, v) for i, v in enumerate(drawn(5))])
    assert np.allclose(first.extra["combine/centre"], first.vector - START, atol=1e-12)
    second = rule.aggregate(first, [update(i, v) for i, v in enumerate(drawn(5, seed=9))])
    fresh = rule.aggregate(first.replace(extra={}), [update(i, v) for i, v in enumerate(drawn(5, seed=9))])
    assert not np.allclose(second.vector, fresh.vector)


def test_what_can_not_be_is_refused():
    with pytest.raises(ConfigError, match="aggregator.space"):
        FedAvg(combine=CoordinateMedian(), space="product")
    with pytest.raises(ConfigError, match="aggregator.combine"):
        FlexLoRA(combine=CoordinateMedian())
    with pytest.raises(ConfigError, match="remembers"):
        FedAvg(combine=CenteredClipping(), space="product")
    with pytest.raises(ConfigError, match="start"):
        FlexLoRA(combine=CenteredClipping())
    with pytest.raises(ConfigError, match="aggregator.f"):
        FedAvg(combine=Krum(), f=2).check_round(6)
    FedAvg(combine=Krum(), f=2).check_round(7)
    with pytest.raises(RunStopped, match="too few"):
        FedAvg(combine=Krum(), f=2).aggregate(SERVER, [update(i, v) for i, v in enumerate(drawn(6))])
    where = SPACE.columns(("a",))
    mixed = [update(0, drawn(1)[0]), *(Update(i, 1, 0, drawn(1)[0][where], 1, columns=where) for i in (1, 2))]
    with pytest.raises(RunStopped, match="same tensors"):
        FedAvg(combine=GeometricMedian(), f=1).aggregate(SERVER, mixed)


def test_a_robust_rule_is_no_mean_and_the_mean_is_one():
    assert FedAvg().linear and FedAvg(combine=Mean()).linear
    assert not FedAvg(combine=Krum()).linear and not FlexLoRA().linear
