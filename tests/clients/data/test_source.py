"""Split, caps and the token cache, on the generated sentences."""

import numpy as np
import pytest

from clients.data import source
from clients.data.sources.sotu import Sotu
from clients.data.sources.tiny import Tiny
from clients.models import Shape, TinyDecoder, TinyEncoder
from fl.errors import ConfigError

ENCODER = TinyEncoder()


def rows(data):
    return [tuple(data.tokens[a:b].tolist()) for a, b in zip(data.offsets, data.offsets[1:])]


@pytest.fixture
def times_tokenised(monkeypatch):
    calls = []
    real = source.tokenise
    monkeypatch.setattr(source, "tokenise", lambda *a, **k: calls.append(1) or real(*a, **k))
    return calls


def test_a_second_load_reads_the_cache(cache, times_tokenised):
    first = Tiny().load(ENCODER)
    done = len(times_tokenised)
    second = Tiny().load(ENCODER)
    assert done == 2 and len(times_tokenised) == done
    for mine, theirs in zip(first, second):
        assert rows(mine) == rows(theirs) and mine.fingerprint == theirs.fingerprint
        assert isinstance(theirs.tokens, np.memmap)


@pytest.mark.parametrize(
    ("change", "again"),
    [
        ({"max_length": 6}, True),
        ({"split_seed": 1}, True),
        ({"max_train": 9}, True),
        ({"client_test_fraction": 0.5}, False),
    ],
)
def test_a_setting_that_matters_changes_the_key(cache, times_tokenised, change, again):
    Tiny().load(ENCODER)
    Tiny(**change).load(ENCODER)
    assert len(times_tokenised) == (4 if again else 2)


def test_another_tokenizer_or_task_has_its_own_tokens(cache, times_tokenised):
    train, _ = Tiny().load(ENCODER)
    causal, _ = Tiny().load(TinyDecoder())
    assert len(times_tokenised) == 4 and train.fingerprint != causal.fingerprint
    by_bytes, _ = Tiny().load(Shape())
    assert by_bytes.task == train.task and by_bytes.lengths.mean() > train.lengths.mean()
    assert (train.task, causal.task) == ("classification", "causal_lm")
    # Labels stay, for partitions.
    assert causal.labels is not None and causal.batch(np.array([0])).labels.ndim == 2


def test_a_damaged_cache_is_made_again(cache, times_tokenised):
    train, _ = Tiny().load(ENCODER)
    kept = rows(train)
    for path in cache.glob("tokens/*/train/tokens.npy"):
        path.write_bytes(b"")
    again, _ = Tiny().load(ENCODER)
    assert rows(again) == kept and len(times_tokenised) == 4


def test_the_split_is_disjoint_and_whole(cache):
    train, test = Tiny()._split(50)
    assert sorted([*train, *test]) == list(range(50)) and len(test) == 10
    assert (np.diff(train) > 0).all() and (np.diff(test) > 0).all()


def test_caps_take_from_their_own_side(cache):
    train, test = Tiny()._split(100)
    few_train, few_test = Tiny(max_train=7, max_test=3)._split(100)
    assert len(few_train) == 7 and set(few_train) <= set(train)
    assert len(few_test) == 3 and set(few_test) <= set(test)
    other, _ = Tiny(split_seed=1)._split(100)
    assert list(other) != list(train)


def test_one_sample_cannot_be_split():
    with pytest.raises(ConfigError, match="at least 2"):
        Tiny()._split(1)
    assert [len(p) for p in Tiny(test_fraction=0.99)._split(3)] == [1, 2]


def test_a_classifier_on_data_without_labels_is_refused(cache):
    with pytest.raises(ConfigError, match="no labels"):
        Sotu(from_year=1790, to_year=1791).load(ENCODER)
    assert list((cache / "tokens").glob("*/train")) == []
