"""The nodes that a SuperLink lets in: their public keys, put there over its Control API (flwr 1.41)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import httpx
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_public_key
from flwr.proto.control_pb2 import ListNodesRequest, RegisterNodeRequest, UnregisterNodeRequest
from flwr.supercore.constant import NodeStatus
from flwr.supercore.control import ControlHttpClient
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from fl.errors import ShoalError

LISTENS = 2.0  # seconds for one look at whether a SuperLink answers


def read_keys(files: Sequence[Path]) -> dict[str, bytes]:
    """The nodes' public keys in the form that a SuperLink stores, by the names of their OpenSSH files."""
    keys: dict[str, bytes] = {}
    for path in files:
        try:
            key = load_ssh_public_key(path.read_bytes())
            if not isinstance(key, ec.EllipticCurvePublicKey):
                raise ValueError("it is not on an elliptic curve")
        except (OSError, ValueError, UnsupportedAlgorithm) as error:
            raise ShoalError(f"{path} is no public key of a node ({error}). `shoal keys` makes NAME.pub.") from None
        stored = public_key_to_bytes(key)
        if path.stem in keys or stored in keys.values():
            raise ShoalError(f"{path} has the name or the key of another node's file.")
        keys[path.stem] = stored
    return keys


def connect(address: str, root_certificates: bytes | None) -> ControlHttpClient:
    """A client of the Control API at ``address``; without certificates it speaks plain HTTP."""
    version = RuntimeVersionHttpInterceptor(component_name="flwr CLI")
    return ControlHttpClient.from_server_address(address, root_certificates is None, root_certificates, [version])


def answers(client: ControlHttpClient) -> bool:
    """Whether the SuperLink is up. Raises `ShoalError` where it is, but its certificate isn't trusted."""
    try:
        client.ListNodes(ListNodesRequest())
    except httpx.HTTPStatusError as error:
        raise ShoalError(f"{error.request.url} answers {error.response.status_code}; it is not a SuperLink.") from None
    except httpx.TransportError as error:
        if "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise ShoalError(f"the SuperLink's certificate is not trusted ({error}).") from None
        return False
    return True


def allow(client: ControlHttpClient, keys: Mapping[str, bytes], say: Callable[[str], None]) -> None:
    """Let in the nodes with these keys and no others. ``keys`` go by the node's name.

    A SuperLink takes a key that was taken off it never again, in the same database.
    """
    there = {node.public_key: node for node in client.ListNodes(ListNodesRequest()).nodes_info}
    for name, key in keys.items():
        if key not in there:
            client.RegisterNode(RegisterNodeRequest(public_key=key, name=name))
        elif there[key].status == NodeStatus.UNREGISTERED:
            raise ShoalError(
                f"the key of {name} was taken off this SuperLink before, and its database takes it never again. "
                f"Make {name} a new key with `shoal keys DIR --add-node`, or begin with a new --database."
            )
    for key, node in there.items():
        if key not in keys.values() and node.status != NodeStatus.UNREGISTERED:
            client.UnregisterNode(UnregisterNodeRequest(node_id=node.node_id))
            say(f"took off node {node.name or node.node_id}, whose key is not among those allowed")
