"""Only bytes with the pinned hash get in, and once in they need no network."""

import hashlib
import sys
from pathlib import Path

import pytest

from clients.data import fetch as fetching
from clients.data.fetch import Artifact, fetch, file_hash
from fl.errors import ShoalError

CONTENT = b"the sentences"


@pytest.fixture
def artifact():
    return Artifact("thing==1.0", "thing-1.0.tar.gz", hashlib.sha256(CONTENT).hexdigest(), "data=thing")


@pytest.fixture
def pip(monkeypatch, tmp_path):
    """A program in pip's place that brings whatever the test says, and keeps its arguments."""

    def install(content: bytes | None, message: str = "", name: str = "thing-1.0.tar.gz") -> Path:
        script = tmp_path / "pip.py"
        script.write_text(
            f"""
import sys, pathlib
args = sys.argv[1:]
requirements = pathlib.Path(args[args.index("--requirement") + 1]).read_text()
with open({str(tmp_path / "calls")!r}, "a") as log:
    log.write(" ".join(args) + " | " + requirements)
content = {content!r}
if content is None:
    sys.exit({message!r})
pathlib.Path(args[args.index("--dest") + 1], {name!r}).write_bytes(content)
"""
        )
        monkeypatch.setattr(fetching, "_pip", lambda: [sys.executable, str(script)])
        return tmp_path / "calls"

    return install


def test_it_is_fetched_once_then_needs_no_pip(cache, artifact, pip, monkeypatch):
    calls = pip(CONTENT)
    path = fetch(artifact)
    assert path.read_bytes() == CONTENT and path.parent == cache / "downloads"
    monkeypatch.setattr(fetching, "_pip", lambda: None)
    assert fetch(artifact) == path
    assert calls.read_text().count("thing==1.0") == 1


def test_pip_is_asked_for_one_file_by_its_hash(cache, artifact, pip):
    asked = pip(CONTENT)
    fetch(artifact)
    text = asked.read_text()
    assert text.startswith("download ") and "--no-deps" in text and "--require-hashes" in text
    assert "--no-binary thing" in text and f"thing==1.0 --hash=sha256:{artifact.sha256}" in text


def test_wrong_bytes_are_refused_and_not_kept(cache, artifact, pip):
    pip(b"something else")
    with pytest.raises(ShoalError, match="SHA-256"):
        fetch(artifact)
    assert [p.name for p in (cache / "downloads").iterdir()] == ["thing-1.0.tar.gz.lock"]


def test_a_changed_file_in_the_cache_is_refused(cache, artifact, pip):
    pip(CONTENT)
    path = fetch(artifact)
    path.write_bytes(b"changed")
    with pytest.raises(ShoalError, match="delete it"):
        fetch(artifact)


def test_a_file_put_there_by_hand_is_taken(cache, artifact, monkeypatch):
    monkeypatch.setattr(fetching, "_pip", lambda: None)
    with pytest.raises(ShoalError, match=r"no pip.*put thing-1.0.tar.gz .* in .*downloads") as failure:
        fetch(artifact)
    assert str(cache / "downloads") in str(failure.value) and "data=thing" in str(failure.value)
    (cache / "downloads" / artifact.filename).write_bytes(CONTENT)
    assert file_hash(fetch(artifact)) == artifact.sha256


def test_pips_own_words_are_passed_on(cache, artifact, pip):
    pip(None, "ERROR: No matching distribution found for thing==1.0")
    with pytest.raises(ShoalError, match="No matching distribution found for thing==1.0. Go online"):
        fetch(artifact)


def test_a_file_of_another_name_is_an_error(cache, artifact, pip):
    pip(CONTENT, name="thing-1.0-py3-none-any.whl")
    with pytest.raises(ShoalError, match=r"brought no thing-1\.0\.tar\.gz"):
        fetch(artifact)
