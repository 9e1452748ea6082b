"""The parts of Flower that Shoal's engines rely on beyond its public API: a Flower upgrade fails here, by name.

After a failure: read what changed in that module, adapt fl/engine/{node_link,objects,retrying}.py, and run the slow
tests of tests/engines, which use a real SuperLink. Then widen the range below.
"""

from __future__ import annotations

import importlib
import inspect

import flwr
import httpx
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.error import ApiErrorCode, FlowerError
from flwr.supercore.error.catalog import API_ERROR_MAP
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.superlink.servicer.fleet import fleet_handlers

from fl.engine.flower import ensure_identity

PARAMETERS = {
    "flwr.supernode.fleet_http_client.FleetHttpClient.from_server_address": (
        "server_address", "insecure", "root_certificates", "interceptors", "retry_invoker",
    ),
    "flwr.supernode.node_auth_http_interceptor.NodeAuthHttpInterceptor.__init__": (
        "self", "private_key", "public_key",
    ),
    "flwr.supercore.retry.RetryInvoker.invoke": ("self", "target", "args", "kwargs"),
    "flwr.supercore.primitives.asymmetric.generate_key_pairs": (),
    "flwr.supercore.primitives.asymmetric.public_key_to_bytes": ("public_key",),
    "flwr.common.serde.message_from_proto": ("message_proto",),
    "flwr.common.serde.message_to_proto": ("message",),
    "flwr.common.serde.run_from_proto": ("run_proto",),
    "flwr.app.message.remove_content_from_message": ("message",),
    "flwr.app.message.make_message": ("metadata", "content", "error"),
    "flwr.supercore.inflatable.inflatable_object.iterate_object_tree": ("tree",),
    "flwr.supercore.inflatable.inflatable_object.no_object_id_recompute": (),
    "flwr.supercore.inflatable.inflatable_utils.pull_objects": (
        "object_ids", "pull_object_fn", "max_concurrent_pulls", "max_time", "max_tries_per_object", "initial_backoff",
        "backoff_cap",
    ),
    "flwr.supercore.inflatable.inflatable_utils.push_objects": (
        "objects", "push_object_fn", "object_ids_to_push", "keep_objects", "max_concurrent_pushes",
    ),
    "flwr.supercore.inflatable.inflatable_utils.ObjectPullError.__init__": ("self", "object_id", "reason"),
    "flwr.supercore.inflatable.inflatable_utils.ObjectPushError.__init__": (
        "self", "object_id", "run_id", "session_id",
    ),
    "flwr.supercore.inflatable.inflatable_utils.ObjectUnavailableError.__init__": ("self", "object_id"),
    "flwr.superlink.grid.HttpGrid.__init__": (
        "self", "runtime_api_address", "insecure", "root_certificates", "token",
    ),
    "flwr.superlink.grid.HttpGrid.push_messages": ("self", "messages"),
    "flwr.superlink.grid.HttpGrid.pull_messages": ("self", "message_ids"),
}  # fmt: skip

FIELDS = {
    "fleet_pb2.RegisterNodeFleetRequest": {"public_key"},
    "fleet_pb2.ActivateNodeRequest": {"public_key", "heartbeat_interval"},
    "fleet_pb2.ActivateNodeResponse": {"node_id"},
    "fleet_pb2.DeactivateNodeRequest": {"node_id"},
    "fleet_pb2.UnregisterNodeFleetRequest": {"node_id"},
    "fleet_pb2.PullMessagesRequest": {"node"},
    "fleet_pb2.PullMessagesResponse": {"messages_list", "message_object_trees"},
    "fleet_pb2.PushMessagesRequest": {"node", "messages_list", "message_object_trees", "clientapp_runtime_list"},
    "fleet_pb2.PushMessagesResponse": {"objects_to_push", "session_id"},
    "heartbeat_pb2.SendNodeHeartbeatRequest": {"node", "heartbeat_interval"},
    "message_pb2.PullObjectRequest": {"node", "run_id", "object_id"},
    "message_pb2.PullObjectResponse": {"object_found", "object_available", "object_content"},
    "message_pb2.PushObjectRequest": {"node", "run_id", "object_id", "object_content", "session_id"},
    "message_pb2.PushObjectResponse": {"stored"},
    "message_pb2.ConfirmMessageReceivedRequest": {"node", "run_id", "message_object_id"},
    "message_pb2.ObjectTree": {"object_id", "children"},
    "runtime_pb2.PullAppMessagesRequest": {"message_ids"},
    "runtime_pb2.PullAppMessagesResponse": {"messages_list", "message_object_trees"},
    "run_pb2.GetRunRequest": {"node", "run_id"},
    "run_pb2.Run": {"override_config"},
}
REQUESTS = (
    "RegisterNode", "ActivateNode", "DeactivateNode", "UnregisterNode", "SendNodeHeartbeat", "PullMessages",
    "PushMessages", "GetRun", "PushObject", "PullObject", "ConfirmMessageReceived",
)  # fmt: skip
CODES = {
    "PUBLIC_KEY_ALREADY_IN_USE": 412, "FLEET_SUPERNODE_REGISTRATION_DISABLED": 412,
    "FLEET_INVALID_HEARTBEAT_INTERVAL": 400, "FLEET_NODE_ACTIVATION_FAILED": 412, "FLEET_RUN_STATUS_NOT_ALLOWED": 403,
    "FLEET_GET_RUN_FAILED": 403,
}  # fmt: skip


def found(path: str):
    """The object at a dotted path."""
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            thing = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            thing = getattr(thing, part, None)
            assert thing is not None, f"Flower has no {path} any more ({part} is missing)"
        return thing
    raise AssertionError(f"Flower has no module for {path} any more")


def test_the_version_is_one_that_was_read():
    assert flwr.__version__.split(".")[:2] == ["1", "41"], "read this file's docstring before allowing another minor"


@pytest.mark.parametrize("path", PARAMETERS)
def test_parameters(path):
    assert tuple(inspect.signature(found(path)).parameters) == PARAMETERS[path]


@pytest.mark.parametrize("path", FIELDS)
def test_fields_of_the_protocol(path):
    fields = {field.name for field in found(f"flwr.proto.{path}").DESCRIPTOR.fields}
    assert fields >= FIELDS[path], f"{path} lacks {FIELDS[path] - fields}"


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_a_node(name):
    """One argument, and each goes through the client's ``_retry_invoker`` and its httpx client ``_client``."""
    client_class = found("flwr.supernode.fleet_http_client.FleetHttpClient")
    (request_type,) = (
        parameter.annotation
        for parameter in inspect.signature(getattr(client_class, name)).parameters.values()
        if parameter.name != "self"
    )
    seen, retried = [], []

    class Invoker:
        def invoke(self, call, *args):
            retried.append(name)
            return call(*args)

    def answer(request: httpx.Request) -> httpx.Response:
        seen.append(request.url.path)
        return httpx.Response(200)

    client = client_class.from_server_address("127.0.0.1:1", True, None, [], retry_invoker=Invoker())
    assert isinstance(client._client, httpx.Client)
    client._client = httpx.Client(transport=httpx.MockTransport(answer))
    getattr(client, name)(request_type())
    assert retried == [name] and len(seen) == 1 and seen[0].startswith("/v1/fleet/")


@pytest.mark.parametrize("name", CODES)
def test_codes_of_errors(name):
    code = ApiErrorCode[name]
    assert API_ERROR_MAP[code].http_status_code == CODES[name]
    assert FlowerError.from_json(f'{{"code": {code.value}, "detail": "x"}}').code == code


def test_a_key_is_looked_up_before_the_heartbeat_interval_is_checked():
    """This is how a node tells an unknown key from one in use."""

    class State:
        def __init__(self, known):
            self.known = known

        def get_node_id_by_public_key(self, key):
            return 7 if self.known else None

        def activate_node(self, node_id, interval):
            raise AssertionError("activated with an interval that is not allowed")

    request = found("flwr.proto.fleet_pb2").ActivateNodeRequest(public_key=b"k", heartbeat_interval=-1.0)
    for known, code in ((True, "FLEET_INVALID_HEARTBEAT_INTERVAL"), (False, "FLEET_NODE_ACTIVATION_FAILED")):
        with pytest.raises(FlowerError) as error:
            fleet_handlers.activate_node(request, State(known))
        assert error.value.code == ApiErrorCode[code]


def test_the_grid_of_a_server_has_one_client_whose_retries_can_be_replaced():
    grid = found("flwr.superlink.grid.HttpGrid")("127.0.0.1:1", insecure=True, token="t")
    client = grid._runtime_client
    assert grid._runtime_client is client and isinstance(client._client, httpx.Client)
    assert client._retry_invoker is grid._retry_invoker
    assert grid.node.node_id == SUPERLINK_NODE_ID
    for name in ("GetNodes", "PushMessages", "PushObject", "PullMessages", "PullObject", "ConfirmMessageReceived"):
        assert list(inspect.signature(getattr(client, name)).parameters) == ["request"], name


def test_a_message_has_the_same_id_each_time_and_comes_back_from_its_objects():
    ensure_identity(1)
    message = Message(RecordDict({"c": ConfigRecord({"x": [1, 2]})}), 5, "train.step")
    first = message.object_id
    message.metadata.__dict__["_message_id"] = first
    assert message.object_id == first == get_object_tree(message).object_id
    contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    assert {get_object_id(content) for content in contents.values()} == contents.keys()
    back = inflate_object_from_contents(first, dict(contents))
    assert isinstance(back, Message) and back.content == message.content
    assert back.metadata.message_id == "" and back.metadata.message_type == "train.step"
    assert isinstance(get_object_tree(message), ObjectTree)


def test_a_reply_is_made_of_the_head_alone():
    ensure_identity(1)
    message = Message(RecordDict(), 5, "train")
    message.metadata.__dict__["_message_id"] = "m"
    reply = Message(Error(2, "no"), reply_to=message).metadata
    assert (reply.reply_to_message_id, reply.src_node_id, reply.message_type) == ("m", 5, "train")


def test_an_app_names_what_it_takes():
    app = ClientApp()
    app.train()(lambda message, context: message)
    app.query("hello")(lambda message, context: message)
    assert set(app._registered_funcs) == {"train.default", "query.hello"}
