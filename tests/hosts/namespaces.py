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
from typing import Self

from tests.hosts.processes import SERVER, Loopback


@functools.cache
def missing() -> str:
    """Why there can't be namespaces here; empty where there can."""
    if shutil.which("ip") is None:
        return "there is no `ip` program (iproute2)"
    if os.geteuid() != 0:
        return "network namespaces need root"
    name = f"hosts-{os.getpid()}-try"
    made = _run("netns", "add", name)
    if made.returncode:
        return f"network namespaces are not allowed here: {made.stderr.strip()}"
    pair = _run("-n", name, "link", "add", "name", "try0", "type", "veth", "peer", "name", "try1")
    entered = _run("netns", "exec", name, "true")
    _run("netns", "delete", name)
    if pair.returncode or entered.returncode:
        return f"network namespaces can't be used here: {(pair.stderr + entered.stderr).strip()}"
    return ""


class Hosts(Loopback):
    """The hosts ``server`` and ``others``; as a context, gone with all their processes at its end."""

    def __init__(self, *others: str):
        super().__init__()
        self.addresses = {SERVER: "10.77.0.1"} | {name: f"10.77.0.{11 + i}" for i, name in enumerate(others)}
        self._links = {name: f"to{i}" for i, name in enumerate(others)}  # the server's ends

    def __enter__(self) -> Self:
        try:
            for name in self.addresses:
                _ip("netns", "add", self.namespace(name))
                self._in(name, "link", "set", "lo", "up")
            self._in(SERVER, "link", "add", "bridge", "type", "bridge")
            self._in(SERVER, "address", "add", f"{self.addresses[SERVER]}/24", "dev", "bridge")
            self._in(SERVER, "link", "set", "bridge", "up")
            for name, link in self._links.items():
                peer = ["peer", "name", "net", "netns", self.namespace(name)]
                self._in(SERVER, "link", "add", link, "type", "veth", *peer)
                self._in(SERVER, "link", "set", link, "master", "bridge")
                self._in(SERVER, "link", "set", link, "up")
                self._in(name, "address", "add", f"{self.addresses[name]}/24", "dev", "net")
                self._in(name, "link", "set", "net", "up")
        except BaseException:
            self.close()
            raise
        return self

    def namespace(self, host: str) -> str:
        return f"hosts-{os.getpid()}-{host}"

    def prefix(self, host: str) -> list[str]:
        return ["ip", "netns", "exec", self.namespace(host)]

    def cut(self, host: str) -> None:
        """Nothing reaches ``host`` any more, and nothing comes from it; no connection is closed by it."""
        self._in(SERVER, "link", "set", self._links[host], "down")

    def heal(self, host: str) -> None:
        self._in(SERVER, "link", "set", self._links[host], "up")

    def close(self) -> None:
        """End everything that runs on the hosts, and remove them."""
        try:
            super().close()
        finally:
            for name in self.addresses:
                for pid in _run("netns", "pids", self.namespace(name)).stdout.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal.SIGKILL)
                _run("netns", "delete", self.namespace(name))

    def _in(self, host: str, *words: str) -> None:
        _ip("-n", self.namespace(host), *words)


def _run(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["ip", *words], capture_output=True, text=True)


def _ip(*words: str) -> None:
    done = _run(*words)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")
