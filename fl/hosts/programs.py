"""Flower's programs as children of ours: where they are, their environment, and how they start and end."""

from __future__ import annotations

import contextlib
import ctypes
import os
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType

import fl
from fl.errors import ShoalError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # <sys/prctl.h>


def find(name: str) -> str:
    """The path of one of Flower's programs, which lie beside this Python's own."""
    beside = Path(sys.executable).with_name(name)
    if beside.is_file():
        return str(beside)
    if found := shutil.which(name):
        return found
    raise ShoalError(f"there is no program {name} beside {sys.executable}. It comes with flwr, which Shoal installs.")


def settings_of(flower_home: Path) -> dict[str, str]:
    """The environment under which Flower sends no telemetry, looks for no update, installs nothing, and keeps its files
    in ``flower_home``.
    """
    return {
        "FLWR_HOME": str(flower_home.absolute()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    }


def paths() -> dict[str, str]:
    """What stands before these variables: Flower starts its other programs by name, and they import Shoal."""
    return {"PATH": str(Path(sys.executable).parent), "PYTHONPATH": str(Path(fl.__file__).parents[1])}


def shown(command: Sequence[str], settings: Mapping[str, str]) -> str:
    """The line for a shell that does what `Program` does."""
    words = [f"{name}={shlex.quote(value)}" for name, value in settings.items()]
    for name, value in paths().items():
        words.append(f"{name}={shlex.quote(value)}" + (f':"${name}"' if os.environ.get(name) else ""))
    return " ".join([*words, shlex.join(command)])


class Program:
    """A running child in a process group of its own, which gets the signals that this process gets.

    As a context it ends the child (SIGTERM) on leaving. On Linux the child also gets SIGTERM if this process is killed.
    """

    def __init__(self, command: Sequence[str], settings: Mapping[str, str]):
        self.command = list(command)
        after = {}
        for name, path in paths().items():
            after[name] = os.pathsep.join([path, os.environ[name]] if os.environ.get(name) else [path])
        self.environment = {**os.environ, **settings, **after}

    def __enter__(self) -> Program:
        self._libc = ctypes.CDLL(None) if sys.platform == "linux" else None
        self._child = subprocess.Popen(
            self.command, env=self.environment, process_group=0, preexec_fn=self._end_with_parent
        )
        self._handlers = {number: signal.signal(number, self._pass_on) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        if self.ended() is None:
            self._child.terminate()
            self._child.wait()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGTERM)  # what the child has left in its group

    def ended(self) -> int | None:
        """The exit code as a shell counts it (128 + the signal's number), or None while the child runs."""
        code = self._child.poll()
        return 128 - code if code is not None and code < 0 else code

    def wait(self) -> int:
        """Wait for the end of the child; returns what `ended` returns."""
        self._child.wait()
        return self.ended() or 0

    def _pass_on(self, number: int, _: FrameType | None) -> None:
        if self._child.poll() is None:
            self._child.send_signal(number)

    def _end_with_parent(self) -> None:
        if self._libc is not None:
            self._libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
