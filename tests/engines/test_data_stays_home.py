"""Every byte that leaves a node, searched for the samples that it trains on.

In one process, behind the same serialisation as on a network; and between real programs, where a recorder stands on the
wire. The search is shown to find what is planted, in the ways in which something could slip out.
"""

from __future__ import annotations

import contextlib
import csv
import zlib
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Error, Message
from flwr.common.serde import message_to_proto

from clients.data.sentences import LABELS, sentences
from fl import node as nodes
from fl.compose import compose
from fl.engine.carried import carry
from fl.engine.in_process import InProcessGrid
from fl.engine.session import Place, Session
from fl.errors import RunStopped
from fl.experiment import Settings
from fl.keys import generator
from fl.messages import TrainReply
from fl.records import RunFolder
from fl.run import go
from tests.engines.leaks import leaks, needles
from tests.helpers import ENCODER, evaluations, rounds

ROWS = 30
WORDS = sorted({word for s in sentences() for word in s.text.lower().split() if word.isalpha()})
ON_HOSTS = ("engine=superlink", "engine.insecure=true", "engine.wait_s=60", "partition=at_nodes", "schedule.rounds=2")


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


class Hosts(InProcessGrid):
    """Two nodes of two clients each, and all that leaves them: ``sent`` are their replies as they are serialised."""

    def __init__(self, folder: Path, files: list[Path], resolved: dict):
        self.sent: list[bytes] = []
        places = [Place(folder / f"node{n}", (2 * n, 2 * n + 1), tuple(files[2 * n : 2 * n + 2])) for n in range(2)]
        self.sessions = [Session(place) for place in places]
        apps = [session.app() for session in self.sessions]

        def answer(message, context):
            reply = apps[int(context.node_config["partition-id"])](message, context)
            self.sent.append(message_to_proto(reply).SerializeToString())
            return reply

        super().__init__(answer, 2, carry(resolved, "", None, False), copy="wire")

    def close(self) -> None:
        """Nothing: what nodes hold is looked at after the run."""

    def needles(self) -> dict[bytes, str]:
        found: dict[bytes, str] = {}
        for session in self.sessions:
            for site in session.sites.values():
                assert site.experiment.samples is not None
                for client, data in site.experiment.samples.own.items():
                    with open(session.place.data[session.place.clients.index(client)], newline="") as file:
                        texts = [row["text"] for row in csv.DictReader(file)]
                    assert len(texts) == len(data) == ROWS
                    mine = site.experiment.data
                    first = min(p.min() for p in (mine.parts[client], mine.client_tests[client]))
                    parts = [np.arange(ROWS), mine.parts[client] - first, mine.client_tests[client] - first]
                    found |= needles(texts, data, parts)
        return found


def play(tmp_path: Path, files: list[Path], *more: str, fails: str = "") -> tuple[Hosts, Path]:
    """Run the experiment over two nodes; what left them, and the run's folder. ``fails`` is how the run ends, if not
    well."""
    resolved = compose([*ENCODER, *ON_HOSTS, *more])[0]
    hosts, folder = Hosts(tmp_path, files, resolved), tmp_path / "run"
    ends = pytest.raises(RunStopped, match=fails) if fails else contextlib.nullcontext()
    with ends:
        go(Settings.of(resolved), resolved, [], RunFolder(folder), False, quiet=True, grid=hosts)
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
    hosts, folder = play(tmp_path, files, "engine.wait_s=1", fails="client 3: its file can't be read")
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
PLANTS = {
    "tokens (int32)": beside(lambda node, c: tokens_of(node, c, np.int32)),
    "tokens (int64)": beside(lambda node, c: tokens_of(node, c, np.int64)),
    "tokens (uint16)": beside(lambda node, c: tokens_of(node, c, np.uint16)),
    "tokens as floats": beside(lambda node, c: tokens_of(node, c, np.float32)),
    "a batch of tokens, compressed": beside(
        lambda node, c: zlib.compress(node.data.train.batch(node.data.parts[c]).input_ids.numpy())
    ),
    "labels of its part (int64)": beside(lambda node, c: node.data.train.labels[node.data.parts[c]]),
    "labels (uint8)": beside(lambda node, c: node.data.train.labels[node.data.parts[c]].astype(np.uint8)),
    "a text": beside(words_of),
    "a text in an error": lambda node, request, said, message: Message(
        Error(0, f"can't tokenise {words_of(node, request.client).decode()!r}"), reply_to=message
    ),
    "tokens in an error": lambda node, request, said, message: Message(
        Error(0, f"bad batch {tokens_of(node, request.client, np.int64).tolist()}"), reply_to=message
    ),
    "tokens for an update": lambda node, request, said, message: beside(lambda n, c: b"0")(
        node, request, type("S", (), {**vars(said), "update": tokens_of(node, request.client, np.float32)})(), message
    ),
}  # fmt: skip


@pytest.mark.parametrize("plant", PLANTS)
def test_the_search_finds_what_a_node_sends_of_its_samples(plant, files, tmp_path, monkeypatch):
    PLANTED[:] = files
    monkeypatch.setattr(nodes.Node, "_reply", PLANTS[plant])
    hosts, _ = play(tmp_path, files, "schedule.rounds=1", fails="0 usable updates|updates")
    found = leaks(hosts.sent, hosts.needles())
    wanted = "word" if "text" in plant else "tokens" if "tokens" in plant else "labels"
    assert found and all(line.startswith((f"the {wanted}", wanted)) for line in found)
