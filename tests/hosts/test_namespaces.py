"""The hosts that the other tests run on: they reach each other and nothing else, until a link is cut."""

import subprocess
import sys

import pytest

from tests.hosts.namespaces import Hosts, missing
from tests.hosts.processes import SERVER

pytestmark = [pytest.mark.hosts, pytest.mark.skipif(bool(missing()), reason=missing())]
LISTEN = """
import socket, sys
with socket.create_server((sys.argv[1], 7000)) as server:
    print("up", flush=True)
    while True:
        server.accept()[0].close()
"""
CONNECT = """
import socket, sys
try:
    socket.create_connection((sys.argv[1], 7000), timeout=1).close()
    print("reached")
except OSError as error:
    print(type(error).__name__)
"""


def connects(hosts: Hosts, host: str, address: str, log) -> bool:
    log.write_text("")
    assert hosts.start(host, [sys.executable, "-c", CONNECT, address], log.parent, log).wait(30) == 0
    return log.read_text() == "reached\n"


def test_links_are_cut_and_healed_and_nothing_is_left(tmp_path):
    with Hosts("one", "two") as hosts:
        server = hosts.addresses[SERVER]
        listening = hosts.start(SERVER, [sys.executable, "-c", LISTEN, server], tmp_path, tmp_path / "listen.log")
        while not (tmp_path / "listen.log").read_text():
            assert listening.poll() is None
        log = tmp_path / "connect.log"
        assert connects(hosts, "one", server, log) and connects(hosts, "two", server, log)
        hosts.cut("one")
        assert not connects(hosts, "one", server, log) and connects(hosts, "two", server, log)
        hosts.heal("one")
        assert connects(hosts, "one", server, log)
        assert not connects(hosts, "one", "192.0.2.1", log)  # no route to anywhere else
        names = [hosts.namespace(name) for name in hosts.addresses]
    assert listening.poll() is not None
    left = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout.split()
    assert not set(names) & set(left)
