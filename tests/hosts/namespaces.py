"""Hosts that are network namespaces of this machine: a server and others, on a bridge that lives only in them.

No namespace has a route to anywhere else, so what runs in them reaches nothing but each other. They share this
machine's file system, clock and processes.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Self

SERVER = "server"


@functools.cache
def missing() -> str | None:
    """Why there can't be namespaces here, or None."""
    if shutil.which("ip") is None:
        return "there is no `ip` program (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"hosts-{os.getpid()}-try"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    veth = ["ip", "-n", name, "link", "add", "name", "try0", "type", "veth", "peer", "name", "try1"]
    pair = subprocess.run(veth, capture_output=True, text=True)
    run = subprocess.run(["ip", "netns", "exec", name, "true"], capture_output=True, text=True)
    subprocess.run(["ip", "netns", "delete", name], check=True)
    if pair.returncode or run.returncode:
        return f"network namespaces can't be used here: {(pair.stderr + run.stderr).strip()}"
    return None


class Hosts:
    """The hosts ``server`` and ``others``; as a context, gone with all their processes at its end."""

    def __init__(self, *others: str):
        self.addresses = {SERVER: "10.77.0.1"} | {name: f"10.77.0.{11 + i}" for i, name in enumerate(others)}
        self._links = {name: f"to{i}" for i, name in enumerate(others)}  # the server's ends
        self._started: list[subprocess.Popen] = []

    def __enter__(self) -> Self:
        try:
            for name in self.addresses:
                _ip("netns", "add", self._namespace(name))
                self._in(name, "link", "set", "lo", "up")
            self._in(SERVER, "link", "add", "bridge", "type", "bridge")
            self._in(SERVER, "address", "add", f"{self.addresses[SERVER]}/24", "dev", "bridge")
            self._in(SERVER, "link", "set", "bridge", "up")
            for name, link in self._links.items():
                other = ["netns", self._namespace(name)]
                self._in(SERVER, "link", "add", link, "type", "veth", "peer", "name", "net", *other)
                self._in(SERVER, "link", "set", link, "master", "bridge")
                self._in(SERVER, "link", "set", link, "up")
                self._in(name, "address", "add", f"{self.addresses[name]}/24", "dev", "net")
                self._in(name, "link", "set", "net", "up")
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(
        self, host: str, command: Sequence[str], folder: Path, log: Path, env: Mapping[str, str] | None = None
    ) -> subprocess.Popen:
        """Start ``command`` on ``host``, in ``folder`` and a session of its own; its output is added to ``log``."""
        words = ["ip", "netns", "exec", self._namespace(host), *command]  # `ip` becomes the command: one process
        with log.open("ab") as out:
            process = subprocess.Popen(
                words, cwd=folder, env={**os.environ, **(env or {})}, stdin=subprocess.DEVNULL, stdout=out,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        self._started.append(process)
        return process

    def cut(self, host: str) -> None:
        """Nothing reaches ``host`` any more, and nothing comes from it; no connection is closed by it."""
        self._in(SERVER, "link", "set", self._links[host], "down")

    def heal(self, host: str) -> None:
        self._in(SERVER, "link", "set", self._links[host], "up")

    def kill(self, process: subprocess.Popen) -> None:
        """kill -9 to ``process`` and its session's process group, as when the machine loses power."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """End everything that runs on the hosts, and remove them."""
        for name in self.addresses:
            listed = subprocess.run(["ip", "netns", "pids", self._namespace(name)], capture_output=True, text=True)
            for pid in listed.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for process in self._started:
            self.kill(process)
        for name in self.addresses:
            subprocess.run(["ip", "netns", "delete", self._namespace(name)], capture_output=True)

    def _namespace(self, host: str) -> str:
        return f"hosts-{os.getpid()}-{host}"

    def _in(self, host: str, *words: str) -> None:
        _ip("-n", self._namespace(host), *words)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
