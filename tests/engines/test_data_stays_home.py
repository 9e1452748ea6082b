"""Every byte that leaves a node, searched for the samples that it trains on.

In one process, behind the same serialisation as on a network; and between real programs, where a recorder stands on the
wire. The search is shown to find what is planted, in the ways in which something could slip out.
"""

from __future__ import annotations

import base64
import contextlib
import csv
import socket
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Error, Message
from flwr.common.serde import message_to_proto

from clients.data.sentences import LABELS, sentences
from fl import node as nodes
from fl.compose import compose
from fl.engine.home import Samples, at_node, localised
from fl.engine.session import Place, Session
from fl.errors import RunStopped
from fl.experiment import Settings
from fl.keys import generator
from fl.messages import TrainReply
from tests.engines import linked
from tests.engines.leaks import leaks, needles
from tests.engines.recorder import Recorder
from tests.helpers import ENCODER, evaluations, rounds
from tests.hosts.processes import SHOAL, Loopback

ROWS = 30
WORDS = sorted({word for s in sentences() for word in s.text.lower().split() if word.isalpha()})
AT_NODES = ("partition=at_nodes", "schedule.rounds=2")


def write_samples(path: Path, client: int) -> None:
    """A file of samples in words that the tiny models know, each with one that nothing else has."""
    rng = generator("samples", client)
    with open(path, "w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["text", "label"])
        for n in range(ROWS):
            rare = "".join(rng.choice(list("bcdfghjklmnpqrstvwxz"), 12))
            text = " ".join([*rng.choice(WORDS, 14).tolist(), f"{rare}{n}"])
            out.writerow([text, LABELS[rng.integers(len(LABELS))]])


@pytest.fixture
def files(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / f"client{c}.csv" for c in range(4)]
    for client, path in enumerate(paths):
        write_samples(path, client)
    return paths


class Hosts(linked.Hosts):
    """Two nodes of two clients each, and all that leaves them: ``sent`` are their replies as they are serialised."""

    def __init__(self, folder: Path, files: Sequence[Path]):
        self.sent, self.files = list[bytes](), files
        super().__init__(folder, (0, 1), (2, 3))

    def start(self, node: int) -> None:
        own = tuple(self.files[client] for client in self.clients[node])
        self.sessions[node] = Session(Place(self.folder / f"node-{node}", tuple(self.clients[node]), own))
        self.apps[node] = self.sessions[node].app()

    def __call__(self, message: Message, context: Context) -> Message:
        reply = super().__call__(message, context)
        self.sent.append(message_to_proto(reply).SerializeToString())
        return reply

    def needles(self) -> dict[bytes, str]:
        """What of all the nodes' samples must not leave them."""
        sites = [site for session in self.sessions.values() for site in session.sites.values()]
        return {n: w for site in sites for n, w in needles_of(site.experiment.samples, self.files).items()}


def needles_of(samples: Samples | None, files: Sequence[Path]) -> dict[bytes, str]:
    assert samples is not None
    found: dict[bytes, str] = {}
    mine = samples.federated()
    for client, data in samples.own.items():
        with open(files[client], newline="") as file:
            texts = [row["text"] for row in csv.DictReader(file)]
        assert len(texts) == len(data) == ROWS
        first = min(int(p.min()) for p in (mine.parts[client], mine.client_tests[client]))
        parts = [np.arange(ROWS), mine.parts[client] - first, mine.client_tests[client] - first]
        found |= {n: f"client {client}: {what}" for n, what in needles(texts, data, parts).items()}
    return found


def play(tmp_path: Path, files: list[Path], *more: str, fails: str = "") -> tuple[Hosts, Path]:
    """Run the experiment over two nodes; what left them, and the run's folder. ``fails`` is how the run ends, if not
    well."""
    hosts, folder = Hosts(tmp_path, files), tmp_path / "run"
    with pytest.raises(RunStopped, match=fails) if fails else contextlib.nullcontext():
        hosts.run(folder, *AT_NODES, *more)
    return hosts, folder


CASES = {
    "updates as they are": (),
    "dp_sgd": ("privacy=dp_sgd", "local=sgd"),
    "local dp": ("privacy=local", "aggregator.weights=uniform", "schedule.max_update_norm=1e6"),
    "secure aggregation": ("secure_aggregation=secagg", "aggregator.weights=uniform"),
    "a start from clients' data": ("adapter=lora_sb", "adapter.init.source=clients", "model.head_std=0.02"),
}


@pytest.mark.parametrize("case", CASES)
def test_no_text_no_tokens_and_no_labels_leave_a_node(case, files, tmp_path):
    hosts, folder = play(tmp_path, files, *CASES[case])
    made = rounds(folder)
    assert [r["accepted"] for r in made] == [4, 4] and evaluations(folder, "clients")
    assert len(hosts.sent) >= 2 + 2 * 2 + 2  # hello, two rounds, an evaluation
    wanted = hosts.needles()
    assert len(wanted) > 10_000
    assert leaks(hosts.sent, wanted) == []
    kept = [p.read_bytes() for p in folder.rglob("*") if p.is_file()]
    assert leaks(kept, wanted) == []


def test_an_error_of_a_node_shows_nothing_of_its_samples(files, tmp_path):
    """A label that the experiment does not have; the run can't begin."""
    with files[3].open("a") as file:
        file.write("a sentence with xylophonequartz in it,weirdlabelvalue\n")
    hosts, folder = play(tmp_path, files, fails="client 3: its file can't be read")
    said = b"".join(hosts.sent) + (folder / "run.json").read_bytes()
    assert b"client 3: its file" in said
    for word in (b"xylophone", b"weirdlabel", b"sentence with", files[3].name.encode()):
        assert word not in said


# What the search finds


def tokens_of(node, client: int, dtype) -> np.ndarray:
    data, i = node.data.train, int(node.data.parts[client][5])
    return np.asarray(data.tokens[data.offsets[i] : data.offsets[i + 1]]).astype(dtype)


def beside(make):
    """A node that sends ``make(node, client)`` beside an update."""

    def reply(node, request, said, message):
        sent = TrainReply(
            said.client, said.round, said.version, said.layout, said.update, said.examples, said.steps, said.tokens,
            said.loss, arrays={"more": np.frombuffer(make(node, request.client), np.uint8)},
        )  # fmt: skip
        return Message(sent.to_record(), reply_to=message)

    return reply


def words_of(node, client: int) -> bytes:
    with open(PLANTED[client], newline="") as file:
        return [row["text"] for row in csv.DictReader(file)][7].encode()


PLANTED: list[Path] = []
PLANTS: dict[str, Callable[..., Message]] = {
    "tokens (int32)": beside(lambda node, c: tokens_of(node, c, np.int32)),
    "tokens (int64)": beside(lambda node, c: tokens_of(node, c, np.int64)),
    "tokens (uint16)": beside(lambda node, c: tokens_of(node, c, np.uint16)),
    "tokens as floats": beside(lambda node, c: tokens_of(node, c, np.float32)),
    "tokens of a batch, compressed": beside(
        lambda node, c: zlib.compress(node.data.train.batch(node.data.parts[c]).input_ids.numpy())
    ),
    "labels of its part (int64)": beside(lambda node, c: node.data.train.labels[node.data.parts[c]]),
    "labels (uint8)": beside(lambda node, c: node.data.train.labels[node.data.parts[c]].astype(np.uint8)),
    "the word of a text": beside(words_of),
    "the word of a text in base64": beside(lambda node, c: base64.b64encode(words_of(node, c))),
    "the word of a text in an error": lambda node, request, said, message: Message(
        Error(0, f"can't tokenise {words_of(node, request.client).decode()!r}"), reply_to=message
    ),
    "tokens in an error": lambda node, request, said, message: Message(
        Error(0, f"bad batch {tokens_of(node, request.client, np.int64).tolist()}"), reply_to=message
    ),
    "tokens for an update": lambda node, request, said, message: beside(lambda n, c: b"0")(
        node, request, replace(said, update=tokens_of(node, request.client, np.float32)), message
    ),
}  # fmt: skip


@pytest.mark.parametrize("first", range(0, len(PLANTS), 4))
def test_the_search_finds_what_nodes_send_of_their_samples(first, files, tmp_path, monkeypatch):
    """Each of the four clients sends one of these."""
    PLANTED[:] = files
    sent = dict(enumerate(list(PLANTS)[first : first + 4]))

    def reply(node, request, said, message):
        return PLANTS[sent[request.client]](node, request, said, message)

    monkeypatch.setattr(nodes.Node, "_reply", reply)
    hosts, _ = play(tmp_path, files, "schedule.rounds=1", fails="updates")
    found = leaks(hosts.sent, hosts.needles())
    for client, plant in sent.items():
        assert any(line.startswith(f"client {client}: {plant.split()[0]}") for line in found), plant
        assert not any(line.startswith(f"client {client}: ") and plant.split()[0] not in line for line in found)


# Between programs

PLANTING = """
import sys
from flwr.app import Error, Message
from fl import cli, node

honest = node.Node._reply


def reply(self, request, said, message):
    data, i = self.data.train, int(self.data.parts[request.client][5])
    if request.client != 3:
        return honest(self, request, said, message)
    tokens = data.tokens[data.offsets[i] : data.offsets[i + 1]].tolist()
    return Message(Error(0, f"bad batch {tokens}"), reply_to=message)


node.Node._reply = reply
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_nothing_of_the_samples_is_on_the_wire_between_node_and_superlink(files, tmp_path):
    """Without TLS, so that the recorder sees what is sent. One client sends tokens in an error: these are found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "planting.py").write_text(PLANTING)
    words = ["engine=superlink", "engine.insecure=true", f"engine.address=127.0.0.1:{port}", "engine.wait_s=300"]
    with Loopback() as hosts, Recorder(port) as recorder:

        def start(name: str, *command: str) -> subprocess.Popen:
            (tmp_path / name).mkdir()
            return hosts.start("server", command, tmp_path / name, tmp_path / f"{name}.log")

        server = start("server", *SHOAL, "server", "--insecure", "--port", str(port))
        end = time.monotonic() + 120
        while "SuperLink is up" not in (tmp_path / "server.log").read_text():
            assert server.poll() is None and time.monotonic() < end, (tmp_path / "server.log").read_text()
            time.sleep(0.1)
        for n, shoal in enumerate((SHOAL, [sys.executable, str(tmp_path / "planting.py")])):
            own = [str(path) for path in files[2 * n : 2 * n + 2]]
            options = ["--insecure", "--clients", f"{2 * n}-{2 * n + 1}", "--state", str(tmp_path / f"state{n}")]
            start(f"node{n}", *shoal, "node", f"127.0.0.1:{recorder.port}", *options, "--data", *own)
        run = start("submit", *SHOAL, "run", *ENCODER, *AT_NODES, *words, f"hydra.run.dir={tmp_path / 'run'}")
        assert run.wait(300) == 0, "\n".join(p.read_text()[-3000:] for p in tmp_path.glob("*.log"))
        sent = [bytes(stream) for stream in recorder.sent]
    made = rounds(tmp_path / "run")
    assert [(r["accepted"], r["rejected"]) for r in made] == [(3, {"error": 1})] * 2
    settings = Settings.of(localised(compose([*ENCODER, *AT_NODES])[0], files))
    wanted = needles_of(at_node(settings, range(4), files, LABELS), files)
    assert len(sent) >= 2 and sum(map(len, sent)) > sum(r["bytes_up"] for r in made)
    found = leaks(sent, wanted)
    assert found and all(line.startswith("client 3: tokens") and "text" in line for line in found)
