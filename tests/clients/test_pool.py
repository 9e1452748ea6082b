"""Worker processes: results in order, and every way that a child can fail."""

from __future__ import annotations

import os
import signal
import time

import numpy as np
import pytest
import torch

from clients.pool import Pool, available
from fl.errors import ConfigError, ShoalError

pytestmark = pytest.mark.skipif(not available(), reason="needs fork")


class Work:
    """What the children do. ``seed`` stands for the memory that they share with the parent."""

    def __init__(self) -> None:
        self.seed = 7

    def add(self, a: int, b: int) -> int:
        return self.seed + a + b

    def slow_first(self, place: int) -> int:
        time.sleep(0.2 if place == 0 else 0)
        return place

    def where(self) -> tuple[int, int]:
        time.sleep(0.02)
        return os.getpid(), torch.get_num_threads()

    def array(self, x: np.ndarray) -> np.ndarray:
        return x * 2

    def fail(self, text: str) -> None:
        raise ValueError(text)

    def refuse(self, value: int) -> None:
        raise ConfigError("adapter.rank", value, "a small number", "Lower it.")

    def missing_file(self) -> None:
        open("/nowhere/at/all").close()

    def unpicklable(self):
        return lambda: None

    def die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def hang(self) -> None:
        time.sleep(60)


@pytest.fixture
def pool():
    with Pool(Work(), 2, 1) as made:
        yield made


def gone(pids: list[int]) -> bool:
    """Whether no process of these is left, as a zombie neither."""
    return not any(os.path.exists(f"/proc/{pid}") for pid in pids)


def test_results_come_in_the_order_of_the_tasks(pool):
    assert pool.run([("add", (i, 1)) for i in range(9)]) == [8 + i for i in range(9)]
    assert pool.run([("slow_first", (i,)) for i in range(5)]) == list(range(5))
    assert pool.run([]) == []


def test_each_result_is_told_as_it_comes(pool):
    told: list[int] = []
    pool.run([("slow_first", (i,)) for i in range(5)], told.append)
    assert sorted(told) == list(range(5)) and told[0] != 0


def test_arrays_go_and_come(pool):
    assert pool.run([("array", (np.arange(3.0),))])[0].tolist() == [0, 2, 4]


def test_the_tasks_are_spread_over_children_with_the_threads_asked_for():
    with Pool(Work(), 2, 2) as pool:
        places = pool.run([("where", ())] * 6)
    assert {p for p, _ in places} == {c for c, _ in places} and len({p for p, _ in places}) == 2
    assert os.getpid() not in {p for p, _ in places} and {t for _, t in places} == {2}


def test_an_exception_in_a_child_is_told_with_its_traceback_and_the_pool_goes_on(pool):
    with pytest.raises(ShoalError, match="(?s)A worker process failed.*in fail.*ValueError: no such luck"):
        pool.run([("add", (1, 1)), ("fail", ("no such luck",)), *[("add", (1, 1))] * 5])
    assert pool.run([("add", (1, i)) for i in range(4)]) == [8, 9, 10, 11]


def test_a_wrong_setting_found_in_a_child_is_that_error_here(pool):
    with pytest.raises(ConfigError) as error:
        pool.run([("refuse", (99,))])
    assert str(error.value) == "adapter.rank=99 is not allowed: a small number. Lower it."
    assert (error.value.key, error.value.value, error.value.exit_code) == ("adapter.rank", 99, 2)


@pytest.mark.parametrize(("task", "text"), [("missing_file", "FileNotFoundError"), ("unpicklable", "pickle")])
def test_errors_of_files_and_of_pickling_are_told_too(pool, task, text):
    with pytest.raises(ShoalError, match=f"(?s)A worker process failed.*{text}"):
        pool.run([(task, ())])


def test_a_child_that_is_killed_at_work_is_an_error_and_leaves_nothing_behind(pool):
    pids = [c.pid for c in pool.children]
    with pytest.raises(ShoalError, match="A worker process died"):
        pool.run([("die", ()), ("hang", ())])
    assert gone(pids)


def test_a_child_that_is_killed_at_rest_is_an_error(pool):
    os.kill(pool.children[1].pid, signal.SIGKILL)
    pool.children[1].join()
    with pytest.raises(ShoalError, match="worker process"):
        pool.run([("add", (i, 1)) for i in range(4)])


def test_a_pool_that_has_lost_a_child_gives_no_stale_results(pool):
    with pytest.raises(ShoalError, match="died"):
        pool.run([("die", ()), ("slow_first", (0,))])
    with pytest.raises(ShoalError, match="gone"):
        pool.run([("add", (1, 1)), ("add", (2, 2))])


def test_an_interrupt_while_waiting_ends_the_children(pool, monkeypatch):
    pids = [c.pid for c in pool.children]

    def interrupted(_):
        raise KeyboardInterrupt

    monkeypatch.setattr("clients.pool.wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pool.run([("hang", ())])
    assert gone(pids)


def test_close_ends_children_that_are_at_work_and_can_be_called_twice():
    pool = Pool(Work(), 2, 1)
    pids = [c.pid for c in pool.children]
    pool.pipes[0].send(("hang", ()))
    start = time.monotonic()
    pool.close()
    pool.close()
    assert gone(pids) and time.monotonic() - start < 30


def test_pools_side_by_side_close_in_any_order():
    first, second = Pool(Work(), 1, 1), Pool(Work(), 1, 1)
    pids = [c.pid for p in (first, second) for c in p.children]
    first.close()
    assert second.run([("add", (1, 1))]) == [9]
    second.close()
    assert gone(pids)


def test_children_pass_over_ctrl_c_and_heed_termination_whatever_the_parent_does():
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    before_int = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with Pool(Work(), 1, 1) as pool:
            pool.run([("add", (1, 1))])
            os.kill(pool.children[0].pid, signal.SIGINT)
            assert pool.run([("add", (1, 1))]) == [9]
            pool.children[0].terminate()
            pool.children[0].join(timeout=10)
            assert pool.children[0].exitcode == -signal.SIGTERM
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGINT, before_int)


def test_children_end_when_the_parent_is_gone():
    """A parent that is killed closes nothing itself: the children see the end of their pipes."""
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        pool = Pool(Work(), 2, 1)
        os.write(write, " ".join(str(c.pid) for c in pool.children).encode())
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(parent, 0)
    pids = [int(p) for p in os.read(read, 100).split()]
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and not all(_ended(p) for p in pids):
        time.sleep(0.01)
    left = [p for p in pids if not _ended(p)]
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert len(pids) == 2 and not left


def _ended(pid: int) -> bool:
    """Gone, or a zombie that whoever adopted it has yet to collect."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True
