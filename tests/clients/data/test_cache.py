"""A folder is made once and whole, whoever asks and whoever dies."""

import subprocess
import sys

import pytest

from clients.data.cache import cache_root, stored_folder
from fl.errors import ShoalError


def test_root_is_the_variable_or_the_home(monkeypatch, tmp_path):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "x"))
    assert cache_root() == tmp_path / "x"
    monkeypatch.delenv("SHOAL_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_root() == tmp_path / ".cache" / "shoal"


def test_it_is_made_once(cache):
    calls = []

    def make(folder):
        calls.append(folder)
        (folder / "file").write_text("x")

    for _ in range(2):
        assert (stored_folder(cache / "a" / "b", make) / "file").read_text() == "x"
    assert len(calls) == 1


def test_a_failure_leaves_nothing_and_the_next_try_works(cache):
    def fail(folder):
        (folder / "half").write_text("x")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        stored_folder(cache / "a", fail)
    assert [p.name for p in cache.iterdir() if not p.name.endswith(".lock")] == []
    stored_folder(cache / "a", lambda folder: (folder / "file").write_text("x"))
    assert [p.name for p in (cache / "a").iterdir()] == ["file"]


def test_two_processes_make_it_once(cache):
    code = """
import sys, time
from pathlib import Path
from clients.data.cache import stored_folder
def make(folder):
    with open(sys.argv[1] + ".log", "a") as log:
        log.write("made\\n")
    time.sleep(0.5)
    (folder / "file").write_text("x")
print((stored_folder(Path(sys.argv[1]), make) / "file").read_text())
"""
    cache.mkdir()
    both = [
        subprocess.Popen([sys.executable, "-c", code, str(cache / "a")], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [p.communicate(timeout=60)[0].strip() for p in both] == ["x", "x"]
    assert (cache / "a.log").read_text() == "made\n"


def test_a_cache_that_cannot_be_written_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(ShoalError, match="SHOAL_CACHE"):
        stored_folder(tmp_path / "file" / "a" / "b", lambda folder: None)
