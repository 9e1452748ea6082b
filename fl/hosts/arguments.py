"""The options of `shoal keys`, `shoal server` and `shoal node`. Nothing is imported before one of them is called."""

from __future__ import annotations

import argparse
from pathlib import Path

_KEYS_HELP = """\
  shoal keys keys --server 10.0.0.1,server.example.org --nodes 3        (node-0, node-1, node-2)
  shoal keys keys --server 10.0.0.1 --nodes alice,bob --days 90
  shoal keys keys --add-node carol
"""
_SERVER_HELP = """\
  shoal server --host 10.0.0.1 --keys keys
  shoal server --insecure                                               (this machine only)
"""
_NODE_HELP = """\
  shoal node 10.0.0.1:8000 --keys keys --name node-0 --clients 0-7
  shoal node 10.0.0.1:8000 --keys keys --name alice --clients 0 --data alice.jsonl
  shoal node 127.0.0.1:8000 --insecure                                  (this machine only)
"""


def add_commands(commands: argparse._SubParsersAction) -> None:
    """Add the three commands."""
    raw = argparse.RawDescriptionHelpFormatter

    keys = commands.add_parser(
        "keys", help="make keys and certificates for a run across hosts", formatter_class=raw, epilog=_KEYS_HELP
    )
    keys.add_argument("folder", type=Path, metavar="DIR", help="where to put them: a new folder")
    keys.add_argument("--server", metavar="HOST[,HOST...]", help="names and addresses of the server")
    keys.add_argument("--nodes", metavar="N|NAME[,NAME...]", help="how many nodes, or their names")
    keys.add_argument("--add-node", metavar="NAME", help="add one node to the keys in DIR")
    keys.add_argument("--days", type=int, default=365, metavar="N", help="how long they are valid (default: 365)")
    keys.set_defaults(call=_keys)

    server = commands.add_parser(
        "server", help="start the server of runs across hosts", formatter_class=raw, epilog=_SERVER_HELP
    )
    server.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    server.add_argument("--port", type=_port, default=8000, help="(default: 8000)")
    server.add_argument("--keys", type=Path, metavar="DIR", help="folder with the server's files from `shoal keys`")
    server.add_argument(
        "--allow", type=Path, nargs="+", metavar="FILE", help="public keys of the nodes to let in (default: DIR/*.pub)"
    )
    server.add_argument(
        "--database", default="shoal-superlink.db", metavar="FILE", help="what a restart goes on from, or :memory:"
    )
    _add_common(server)
    server.set_defaults(call=_server)

    node = commands.add_parser(
        "node", help="train clients of runs across hosts on this machine", formatter_class=raw, epilog=_NODE_HELP
    )
    node.add_argument("superlink", metavar="HOST:PORT", help="the server's address")
    node.add_argument("--keys", type=Path, metavar="DIR", help="folder with ca.crt and this node's files")
    node.add_argument("--name", help="this node's name: that of its key file")
    node.add_argument("--clients", metavar="LIST", help="the clients that live here, such as 0-7 or 0,3,5")
    node.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="the clients' own samples, a file for each")
    node.add_argument("--state", type=Path, metavar="DIR", help="what clients keep (default: .shoal/NAME)")
    node.add_argument("--device", help="in place of the experiment's engine.device, such as cuda")
    node.add_argument("--threads", type=int, metavar="N", help="in place of the experiment's engine.threads")
    node.add_argument("--listen", metavar="HOST:PORT", help="where other nodes reach this one (engine.peers=direct)")
    node.add_argument(
        "--files", type=Path, nargs="+", default=[Path(".")], metavar="DIR",
        help="folders whose files an experiment's settings may name (default: the working folder)",
    )  # fmt: skip
    node.add_argument(
        "--allow", nargs="+", default=[], metavar="PACKAGE",
        help="packages, beside Shoal's, whose classes an experiment's settings may name",
    )  # fmt: skip
    node.add_argument("--max-message-mb", type=int, default=2048, metavar="N", help="largest message (default: 2048)")
    node.add_argument("--stock", action="store_true", help="run Flower's flower-supernode")
    _add_common(node)
    node.set_defaults(call=_node)


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--insecure", action="store_true", help="no TLS and no keys; on loopback addresses only")
    parser.add_argument("--print", action="store_true", help="only print the Flower command that this stands for")


def _port(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 65_535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port from 1 to 65535")
    return int(text)


def _keys(options: argparse.Namespace) -> int:
    from fl.hosts.keys import make

    return make(options)


def _server(options: argparse.Namespace) -> int:
    from fl.hosts.server import serve

    return serve(options)


def _node(options: argparse.Namespace) -> int:
    from fl.hosts.node import run

    return run(options)
