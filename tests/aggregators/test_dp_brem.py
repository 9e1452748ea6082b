"""DP-BREM's server step: along phi, which is kept as the next centre."""

from __future__ import annotations

import numpy as np
import pytest

from aggregators.dp_brem import CENTRE, DPBREM
from aggregators.fedavg import FedAvg
from aggregators.server_optimizers import SGD
from clients.adapters.lora import LoRA
from clients.adapters.space import Space
from clients.layout import Layout
from fl.errors import ConfigError
from fl.state import ServerState, Update

RNG = np.random.default_rng(3)
START = ServerState(
    RNG.normal(size=6), Space(Layout(("a", "b"), ((2, 2), (2,)))), version=4, extra={"other": np.ones(2)}
)
PHI = RNG.normal(size=6)


def collected(phi: np.ndarray, lr: float, columns: np.ndarray | None = None) -> Update:
    return Update(0, 1, 4, -lr * phi, 1, extra={CENTRE: phi}, columns=columns)


def test_theta_moves_by_lr_phi_and_phi_is_kept():
    new = DPBREM().aggregate(START, [collected(PHI, 0.25)], SGD())
    np.testing.assert_allclose(new.vector, START.vector - 0.25 * PHI, rtol=1e-12)
    assert np.array_equal(new.extra[CENTRE], PHI)
    assert new.extra["other"].tolist() == [1, 1]
    assert new.version == 5 and CENTRE not in START.extra
    twice = DPBREM().aggregate(new, [collected(2 * PHI, 0.25)], SGD(lr=3.0))
    np.testing.assert_allclose(twice.vector, new.vector - 1.5 * PHI, rtol=1e-12)
    assert np.array_equal(twice.extra[CENTRE], 2 * PHI)


def test_only_the_columns_that_train_move():
    columns = np.array([1, 4])
    new = DPBREM().aggregate(START, [collected(PHI[:2], 1.0, columns)], SGD())
    still = [0, 2, 3, 5]
    assert np.array_equal(new.vector[still], START.vector[still])
    np.testing.assert_allclose(new.vector[columns], START.vector[columns] - PHI[:2], rtol=1e-12)


def test_plain_updates_are_averaged_and_leave_no_centre():
    updates = [Update(c, 1, 4, RNG.normal(size=6), 3 + c) for c in range(3)]
    new = DPBREM().aggregate(START, updates, SGD())
    assert np.array_equal(new.vector, FedAvg().aggregate(START, updates, SGD()).vector)
    assert new.extra.keys() == {"other"}


def test_mixed_ranks_are_refused():
    with pytest.raises(ConfigError, match="mixed ranks"):
        DPBREM().check(LoRA(rank=[2, 4]), SGD())
    DPBREM().check(LoRA(rank=2), SGD(lr=0.1, momentum=0.5))
