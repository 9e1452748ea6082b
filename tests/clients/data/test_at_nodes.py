"""Samples in files at nodes: they train as dealt out ones would, and nobody else can look into them."""

import csv
import json
from dataclasses import replace

import numpy as np
import pytest

from clients.data.at_nodes import AtNodes, Elsewhere, held, joined, kind_of, node_side, samples, server_side, source_of
from clients.data.federated import federate
from clients.data.partition import Iid
from clients.data.sources.files import Csv, Jsonl, Parquet
from clients.data.sources.tiny import Tiny
from clients.models import TinyDecoder, TinyEncoder
from fl.errors import ConfigError, ShoalError

LABELS = ["negative", "neutral", "positive"]


def write(path, rows, names=("text", "label")):
    """``rows`` of texts as a file of the kind that its name says."""
    columns = dict(zip(names, zip(*rows, strict=True), strict=True))
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            csv.writer(file).writerows([names, *rows])
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(dict(zip(names, row, strict=True))) + "\n" for row in rows))
    else:
        pq = pytest.importorskip("pyarrow.parquet")
        pa = pytest.importorskip("pyarrow")
        pq.write_table(pa.table({name: list(column) for name, column in columns.items()}), path)
    return path


ROWS = [("good bread", "positive"), ("bad bread", "negative"), ("it is bread", "neutral"), ("so good", "positive")]


@pytest.fixture
def dealt(cache, tmp_path):
    """The tiny set dealt out to four clients, and the same samples in four files, of three kinds."""
    source, spec = Tiny(), TinyEncoder()
    texts = source.examples(spec.task)[0].take(source._split(240)[0])
    data = federate(*source.load(spec), Iid(), 4, 3, 0.25)
    files = []
    for client, kind in enumerate((".csv", ".jsonl", ".CSV", ".parquet")):
        rows = np.sort(np.concatenate([data.parts[client], data.client_tests[client]]))
        path = tmp_path / f"client{client}{kind.lower()}"
        write(path, [(texts.texts[i], LABELS[texts.labels[i]]) for i in rows])
        files.append(path.rename(path.with_suffix(kind)) if kind == ".CSV" else path)
    return data, files, spec


def batches(data, client):
    return [data.train.batch(part) for part in (data.parts[client], data.client_tests[client])]


def test_clients_train_and_test_on_the_same_samples_as_if_they_had_been_dealt_out(dealt):
    """In the same order, so that batches, which are drawn by position, are the same too."""
    data, files, spec = dealt
    own = {c: samples(source_of(Tiny(), files[c]), spec, LABELS) for c in (0, 1, 3)}
    node = node_side(own, 4, 3, 0.25)
    assert len(node) == 4 and len(held(node.parts)) == 3 and len(node.test) == 1
    for client in (0, 1, 3):
        for mine, other in zip(batches(node, client), batches(data, client), strict=True):
            assert np.array_equal(mine.input_ids, other.input_ids) and np.array_equal(mine.labels, other.labels)
    assert not np.array_equal(node_side(own, 4, 4, 0.25).client_tests[0], node.client_tests[0])


def test_labels_get_the_numbers_that_the_experiment_has_for_them(cache, tmp_path):
    path = write(tmp_path / "own.csv", ROWS)
    for labels in (LABELS, LABELS[::-1], [*LABELS, "other"]):
        found = samples(Csv(path=str(path)), TinyEncoder(), labels)
        assert [labels[i] for i in found.labels] == [label for _, label in ROWS] and found.label_names == labels


def test_a_label_that_the_experiment_does_not_have_is_refused_with_its_row(cache, tmp_path):
    path = write(tmp_path / "own.csv", ROWS)
    with pytest.raises(ConfigError, match=r"data\.label='neutral'.*negative, positive; this is row 3 of .*own\.csv"):
        samples(Csv(path=str(path)), TinyEncoder(), ["negative", "positive"])
    without = write(tmp_path / "plain.csv", [(text, "") for text, _ in ROWS], ("text", "other"))
    with pytest.raises(ConfigError, match=r"data\.label='label'.*has no such column"):
        samples(Csv(path=str(without)), TinyEncoder(), LABELS)
    with pytest.raises(ConfigError, match=r"data\.label=None.*column of the labels"):
        samples(Csv(path=str(path), label=None), TinyEncoder(), LABELS)


def test_a_language_model_needs_no_labels_and_takes_prompts(cache, tmp_path):
    path = write(tmp_path / "own.csv", ROWS, ("q", "a"))
    chat = Csv(path=str(path), prompt="q", response="a", template="{prompt}: ")
    found = samples(chat, TinyDecoder(), [])
    assert len(found) == 4 and found.labels is None and found.prompt_lengths.min() > 0
    texts = samples(Csv(path=str(path), text="q", label=None, max_length=4), TinyDecoder(), [])
    assert len(texts) == 4 and texts.lengths.max() <= 4
    both = joined([found, samples(chat, TinyDecoder(), [])])
    assert len(both) == 8 and np.array_equal(both.batch([6]).input_ids, found.batch([2]).input_ids)
    assert np.array_equal(both.prompt_lengths, np.tile(found.prompt_lengths, 2))


def test_tokens_are_made_again_where_file_labels_or_columns_change_and_others_can_not_read_them(cache, tmp_path):
    path = write(tmp_path / "own.csv", ROWS)
    first = samples(Csv(path=str(path)), TinyEncoder(), LABELS)
    assert samples(Csv(path=str(path)), TinyEncoder(), LABELS).fingerprint == first.fingerprint
    others = [samples(Csv(path=str(path)), TinyEncoder(), LABELS[::-1])]
    others.append(samples(Csv(path=str(path), max_length=3), TinyEncoder(), LABELS))
    write(path, ROWS[:3])
    others.append(samples(Csv(path=str(path)), TinyEncoder(), LABELS))
    assert len({first.fingerprint, *(o.fingerprint for o in others)}) == 4 and len(others[2]) == 3
    folders = [p for p in cache.rglob("samples") if p.is_dir()]
    assert len(folders) == 4 and {p.stat().st_mode & 0o777 for p in folders} == {0o700}


def test_files_are_read_by_the_end_of_their_names_with_the_columns_of_the_experiment(tmp_path):
    path = write(tmp_path / "own.jsonl", ROWS)
    given = Csv(path=str(write(tmp_path / "central.csv", ROWS)), text="text", label="stars", group="shop", max_length=9)
    found = source_of(given, path)
    assert isinstance(found, Jsonl) and (found.label, found.max_length, found.group) == ("stars", 9, None)
    assert (found.path, found.test_path) == (str(path), None)
    assert source_of(Tiny(max_length=7), path) == Jsonl(path=str(path), max_length=7)
    assert kind_of(tmp_path / "X.PARQUET") is Parquet
    with pytest.raises(ConfigError, match=r"--data='own\.txt'.*\.csv, \.jsonl, \.parquet"):
        kind_of(tmp_path / "own.txt")


def test_a_node_hosts_clients_that_there_are(cache, tmp_path):
    own = samples(Csv(path=str(write(tmp_path / "own.csv", ROWS))), TinyEncoder(), LABELS)
    with pytest.raises(ConfigError, match=r"--clients=\[1, 4\].*0 to 3"):
        node_side({1: own, 4: own}, 4, 0, 0.25)


def test_what_lies_elsewhere_can_be_counted_and_nothing_else(cache):
    train, test = Tiny().load(TinyEncoder())
    data = server_side(train, test, {0: (18, 2), 1: (3, 0)}, 5, 7)
    assert [len(p) for p in data.parts] == [18, 3] and [len(t) for t in data.client_tests] == [2, 0]
    assert held(data.parts) == [] and len(data) == 2
    for use in (
        lambda part: train.labels[part], lambda part: train.batch(part), lambda part: np.concatenate([part]), list,
        lambda part: part[0], np.asarray, np.unique, lambda part: np.random.default_rng(0).permutation(part),
        lambda part: train.lengths[part], lambda part: train.select(part, ""), lambda part: 3 in part, np.sort,
    ):  # fmt: skip
        for part in data.parts:
            with pytest.raises(ShoalError, match=f"samples of client {part.client} are at its node"):
                use(part)
    with pytest.raises(ShoalError, match="client 1 are at its node"):
        np.asarray(data.client_tests[1])  # none, but that is for its node to say
    with pytest.raises(TypeError):
        Elsewhere(0, 1) + 1  # type: ignore[operator]


def test_the_server_has_its_own_samples_and_the_sizes_that_were_told(cache):
    train, test = Tiny().load(TinyEncoder())
    data = server_side(train, test, {1: (3, 0), 0: (18, 2)}, 5, 7)
    same = federate(train, test, Iid(), 2, 5, 0.0, public=7)
    assert data.train is train and data.test is test and np.array_equal(data.public, same.public)
    summary = data.summary()
    assert json.loads(json.dumps(summary)) == summary and (summary["sizes"], summary["test_sizes"]) == ([18, 3], [2, 0])
    assert summary["labels"] is None and summary["tokens"] == [0, 0]
    with pytest.raises(ConfigError, match=r"data\.public=999.*at most the"):
        server_side(train, test, {0: (1, 1)}, 5, 999)
    with pytest.raises(ShoalError, match=r"told were the sizes of \[0, 2\]"):
        server_side(train, test, {0: (1, 1), 2: (1, 1)}, 5, 0)
    assert type(replace(data, public=np.arange(2))) is type(data)


def test_in_one_process_there_is_nothing_to_deal_out(cache):
    with pytest.raises(ConfigError, match=r"partition='at_nodes'.*engine=superlink.*shoal node --data"):
        federate(*Tiny().load(TinyEncoder()), AtNodes(), 4, 0, 0.1)
