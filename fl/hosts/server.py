"""`shoal server`: a SuperLink with TLS, node authentication, and the keys of the nodes that it lets in."""

from __future__ import annotations

import argparse
import socket
import time
from collections.abc import Sequence
from pathlib import Path

from fl.errors import ConfigError, ShoalError
from fl.hosts import programs
from fl.hosts.addresses import is_loopback, is_wildcard, join_address
from fl.hosts.files import CA, SERVER, SERVER_KEY, check_private, check_public

HOME = Path(".shoal")  # in the working folder: nothing is written to the home folder
START_S = 120.0
MEMORY = ":memory:"


def command(options: argparse.Namespace) -> list[str]:
    """The `flower-superlink` command for these options; raises where one of them is not allowed."""
    words = [programs.find("flower-superlink"), "--host", options.host, "--port", str(options.port)]
    if options.database != MEMORY:
        words += ["--database", options.database]
    words += ["--disable-runtime-dependency-installation"]
    if options.insecure:
        check_insecure("--host", options.host)
        return [*words, "--insecure"]
    keys = options.keys
    if keys is None:
        raise ConfigError("--keys", None, "a folder from `shoal keys`", "Without keys: --insecure, on loopback only.")
    from fl.hosts.certificates import names_of

    names = names_of(check_public(keys / SERVER))
    if not is_wildcard(options.host) and options.host not in names:
        way_out = f"Make keys with `shoal keys DIR --server {options.host}`."
        raise ConfigError("--host", options.host, f"{keys / SERVER} is for {', '.join(names)}", way_out)
    words += ["--enable-supernode-auth"]
    words += ["--ssl-ca-certfile", str(check_public(keys / CA)), "--ssl-certfile", str(keys / SERVER)]
    return [*words, "--ssl-keyfile", str(check_private(keys / SERVER_KEY))]


def serve(options: argparse.Namespace) -> int:
    """Run the command; returns the SuperLink's exit code."""
    words, settings = command(options), programs.settings_of(HOME / "flwr")
    print(programs.shown(words, settings), flush=True)
    if options.print:
        return 0
    files = [] if options.insecure else _public_keys(options.keys, options.allow)
    HOME.mkdir(mode=0o700, exist_ok=True)
    if options.database != MEMORY:
        Path(options.database).touch(mode=0o600)  # it holds the messages
    from fl.hosts import registry

    keys = registry.read_keys(files)
    address = join_address(_reachable(options.host), options.port)
    certificates = None if options.insecure else (options.keys / CA).read_bytes()
    _check_free(options.host, options.port)
    with programs.Program(words, settings) as superlink:
        with registry.connect(address, certificates) as control:
            deadline = time.monotonic() + START_S
            while superlink.ended() is None and not registry.answers(control):
                if time.monotonic() > deadline:
                    raise ShoalError(f"no SuperLink answers at {address} after {START_S:.0f} s; see its log above.")
                time.sleep(0.1)
            if superlink.ended() is None and not options.insecure:
                registry.allow(control, keys, _say)
        if superlink.ended() is None:
            _say(f"SuperLink is up at {join_address(options.host, options.port)}; nodes: {', '.join(keys) or 'any'}")
            _say(f"on a node: {_node_line(options)}")
            if not is_loopback(options.host):
                _say("whoever reaches this port can start runs here and register nodes: let only your hosts through")
        return superlink.wait()


def check_insecure(key: str, host: str) -> None:
    """Raise unless ``host`` is this machine: without TLS and keys nothing may leave it."""
    if not is_loopback(host):
        way_out = "Leave --insecure out and use --keys, or use 127.0.0.1."
        raise ConfigError(key, host, "with --insecure it must be a loopback address", way_out)


def _public_keys(keys: Path, allowed: Sequence[Path] | None) -> list[Path]:
    files = [check_public(path) for path in allowed] if allowed else sorted(keys.glob("*.pub"))
    if not files:
        raise ShoalError(f"no node could connect: {keys} has no *.pub file. Copy the nodes' public keys there.")
    return files


def _check_free(host: str, port: int) -> None:
    """Raise where something listens already: it would be taken for the SuperLink that starts."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        way_out = "Choose another --host or --port, or end what listens there."
        raise ShoalError(f"nothing can listen on {join_address(host, port)} ({error.strerror}). {way_out}") from None


def _reachable(host: str) -> str:
    """The address under which this machine reaches what listens on ``host``."""
    if not is_wildcard(host):
        return host
    return "::1" if ":" in host else "127.0.0.1"


def _node_line(options: argparse.Namespace) -> str:
    if options.insecure:
        return f"shoal node {join_address(options.host, options.port)} --insecure"
    host = options.host
    if is_wildcard(host):
        from fl.hosts.certificates import names_of

        host = next((name for name in names_of(options.keys / SERVER) if not is_loopback(name)), "HOST")
    return f"shoal node {join_address(host, options.port)} --keys DIR --name NAME"


def _say(text: str) -> None:
    print(f"shoal: {text}", flush=True)
