"""A node's link to a SuperLink over Flower's Fleet API: joining, heartbeats, messages with their contents, leaving.

Built on Flower's ``FleetHttpClient``; ``http_request_response``, which a SuperNode uses, ends the process when it can't
connect. Flower internals that are relied on (1.41; tests/engines/test_flower_contract.py checks each):
``flwr.supernode.fleet_http_client.FleetHttpClient`` (its requests, ``retry_invoker`` and ``_client``, an httpx.Client),
``flwr.supernode.node_auth_http_interceptor.NodeAuthHttpInterceptor``, the messages of ``flwr.proto``,
``flwr.supercore.primitives.asymmetric.{generate_key_pairs, public_key_to_bytes}``, ``flwr.supercore.error``'s codes,
``flwr.common.serde``, ``flwr.supercore.inflatable`` (objects and their trees; also in `fl.engine.objects`), and
`ClientApp._registered_funcs` (in `fl.engine.resident`).

An unknown key and a key that another process still uses get the same error. They are told apart by a second request
with a heartbeat interval that no SuperLink allows: it looks for the key first, and refuses the interval only if it
knows the key.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto, run_from_proto
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, ObjectTree, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, push_objects
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.fleet_http_client import FleetHttpClient
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from fl.engine.objects import RefusedMessage, fetch, limit_answers
from fl.engine.retrying import Retry, described, push_until_stored, tls_error
from fl.errors import ShoalError

HEARTBEAT_S = 30.0  # Flower's default: a node is offline after two intervals without one
REJOIN_S = 5.0
Keys = tuple[ec.EllipticCurvePrivateKey, ec.EllipticCurvePublicKey]


class NodeLink:
    """The context of a node that has joined ``superlink``, HOST:PORT. It leaves when the context ends.

    Entering waits for a SuperLink that is away, and for a key that is still in use, and raises `ShoalError` for what
    waiting does not heal: an unknown key, a certificate that does not fit, TLS at one end only. It returns at once,
    without joining, when ``stop`` is set. Requests are repeated without end while the SuperLink is away and for
    ``patience_s`` seconds when it answers 500; then their httpx error is raised. A key of None makes one that the node
    registers itself, which works where the SuperLink does not ask for known keys.
    """

    def __init__(
        self,
        superlink: str,
        *,
        insecure: bool,
        root_certificates: bytes | None,
        key_file: Path | None,
        stop: threading.Event,
        max_message_bytes: int,
        log: logging.Logger,
        patience_s: float = 120.0,
    ):
        self.superlink, self.key_file, self.stop, self.log = superlink, key_file, stop, log
        self.insecure, self.max_message_bytes = insecure, max_message_bytes
        self.retry = Retry(f"the SuperLink at {superlink}", patience_s, float("inf"), stop=stop, log=log)
        self.keys: Keys = generate_key_pairs() if key_file is None else read_key(key_file)
        self.public_key = public_key_to_bytes(self.keys[1])
        self.client = connect(superlink, insecure, root_certificates, self.keys, self.retry)
        limit_answers(self.client._client, max_message_bytes)
        self.node = Node()
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")

    @property
    def node_id(self) -> int:
        """Flower's id of this node; 0 before it has joined."""
        return self.node.node_id

    def __enter__(self) -> NodeLink:
        try:
            self.join()
        except BaseException:
            self.client.close()
            raise
        self._heart.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._left.set()
        self.retry.max_tries = 1
        self._heart.join(10.0)  # a heartbeat after it has left would make the node known as online again
        self.client._retry_invoker = cast(Any, Retry(self.retry.what, 5.0, 0.0, log=self.log))
        try:
            if self.node_id:
                self.client.DeactivateNode(DeactivateNodeRequest(node_id=self.node_id))
                if self.key_file is None:
                    self.client.UnregisterNode(UnregisterNodeFleetRequest(node_id=self.node_id))
                self.log.info("node %d has left %s", self.node_id, self.superlink)
        except (httpx.HTTPError, RunNotRunningException) as left:
            self.log.warning("left %s without a word: %s", self.superlink, type(left).__name__)
        finally:
            self.client.close()

    def join(self) -> None:
        """Register if there is no key file, and activate; sets `node_id`. Again after a 401, too."""
        self.node, waiting = Node(), False
        while not self.stop.is_set():
            try:
                if self._activate():
                    return
            except httpx.HTTPError as error:
                if self.stop.is_set():
                    return
                if isinstance(error, httpx.TransportError):
                    raise ShoalError(self._no_tls(error)) from error
                self._check_refusal(error)
            except RunNotRunningException as error:  # `Retry`'s word for a 403
                raise ShoalError(f"{self.superlink} answers HTTP 403. Is it a SuperLink? Look at its log.") from error
            else:
                if not waiting:
                    key = self.key_file or "that this node made for itself"
                    text = "%s: the key %s is in use, by another process or one that was killed less than a minute ago"
                    self.log.warning(text + "; trying again every %g s", self.superlink, key, REJOIN_S)
                waiting = True
            self.stop.wait(REJOIN_S)

    def pull(self) -> tuple[Message, ObjectTree] | None:
        """The next message's head, without its content, and the tree of its objects; None if there is none.

        Raises `RefusedMessage` for a head that can't be read. Flower hands a message out once.
        """
        response = self.client.PullMessages(PullMessagesRequest(node=self.node))
        if not response.messages_list:
            return None
        head, tree = response.messages_list[0], response.message_object_trees[0]
        try:
            return message_from_proto(head), tree
        except Exception as error:
            self.confirm(head.metadata.run_id, tree.object_id)
            raise RefusedMessage(f"its head can't be read ({type(error).__name__})") from error

    def fetch(self, head: Message, tree: ObjectTree) -> Message:
        """The message of ``head`` with its content; see `fl.engine.objects.fetch`. It is confirmed in any case."""
        try:
            return fetch(head.metadata, tree, self.client.PullObject, self.node, self.max_message_bytes, self.stop)
        finally:
            self.confirm(head.metadata.run_id, tree.object_id)

    def confirm(self, run_id: int, object_id: str) -> None:
        """Tell the SuperLink that a message's objects can be forgotten. It costs only space if that fails."""
        try:
            self.client.ConfirmMessageReceived(
                ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=object_id)
            )
        except httpx.HTTPError as error:
            self.log.debug("not confirmed: %s", described(error))

    def run_config(self, run_id: int) -> dict:
        """The settings that a run was started with. Raises `RunNotRunningException` if it is over."""
        run = run_from_proto(self.client.GetRun(GetRunRequest(node=self.node, run_id=run_id)).run)
        return dict(run.override_config)

    def push(self, reply: Message, runtime_s: float = 0.0) -> None:
        """Send ``reply`` with its objects. The SuperLink keeps the first reply to a message, however often it comes."""
        run_id = reply.metadata.run_id
        with no_object_id_recompute():
            reply.metadata.__dict__["_message_id"] = reply.object_id
            request = PushMessagesRequest(
                node=self.node,
                messages_list=[message_to_proto(remove_content_from_message(reply))],
                message_object_trees=[get_object_tree(reply)],
                clientapp_runtime_list=[runtime_s],
            )

            def push() -> None:
                answer = self.client.PushMessages(request)
                self._push_objects(reply, run_id, answer.session_id, answer.objects_to_push)

            push_until_stored(push)

    def _push_objects(self, reply: Message, run_id: int, session: str, wanted: Iterable[str]) -> None:
        def push_one(object_id: str, content: bytes) -> None:
            request = PushObjectRequest(
                node=self.node, run_id=run_id, object_id=object_id, object_content=content, session_id=session
            )
            if not self.client.PushObject(request).stored:
                raise ObjectPushError(object_id, run_id, session)

        push_objects(get_all_nested_objects(reply), push_one, object_ids_to_push=set(wanted))

    def _activate(self) -> bool:
        """Whether the node is active now; otherwise its key is known, and in use. Raises what else goes wrong."""
        try:
            if self.key_file is None:
                self._register()
            request = ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=HEARTBEAT_S)
            self.node = Node(node_id=self.client.ActivateNode(request).node_id)
        except httpx.HTTPStatusError as error:
            if _code(error) == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED and self._key_is_known():
                return False
            raise
        self.log.info("node %d has joined %s", self.node_id, self.superlink)
        return True

    def _register(self) -> None:
        try:
            self.client.RegisterNode(RegisterNodeFleetRequest(public_key=self.public_key))
        except httpx.HTTPStatusError as error:
            if _code(error) != ApiErrorCode.PUBLIC_KEY_ALREADY_IN_USE:  # it was registered when the answer got lost
                raise

    def _check_refusal(self, error: httpx.HTTPError) -> None:
        """Raise what waiting does not heal."""
        assert isinstance(error, httpx.HTTPStatusError)
        code, status, answer = _code(error), error.response.status_code, f"{self.superlink} answers {described(error)}"
        if code == ApiErrorCode.FLEET_NODE_ACTIVATION_FAILED:
            raise ShoalError(
                f"{self.superlink} does not know the key {self.key_file or 'that this node made for itself'}. "
                f"Put {self.key_file or 'KEY'}.pub among the server's --keys, and start `shoal server` again."
            ) from error
        if code == ApiErrorCode.FLEET_SUPERNODE_REGISTRATION_DISABLED:
            raise ShoalError(
                f"{self.superlink} takes only nodes with a known key, and this one has none. Make one with `shoal "
                "keys`, put KEY.pub among the server's --keys, and give the key to `shoal node`."
            ) from error
        if status == httpx.codes.UNAUTHORIZED:
            raise ShoalError(
                f"{answer}: it does not accept this node's signature. Set both machines' clocks: they may differ by "
                "5 s where the node's is ahead, and by 5 minutes where it is behind."
            ) from error
        if status < 500:
            raise ShoalError(f"{answer}; {error.response.text:.200}. Look at its log.") from error

    def _key_is_known(self) -> bool:
        try:
            self.client.ActivateNode(ActivateNodeRequest(public_key=self.public_key, heartbeat_interval=-1.0))
        except httpx.HTTPStatusError as error:
            return _code(error) == ApiErrorCode.FLEET_INVALID_HEARTBEAT_INTERVAL
        return True

    def _no_tls(self, error: httpx.TransportError) -> str:
        return (
            f"no TLS connection with {self.superlink} ({tls_error(error) or described(error)}). The CA certificate "
            "must be the one that signed the server's, and that must name the address; both ends use TLS, or neither."
        )

    def _beat(self) -> None:
        request_s = HEARTBEAT_S * 2 / 3
        while not self._left.wait(request_s):
            try:
                self.client.SendNodeHeartbeat(SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_S))
            except (httpx.HTTPError, RunNotRunningException) as error:  # a 401 comes to the main loop, too
                self.log.debug("heartbeat: %s", type(error).__name__)


def connect(
    superlink: str, insecure: bool, root_certificates: bytes | None, keys: Keys, retry: Retry
) -> FleetHttpClient:
    """Flower's client of the Fleet API, with our patience."""
    try:
        client = FleetHttpClient.from_server_address(
            superlink, insecure, root_certificates, [NodeAuthHttpInterceptor(*keys)], retry_invoker=cast(Any, retry)
        )
    except (ValueError, OSError) as error:  # OSError: ssl.SSLError
        raise ShoalError(f"can't use the CA certificates for {superlink}: {error}") from error
    client._client.timeout = httpx.Timeout(30.0, connect=5.0)
    return client


def read_key(path: Path) -> Keys:
    """The node's key pair from an OpenSSH private key file (elliptic curve, no passphrase)."""
    way_out = "`shoal keys` makes one, and so does `ssh-keygen -t ecdsa -b 384 -N '' -f FILE`."
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise ShoalError(f"can't read the node's key {path}: {error!s:.200}. {way_out}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ShoalError(f"the node's key {path} is of another kind than elliptic curve. {way_out}")
    return key, key.public_key()


def _code(error: httpx.HTTPStatusError) -> int | None:
    flower = FlowerError.from_json(error.response.text)
    return None if flower is None else flower.code
