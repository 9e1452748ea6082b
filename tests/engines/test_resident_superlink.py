"""A resident node at a real SuperLink: round trips, a SuperLink that is killed and comes back, leaving, TLS, keys."""

from __future__ import annotations

import datetime
import ipaddress
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent

PROJECT = """
[project]
name = "echo"
version = "1.0.0"

[tool.flwr.app]
publisher = "shoal"

[tool.flwr.app.components]
serverapp = "echo.server_app:app"
clientapp = "echo.server_app:client"

[tool.flwr.app.config]
out = ""
rounds = 0
word = ""
"""
SERVER = """
import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

from fl.engine.retrying import RetryGrid

app = ServerApp()
client = ClientApp()  # Flower wants one in the archive; a resident node never fetches it


@app.main()
def main(grid, context):
    grid = RetryGrid(grid)
    out = Path(context.run_config["out"])
    while not (nodes := grid.get_node_ids()):
        time.sleep(0.1)
    answers = []
    for number in range(context.run_config["rounds"]):
        began = time.monotonic()
        content = RecordDict({"c": ConfigRecord({"number": number, "bytes": bytes(1000)})})
        ids = set(grid.push_messages([Message(content, nodes[0], "query.echo", ttl=120)]))
        while ids:
            for reply in grid.pull_messages(ids):
                ids.discard(reply.metadata.reply_to_message_id)
                said = reply.error.reason if reply.has_error() else dict(reply.content["c"])
                answers.append([number, time.monotonic() - began, said])
            time.sleep(0.02)
        out.with_suffix(".part").write_text(json.dumps(answers))
        out.with_suffix(".part").rename(out)
"""
NODE = """
import logging
import os
import sys
from pathlib import Path

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.clientapp import ClientApp

from fl.engine.resident import Pace, serve_node, until_signal
from fl.errors import ShoalError

app = ClientApp()


@app.query("echo")
def echo(message, context):
    calls = context.state.setdefault("calls", ConfigRecord({"n": 0}))
    calls["n"] += 1
    if context.run_config["word"] == "die" and calls["n"] == 3:
        os._exit(9)
    said = {"number": message.content["c"]["number"], "calls": calls["n"], "word": context.run_config["word"]}
    return Message(RecordDict({"c": ConfigRecord(said)}), reply_to=message)


logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
superlink, ca, key = sys.argv[1:]
try:
    serve_node(
        superlink, app, insecure=not ca, root_certificates=Path(ca).read_bytes() if ca else None,
        key_file=Path(key) if key else None, node_config={}, stop=until_signal(), pace=Pace(),
    )
except ShoalError as error:
    print(f"refused: {error}")
    sys.exit(error.exit_code)
"""


class Programs:
    """Flower's programs and a node's, in one environment."""

    def __init__(self, folder: Path):
        self.folder, self.started = folder, []
        self.link = f"127.0.0.1:{free_port()}"
        self.env = {
            **os.environ, "FLWR_HOME": str(folder / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
            "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
            "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        (folder / "flwr").mkdir()
        self.connection("insecure = true")
        (folder / "node.py").write_text(NODE)

    def connection(self, words: str) -> None:
        text = f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "{self.link}"\n{words}\n'
        (self.folder / "flwr" / "config.toml").write_text(text)

    def start(self, name: str, *words: str) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("a") as out:
            process = subprocess.Popen(
                [str(BIN / words[0]), *words[1:]], cwd=self.folder, env=self.env, stdout=out, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        self.started.append(process)
        return process

    def superlink(self, *words: str) -> subprocess.Popen:
        port = self.link.rpartition(":")[2]
        words = words or ("--insecure",)
        return self.start(
            "link", "flower-superlink", "--host", "127.0.0.1", "--port", port, "--database", "state.db",
            "--disable-runtime-dependency-installation", *words,
        )  # fmt: skip

    def node(self, name: str = "node", ca: object = "", key: object = "") -> subprocess.Popen:
        return self.start(name, "python", "node.py", self.link, str(ca), str(key))

    def flwr(self, *words: str) -> str:
        """A `flwr` command's output; it is tried until the SuperLink is up."""
        until = time.monotonic() + 90
        while True:
            done = subprocess.run(
                [str(BIN / "flwr"), *words], cwd=self.folder, env=self.env, capture_output=True, text=True, timeout=60
            )
            if done.returncode == 0:
                return done.stdout
            assert time.monotonic() < until, done.stdout + done.stderr
            time.sleep(1)

    def run(self, rounds: int, word: str = "hello") -> Path:
        """Start a run of ``rounds`` echoes; returns the file of its answers."""
        app = self.folder / "app" / "echo"
        app.mkdir(parents=True)
        (app.parent / "pyproject.toml").write_text(PROJECT)
        (app / "__init__.py").touch()
        (app / "server_app.py").write_text(SERVER)
        out = self.folder / "answers.json"
        self.flwr("run", str(app.parent), "here", "-c", f'out="{out}" rounds={rounds} word="{word}"')
        return out

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text()

    def wait_for(self, what, seconds: float = 120):
        until = time.monotonic() + seconds
        while not (found := what()):
            assert time.monotonic() < until, {p.stem: p.read_text()[-3000:] for p in self.folder.glob("*.log")}
            time.sleep(0.1)
        return found

    def answers(self, out: Path, count: int) -> list:
        return self.wait_for(lambda: out.exists() and len(got := json.loads(out.read_text())) >= count and got)

    def nodes(self) -> list[dict]:
        ask = ("supernode", "list", "here", "--format", "json")
        return self.wait_for(lambda: "nodes" in (told := json.loads(self.flwr(*ask))) and told)["nodes"]


@pytest.fixture
def programs(tmp_path):
    """Programs that are all ended afterwards."""
    started = Programs(tmp_path)
    yield started
    for process in reversed(started.started):
        try:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(15)
        except ProcessLookupError:
            pass
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait(5)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def test_round_trips_and_a_clean_leave(programs, record_property):
    """The app's context lives as long as the run, the settings of the run arrive, SIGTERM leaves."""
    link = programs.superlink()
    node = programs.node()
    answers = programs.answers(programs.run(rounds=20), 20)
    assert [(n, said) for n, _, said in answers] == [
        (n, {"number": n, "calls": n + 1, "word": "hello"}) for n in range(20)
    ]
    seconds = sorted(s for _, s, _ in answers)[10]
    record_property("seconds_per_message", seconds)
    print(f"median seconds of a round trip: {seconds:.3f}")
    assert [n["status"] for n in programs.nodes()] == ["online"]
    node.send_signal(signal.SIGTERM)
    assert node.wait(10) == 0
    assert [n for n in programs.nodes() if n["status"] == "online"] == []
    assert "has left" in programs.log("node")
    assert link.poll() is None


def test_the_superlink_is_killed_and_comes_back(programs):
    """On the same database: the node and the run go on, in the same process and with the same context.

    By default Flower's run is a grandchild of the SuperLink, and ends when the SuperLink has died. Here it is not.
    """
    words = ("--insecure", "--isolation", "process")
    link = programs.superlink(*words)
    programs.start("exec", "flower-superexec", "--insecure", "--runtime-api-address", programs.link)
    programs.node()
    out = programs.run(rounds=30)
    programs.answers(out, 5)
    link.kill()
    link.wait()
    before = len(json.loads(out.read_text()))
    time.sleep(3)
    programs.superlink(*words)
    answers = programs.answers(out, 30)
    assert before < 30
    assert [n for n, _, _ in answers] == list(range(30))
    errors = [said for _, _, said in answers if isinstance(said, str)]
    assert len(errors) <= 1, errors  # the one that was on its way, at most
    assert answers[-1][2]["calls"] >= 29
    assert "answers again" in programs.log("node")


def test_a_node_that_dies_with_a_message_in_its_hands(programs):
    """The SuperLink reports it when two heartbeats are missing."""
    programs.superlink()
    node = programs.node()
    answers = programs.answers(programs.run(rounds=3, word="die"), 3)
    assert node.wait(5) == 9
    assert [said["number"] for _, _, said in answers[:2]] == [0, 1]
    assert isinstance(answers[2][2], str) and "unavailable" in answers[2][2].lower()
    assert 10 < answers[2][1] < 90


def test_a_superlink_that_has_forgotten_everything(programs):
    """Without its database: the node joins again, as a new one."""
    link = programs.superlink("--insecure", "--database", ":memory:")
    programs.node()
    (first,) = programs.wait_for(programs.nodes)
    os.killpg(link.pid, signal.SIGKILL)
    link.wait()
    programs.superlink("--insecure", "--database", ":memory:")
    (second,) = programs.wait_for(programs.nodes)
    assert first["node-id"] != second["node-id"]
    assert "does not know node" in programs.log("node")


def certificates(folder: Path) -> None:
    """A CA, ca.crt, and a server certificate for 127.0.0.1, server.pem and server.key."""
    now = datetime.datetime.now(datetime.UTC)

    def certificate(name: str, issuer: str, key, signer, ca: bool) -> x509.Certificate:
        built = x509.CertificateBuilder().public_key(key.public_key()).serial_number(x509.random_serial_number())
        built = built.subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)]))
        built = built.issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, issuer)]))
        built = built.not_valid_before(now - datetime.timedelta(hours=1)).not_valid_after(
            now + datetime.timedelta(days=2)
        )
        built = built.add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        address = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
        return (built if ca else built.add_extension(address, critical=False)).sign(signer, hashes.SHA256())

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    pem = serialization.Encoding.PEM
    (folder / "ca.crt").write_bytes(certificate("ca", "ca", ca_key, ca_key, True).public_bytes(pem))
    (folder / "server.pem").write_bytes(certificate("server", "ca", key, ca_key, False).public_bytes(pem))
    (folder / "server.key").write_bytes(
        key.private_bytes(pem, serialization.PrivateFormat.TraditionalOpenSSL, serialization.NoEncryption())
    )


def node_key(path: Path) -> Path:
    """A node's key pair, PATH and PATH.pub."""
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption())
    )
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    path.with_suffix(".pub").write_bytes(public)
    return path


def test_keys_over_tls(programs, tmp_path):
    """A known key works, also again once a killed node's heartbeat has expired; what else comes is refused."""
    certificates(tmp_path)
    known, stranger = node_key(tmp_path / "known"), node_key(tmp_path / "stranger")
    ca = tmp_path / "ca.crt"
    programs.connection(f'root-certificates = "{ca}"')
    tls = ("--ssl-ca-certfile", str(ca), "--ssl-certfile", "server.pem", "--ssl-keyfile", "server.key")
    programs.superlink(*tls, "--enable-supernode-auth")
    programs.flwr("supernode", "register", "known.pub", "here")
    node = programs.node("known_node", ca, known)
    answers = programs.answers(programs.run(rounds=3), 3)
    assert [said["calls"] for _, _, said in answers] == [1, 2, 3]

    refused = {
        "stranger": (ca, stranger, f"does not know the key {stranger}. Put {stranger}.pub among"),
        "keyless": (ca, "", "takes only nodes with a known key"),
    }
    (tmp_path / "other").mkdir()
    certificates(tmp_path / "other")
    refused["other_ca"] = (tmp_path / "other" / "ca.crt", known, "no TLS connection")
    for name, (with_ca, key, text) in refused.items():
        assert programs.node(name, with_ca, key).wait(60) == 1, name
        assert text in programs.log(name)
        assert "Traceback" not in programs.log(name)

    plain = programs.node("plain", "", known)
    programs.wait_for(lambda: "trying again" in programs.log("plain"))
    assert plain.poll() is None
    plain.send_signal(signal.SIGTERM)
    assert plain.wait(15) == 0

    os.killpg(node.pid, signal.SIGKILL)
    node.wait()
    again = programs.node("again", ca, known)
    programs.wait_for(lambda: "is in use" in programs.log("again"))
    programs.wait_for(lambda: "has joined" in programs.log("again"), 90)
    again.send_signal(signal.SIGTERM)
    assert again.wait(15) == 0
