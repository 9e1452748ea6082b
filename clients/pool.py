"""Worker processes over cohorts: on a CPU, one thread in each of two processes beats two threads inside an operator.

The children are forked after the base model and the data are loaded, so that all share their memory. Which child runs
a task does not change its result, so tasks go to whichever is free, and results come back in the order of the tasks.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import signal
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

from fl.errors import ShoalError

Task = tuple[str, tuple]  # name of a method of the worker, its arguments


def available() -> bool:
    """Whether children can be forked here: Linux, and no accelerator in use in this process."""
    return "fork" in mp.get_all_start_methods() and os.name == "posix" and not torch.cuda.is_initialized()


class Pool:
    """``processes`` children that call methods of ``worker``, each with ``threads`` torch threads.

    Raises `ShoalError` when a child raises or dies; a `ShoalError` of the task's own comes as it is. After any
    exception but a task's own the pool is closed, since children may still be at work on what nobody waits for. Use as
    a context manager, or call `close`.
    """

    def __init__(self, worker: Any, processes: int, threads: int):
        context = mp.get_context("fork")
        self.children: list[Any] = []
        self.pipes: list[Connection] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            child = context.Process(target=_serve, args=(worker, theirs, threads, [*self.pipes, ours]), daemon=True)
            child.start()
            theirs.close()
            self.children.append(child)
            self.pipes.append(ours)

    def run(self, tasks: Sequence[Task], done: Callable[[Any], None] = lambda _: None) -> list[Any]:
        """Results of the tasks, in their order; ``done`` is told of each as it comes."""
        if not self.pipes:
            raise ShoalError("The worker processes are gone; start the run again with --resume.")
        try:
            results, failure = self._run(tasks, done)
        except BaseException:
            self.close()
            raise
        if failure is not None:
            raise failure
        return results

    def everywhere(self, method: str, arguments: tuple) -> None:
        """Call ``method`` in every child, one after another; for what all of them have to know."""
        try:
            for pipe in self.pipes:
                self._send(pipe, [(method, arguments)], 0)
            answers = [pipe.recv() for pipe in self.pipes]
        except (EOFError, ConnectionError) as error:
            self.close()
            raise ShoalError("A worker process died; start the run again with --resume.") from error
        for good, value in answers:
            if not good:
                self.close()
                raise _error(*value)

    def _run(self, tasks: Sequence[Task], done: Callable[[Any], None]) -> tuple[list[Any], ShoalError | None]:
        results: list[Any] = [None] * len(tasks)
        waiting = list(range(len(tasks)))[::-1]
        busy: dict[Connection, int] = {}
        failure: ShoalError | None = None
        for pipe in self.pipes:
            if waiting:
                busy[pipe] = self._send(pipe, tasks, waiting.pop())
        while busy:
            for ready in wait(list(busy)):
                assert isinstance(ready, Connection)
                index = busy.pop(ready)
                try:
                    good, value = ready.recv()
                except (EOFError, ConnectionError) as error:
                    raise ShoalError(
                        "A worker process died, which is most often a lack of memory. "
                        "Use a smaller engine.cohort_size or engine.workers=1."
                    ) from error
                if good:
                    results[index] = value
                    done(value)
                else:
                    failure = failure or _error(*value)
                if waiting and failure is None:
                    busy[ready] = self._send(ready, tasks, waiting.pop())
        return results, failure

    def _send(self, pipe: Connection, tasks: Sequence[Task], index: int) -> int:
        try:
            pipe.send(tasks[index])
        except (BrokenPipeError, ConnectionError) as error:
            raise ShoalError("A worker process is gone; start the run again with --resume.") from error
        return index

    def close(self) -> None:
        """End the children at once: they hold nothing that is not in this process or in a result."""
        for pipe in self.pipes:
            pipe.close()
        for child in self.children:
            child.terminate()
        for child in self.children:
            child.join(timeout=5)
            if child.is_alive():
                child.kill()
                child.join()
        self.pipes, self.children = [], []

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _serve(worker: Any, pipe: Connection, threads: int, inherited: list[Connection]) -> None:
    # The parent handles Ctrl-C (it checkpoints); its ends of the pipes must not stay open here, or a child would
    # never see the parent go.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    for other in inherited:
        other.close()
    torch.set_num_threads(threads)
    while True:
        try:
            method, arguments = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        try:
            result = (True, getattr(worker, method)(*arguments))
        except ShoalError as error:
            result = (False, (type(error), error.args, vars(error)))
        except Exception:
            result = (False, _untold())
        try:
            pipe.send(result)
        except OSError:
            os._exit(0)
        except Exception:  # a result that can't be pickled
            pipe.send((False, _untold()))


def _untold() -> tuple[type[ShoalError], tuple, dict]:
    return ShoalError, (f"A worker process failed:\n{traceback.format_exc()}",), {}


def _error(kind: type[ShoalError], arguments: tuple, attributes: dict) -> ShoalError:
    """The error that a child sent: not by its constructor, whose arguments are not those of the message."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(attributes)
    return error
