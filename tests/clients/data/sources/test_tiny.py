"""The generated sentences are the same everywhere, fit the tiny models' words, and can be told apart."""

from collections import Counter

from clients.data.sentences import LABELS, OPINIONS, TOPICS, sentences
from clients.data.sources.tiny import Tiny
from clients.models import TinyDecoder, TinyEncoder


def test_they_are_fixed_and_balanced():
    found = sentences()
    assert found == sentences() and len(found) == 240
    assert set(Counter(s.topic for s in found).values()) == {40} and len(TOPICS) == 6
    assert max(Counter(s.label for s in found).values()) - min(Counter(s.label for s in found).values()) <= 6
    # Changing the words changes every result that was ever recorded on them.
    assert found[2].text == "a lovely sail and nothing else"
    for sentence in found:
        words = set(sentence.text.split())
        assert words & set(OPINIONS[LABELS[sentence.label]])
        assert words & set(list(TOPICS.values())[sentence.topic])


def test_every_word_is_known_to_both_tiny_models(cache):
    for spec in (TinyEncoder(), TinyDecoder()):
        unknown = spec.tokenizer().unk_token_id
        for part in Tiny().load(spec):
            assert unknown not in part.tokens
            assert part.lengths.max() < 20


def test_labels_and_groups_are_named(cache):
    train, test = Tiny().load(TinyEncoder())
    assert train.label_names == list(LABELS) and train.group_names == list(TOPICS)
    assert (len(train), len(test)) == (192, 48)
