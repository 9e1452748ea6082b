"""Data sets through ``datasets``: a stand-in for what Shoal does with them, the real library where it is installed."""

import json
import sys
import types

import pytest

from clients.data.sources.hub import HubData
from clients.models import TinyEncoder
from fl.errors import ConfigError, ShoalError

ROWS = {"sentence": ["the ferry was bright", "the map is dull"] * 4, "label": [1, 0] * 4, "idx": list(range(8))}


class FakeSplit:
    def __init__(self, columns, features):
        self.columns, self.features, self.column_names = columns, features, list(columns)

    def __getitem__(self, name):
        return self.columns[name]


@pytest.fixture
def fake(monkeypatch):
    """Install a module named ``datasets``; ``answer`` is what load_dataset gives or raises."""
    asked = []

    def install(answer):
        def load_dataset(*args, **kwargs):
            asked.append((args, kwargs))
            if isinstance(answer, Exception):
                raise answer
            return answer

        module = types.ModuleType("datasets")
        module.load_dataset = load_dataset
        monkeypatch.setitem(sys.modules, "datasets", module)
        return asked

    return install


def test_class_labels_keep_their_names_and_order(fake, cache):
    asked = fake(FakeSplit(dict(ROWS), {"label": types.SimpleNamespace(names=["unhappy", "happy"])}))
    source = HubData(name="org/set", subset="sub", revision="abc", text="sentence")
    train, test = source.load(TinyEncoder())
    assert train.label_names == ["unhappy", "happy"] and len(train) + len(test) == 8
    bright = TinyEncoder().tokenizer().convert_tokens_to_ids("bright")
    batch = train.batch(range(len(train)))
    assert ((batch.input_ids == bright).any(dim=1).long() == batch.labels).all()
    assert asked == [(("org/set", "sub"), {"split": "train", "revision": "abc"})]


def test_a_test_split_of_its_own(fake):
    asked = fake(FakeSplit(dict(ROWS), {}))
    found, test = HubData(name="org/set", text="sentence", test_split="validation").examples("classification")
    assert len(found) == len(test) == 8 and [k["split"] for _, k in asked] == ["train", "validation"]


def test_changed_rows_have_another_key(fake):
    fake(FakeSplit(dict(ROWS), {}))
    source = HubData(name="org/set", text="sentence")
    before = source.origin()
    assert before == HubData(name="org/set", text="sentence").origin()
    fake(FakeSplit({**ROWS, "idx": [0] * 8}, {}))
    assert HubData(name="org/set", text="sentence").origin() == before
    fake(FakeSplit({**ROWS, "label": [0, 1] * 4}, {}))
    assert HubData(name="org/set", text="sentence").origin() != before


def test_rows_without_a_label_are_refused(fake):
    fake(FakeSplit({**ROWS, "label": [-1] * 8}, {"label": types.SimpleNamespace(names=["a", "b"])}))
    with pytest.raises(ShoalError, match="8 rows have no label"):
        HubData(name="org/set", text="sentence").examples("classification")


def test_a_missing_column_names_the_set(fake):
    fake(FakeSplit(dict(ROWS), {}))
    with pytest.raises(ConfigError, match=r"data.text='text'.*org/set@train has no such column, only sentence, label"):
        HubData(name="org/set").examples("classification")


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (RuntimeError("Dataset scripts are no longer supported, but found banking77.py"), "copy in Parquet"),
        (ConnectionError("Couldn't reach 'x' on the Hub (OfflineModeIsEnabled)"), "go online"),
        (ValueError("Unknown split \"test\". Should be one of ['train']."), "data.train_split"),
        (ValueError("Config name is missing. Please pick one among: ['cola']"), "data.subset"),
        (FileNotFoundError("nothing there"), "Check data.name"),
    ],
)
def test_errors_become_one_line_with_a_hint(fake, error, hint):
    fake(error)
    with pytest.raises(ShoalError) as failure:
        HubData(name="org/set").examples("classification")
    assert hint in str(failure.value) and "org/set@train" in str(failure.value) and "\n" not in str(failure.value)


def test_without_the_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ShoalError, match=r"pip install 'shoal-fl\[hub\]'"):
        HubData(name="org/set").examples("classification")


def test_a_name_is_needed():
    with pytest.raises(ConfigError, match=r"data\.name"):
        HubData()


@pytest.mark.parametrize("kind", ["csv", "parquet", "jsonl"])
def test_the_real_library_reads_a_folder(tmp_path, monkeypatch, cache, kind):
    datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    folder = tmp_path / "set"
    folder.mkdir()
    if kind == "csv":
        lines = ["sentence,label", *(f"{s},{n}" for s, n in zip(ROWS["sentence"], ROWS["label"]))]
        (folder / "train.csv").write_text("\n".join(lines) + "\n")
    elif kind == "jsonl":
        rows = [{"sentence": s, "label": n} for s, n in zip(ROWS["sentence"], ROWS["label"])]
        (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    else:
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.table(ROWS), folder / "train.parquet")
    train, test = HubData(name=str(folder), text="sentence").load(TinyEncoder())
    assert train.label_names == ["0", "1"] and len(train) + len(test) == 8
    with pytest.raises(ShoalError, match="data.train_split"):
        HubData(name=str(folder), text="sentence", train_split="validation").examples("classification")


def test_the_real_library_without_network(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets", reason="the extra `hub` is not installed")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    with pytest.raises(ShoalError, match="org/none@train can't be loaded"):
        HubData(name="org/none").examples("classification")
