"""Every partition: disjoint (but one), whole, no client too small, the same for the same key; and what each is for."""

import numpy as np
import pytest

from clients.data.partition import Dirichlet, Iid, Natural, Quantity, Replicated, Shards, fill_up
from fl.errors import ConfigError
from fl.keys import generator

LABELS = generator(0, "test-labels").integers(0, 4, 600)
GROUPS = generator(0, "test-groups").integers(0, 12, 600)
DEALT = [
    Iid(min_size=5),
    Dirichlet(min_size=5, alpha=0.01),
    Dirichlet(min_size=5, alpha=1.0),
    Dirichlet(min_size=5, alpha=1000.0),
    Dirichlet(min_size=5, alpha=0.3, by="group"),
    Shards(min_size=5),
    Shards(min_size=5, by="group", per_client=3),
    Quantity(min_size=5, alpha=0.05),
    Quantity(min_size=5, law="zipf", alpha=2.0),
]


def split(partition, clients=10, seed=0, labels=LABELS, groups=GROUPS, n=600):
    return partition.split(labels, groups, n, clients, generator(seed, "partition"))


def label_counts(parts):
    return np.array([np.bincount(LABELS[p], minlength=4) for p in parts])


def skew(parts):
    """Mean total variation distance of the clients' label shares from those of all."""
    shares = label_counts(parts) / np.array([[len(p)] for p in parts])
    return np.abs(shares - np.bincount(LABELS) / 600).sum(axis=1).mean() / 2


@pytest.mark.parametrize("partition", DEALT, ids=str)
@pytest.mark.parametrize("clients", [1, 7, 120])
def test_disjoint_whole_sorted_and_none_too_small(partition, clients):
    parts = split(partition, clients)
    assert len(parts) == clients
    assert sorted(np.concatenate(parts)) == list(range(600))
    assert min(len(p) for p in parts) >= 5
    assert all((np.diff(p) > 0).all() for p in parts)


@pytest.mark.parametrize("partition", [*DEALT, Natural(min_size=5, group_size=2)], ids=str)
def test_the_key_decides(partition):
    clients = 5
    first, again, other = (split(partition, clients, seed) for seed in (0, 0, 1))
    assert all(np.array_equal(a, b) for a, b in zip(first, again))
    assert not all(np.array_equal(a, b) for a, b in zip(first, other))


def test_iid_sizes_differ_by_one_at_most():
    sizes = [len(p) for p in split(Iid(), 7)]
    assert max(sizes) - min(sizes) <= 1
    assert skew(split(Iid(), 7)) < 0.1


def test_smaller_alpha_is_more_skewed():
    means = [np.mean([skew(split(Dirichlet(alpha=a, min_size=1), seed=s)) for s in range(5)]) for a in (0.1, 1, 100)]
    assert means[0] > means[1] + 0.1 and means[1] > means[2] + 0.1
    assert means[2] < 0.1


def test_dirichlet_by_group_skews_groups_not_labels():
    parts = split(Dirichlet(alpha=0.05, by="group", min_size=1), 5)
    groups = np.array([np.bincount(GROUPS[p], minlength=12) for p in parts])
    # The largest client of a group holds nearly all of it.
    assert (groups.max(axis=0) / groups.sum(axis=0)).mean() > 0.8


def test_dirichlet_ends_where_no_draw_can_please():
    parts = split(Dirichlet(alpha=0.001, min_size=60), 10)
    assert [len(p) for p in parts] == [60] * 10


def test_shards_give_few_labels():
    counts = label_counts(split(Shards(per_client=2), 20))
    assert ((counts > 0).sum(axis=1) <= 4).all() and (counts > 0).sum(axis=1).mean() < 3
    assert (counts.sum(axis=1) == 30).all()


def test_zipf_sizes_follow_the_law():
    sizes = sorted((len(p) for p in split(Quantity(law="zipf", alpha=1.0, min_size=1), 5)), reverse=True)
    ideal = 600 / np.arange(1, 6) / (1 / np.arange(1, 6)).sum()
    assert np.abs(np.array(sizes) - ideal).max() <= 1


def test_quantity_skews_sizes_not_labels():
    spread = [np.std([len(p) for p in split(Quantity(alpha=a, min_size=1))]) for a in (0.2, 100)]
    assert spread[0] > 3 * spread[1]
    assert skew(split(Quantity(alpha=100.0), 4)) < 0.1


def test_natural_clients_are_the_groups_that_are_large_enough():
    groups = np.repeat([0, 1, 2, -1], [20, 3, 10, 5])
    parts = split(Natural(min_size=5), None, groups=groups, n=38)
    assert [p.tolist() for p in parts] == [list(range(20)), list(range(23, 33))]


def test_natural_takes_as_many_as_asked():
    parts = split(Natural(min_size=5), 4)
    chosen = [np.unique(GROUPS[p]) for p in parts]
    assert all(len(c) == 1 for c in chosen) and len({int(c[0]) for c in chosen}) == 4
    assert all(len(p) == (c[0] == GROUPS).sum() for p, c in zip(parts, chosen))


def test_natural_merges_groups():
    parts = split(Natural(min_size=5, group_size=5), None)
    assert [len(np.unique(GROUPS[p])) for p in parts] == [5, 5]
    assert len(np.intersect1d(GROUPS[parts[0]], GROUPS[parts[1]])) == 0


def test_fill_up_moves_only_what_is_missing():
    parts = [np.arange(10), np.array([10]), np.arange(11, 17)]
    filled = fill_up(parts, 3, generator(0))
    assert [len(p) for p in filled] == [8, 3, 6]
    assert sorted(np.concatenate(filled)) == list(range(17)) and 10 in filled[1]


@pytest.mark.parametrize("partition", DEALT, ids=str)
def test_too_many_clients_is_an_error_with_the_numbers(partition):
    with pytest.raises(ConfigError, match=r"121 clients of 5 need 605 samples, and there are 600"):
        split(partition, 121)


@pytest.mark.parametrize(
    ("partition", "clients", "labels", "groups", "text"),
    [
        (Iid(), None, LABELS, GROUPS, "clients.number=None"),
        (Iid(), 0, LABELS, GROUPS, "clients.number=0"),
        (Dirichlet(), 5, None, GROUPS, "needs labels.*natural, iid or quantity"),
        (Dirichlet(by="group"), 5, LABELS, None, "needs groups"),
        (Shards(), 5, None, None, "needs labels.*Choose iid or quantity"),
        (Shards(min_size=1, per_client=200), 5, LABELS, None, "1000 shards of 600"),
        (Natural(), 5, LABELS, None, "needs groups"),
        (Natural(), 13, LABELS, GROUPS, "at most 12: of 12 groups, 12 have at least 8"),
        (Natural(min_size=500), None, LABELS, GROUPS, "at most 0: of 12 groups, 0 have at least 500"),
        (Natural(group_size=7), 2, LABELS, GROUPS, "at most 1.*7 make a client"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(partition, clients, labels, groups, text):
    with pytest.raises(ConfigError, match=text):
        split(partition, clients, labels=labels, groups=groups)


def test_replicated_gives_everybody_everything():
    parts = split(Replicated(), 3)
    assert len(parts) == 3
    assert all(np.array_equal(p, np.arange(600)) for p in parts)


def test_replicated_needs_a_number_and_enough_samples():
    with pytest.raises(ConfigError, match="needs a number"):
        split(Replicated(), None)
    with pytest.raises(ConfigError, match="at most the 600 samples"):
        split(Replicated(min_size=601), 3)
