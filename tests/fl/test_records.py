import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml

from fl import checkpoint
from fl.errors import ShoalError
from fl.records import WALL_FIELDS, RunFolder, line, plain, read_events, read_run, without_wall

ROOT = Path(__file__).parents[2]


def event(round_: int, **fields) -> dict:
    return {"event": "round", "round": round_, "wall_s": 0.25 * round_, "loss": 1 / (round_ + 3)} | fields


def test_a_run_leaves_its_files(tmp_path):
    path = tmp_path / "outputs" / "quickstart"
    with RunFolder(path) as folder:
        folder.write_config({"seed": 1, "local": {"lr": 1e-5, "steps": 4}, "names": ["ä"]})
        folder.write_overrides(["seed=1", "local.lr=1e-5"])
        folder.append(event(0))
        folder.append(event(1))
        folder.write_run({"name": "quickstart", "status": "completed", "final": {"loss": np.float32(0.5)}})
    assert yaml.safe_load((path / "config.yaml").read_text()) == {
        "seed": 1,
        "local": {"lr": 1e-5, "steps": 4},
        "names": ["ä"],
    }
    assert yaml.safe_load((path / "overrides.yaml").read_text()) == ["seed=1", "local.lr=1e-5"]
    assert read_run(path) == {"name": "quickstart", "status": "completed", "final": {"loss": 0.5}}
    assert read_events(path) == [event(0), event(1)]
    assert sorted(os.listdir(path)) == ["config.yaml", "metrics.jsonl", "overrides.yaml", "run.json"]


def test_yaml_text_is_written_as_it_is(tmp_path):
    RunFolder(tmp_path).write_config("seed: 1  # ours\n")
    assert (tmp_path / "config.yaml").read_text() == "seed: 1  # ours\n"


# Numbers


def test_a_line_depends_on_values_only_and_keeps_the_order_of_keys():
    values = {"round": np.int64(3), "loss": np.float64(0.1), "accepted": np.bool_(True), "event": "client"}
    assert line(values) == b'{"round":3,"loss":0.1,"accepted":true,"event":"client"}\n'


def test_floats_are_exact():
    for value in (0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(0.1))):
        back = json.loads(line({"x": value}))["x"]
        assert (back, math.copysign(1, back)) == (value, math.copysign(1, value))


def test_what_is_not_finite_becomes_null():
    values = {"a": math.nan, "b": np.float32(np.inf), "c": {"d": [-math.inf, 1.0]}, "e": np.array([[np.nan, 2.0]])}
    assert json.loads(line(values)) == {"a": None, "b": None, "c": {"d": [None, 1.0]}, "e": [[None, 2.0]]}


def test_what_json_cannot_hold_is_refused_by_name():
    with pytest.raises(TypeError, match=r"a\.b\[1\] is a complex"):
        plain({"a": {"b": [1, 2j]}})


def test_integers_stay_integers_and_booleans_booleans():
    kept = plain({"n": np.int32(7), "t": (1, 2), "big": 2**60, "yes": True, 5: "key", "path": Path("a/b")})
    assert kept == {"n": 7, "t": [1, 2], "big": 2**60, "yes": True, "5": "key", "path": "a/b"}
    assert type(kept["n"]) is int
    assert kept["yes"] is True


# Wall-clock fields


def test_without_wall_leaves_what_replays():
    first, second = event(2, wall_s=1.5), event(2, wall_s=9.0)
    assert first != second
    assert without_wall(line(first)) == without_wall(second) == {"event": "round", "round": 2, "loss": 0.2}
    run = {"seed": 1, "started": "now", "final": {"loss": 0.5, "tokens_per_s": 5, "virtual_s": 3.0}}
    assert without_wall(run) == {"seed": 1, "final": {"loss": 0.5, "virtual_s": 3.0}}
    assert "virtual_s" not in WALL_FIELDS


# Resume


def test_a_resumed_run_is_cut_back_to_its_checkpoint_and_goes_on(tmp_path):
    whole = tmp_path / "whole"
    with RunFolder(whole) as folder:
        for k in range(6):
            folder.append(event(k))
    cut = tmp_path / "cut"
    first = RunFolder(cut)
    first.write_run({"status": "interrupted"})
    for k in range(3):
        first.append(event(k))
    offset = first.offset()
    assert offset == (cut / "metrics.jsonl").stat().st_size
    first.append(event(3, loss=99))  # after the checkpoint
    first.close()
    with open(cut / "metrics.jsonl", "ab") as file:
        file.write(b'{"event":"rou')  # and a line that was cut off
    with RunFolder(cut, resume=True) as second:
        second.truncate(offset)
        assert second.offset() == offset
        for k in range(3, 6):
            second.append(event(k))
        assert second.offset() == (cut / "metrics.jsonl").stat().st_size
    assert (cut / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()


def test_resuming_loses_nothing_before_truncate(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_run({"status": "interrupted"})
        folder.append(event(0))
    RunFolder(tmp_path, resume=True).close()
    assert read_events(tmp_path) == [event(0)]


def test_metrics_shorter_than_the_checkpoint_are_refused(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.append(event(0))
        offset = folder.offset()
        with pytest.raises(ShoalError, match=rf"has {offset} bytes, but the checkpoint was taken at {offset + 1}"):
            folder.truncate(offset + 1)


def test_there_has_to_be_a_run_to_resume(tmp_path):
    with pytest.raises(ShoalError, match="no run to resume"):
        RunFolder(tmp_path / "missing", resume=True)
    assert not (tmp_path / "missing").exists()


def test_a_line_outlives_a_kill_right_after_it(tmp_path):
    script = (
        "import os, signal, sys; from fl.records import RunFolder; f = RunFolder(sys.argv[1]);"
        "f.append({'event': 'round', 'round': 1}); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=ROOT, timeout=60)
    assert read_events(tmp_path) == [{"event": "round", "round": 1}]


def test_a_last_line_cut_off_is_left_out_and_a_broken_one_is_not(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(line(event(0)) + b'{"event":"ro')
    assert read_events(tmp_path) == [event(0)]
    (tmp_path / "metrics.jsonl").write_bytes(b"{oops\n" + line(event(0)))
    with pytest.raises(ShoalError, match="not JSON"):
        read_events(tmp_path)
    assert read_events(tmp_path / "missing") == []


# One process at a time


HOLDER = """
import os, sys, time
from fl.records import RunFolder
folder = RunFolder(sys.argv[1])
folder.write_run({"status": "interrupted"})
if sys.argv[2] == "worker" and os.fork() == 0:  # outlives its parent
    print(os.getpid(), flush=True)
    time.sleep(60)
    os._exit(0)
if sys.argv[2] == "worker":
    os.kill(os.getpid(), 9)
print("held", flush=True)
sys.stdin.readline()
folder.close()
print("closed", flush=True)
sys.stdin.readline()
"""


def holder(path, kind="alone") -> subprocess.Popen:
    words = [sys.executable, "-c", HOLDER, str(path), kind]
    return subprocess.Popen(words, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_folder_is_open_in_one_process_at_a_time(tmp_path):
    with holder(tmp_path) as other:
        try:
            assert other.stdout.readline() == "held\n"
            before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
            for how in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(ShoalError, match=f"{tmp_path} is open.*another process works"):
                    RunFolder(tmp_path, **how)
            assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before
            assert read_run(tmp_path) == {"status": "interrupted"} and read_events(tmp_path) == []
            other.stdin.write("\n")
            other.stdin.flush()
            assert other.stdout.readline() == "closed\n"
            RunFolder(tmp_path, resume=True).close()
            assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "run.json"]
        finally:
            other.kill()


def test_a_process_that_died_holds_no_folder_nor_do_workers_that_outlive_it(tmp_path):
    with holder(tmp_path, "worker") as other:
        worker = int(other.stdout.readline())
        try:
            assert other.wait(30) == -signal.SIGKILL
            os.kill(worker, 0)
            RunFolder(tmp_path, resume=True).close()
        finally:
            os.kill(worker, signal.SIGKILL)


def test_a_folder_that_was_refused_is_not_held(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_run({"status": "completed"})
    with pytest.raises(ShoalError, match="finished run"):
        RunFolder(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["metrics.jsonl", "run.json"]


# Overwriting


def test_a_finished_run_is_not_overwritten_unless_told(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_run({"status": "completed"})
        folder.append(event(0))
    with pytest.raises(ShoalError, match=r"finished run.*hydra\.run\.dir"):
        RunFolder(tmp_path)
    assert read_events(tmp_path) == [event(0)]
    with RunFolder(tmp_path, overwrite=True):
        assert read_events(tmp_path) == []
        assert read_run(tmp_path) is None


def test_a_run_that_can_go_on_is_not_overwritten_unless_told(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.write_run({"status": "interrupted"})
        checkpoint.save(folder.checkpoint, {}, {})
    with pytest.raises(ShoalError, match="shoal run --resume"):
        RunFolder(tmp_path)
    RunFolder(tmp_path, overwrite=True)
    assert checkpoint.load(tmp_path / "checkpoint") is None


def test_what_a_failed_run_left_is_not_inherited_and_other_files_stay(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.append(event(0))
        folder.write_run({"status": "failed"})
    for name in ("adapter", "plots"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "old").write_text("x")
    (tmp_path / "notes.txt").write_text("mine")
    with RunFolder(tmp_path):
        assert sorted(os.listdir(tmp_path)) == [".lock", "metrics.jsonl", "notes.txt"]
        assert read_events(tmp_path) == []


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ShoalError, match=r"Choose another hydra\.run\.dir"):
        RunFolder(tmp_path / "file" / "run")


# Atomic small files


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch, step):
    folder = RunFolder(tmp_path)
    folder.write_run({"status": "interrupted"})

    def full(*_arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, full)
        with pytest.raises(OSError, match="No space"):
            folder.write_run({"status": "completed"})
    assert read_run(tmp_path) == {"status": "interrupted"}
    folder.write_run({"status": "completed"})
    assert read_run(tmp_path) == {"status": "completed"}


def test_metrics_reach_the_disk_when_they_are_flushed(tmp_path, monkeypatch):
    """Else a checkpoint could outlive the lines that it counts."""
    synced, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (synced.append(os.fstat(fd).st_size), fsync(fd)))
    folder = RunFolder(tmp_path)
    folder.append(event(0))
    assert synced == []
    assert folder.offset() > 0 and synced == []
    folder.flush()
    assert folder.offset() == synced[-1]
