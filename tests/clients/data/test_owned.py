"""Labels that only some clients hold."""

import numpy as np
import pytest

from clients.data.owned import Owned
from fl.errors import ConfigError

LABELS = np.array([0, 1, 2, 3] * 15)


def split(data: np.ndarray | None = LABELS, clients: int | None = 6, **settings):
    return Owned(**{"min_size": 4, **settings}).split(data, None, 60, clients, np.random.default_rng(0))


def test_owners_hold_all_of_their_labels_and_nothing_else():
    parts = split(owners=[1, 4], labels=[0, 3])
    assert {c for c, part in enumerate(parts) if set(LABELS[part]) & {0, 3}} == {1, 4}
    assert all(set(LABELS[parts[c]]) <= {0, 3} for c in (1, 4))
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(60))
    assert [len(p) for p in parts] == [8, 15, 8, 7, 15, 7]
    assert all((np.diff(part) > 0).all() for part in parts)
    assert not np.array_equal(parts[0], np.flatnonzero(~np.isin(LABELS, [0, 3]))[:8])  # dealt by chance


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"owners": []}, "partition.owners"),
        ({"owners": [6]}, "partition.owners"),
        ({"owners": [1, 1]}, "partition.owners"),
        ({"owners": [0, 1, 2, 3, 4, 5]}, "partition.owners"),
        ({"labels": [4]}, "partition.labels"),
        ({"labels": [0, 1, 2, 3]}, "partition.labels"),
        ({"min_size": 16, "owners": [2]}, "partition.min_size"),
        ({"clients": None}, "clients.number"),
        ({"labels": [0], "data": None}, "partition"),
    ],
    ids=str,
)
def test_what_can_t_be_dealt_so_is_refused(settings, key):
    with pytest.raises(ConfigError) as refusal:
        split(**settings)
    assert refusal.value.key == key
