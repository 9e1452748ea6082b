"""VADER's sentences: the real archive where it can be fetched, and a made-up one for what is done with it."""

import hashlib
import io
import tarfile

import numpy as np
import pytest

from clients.data.sources import vader
from clients.data.sources.vader import Vader
from fl.errors import ShoalError


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture
def made_up(tmp_path, monkeypatch):
    """An archive of the same form with eight sentences, and a file that would land outside if it were unpacked."""
    texts = {
        "tweets": "1\t2.5\tso good\r\n2\t0.5\tmeh\r\n3\t-1.0\tbad day\r\n",
        "amazon": "1_1\t-3\tbroke at once\r\n1_2\t1.5\tworks\r\n2_1\t2\tso good\r\n",
        "movies": "1\t0.9\tsplit opinion\r\n",
        "editorials": "7_1\t1.0\ta\tb\r\n",
    }
    inner = archive({f"hutto_ICWSM_2014/{vader.FILES[k]}": v.encode() for k, v in texts.items()})
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(archive({vader.INNER: inner, "../escaped.txt": b"x"}))
    monkeypatch.setattr(vader, "INNER_SHA256", hashlib.sha256(inner).hexdigest())
    monkeypatch.setattr(vader, "fetch", lambda artifact: path)
    return path


def test_kept_are_clear_ratings_of_first_texts(made_up):
    found, test = Vader().examples("classification")
    assert test is None
    assert list(zip(found.texts, found.labels)) == [
        ("so good", 1),
        ("bad day", 0),
        ("broke at once", 0),
        ("works", 1),
        ("a\tb", 1),
    ]
    assert [found.group_names[g] for g in found.groups] == ["tweets", "tweets", "amazon", "amazon", "editorials"]
    assert len(Vader(min_rating=0.4).examples("classification")[0]) == 7


def test_documents_as_groups(made_up):
    found, _ = Vader(group="document").examples("classification")
    assert found.groups.tolist() == [-1, -1, 0, 0, 1] and found.group_names == ["amazon 1", "editorials 7"]


def test_another_inner_archive_is_refused(made_up, monkeypatch):
    monkeypatch.setattr(vader, "INNER_SHA256", "0" * 64)
    with pytest.raises(ShoalError, match="SHA-256"):
        Vader().examples("classification")


def test_nothing_is_written_to_disk(made_up, tmp_path):
    before = sorted(p.name for p in tmp_path.iterdir())
    Vader().examples("classification")
    assert sorted(p.name for p in tmp_path.iterdir()) == before and not (tmp_path.parent / "escaped.txt").exists()


def test_a_missing_member_is_named(tmp_path):
    path = tmp_path / "sdist.tar.gz"
    path.write_bytes(archive({"other": b""}))
    with pytest.raises(ShoalError, match="hutto_ICWSM_2014"):
        vader.read(path)


def test_the_real_archive():
    # Into the user's own cache, so that it is fetched once and not for every run of the tests.
    try:
        found, _ = Vader().examples("classification")
    except ShoalError as error:
        if "can't be fetched" in str(error):
            pytest.skip(str(error))
        raise
    assert len(found) == 15815 and len(set(found.texts)) == 15815
    assert found.labels.sum() == 8486
    assert np.bincount(found.groups).tolist() == [2667, 2447, 9171, 1530]
    documents, _ = Vader(group="document").examples("classification")
    assert (np.bincount(documents.groups[documents.groups >= 0]) >= 8).sum() == 139
