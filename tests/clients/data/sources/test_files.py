"""Files with named columns: the same rows in three formats, and what is wrong with a file in one line."""

import csv
import json
import re

import numpy as np
import pytest

from clients.data.sources.files import Csv, Jsonl, Parquet
from clients.models import TinyDecoder, TinyEncoder
from fl.errors import ConfigError, ShoalError

ROWS = [
    {"text": f"the ferry was {w}", "more": "we found the map", "label": label, "who": who}
    for w, label, who in [("bright", "good", 10), ("dull", "bad", 9), ("ugly", "bad", 10), ("fine", "good", 9)] * 3
]
FORMATS = {"csv": Csv, "jsonl": Jsonl, "parquet": Parquet}


def write(path, rows, kind):
    if kind == "csv":
        with open(path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    else:
        pa = pytest.importorskip("pyarrow")
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path)
    return str(path)


@pytest.fixture(params=FORMATS)
def kind(request):
    return request.param


def test_columns_become_texts_labels_and_groups(tmp_path, kind):
    path = write(tmp_path / "data", ROWS, kind)
    found, test = FORMATS[kind](path=path, group="who").examples("classification")
    assert test is None and found.second is None
    assert found.texts == [r["text"] for r in ROWS]
    assert [found.label_names[c] for c in found.labels] == [r["label"] for r in ROWS]
    # Numbers sort as numbers in every format.
    assert found.group_names == ["9", "10"] and found.groups.tolist() == [int(r["who"] == 10) for r in ROWS]


def test_pairs(tmp_path, kind):
    path = write(tmp_path / "data", ROWS, kind)
    found, _ = FORMATS[kind](path=path, text=["text", "more"]).examples("classification")
    assert found.second == ["we found the map"] * len(ROWS)


def test_all_missing_columns_in_one_error(tmp_path, kind):
    path = write(tmp_path / "data", ROWS, kind)
    with pytest.raises(ConfigError) as failure:
        FORMATS[kind](path=path, text="sentence", label="label", group="client").examples("classification")
    text = str(failure.value)
    assert text.startswith("data.text='sentence' is not allowed") and "text, more, label, who" in text
    assert "also missing: data.group='client'" in text and text.count("\n") == 0


def test_a_test_file_shares_the_labels(tmp_path, kind, cache):
    path = write(tmp_path / "train", ROWS[:2], kind)
    test_path = write(tmp_path / "test", [{**ROWS[0], "label": "odd"}], kind)
    train, test = FORMATS[kind](path=path, test_path=test_path).load(TinyEncoder())
    assert train.label_names == test.label_names == ["bad", "good", "odd"]
    assert (len(train), len(test)) == (2, 1) and test.labels.tolist() == [2]


def test_another_content_has_other_tokens_and_the_same_one_the_same(tmp_path, cache):
    one = Csv(path=write(tmp_path / "a", ROWS, "csv")).load(TinyEncoder())[0].fingerprint
    moved = Csv(path=write(tmp_path / "b", ROWS, "csv")).load(TinyEncoder())[0].fingerprint
    other = Csv(path=write(tmp_path / "a", ROWS[:-1], "csv")).load(TinyEncoder())[0].fingerprint
    assert one == moved != other


def test_prompt_and_response(tmp_path, kind, cache):
    rows = [{"q": "the ferry", "a": "was bright"}, {"q": "the map", "a": "is dull"}] * 3
    source = FORMATS[kind](
        path=write(tmp_path / "data", rows, kind), prompt="q", response="a", template="we found {prompt} today"
    )
    train, _ = source.load(TinyDecoder())
    tokenizer = TinyDecoder().tokenizer()
    batch = train.batch(np.arange(len(train)))
    for ids, labels in zip(batch.input_ids, batch.labels):
        assert tokenizer.decode(ids[:5]).startswith("we found the") and tokenizer.decode(ids[4]) == "today"
        assert (labels[:5] == -100).all() and tokenizer.decode(ids[-1]) == "</s>"
        assert (labels[5:] == ids[5:]).all()


def test_a_causal_model_needs_no_label_column(tmp_path, cache):
    rows = [{"text": "the ferry was bright and nothing else"}] * 5
    path = write(tmp_path / "data", rows, "jsonl")
    train, _ = Jsonl(path=path, max_length=4).load(TinyDecoder())
    assert train.labels is None and train.lengths.tolist() == [4] * 4
    pieces, _ = Jsonl(path=path, max_length=4, chunk=True).load(TinyDecoder())
    assert len(pieces) == 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"path": None}, "data.path=None.*data.path=FILE"),
        ({"path": "/nowhere/x.csv"}, "data.path='/nowhere/x.csv'.*a file that exists"),
        ({"text": ["a", "b", "c"]}, "one column, or two"),
        ({"prompt": "q"}, "data.response=None.*go together"),
        ({"template": "no place"}, "contains {prompt}"),
        ({"delimiter": ";;"}, "one character"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_read(tmp_path, change, text):
    path = write(tmp_path / "data", ROWS, "csv")
    with pytest.raises(ConfigError, match=text):
        Csv(**{"path": path, **change})


@pytest.mark.parametrize(
    ("cls", "content", "text"),
    [
        (Csv, "text,label\na,b\nc\n", "line 3: 1 fields, but the first line names 2"),
        (Csv, "text,text\na,b\n", "names a column twice"),
        (Csv, 'text,label\n"a,b\n', "not a CSV file"),
        (Csv, "text,label\n", "has no rows"),
        (Csv, "", "has no rows"),
        (Csv, b"text,label\n\xff\xfe,b\n", "UTF-8"),
        (Csv, "text,label\na,\n", r"data.label=''.*row 1 of"),
        (Jsonl, '{"text": "a", "label": 1}\n{"text": \n', "line 2: .*JSON"),
        (Jsonl, "[1]\n", "line 1: .* no JSON object"),
        (Jsonl, '{"text": "a", "label": 1}\n{"text": 5, "label": 1}\n', "column of text; row 2 of .* holds 5"),
        (Jsonl, '{"text": "a", "label": 1.5}\n', "data.label=1.5.*whole number"),
        (Jsonl, '{"text": "a", "label": 1}\n{"text": "b"}\n', "data.label=None.*row 2"),
        (Parquet, "hello", "not a Parquet file"),
    ],
)
def test_a_broken_file_is_one_line_that_says_where(tmp_path, cls, content, text):
    path = tmp_path / "broken"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ShoalError) as failure:
        cls(path=str(path)).examples("classification")
    assert "\n" not in str(failure.value)
    assert re.search(text, str(failure.value)), failure.value


def test_a_column_of_texts_is_no_label(tmp_path):
    rows = [{"text": "a", "label": f"x{i}"} for i in range(1001)]
    with pytest.raises(ConfigError, match="at most 1000 labels; this column has 1001"):
        Csv(path=write(tmp_path / "data", rows, "csv")).examples("classification")
