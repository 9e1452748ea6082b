"""Programs on hosts, and the three that make up a run: `shoal server`, `shoal node`, `shoal run`."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

from fl.hosts.keys import make_keys
from fl.records import read_events, read_run
from tests.helpers import ENCODER

SHOAL = [sys.executable, "-m", "fl.cli"]
SERVER = "server"
QUIET = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return probe.getsockname()[1]


class Loopback:
    """All hosts are this machine. As a context it ends, at the end, all that was started on it."""

    def __init__(self) -> None:
        self.addresses = {SERVER: "127.0.0.1"}
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, host: str, command: Sequence[str], folder: Path, log: Path) -> subprocess.Popen:
        """Start ``command`` on ``host``, in ``folder`` and a session of its own; its output is added to ``log``."""
        environment = {**os.environ, **QUIET, "PYTHONPATH": str(Path(__file__).parents[2])}
        with log.open("ab") as out:
            process = subprocess.Popen(
                [*self.prefix(host), *command], cwd=folder, env=environment, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def prefix(self, host: str) -> list[str]:
        """What stands before a command for ``host``; it becomes the command, so that there is one process."""
        return []

    def kill(self, process: subprocess.Popen) -> None:
        """kill -9, as when the machine loses power, also to what ``process`` has started in its session's group."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """Ask everything to end, in the reverse of the order of starting, and kill what has not within 10 s."""
        for process in reversed(self._started):
            process.terminate()
        deadline = time.monotonic() + 10
        for process in reversed(self._started):
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
            self.kill(process)


class Scene:
    """A server, nodes and runs on ``hosts``, with keys, each in a folder of its own under ``folder``."""

    def __init__(self, hosts: Loopback, folder: Path, nodes: Sequence[str], port: int = 8000):
        self.hosts, self.folder, self.port = hosts, folder, port
        self.keys = folder / "keys"
        make_keys(self.keys, [hosts.addresses[SERVER]], nodes)
        self.address = f"{hosts.addresses[SERVER]}:{port}"

    def server(self, *options: str) -> subprocess.Popen:
        """Start the server, and wait until it lets the nodes in."""
        host = self.hosts.addresses[SERVER]
        words = ["server", "--host", host, "--port", str(self.port), "--keys", str(self.keys), *options]
        before = self.log(SERVER).count("SuperLink is up")
        process = self._start(SERVER, SERVER, words)
        self.wait(lambda: self.log(SERVER).count("SuperLink is up") > before, 120, "the server is up", process)
        return process

    def node(self, name: str, clients: str, *options: str, host: str = SERVER, to: str = "", log: str = "") -> Any:
        words = ["node", to or self.address, "--keys", str(self.keys), "--name", name, "--clients", clients, *options]
        return self._start(host, log or name, words)

    def run(self, *settings: str, name: str = "run") -> subprocess.Popen:
        """Start `shoal run` on the server's host; its folder is ``name`` in the server's."""
        engine = ["engine=superlink", f"engine.address={self.address}"]
        engine += [f"engine.root_certificates={self.keys / 'ca.crt'}", f"hydra.run.dir={self.folder / SERVER / name}"]
        return self._start(SERVER, name, ["run", *ENCODER, *engine, *settings])

    def resume(self, name: str = "run") -> subprocess.Popen:
        """Start `shoal run --resume`."""
        return self._start(SERVER, f"{name}-resumed", ["run", "--resume", str(self.folder / SERVER / name)])

    def log(self, name: str) -> str:
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.is_file() else ""

    def events(self, kind: str, name: str = "run") -> list[dict[str, Any]]:
        path = self.folder / SERVER / name
        return [e for e in read_events(path) if e["event"] == kind] if (path / "metrics.jsonl").is_file() else []

    def record(self, name: str = "run") -> dict[str, Any]:
        found = read_run(self.folder / SERVER / name)
        assert found is not None
        return found

    def wait_round(self, number: int, process: subprocess.Popen, seconds: float = 120, name: str = "run") -> None:
        """Wait until round ``number`` is over."""
        self.wait(lambda: len(self.events("round", name)) >= number, seconds, f"round {number} is over", process)

    def wait_end(self, process: subprocess.Popen, seconds: float = 300) -> int:
        self.wait(lambda: process.poll() is not None, seconds, "the run ends")
        return process.returncode

    def wait(self, true: Callable[[], bool], seconds: float, what: str, alive: Any = None) -> None:
        """Wait until ``true()``; fails with the logs after ``seconds``, or when the process ``alive`` has ended."""
        deadline = time.monotonic() + seconds
        while not true():
            ended = alive is not None and alive.poll() is not None
            assert not ended and time.monotonic() < deadline, f"waited in vain until {what}\n{self.tails()}"
            time.sleep(0.1)

    def tails(self) -> str:
        return "\n".join(f"--- {path.name}\n{path.read_text()[-3000:]}" for path in sorted(self.folder.glob("*.log")))

    def _start(self, host: str, name: str, words: Sequence[str]) -> subprocess.Popen:
        folder = self.folder / (SERVER if host == SERVER else host)
        folder.mkdir(exist_ok=True)
        return self.hosts.start(host, [*SHOAL, *words], folder, self.folder / f"{name}.log")
