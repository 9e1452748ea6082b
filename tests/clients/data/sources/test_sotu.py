"""State of the Union addresses: from the installed package, by president, in pieces."""

import numpy as np
import pytest

from clients.data.partition import Natural
from clients.data.sources.sotu import Sotu
from clients.models import Shape, TinyEncoder
from fl.errors import ConfigError
from fl.keys import generator

BYTES = Shape(architecture="gpt2")


def test_all_addresses_and_presidents():
    found, test = Sotu().examples("causal_lm")
    assert test is None and found.labels is None
    assert len(found) == 237 and len(found.group_names) == 43
    # Two terms apart are one president.
    assert "Grover Cleveland" in found.group_names and found.texts[0].startswith("Fellow-Citizens")
    assert sum(len(t.split()) for t in found.texts) > 1_800_000


@pytest.mark.parametrize(("group", "names"), [("party", {"Nonpartisan", "Federalist"}), ("decade", {"1790s", "1800s"})])
def test_years_and_other_groups(group, names):
    found, _ = Sotu(group=group, to_year=1800).examples("causal_lm")
    assert set(found.group_names) == names


def test_pieces_are_capped_by_president_and_dealt_to_them(cache):
    source = Sotu(from_year=2000, max_length=64, max_chunks_per_group=30, test_fraction=0.2)
    train, test = source.load(BYTES)
    assert len(train.group_names) == 5
    assert np.bincount(np.concatenate([train.groups, test.groups])).tolist() == [30] * 5
    assert len(test) == 30 and train.lengths.max() == 64
    parts = Natural().split(None, train.groups, len(train), None, generator(0))
    assert len(parts) == 5
    batch = train.batch(parts[0][:4])
    assert batch.labels.shape == batch.input_ids.shape == (4, 64)


def test_no_address_in_these_years():
    with pytest.raises(ConfigError, match="no address"):
        Sotu(from_year=1933, to_year=1933, group="president").examples("causal_lm")
    with pytest.raises(ConfigError, match="not after"):
        Sotu(from_year=1950, to_year=1949)


def test_a_classifier_is_refused(cache):
    with pytest.raises(ConfigError, match="no labels"):
        Sotu(to_year=1791).load(TinyEncoder())
