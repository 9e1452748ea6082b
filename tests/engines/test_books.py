"""What a server can't make a node do to a client's book, and what replies and errors of a node do not tell."""

import hashlib
import shutil
import types

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

import fl.run
from clients.adapters.base_change import packed_size
from fl import checkpoint
from fl.compose import compose
from fl.engine import session
from fl.engine.carried import Note, carry
from fl.engine.kept import Kept
from fl.engine.session import Place, Session, Site
from fl.errors import ConfigError, RunStopped, ShoalError
from fl.experiment import Experiment, Settings
from fl.messages import TrainRequest
from tests.engines.linked import HOSTS, Hosts
from tests.helpers import ENCODER, SHARED, clients

LOCAL = ("privacy=local", "privacy.epsilon=null", "privacy.noise_multiplier=1", "aggregator.weights=uniform")
DP = ("privacy=dp_sgd", "privacy.epsilon=null", "privacy.noise_multiplier=1", "local=sgd")
ONE = ("schedule.rounds=1", "local.steps=1", "evaluation.clients=never")

# Which requests are one job


def experiment(*words: str, secret: bytes | None = b"s" * 32) -> Experiment:
    made = Experiment(Settings.of(compose([*ENCODER, "schedule.rounds=9", *words])[0]), SHARED)
    made.secret = secret
    return made


def request(node, piece: float | None = None, **arrays: np.ndarray) -> TrainRequest:
    """A request for client 0's first job, with a change of the base of rank 1 all of whose numbers are ``piece``."""
    space, state = node.space, node.trainer.worker.cohort.initial.numpy().astype(np.float32)
    header = {"lr": 1.0, "train": ",".join(space.names), "sent": ",".join(space.names)}
    if piece is not None:
        sizes = [space.sizes(module) for module in space.modules]
        ranks = [1] * len(sizes)
        state = np.concatenate([state, np.full(packed_size(ranks, sizes), piece, np.float32)])
        header["base"] = "=" + ",".join(map(str, ranks))
    return TrainRequest(0, 1, 1, state, space.layout.hash, header, arrays)


@pytest.fixture
def made():
    with_books = experiment(*LOCAL)
    yield with_books
    with_books.close()


def newest(made: Experiment, asked: TrainRequest) -> tuple[str, int]:
    """What the book of client 0 names the job that is ``asked``, and the steps in it."""
    made.node._work(asked)
    state = made.guard.client_state(0)
    return state["newest"]["fingerprint"], state["steps"]


def test_another_change_of_the_base_is_another_job(made):
    plain = newest(made, request(made.node))
    assert newest(made, request(made.node)) == plain
    changed = newest(made, request(made.node, 0.5))
    assert (plain[1], changed[1]) == (1, 2) and changed[0] != plain[0]
    assert newest(made, request(made.node, 0.5)) == changed
    assert newest(made, request(made.node, 0.25))[1] == 3


def test_arrays_that_an_answer_depends_on_name_its_job_and_masks_do_not(made):
    centre = np.ones(3, np.float32)
    first = newest(made, request(made.node, centre=centre))
    masks = np.zeros(2, np.uint8)
    assert newest(made, request(made.node, centre=centre, inbox=masks, session=masks)) == first
    assert newest(made, request(made.node, centre=2 * centre))[1] == 2


def test_other_samples_and_other_settings_under_one_name_are_other_jobs(made):
    asked = request(made.node)
    first = newest(made, asked)
    made.data.parts[0] = made.data.parts[0][1:]
    made.node._samples.clear()
    other = newest(made, asked)
    assert (first[1], other[1]) == (1, 2)
    made.guard.root += "of other settings"
    assert newest(made, asked)[1] == 3


def test_a_simulation_names_jobs_by_the_request_alone():
    made = experiment(*LOCAL, secret=None)
    asked = request(made.node)
    content = hashlib.sha256(asked.state.tobytes())
    content.update(repr((1, 1.0, made.node.space.names)).encode())
    assert newest(made, asked)[0] == content.hexdigest()[:32]
    made.close()


# A run's name is the server's


def site(folder, *words: str) -> Site:
    return Site(Place(folder), (0, 1, 2, 3), Settings.of(compose([*HOSTS, *words])[0]), Note("ab", "cd"), SHARED)


def test_a_run_of_the_same_name_without_a_claim_leaves_books_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(fl.run, "secrets", types.SimpleNamespace(token_hex=lambda n: "ab" * n))
    hosts = Hosts(tmp_path, (0, 3), (1, 2))
    hosts.run(tmp_path / "first", *DP, *ONE)
    files = sorted(tmp_path.glob("node-*/abab*/client-*/*.safetensors"))
    before = [file.read_bytes() for file in files]
    assert len(files) == 4
    for again in range(2):
        with pytest.raises(RunStopped, match=r"0 accepted.*a privacy book, and this run has none"):
            hosts.run(tmp_path / f"again-{again}", "local=momentum", *ONE)
    assert [file.read_bytes() for file in files] == before


def test_what_was_kept_without_a_book_is_not_gone_on_from_under_a_claim(tmp_path):
    Kept(tmp_path, "ab").save(0, {"memory/0/1/after/m": np.ones(2)}, {"privacy": {}})
    made = site(tmp_path, *DP)
    made.read(1, 0)
    with pytest.raises(ShoalError, match=r"client 0 .*no privacy book, and this run has one"):
        made.read(0, 0)
    made.close()


def test_a_lost_book_shuts_out_its_client_alone(tmp_path):
    hosts, asked = Hosts(tmp_path, (0, 1, 2, 3)), []

    def lose(node, message, answer):
        if message.metadata.message_type == "train":
            asked.append(node)
            if len(asked) == 2:
                (lost,) = tmp_path.glob("node-0/*/client-2")
                shutil.rmtree(lost)
                hosts.start(0)
        return answer(message)

    hosts.between = lose
    hosts.run(tmp_path / "run", *DP, *ONE, "schedule.rounds=3")
    for round, reasons in ((1, {}), (2, {2: "error"}), (3, {2: "error"})):
        found = {e["client"]: e["reason"] for e in clients(tmp_path / "run", round)}
        assert found == dict.fromkeys(range(4)) | reasons
    steps = {c: checkpoint.load(p)[1]["privacy"]["steps"] for c in range(4) for p in tmp_path.glob(f"node-0/*/*-{c}")}
    assert steps == {0: 3, 1: 3, 3: 3}


# What a node tells


@pytest.mark.parametrize(("words", "hidden"), [(LOCAL, True), (DP, False), ((), False)])
def test_replies_hide_numbers_of_samples_where_they_are_secret(words, hidden, tmp_path):
    made = site(tmp_path, *words, "schedule.max_update_norm=1e6")
    assert made.node.sizes_hidden is hidden
    made.close()


def test_the_server_s_tracker_is_not_looked_for_at_a_node(tmp_path, monkeypatch):
    from fl.trackers.mlflow import MLflow

    def missing(tracker):
        raise ConfigError("tracker", "mlflow", "its library can't be imported")

    monkeypatch.setattr(MLflow, "check", missing)
    resolved = compose([*HOSTS, "tracker=mlflow"])[0]
    with pytest.raises(ConfigError, match="tracker"):
        Settings.of(resolved)
    context = Context(7, 1, {}, RecordDict(), carry(resolved, "run", [], False))
    found, settings = Session(Place(tmp_path, (0,)))._settings(context)
    assert settings.tracker.name == "none" and found == resolved


@pytest.mark.parametrize(("told", "paced"), [(10**9, 1000), (-5, 1), (20, 20)])
def test_a_node_paces_itself_by_no_more_nodes_than_there_can_be(told, paced, tmp_path):
    seen = []
    Session(Place(tmp_path), paced=seen.append)._pace(Note("ab", "cd", nodes=told))
    assert seen == [paced]


@pytest.mark.parametrize("name", ["_train", "_evaluate", "_query", "_enter", "hello"])
def test_of_an_unforeseen_failure_only_the_type_leaves(name, tmp_path, monkeypatch, caplog):
    def fail(self, *_):
        raise KeyError("a zebra of client 3")

    handlers = {}

    def app(train, evaluate, query, enter):
        handlers.update(_train=train, _evaluate=evaluate, _query=query, _enter=enter)
        return types.SimpleNamespace(query=lambda kind: lambda handler: handlers.update(hello=handler))

    monkeypatch.setattr(Session, name, fail)
    monkeypatch.setattr(session, "cohort_app", app)
    Session(Place(tmp_path)).app()
    with pytest.raises(ShoalError, match="^KeyError at this node") as caught:
        handlers[name](Message(RecordDict(), 1, "train"), None)
    assert "zebra" not in str(caught.value) and caught.value.__suppress_context__
    assert "zebra" in caplog.text


def test_a_foreseen_one_is_told(tmp_path, monkeypatch):
    def fail(self, *_):
        raise ConfigError("data.label", "x", "another")

    monkeypatch.setattr(Session, "hello", fail)
    with pytest.raises(ConfigError, match=r"data\.label"):
        Session(Place(tmp_path)).app()(Message(RecordDict(), 1, "query.hello"), Context(7, 1, {}, RecordDict(), {}))
