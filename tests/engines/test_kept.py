"""What a node keeps on disk: complete or as it was, whoever else writes, and whatever the disk does."""

import errno
import os
import stat
import subprocess
import threading

import numpy as np
import pytest

from fl import checkpoint
from fl.engine.kept import HomeError, Kept, forget, secret
from fl.errors import ShoalError

ARRAYS = {"memory": np.arange(5, dtype=np.float32)}
META = {"privacy": {"steps": 3}}


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def same(found, arrays, meta) -> bool:
    return found is not None and found[1] == meta and all(np.array_equal(found[0][n], a) for n, a in arrays.items())


def test_it_comes_back_as_it_was_by_run_and_client(tmp_path):
    kept = Kept(tmp_path, "run1")
    assert kept.load(0) is None and not kept.holds(0)
    kept.save(0, ARRAYS, META)
    kept.save(1, {}, {})
    assert same(Kept(tmp_path, "run1").load(0), ARRAYS, META) and kept.load(1) == ({}, {})
    assert kept.holds(0) and Kept(tmp_path, "run2").load(0) is None


@pytest.mark.parametrize("run", ["", "..", "a/b", "a.b"])
def test_a_run_s_name_leads_to_no_other_folder(run, tmp_path):
    with pytest.raises(ShoalError, match="letters and digits"):
        Kept(tmp_path, run)


def test_nobody_else_can_read_it(tmp_path):
    before = os.umask(0)
    try:
        Kept(tmp_path / "home", "run").save(3, ARRAYS, META)
        secret(tmp_path / "home")
    finally:
        os.umask(before)
    paths = list((tmp_path / "home").rglob("*"))
    assert {mode(p) for p in [tmp_path / "home", *paths] if p.is_dir()} == {0o700}
    assert {mode(p) for p in paths if p.is_file()} == {0o600} and sum(p.is_file() for p in paths) == 3


def test_a_write_of_another_process_is_seen_and_one_s_own_is_not(tmp_path):
    mine, other = Kept(tmp_path, "run"), Kept(tmp_path, "run")
    assert mine.newer(0)  # nobody has looked
    mine.load(0)
    assert not mine.newer(0)
    for _ in range(3):
        other.save(0, ARRAYS, META)
        assert mine.newer(0)
        mine.load(0)
        assert not mine.newer(0)
        mine.save(0, ARRAYS, META)
        assert not mine.newer(0) and other.newer(0)
    mine.forget_read([0])
    assert mine.newer(0)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_file_is_refused_by_name_and_nothing_starts_anew(damage, tmp_path):
    kept = Kept(tmp_path, "run")
    kept.save(7, ARRAYS, META)
    path = tmp_path / "run" / "client-7" / checkpoint.FILE
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"flip": content, "cut": content[:-3], "empty": b""}[damage])
    for _ in range(2):
        with pytest.raises(HomeError, match="client 7: what it kept of run run is damaged") as caught:
            kept.load(7)
        assert str(path) in caught.value.here and str(tmp_path) not in str(caught.value)
        assert kept.newer(7)


def test_a_full_disk_leaves_what_was_there_and_the_job_undone(tmp_path):
    """On a real file system of 256 KB."""
    where = tmp_path / "small"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", where], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no file system can be mounted here: {done.stderr.strip()}")
    try:
        kept = Kept(where, "run")
        kept.save(0, ARRAYS, META)
        with pytest.raises(HomeError, match="client 0: what it must remember.*so the job is not done") as caught:
            kept.save(0, {"memory": np.zeros(100_000, np.float32)}, {"privacy": {"steps": 4}})
        assert str(where) not in str(caught.value) and "memory" not in str(caught.value)
        assert kept.newer(0) and same(kept.load(0), ARRAYS, META)
        assert not list(where.rglob("*.partial"))  # else there would be no room for the next
        kept.save(0, {}, {"privacy": {"steps": 4}})
        assert kept.load(0) == ({}, {"privacy": {"steps": 4}})
    finally:
        subprocess.run(["umount", where], check=True)


@pytest.mark.parametrize("step", ["save_file", "flush_to_disk"])
@pytest.mark.parametrize("fault", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
def test_an_error_at_any_step_before_the_rename_leaves_what_was_there(step, fault, tmp_path, monkeypatch):
    kept = Kept(tmp_path, "run")
    kept.save(0, ARRAYS, META)

    def fails(*_, **__):
        raise OSError(fault, os.strerror(fault))

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, step, fails)
        with pytest.raises(HomeError, match="so the job is not done"):
            kept.save(0, {}, {"privacy": {"steps": 9}})
    assert same(kept.load(0), ARRAYS, META) and not list(tmp_path.rglob("*.partial"))


def test_a_secret_is_made_once_and_of_those_who_come_at_once_all_get_the_same(tmp_path):
    for attempt in range(20):
        folder, barrier, found = tmp_path / str(attempt), threading.Barrier(6), []

        def ask(folder=folder, barrier=barrier, found=found):
            barrier.wait()
            found.append(secret(folder))

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 6 and len(set(found)) == 1 and len(found[0]) == 32
        assert secret(folder) == found[0] and [p.name for p in folder.iterdir()] == ["secret"]
    assert len({secret(tmp_path / str(attempt)) for attempt in range(20)}) == 20


def test_a_secret_that_others_can_read_or_that_was_cut_is_refused(tmp_path):
    secret(tmp_path)
    path = tmp_path / "secret"
    path.chmod(0o640)
    with pytest.raises(HomeError, match="no secret") as caught:
        secret(tmp_path)
    assert "chmod 600" in caught.value.here and str(tmp_path) not in str(caught.value)
    path.chmod(0o600)
    path.write_bytes(b"short")
    with pytest.raises(HomeError) as caught:
        secret(tmp_path)
    assert "has 5 bytes, not 32" in caught.value.here and path.read_bytes() == b"short"


def test_runs_that_nothing_was_written_to_for_long_are_forgotten_and_nothing_else(tmp_path):
    own = secret(tmp_path)
    for run in ("old", "young"):
        Kept(tmp_path, run).save(0, ARRAYS, META)
    long_ago = (tmp_path / "young" / "used").stat().st_mtime - 8 * 86400
    os.utime(tmp_path / "old" / "used", (long_ago, long_ago))
    assert forget(tmp_path, 9) == [] and forget(tmp_path, 7) == ["old"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["secret", "young"] and secret(tmp_path) == own
    Kept(tmp_path, "young").save(1, ARRAYS, META)
    assert forget(tmp_path / "nothing", 1) == []
