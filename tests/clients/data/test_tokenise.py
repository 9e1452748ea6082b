"""What becomes a sample, and what is left out."""

import numpy as np
import pytest

from clients.data.tokenise import Examples, tokenise, tokenizer_id
from clients.models.tokenizers import byte_tokenizer, word_tokenizer
from fl.errors import ShoalError

WORDS = word_tokenizer("encoder")
BYTES = byte_tokenizer("decoder")


def samples(data):
    return [data.tokens[a:b].tolist() for a, b in zip(data.offsets, data.offsets[1:])]


def run(examples, tokenizer, task, max_length=8, chunk=False):
    return tokenise(examples, tokenizer, task=task, max_length=max_length, chunk=chunk, fingerprint="f")


def test_a_classifier_gets_special_tokens_within_max_length():
    data = run(Examples(["the ferry was bright", "the"], labels=np.array([1, 0])), WORDS, "classification", 5)
    long, short = (WORDS.convert_ids_to_tokens(s) for s in samples(data))
    assert long == ["[CLS]", "the", "ferry", "was", "[SEP]"]
    assert short == ["[CLS]", "the", "[SEP]"]
    assert data.labels.tolist() == [1, 0] and data.tokens.dtype == np.int32


def test_pairs_are_joined():
    data = run(Examples(["the ferry"], ["was dull"], labels=np.array([0])), WORDS, "classification")
    assert WORDS.convert_ids_to_tokens(samples(data)[0]) == ["[CLS]", "the", "ferry", "[SEP]", "was", "dull", "[SEP]"]


def test_chunks_hold_every_token_once_and_keep_their_group():
    texts = ["abcdefghij", "", "xyz"]
    data = run(Examples(texts, groups=np.array([4, 5, 6])), BYTES, "causal_lm", 4, chunk=True)
    assert [BYTES.decode(s) for s in samples(data)] == ["abcd", "efgh", "ij", "xyz"]
    assert data.groups.tolist() == [4, 4, 4, 6]


def test_a_causal_text_is_truncated_unless_chunked():
    assert [BYTES.decode(s) for s in samples(run(Examples(["abcdefghij"]), BYTES, "causal_lm", 4))] == ["abcd"]


def test_a_piece_with_nothing_to_predict_is_dropped():
    data = run(Examples(["abcde", "f"]), BYTES, "causal_lm", 4, chunk=True)
    assert [BYTES.decode(s) for s in samples(data)] == ["abcd"]


def test_only_the_response_carries_loss_and_it_ends():
    examples = Examples(["ab", "abcdefgh"], ["xy", "z"], is_prompt=True, groups=np.array([0, 1]))
    data = run(examples, BYTES, "causal_lm", 8)
    # The second prompt leaves no room for its response.
    assert data.groups.tolist() == [0]
    batch = data.batch(np.array([0]))
    assert BYTES.decode(batch.input_ids[0]) == "abxy</s>"
    assert batch.labels[0].tolist()[:2] == [-100, -100]
    assert batch.labels[0].tolist()[2:] == batch.input_ids[0].tolist()[2:]


def test_nothing_left_is_an_error_with_the_number():
    with pytest.raises(ShoalError, match="2 texts.*max_length=8"):
        run(Examples(["", "a"]), BYTES, "causal_lm")


def test_what_is_left_out_is_told(caplog):
    run(Examples(["ab", ""]), BYTES, "causal_lm")
    assert "1 of 2 texts" in caplog.text


def test_tokenizer_id_names_the_rules_not_the_last_call():
    before = tokenizer_id(WORDS)
    WORDS(["the ferry"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer_id(WORDS) == before == tokenizer_id(word_tokenizer("encoder"))
    assert before != tokenizer_id(word_tokenizer("decoder")) != tokenizer_id(BYTES)
