"""What clients train on and are tested on, and the summary of it."""

import json

import numpy as np
import pytest

from clients.data.federated import federate
from clients.data.partition import Dirichlet, Iid, Natural
from clients.data.sources.tiny import Tiny
from clients.models import TinyDecoder, TinyEncoder
from fl.errors import ConfigError


@pytest.fixture
def sets(cache):
    return Tiny().load(TinyEncoder())


def test_training_and_held_out_samples_are_apart_and_nothing_is_lost(sets):
    data = federate(*sets, Iid(), 6, 0, 0.25)
    everything = np.concatenate([*data.parts, *data.client_tests])
    assert sorted(everything) == list(range(len(sets[0]))) and len(data) == 6
    assert [len(p) for p in data.client_tests] == [8] * 6


def test_no_fraction_no_client_tests(sets):
    data = federate(*sets, Iid(), 6, 0, 0.0)
    assert [len(t) for t in data.client_tests] == [0] * 6 and sum(map(len, data.parts)) == len(sets[0])


def test_each_side_keeps_one_at_least(sets):
    small = federate(*sets, Iid(min_size=1), len(sets[0]) // 2, 0, 0.01)
    assert {len(p) for p in small.parts} == {1} == {len(t) for t in small.client_tests}
    large = federate(*sets, Iid(min_size=1), len(sets[0]) // 2, 0, 0.99)
    assert {len(p) for p in large.parts} == {1}
    single = federate(*sets, Iid(min_size=1), len(sets[0]), 0, 0.5)
    assert {len(p) for p in single.parts} == {1} and {len(t) for t in single.client_tests} == {0}


def test_the_seed_decides_the_partition(sets):
    same = [federate(*sets, Dirichlet(), 6, seed, 0.0).parts for seed in (1, 1, 2)]
    assert all(np.array_equal(a, b) for a, b in zip(same[0], same[1]))
    assert not all(np.array_equal(a, b) for a, b in zip(same[0], same[2]))


def test_the_summary_counts_what_is_there(sets):
    train, _ = sets
    data = federate(*sets, Dirichlet(), 6, 0, 0.2)
    summary = data.summary()
    assert json.loads(json.dumps(summary)) == summary
    assert summary["groups"] is None and summary["label_names"] == ["negative", "neutral", "positive"]
    tokens = [train.offsets[i + 1] - train.offsets[i] for i in range(len(train))]
    for client, part in enumerate(data.parts):
        assert summary["sizes"][client] == len(part) == sum(summary["labels"][client])
        assert summary["labels"][client] == [int((train.labels[part] == c).sum()) for c in range(3)]
        assert summary["tokens"][client] == sum(tokens[i] for i in part)
    assert summary["test_sizes"] == [len(t) for t in data.client_tests]


def test_natural_clients_have_their_groups_names(cache):
    sets = Tiny().load(TinyDecoder())
    names = sets[0].group_names
    assert federate(*sets, Natural(), None, 0, 0.1).summary()["groups"] == names
    merged = federate(*sets, Natural(group_size=3), None, 0, 0.1).client_names
    assert sorted(n for m in merged for n in m.split(" + ")) == names


@pytest.mark.parametrize("fraction", [-0.1, 1.0])
def test_a_wrong_fraction_is_refused(sets, fraction):
    with pytest.raises(ConfigError, match="client_test_fraction"):
        federate(*sets, Iid(), 6, 0, fraction)


def test_public_samples_are_nobodys(sets):
    train, _ = sets
    data = federate(*sets, Dirichlet(), 6, 0, 0.2, public=25)
    everything = np.concatenate([data.public, *data.parts, *data.client_tests])
    assert sorted(everything) == list(range(len(train)))
    assert len(data.public) == 25 and (np.diff(data.public) > 0).all()
    assert len(set(train.labels[data.public])) == 3  # drawn from everywhere, not the first rows
    assert all((np.diff(p) > 0).all() for p in (*data.parts, *data.client_tests) if len(p) > 1)


def test_the_partition_sees_the_labels_and_groups_of_what_is_left(sets, cache):
    """Row i of what is dealt out is not row i of the training set once some are set aside."""
    train, _ = sets
    for seed in range(3):  # a client with next to no concentration has one label, or what is left of several
        parts = federate(*sets, Dirichlet(alpha=0.01, min_size=1), 3, seed, 0.0, public=40).parts
        assert sum(len(set(train.labels[p])) == 1 for p in parts) >= 2
    texts = Tiny().load(TinyDecoder())
    natural = federate(*texts, Natural(), None, 0, 0.0, public=40)
    assert natural.client_names == texts[0].group_names
    for name, part in zip(natural.client_names, natural.parts, strict=True):
        assert {texts[0].group_names[g] for g in texts[0].groups[part]} == {name}


def test_no_public_samples_leave_the_draws_as_they_are(sets):
    plain, none = federate(*sets, Dirichlet(), 6, 3, 0.2), federate(*sets, Dirichlet(), 6, 3, 0.2, public=0)
    assert len(plain.public) == 0
    assert all(np.array_equal(a, b) for a, b in zip(plain.parts + plain.client_tests, none.parts + none.client_tests))


def test_the_seed_decides_what_is_public(sets):
    same = [federate(*sets, Iid(), 6, seed, 0.0, public=25).public for seed in (1, 1, 2)]
    assert np.array_equal(same[0], same[1]) and not np.array_equal(same[0], same[2])


def test_somebody_has_to_be_left_to_train(sets):
    assert len(federate(*sets, Iid(min_size=1), 1, 0, 0.0, public=len(sets[0]) - 1).parts[0]) == 1
    for public in (len(sets[0]), len(sets[0]) + 1):
        with pytest.raises(ConfigError, match=r"data\.public="):
            federate(*sets, Iid(), 6, 0, 0.0, public=public)
