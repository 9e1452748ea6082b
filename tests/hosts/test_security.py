"""What a server and its nodes refuse, over TLS with keys: after all of it they still finish a run.

One server and its nodes go through everything, in the order of this file.
"""

import hashlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
from collections import Counter
from pathlib import Path

import httpx
import pytest

from fl.compose import compose
from fl.engine.carried import carry
from fl.hosts.keys import add_node, make_keys
from tests.helpers import ENCODER
from tests.hosts.attackers import EVIL, EVIL_PROJECT, LIAR
from tests.hosts.processes import QUIET, SERVER, SHOAL, Loopback, Scene, free_port
from tests.hosts.proxy import Proxy

pytestmark = pytest.mark.slow
RUN = ("clients.number=6", "schedule.deadline_s=30", "schedule.min_clients=1", "network.rejoin_s=1")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A server that lets in node-0 (clients 0 and 1), node-1 (2 and 3), and node-2 (4 and 5), which is not started."""
    with Loopback() as hosts:
        made = Scene(hosts, tmp_path_factory.mktemp("hosts"), ["node-0", "node-1", "node-2"], free_port())
        made.link = made.server()
        made.proxy = hosts_proxy = Proxy(made.port)
        with hosts_proxy:
            to = f"127.0.0.1:{made.proxy.port}"
            made.nodes = [
                made.node("node-0", "0-1", "--max-message-mb", "1"),
                made.node("node-1", "2-3", "--max-message-mb", "1", to=to),
            ]
            for name in ("node-0", "node-1"):
                made.wait(lambda name=name: "has joined" in made.log(name), 120, f"{name} has joined")
            yield made


def unharmed(scene: Scene) -> None:
    assert scene.link.poll() is None and [node.poll() for node in scene.nodes] == [None, None], scene.tails()


def refused(scene: Scene, *words: str) -> str:
    """What `shoal node` says when it is turned away, which it must be within a minute."""
    environment = {**os.environ, **QUIET, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [*SHOAL, "node", *words]
    done = subprocess.run(command, cwd=scene.folder, env=environment, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    return done.stderr


def test_a_node_without_a_known_key(scene):
    add_node(scene.keys, "stranger")  # from the same authority, but not let in
    said = refused(scene, scene.address, "--keys", str(scene.keys), "--name", "stranger")
    assert "does not know the key" in said
    unharmed(scene)


def test_a_plaintext_client_at_the_tls_port(scene, tmp_path):
    node = scene.hosts.start(
        SERVER, [*SHOAL, "node", scene.address, "--insecure"], tmp_path, scene.folder / "plain.log"
    )
    scene.wait(lambda: "trying again" in scene.log("plain"), 90, "the plaintext node is turned away", node)
    node.terminate()
    assert node.wait(30) == 0 and "has joined" not in scene.log("plain")
    with pytest.raises(httpx.TransportError):
        httpx.post(f"http://{scene.address}/v1/control/list-runs", content=b"", timeout=10)
    with socket.create_connection(("127.0.0.1", scene.port), timeout=10) as raw:
        raw.sendall(os.urandom(4000))
        assert not raw.recv(100).startswith(b"HTTP")
    unharmed(scene)


def test_a_client_that_trusts_another_authority(scene, tmp_path):
    make_keys(tmp_path / "keys", ["127.0.0.1"], ["node-2"])
    shutil.copy(scene.keys / "node-2", tmp_path / "keys" / "node-2")  # the right key does not help
    said = refused(scene, scene.address, "--keys", str(tmp_path / "keys"), "--name", "node-2")
    assert "no TLS connection" in said and "certificate" in said
    unharmed(scene)


def test_a_server_with_another_authoritys_certificate_gets_no_node(scene, tmp_path):
    make_keys(tmp_path / "keys", ["127.0.0.1"], ["node-2"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "keys" / "server.pem", tmp_path / "keys" / "server.key")
    got = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60)
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        command = [*SHOAL, "node", address, "--keys", str(scene.keys), "--name", "node-2"]
        environment = {**os.environ, **QUIET, "PYTHONPATH": str(Path(__file__).parents[2])}
        node = subprocess.Popen(command, cwd=scene.folder, env=environment, stderr=subprocess.PIPE, text=True)
        try:
            with pytest.raises((ssl.SSLError, OSError)), listener.accept()[0] as raw:
                got.append(context.wrap_socket(raw, server_side=True).recv(1))
            listener.close()
            assert node.wait(60) == 1 and "certificate" in node.stderr.read()
        finally:
            node.kill()
            node.wait()
            node.stderr.close()
    assert not got  # not a byte was sent to it


def test_garbage_at_every_door(scene):
    """With TLS, but without a signature, or with bytes that are no messages: an error for an answer, and no more."""
    trusted = ssl.create_default_context(cafile=scene.keys / "ca.crt")
    with httpx.Client(verify=trusted, base_url=f"https://{scene.address}", timeout=30) as client:
        for path in ("fleet/pull-messages", "fleet/push-object", "fleet/activate-node", "control/start-run"):
            for content in (b"", b"\xff" * 300, os.urandom(5000), bytes(5 * 2**20)):
                headers = {"content-type": "application/protobuf"}
                answer = client.post(f"/v1/{path}", content=content, headers=headers)
                assert answer.status_code >= 400, (path, answer.status_code, answer.text)
    unharmed(scene)


def test_messages_that_are_not_what_they_say(scene, tmp_path):
    """A run of someone who reaches the server's port: oversize and lying messages to resident nodes."""
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    from fl.hosts.registry import connect

    app = tmp_path / "app" / "evil"
    app.mkdir(parents=True)
    (app.parent / "pyproject.toml").write_text(EVIL_PROJECT)
    (app / "__init__.py").touch()
    (app / "server_app.py").write_text(EVIL)
    out = tmp_path / "answers.json"
    resolved, _ = compose([*ENCODER, *RUN, "engine=superlink"])
    content = build_fab_from_disk(app.parent)
    fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
    config = user_config_to_proto(carry(resolved, str(out), [], False))
    with connect(scene.address, (scene.keys / "ca.crt").read_bytes()) as control:
        assert control.StartRun(StartRunRequest(fab=fab_to_proto(fab), override_config=config)).run_id
    scene.wait(out.is_file, 240, "the nodes have answered", scene.link)

    answers = json.loads(out.read_text())
    expected = {
        "too large": "more than 1048576",
        "unknown type": "takes no 'query.shell' messages",
        "other version": "messages 99",
        "other settings": "is for other settings",
        "path as run": "names no run",
        "no note": "the server runs Shoal None",
        "other layout": "not layout",
        "shape lies": "4 bytes are not float32",
        "pickled state": "must be float32 bytes",
        "client of another node": "this node hosts clients",
        "client of nobody": "this node holds clients 0 to 5",
    }
    assert len(answers) == 18
    for name, both in answers.items():
        assert len(both) == 2, (name, both)
        assert all(expected.get(name, "") in answer for answer in both), (name, both)
        assert not any("TRAINED" in answer for answer in both), (name, both)
    assert not Path(f"{out}.canary").exists()  # nothing was unpickled
    assert "more than 1048576" in scene.log("node-0")  # and it is logged
    unharmed(scene)


def test_a_node_that_lies_and_bits_that_change_on_the_way(scene, tmp_path):
    """Every lie is counted by its reason; a changed bit breaks its connection, which is made again."""
    (tmp_path / "liar.py").write_text(LIAR)
    words = [scene.address, str(scene.keys), "node-2", "4,5", str(tmp_path / "state")]
    liar = scene.hosts.start(
        "server", [sys.executable, str(tmp_path / "liar.py"), *words], tmp_path, scene.folder / "liar.log"
    )
    rounds = 12
    run = scene.run(*RUN, f"schedule.rounds={rounds}", "local.steps=20")
    scene.wait_round(2, run, 180)
    scene.proxy.change("up")
    scene.wait_round(4, run)
    scene.proxy.change("down")
    scene.wait_round(6, run)
    scene.proxy.change("up")
    assert scene.wait_end(run, 400) == 0, scene.tails()
    liar.terminate()
    assert scene.proxy.changed == {"up": 2, "down": 1}

    events, record = scene.events("client"), scene.record()
    assert record["status"] == "completed"
    lies = {e["round"]: e["reason"] for e in events if e["client"] == 5}
    reasons = [lies[number] for number in range(1, rounds + 1)]
    wanted = [None, "shape", "schema", "not_finite", "unexpected", "shape", "weight", "error", "error", "error"]
    assert reasons[:10] == wanted
    assert reasons[10:] == ["version"] * 2
    honest = [e for e in events if e["client"] in (0, 1)]
    assert len(honest) == 2 * rounds and all(e["accepted"] for e in honest)
    # At most the message that was on its way is lost with a broken connection.
    behind = Counter(e["reason"] for e in events if e["client"] in (2, 3))
    assert set(behind) <= {None, "late", "error"} and behind[None] >= 2 * (rounds - 3)
    assert "trying again" in scene.log("node-1")
    unharmed(scene)


def test_after_all_that_a_run_completes(scene):
    run = scene.run("clients.number=4", "schedule.rounds=2", name="last")
    assert scene.wait_end(run, 300) == 0, scene.tails()
    assert scene.record("last")["final"]["rejected"] == {}
    assert sum(e["accepted"] for e in scene.events("round", "last")) == 8
    unharmed(scene)
