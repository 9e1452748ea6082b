"""Directions come from their keys alone, and a step is elementwise."""

import numpy as np
import torch

from fl.one_byte.directions import direction, step


def test_a_direction_is_its_key_s():
    z = direction(1000, 7, 3, 2, 1)
    assert z.dtype == np.float32 and z.shape == (1000,)
    direction(50, 1, 1, 1, 1)  # what was drew before changes nothing
    assert np.array_equal(z, direction(1000, 7, 3, 2, 1))
    others = [direction(1000, *key) for key in [(8, 3, 2, 1), (7, 4, 2, 1), (7, 3, 1, 2), (7, 3, 2, 0)]]
    assert all(not np.array_equal(z, other) for other in others)


def test_directions_are_standard_normal_and_do_not_depend_on_each_other():
    z = np.stack([direction(4000, 0, t, k, s) for t in range(5) for k in range(4) for s in range(5)]).astype(float)
    assert abs(z.mean()) < 0.01 and abs(z.var() - 1) < 0.01 and abs((z**4).mean() - 3) < 0.1
    correlation = z @ z.T / 4000
    np.fill_diagonal(correlation, 0)
    assert np.abs(correlation).max() < 6 / np.sqrt(4000)


def test_no_global_generator_is_touched():
    before = torch.random.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    direction(100, 0, 1, 1, 1)
    assert torch.equal(before[0], torch.random.get_rng_state())
    assert np.array_equal(before[1], np.random.get_state()[1])  # noqa: NPY002


def test_a_step_is_one_product_and_one_difference_for_each_replica_by_itself():
    rng = np.random.default_rng(0)
    states = [rng.standard_normal(100).astype(np.float32) for _ in range(3)]
    before, z = [s.copy() for s in states], rng.standard_normal(100).astype(np.float32)
    c = np.float32(0.3)
    step(states, z, c)
    for old, new in zip(before, states, strict=True):
        right = [np.float32(a - np.float32(c * b)) for a, b in zip(old, z, strict=True)]
        assert np.array_equal(new, np.array(right, np.float32))
