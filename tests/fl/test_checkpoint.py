import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fl import checkpoint
from fl.checkpoint import FILE, CheckpointError, load, save
from fl.keys import generator

ROOT = Path(__file__).parents[2]
META = {"round": 3, "offset": 2**40, "lr": 0.1, "tiny": 5e-324, "name": "größe", "none": None, "list": [1, [True, "x"]]}


def numbered(k: int) -> tuple[dict[str, np.ndarray], dict]:
    """A checkpoint every part of which names ``k``."""
    return {"a": np.full(1000, k), "b": np.full((7, 3), k, np.float32)}, {"k": k}


def number_in(folder: Path) -> int:
    """The k of the checkpoint in ``folder``, after a check that all of it is of that k."""
    arrays, meta = load(folder)
    for name, array in numbered(meta["k"])[0].items():
        np.testing.assert_array_equal(arrays[name], array)
    return meta["k"]


@pytest.mark.parametrize(
    "dtype",
    ["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8", "bool"],
)
@pytest.mark.parametrize("shape", [(), (0,), (5,), (3, 4), (2, 0, 3)])
def test_arrays_come_back_bit_for_bit(tmp_path, dtype, shape):
    array = np.frombuffer(generator(0, dtype).bytes(8 * 24), dtype=np.uint8)[: 24 * np.dtype(dtype).itemsize]
    array = (array % 2 if dtype == "bool" else array).copy().view(dtype)[: int(np.prod(shape))].reshape(shape)
    save(tmp_path / "c", {"x/y": array}, {})
    back = load(tmp_path / "c")[0]["x/y"]
    assert (back.dtype, back.shape, back.tobytes()) == (array.dtype, array.shape, array.tobytes())


def test_nan_payloads_infinities_and_negative_zero_survive(tmp_path):
    bits = np.array([0x7FC00001, 0xFFC12345, 0x7F800000, 0xFF800000, 0x80000000, 1], dtype=np.uint32)
    save(tmp_path, {"x": bits.view(np.float32)}, {})
    np.testing.assert_array_equal(load(tmp_path)[0]["x"].view(np.uint32), bits)


@pytest.mark.parametrize("view", [lambda a: a.T, lambda a: a[:, ::2], lambda a: a[::-1], np.asfortranarray])
def test_arrays_that_are_not_contiguous_are_kept_right(tmp_path, view):
    array = view(np.arange(24.0).reshape(4, 6))
    save(tmp_path, {"x": array}, {})
    np.testing.assert_array_equal(load(tmp_path)[0]["x"], array)


def test_what_is_loaded_can_be_written_to_and_is_no_view_of_the_file(tmp_path):
    save(tmp_path, *numbered(1))
    arrays, _ = load(tmp_path)
    arrays["a"][:] = 5
    save(tmp_path, *numbered(2))
    assert (arrays["a"] == 5).all()
    assert number_in(tmp_path) == 2


def test_values_come_back_exactly(tmp_path):
    save(tmp_path, {}, META)
    arrays, meta = load(tmp_path)
    assert arrays == {}
    assert meta == META
    assert type(meta["round"]) is int
    assert list(meta) == list(META)


def test_a_folder_without_a_checkpoint_gives_none(tmp_path):
    assert load(tmp_path) is None
    assert load(tmp_path / "missing") is None


def test_the_same_contents_give_the_same_bytes(tmp_path):
    for name in "ab":
        save(tmp_path / name, *numbered(4))
    assert (tmp_path / "a" / FILE).read_bytes() == (tmp_path / "b" / FILE).read_bytes()


@pytest.mark.parametrize(
    ("meta", "path"),
    [({"x": (1, 2)}, "meta.x"), ({"x": [{1: 2}]}, r"meta\.x\[0\]"), ({"x": {"y": np.float64(1)}}, "meta.x.y")],
)
def test_values_that_json_would_change_are_refused_by_name(tmp_path, meta, path):
    with pytest.raises(CheckpointError, match=path):
        save(tmp_path, {}, meta)


@pytest.mark.parametrize("array", [np.array(["a"]), np.array([1j]), np.zeros(2, ">f4"), [1.0], np.array([None])])
def test_arrays_that_would_change_are_refused_by_name(tmp_path, array):
    save(tmp_path, *numbered(1))
    with pytest.raises(CheckpointError, match="'weights'"):
        save(tmp_path, {"weights": array}, {})
    assert number_in(tmp_path) == 1


# A failure at each step of a write

STEPS = ["write", "torn write", "flush file", "rename", "flush folder"]


def fail_at(monkeypatch, step: str, error: BaseException) -> None:
    def failing(*_arguments, **_named):
        raise error

    def torn(_arrays, path, **_named):
        Path(path).write_bytes(b"\x10\0\0\0\0\0\0\0{half a header")
        raise error

    if step in ("write", "torn write"):
        monkeypatch.setattr(checkpoint, "save_file", failing if step == "write" else torn)
    elif step == "rename":
        monkeypatch.setattr(os, "replace", failing)
    else:
        real, calls = os.fsync, iter(["flush file", "flush folder"])
        monkeypatch.setattr(os, "fsync", lambda fd: failing() if next(calls) == step else real(fd))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_the_old_or_the_new(tmp_path, step, error):
    save(tmp_path, *numbered(1))
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, step, error)
        with pytest.raises(CheckpointError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            save(tmp_path, *numbered(2))
    if isinstance(error, OSError):
        assert "No space left" in str(raised.value)
        assert "is intact" in str(raised.value)
    assert number_in(tmp_path) == (2 if step == "flush folder" else 1)
    save(tmp_path, *numbered(3))
    assert number_in(tmp_path) == 3
    assert os.listdir(tmp_path) == [FILE]


@pytest.mark.parametrize("step", STEPS[:-1])
def test_a_failure_of_the_first_save_leaves_none(tmp_path, step):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, step, OSError("full"))
        with pytest.raises(CheckpointError):
            save(tmp_path / "c", *numbered(1))
    assert load(tmp_path / "c") is None


def test_bytes_reach_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    """What a power cut needs, and no killed process can show."""
    steps = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(os.fstat(fd).st_ino), fsync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (steps.append("rename"), replace(a, b)))
    save(tmp_path, *numbered(1))
    assert steps == [(tmp_path / FILE).stat().st_ino, "rename", tmp_path.stat().st_ino]


# Forks savers that save 0, 1, 2, ... and kills each after a moment; the parent then loads. Prints a line a kill.
KILLS = """
import os, signal, sys, time
import numpy as np
from fl.checkpoint import load, save
from fl.keys import generator

folder, kills = sys.argv[1], int(sys.argv[2])
k = 0
for kill in range(kills):
    told, tell = os.pipe()
    child = os.fork()
    if child == 0:
        while True:
            save(folder, {"a": np.full(400_000, k), "b": np.full((7, 3), k, np.float32)}, {"k": k})
            os.write(tell, b"%d\\n" % k)
            k += 1
    os.close(tell)
    heard = os.read(told, 64)  # the first save is done
    time.sleep(generator(kill, "moment").uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while more := os.read(told, 65536):
        heard += more
    os.close(told)
    acknowledged = int(heard.split()[-1])
    arrays, meta = load(folder)
    whole = all((array == meta["k"]).all() for array in arrays.values()) and len(arrays["a"]) == 400_000
    partial = os.path.exists(folder + "/checkpoint.safetensors.partial")
    print(acknowledged, meta["k"], int(whole), int(partial), flush=True)
    k = meta["k"] + 1
"""


def test_kill_9_at_random_moments_leaves_a_whole_checkpoint_no_older_than_the_last_that_was_acknowledged(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), "40"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    kills = [tuple(map(int, text.split())) for text in done.stdout.splitlines()]
    assert len(kills) == 40
    assert all(whole for *_, whole, _ in kills)
    assert all(acknowledged <= k <= acknowledged + 1 for acknowledged, k, *_ in kills)
    assert any(partial for *_, partial in kills), "no kill fell into a save: the test shows nothing"


# Damage


@pytest.mark.parametrize("place", ["values", "array", "cut short", "emptied", "not safetensors", "no header"])
def test_damage_is_found_and_the_message_has_a_way_out(tmp_path, place):
    save(tmp_path, *numbered(1234567))
    path = tmp_path / FILE
    data = bytearray(path.read_bytes())
    if place == "values":
        at = data.index(b"1234567")
        data[at : at + 1] = b"9"
    elif place == "array":
        data[-100] ^= 4
    elif place == "cut short":
        data = data[:-1]
    elif place == "emptied":
        data = b""
    elif place == "not safetensors":
        data = b"\xff" * 4096
    else:
        checkpoint.save_file({"a": np.zeros(2)}, path)
        data = path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"is damaged: .*delete the folder") as raised:
        load(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_later_format_is_refused_as_such(tmp_path):
    checkpoint.save_file({}, tmp_path / FILE, metadata={"shoal": json.dumps({"format": 99})})
    with pytest.raises(CheckpointError, match=r"format 99; this version of Shoal reads format 1"):
        load(tmp_path)


def test_nothing_is_unpickled(tmp_path):
    (tmp_path / FILE).write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    with pytest.raises(CheckpointError):
        load(tmp_path)
