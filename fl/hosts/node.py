"""`shoal node`: one machine's part of a run across hosts, in this process, or a stock SuperNode with `--stock`."""

from __future__ import annotations

import argparse
import logging
import socket
import sys
from pathlib import Path
from typing import Any

from fl.errors import ConfigError, ShoalError
from fl.hosts import programs
from fl.hosts.addresses import join_address, split_address
from fl.hosts.clients import parse_clients
from fl.hosts.files import CA, check_private, check_public, node_files
from fl.hosts.server import HOME, check_insecure

SEPARATORS = "'\"\\:"  # characters that a node config, or a list of files in it, can't carry


def run(options: argparse.Namespace) -> int:
    """Run the command; returns its exit code."""
    checked = _check(options)
    words, settings = command(options, checked), programs.settings_of(_state(options) / "flwr")
    if options.print:
        print(programs.shown(words, settings))
        return 0
    _make_state(_state(options))
    if options.stock:
        print(programs.shown(words, settings), flush=True)
        with programs.Program(words, settings) as supernode:
            return supernode.wait()
    return _resident(options, checked)


def command(options: argparse.Namespace, config: dict[str, Any]) -> list[str]:
    """The `flower-supernode` command for these options and this node config."""
    host, port = split_address("HOST:PORT", options.superlink)
    words = [programs.find("flower-supernode"), "--superlink", join_address(host, port)]
    words += ["--port", str(_free_port())]
    if options.insecure:
        words += ["--insecure"]
    else:
        key = node_files(options.keys, options.name)[0]
        words += ["--root-certificates", str(options.keys / CA), "--auth-supernode-private-key", str(key)]
    quoted = (f"{name}={value}" if isinstance(value, int) else f'{name}="{value}"' for name, value in config.items())
    return [*words, "--node-config", " ".join(quoted)]


def _check(options: argparse.Namespace) -> dict[str, Any]:
    """Check every option; returns the node config that says the same to a stock SuperNode."""
    host, _ = split_address("HOST:PORT", options.superlink)
    if options.insecure:
        check_insecure("HOST:PORT", host)
    else:
        _check_keys(options.keys, options.name)
    config: dict[str, Any] = {"state": str(_state(options).absolute())}
    clients = None if options.clients is None else parse_clients(options.clients)
    if clients is not None:
        config["clients"] = options.clients.replace(" ", "")
    if options.data:
        if clients is None or len(options.data) != len(clients):
            allowed = f"one file for each client in --clients, which is {options.clients}"
            raise ConfigError("--data", " ".join(map(str, options.data)), allowed)
        for path in options.data:
            if not path.is_file():
                raise ShoalError(f"there is no data file {path}.")
        config["data"] = ":".join(str(path.absolute()) for path in options.data)
    for name in ("device", "threads"):
        if getattr(options, name) is not None:
            config[name] = getattr(options, name)
    config["files"] = ":".join(str(path.absolute()) for path in options.files)
    if options.allow:
        config["allow"] = ":".join(options.allow)
    for path in (config["state"], *config["files"].split(":"), *config.get("data", "").split(":")):
        if set(path) & set(SEPARATORS):
            raise ConfigError("--state, --files or --data", path, "a path without quotes, backslashes and colons")
    if options.max_message_mb < 1:
        raise ConfigError("--max-message-mb", options.max_message_mb, "1 or more")
    if options.listen is not None:
        split_address("--listen", options.listen)
        if options.stock:
            raise ConfigError("--listen", options.listen, "a stock SuperNode's processes end after each message")
    return config


def _check_keys(keys: Path | None, name: str | None) -> None:
    if keys is None or name is None:
        way_out = "Without keys: --insecure, to a SuperLink on this machine only."
        raise ConfigError("--keys and --name", (keys, name), "a folder from `shoal keys` and this node's name", way_out)
    check_public(keys / CA)
    check_private(node_files(keys, name)[0])


def _state(options: argparse.Namespace) -> Path:
    return options.state or HOME / (options.name or "node")


def _make_state(folder: Path) -> None:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        way_out = "Name another with --state."
        raise ShoalError(f"the state folder {folder} can't be made ({error.strerror}). {way_out}") from None


def _free_port() -> int:
    """A port of this machine that nothing listens on, of the system's choice, so that two nodes that start at
    the same moment get two."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def _listening(options: argparse.Namespace) -> Any:
    """What listens for other nodes, if this one is to be reached by them (``--listen``)."""
    from fl.transport.identity import Identity
    from fl.transport.sockets import Sockets

    if options.listen is None:
        return None
    if options.insecure:
        return Sockets.at(options.listen, None)
    key, _, certificate = node_files(options.keys, options.name)
    return Sockets.at(options.listen, Identity(options.keys / CA, check_public(certificate), key))


def _resident(options: argparse.Namespace, config: dict[str, Any]) -> int:
    from fl.engine.carried import OURS
    from fl.engine.flower import quiet_flower
    from fl.engine.resident import Pace, serve_node, until_signal
    from fl.engine.session import Place, Session

    layout = "%(asctime)s %(message)s"
    logging.basicConfig(format=layout, datefmt="%H:%M:%S", level=logging.INFO, stream=sys.stdout, force=True)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # it has a line for every poll
    quiet_flower()
    place = Place(
        folder=_state(options).absolute(),
        clients=None if options.clients is None else parse_clients(options.clients),
        data=tuple(path.absolute() for path in options.data or ()),
        engine={name: config[name] for name in ("device", "threads") if name in config},
        transport=_listening(options),
        packages=(*OURS, *options.allow),
        files=tuple(path.absolute() for path in options.files),
    )
    stop, pace = until_signal(), Pace()
    session = Session(place, paced=pace.nodes)
    try:
        serve_node(
            options.superlink,
            session.app(),
            insecure=options.insecure,
            root_certificates=None if options.insecure else (options.keys / CA).read_bytes(),
            key_file=None if options.insecure else node_files(options.keys, options.name)[0],
            stop=stop,
            pace=pace,
            max_message_bytes=options.max_message_mb * 2**20,
        )
    finally:
        session.close()
    return 0
