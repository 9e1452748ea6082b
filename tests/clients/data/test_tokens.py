"""Batches against a loop over samples, and sets on disk."""

import numpy as np
import pytest

from clients.data.tokens import TokenData

PAD = 9


def make(task="classification", prompts=None):
    samples = [[1, 2, 3], [4], [5, PAD, 6, 7, 8], [2, 2]]
    return TokenData(
        tokens=np.array([t for s in samples for t in s], dtype=np.int32),
        offsets=np.array([0, 3, 4, 9, 11]),
        labels=np.array([0, 1, 2, 1]) if task == "classification" else None,
        groups=np.array([0, 0, 1, -1]),
        label_names=["a", "b", "c"],
        group_names=["x", "y"],
        task=task,
        pad_id=PAD,
        fingerprint="f",
        prompt_lengths=prompts,
    ), samples


@pytest.mark.parametrize("indices", [[0], [3, 0], [2, 1, 0, 3], [1, 1]])
def test_batch_is_each_sample_padded_to_the_longest(indices):
    data, samples = make()
    batch = data.batch(np.array(indices))
    width = max(len(samples[i]) for i in indices)
    assert batch.input_ids.tolist() == [samples[i] + [PAD] * (width - len(samples[i])) for i in indices]
    assert batch.attention_mask.tolist() == [[1] * len(samples[i]) + [0] * (width - len(samples[i])) for i in indices]
    assert batch.labels.tolist() == [[0, 1, 2, 1][i] for i in indices]
    assert {t.dtype for t in (batch.input_ids, batch.attention_mask, batch.labels)} == {batch.labels.dtype}
    assert len(batch) == len(indices)


def test_causal_labels_are_the_tokens_and_minus_100_at_padding_only():
    data, _ = make("causal_lm")
    batch = data.batch(np.array([1, 2]))
    # The second sample holds the padding token as a real one, as where the end token pads.
    assert batch.labels.tolist() == [[4, -100, -100, -100, -100], [5, PAD, 6, 7, 8]]


def test_causal_labels_leave_the_prompt_out():
    data, _ = make("causal_lm", prompts=np.array([2, 0, 4, 1]))
    assert data.batch(np.array([0, 2])).labels.tolist() == [[-100, -100, 3, -100, -100], [-100] * 4 + [8]]


def test_classification_without_labels_is_refused():
    data, _ = make("causal_lm")
    data.task = "classification"
    with pytest.raises(ValueError, match="labels"):
        data.batch(np.array([0]))


def test_select_keeps_the_samples_in_the_order_given():
    data, samples = make("causal_lm", prompts=np.array([2, 0, 4, 1]))
    chosen = data.select(np.array([2, 0]), "g")
    assert [chosen.tokens[a:b].tolist() for a, b in zip(chosen.offsets, chosen.offsets[1:])] == [
        samples[2],
        samples[0],
    ]
    assert chosen.groups.tolist() == [1, 0] and chosen.prompt_lengths.tolist() == [4, 2]
    assert chosen.fingerprint == "g" and chosen.lengths.tolist() == [5, 3]


@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_a_saved_set_comes_back_mapped(tmp_path, task):
    data, _ = make(task)
    data.save(tmp_path / "set")
    again = TokenData.open(tmp_path / "set")
    assert isinstance(again.tokens, np.memmap)
    for name in ("tokens", "offsets", "labels", "groups", "prompt_lengths"):
        mine, theirs = getattr(data, name), getattr(again, name)
        assert (mine is None) == (theirs is None)
        assert mine is None or (np.array_equal(mine, theirs) and mine.dtype == theirs.dtype)
    for name in ("label_names", "group_names", "task", "pad_id", "fingerprint"):
        assert getattr(data, name) == getattr(again, name)


def test_a_file_cut_short_is_noticed(tmp_path):
    data, _ = make()
    data.save(tmp_path / "set")
    path = tmp_path / "set" / "tokens.npy"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises((ValueError, OSError)):
        TokenData.open(tmp_path / "set")


def test_nothing_is_unpickled(tmp_path):
    data, _ = make()
    data.save(tmp_path / "set")
    np.save(tmp_path / "set" / "labels.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        TokenData.open(tmp_path / "set")
