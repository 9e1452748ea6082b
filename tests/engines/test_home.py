"""What a node tells and refuses about its data and books, and what the server remembers to have charged."""

import csv
import errno
import itertools
import json
import shutil

import numpy as np
import pytest

from clients.data.sources.files import Csv, Jsonl
from clients.data.sources.tiny import Tiny
from fl import checkpoint
from fl.compose import compose
from fl.engine import home
from fl.engine.kept import HomeError, Kept
from fl.errors import ConfigError, ShoalError
from fl.experiment import Settings
from fl.records import read_run
from privacy.local_dp import LocalDP
from tests.engines.linked import Hosts
from tests.helpers import ENCODER, go, rounds, vector
from tests.privacy import test_dp_sgd
from tests.privacy.test_client_level import guard_of, settings

LABELS = ["negative", "neutral", "positive"]
SECRET_WORDS = ("zebra", "quagga")
ROWS = [(f"the {animal} number {n} is good", "positive") for n in range(5) for animal in SECRET_WORDS]
AT_NODES = "partition=at_nodes"


def resolved(*more: str) -> dict:
    return compose([*ENCODER, *more])[0]


def write(path, rows=ROWS, names=("text", "label")):
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([names, *rows])
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SHOAL_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def files(cache, tmp_path):
    return [write(tmp_path / f"own{n}.csv", ROWS[n:]) for n in range(2)]


# Settings at a node


def test_a_node_reads_its_own_files_by_the_experiment_s_columns(files, tmp_path):
    """The server's file is not there, and a bundled set is not fetched."""
    words = ("data=csv", f"data.path={files[0]}", "data.label=stars", "data.max_length=9", "data.group=shop", AT_NODES)
    given = resolved(*words)
    given["data"]["path"] = "/no/such/file.csv"
    found = home.localised(given, files)
    assert Settings.of(found).data == Csv(
        path=str(files[0]), label="stars", max_length=9, client_test_fraction=given["data"]["client_test_fraction"],
        max_test=given["data"]["max_test"],
    )  # fmt: skip
    assert {k: v for k, v in found.items() if k != "data"} == {k: v for k, v in given.items() if k != "data"}
    assert given["data"]["path"] == "/no/such/file.csv"
    other = files[0].rename(tmp_path / "own.jsonl")
    assert isinstance(Settings.of(home.localised(resolved("data.max_length=9"), [other])).data, Jsonl)
    assert Settings.of(home.localised(resolved(), [])) == Settings.of(resolved())


def test_files_and_partition_have_to_fit(files):
    own, dealt = Settings.of(resolved(AT_NODES)), Settings.of(resolved())
    home.check_samples(own, [0, 3], files)
    home.check_samples(dealt, [0, 3], [])
    with pytest.raises(ConfigError, match=r"--data='0 files'.*each of the 2 clients.*shoal node --data"):
        home.check_samples(own, [0, 3], [])
    with pytest.raises(ConfigError, match=r"--data='2 files'.*each of the 3 clients"):
        home.check_samples(own, [0, 1, 2], files)
    with pytest.raises(ConfigError, match=r"partition='iid'.*at_nodes.*without --data"):
        home.check_samples(dealt, [0, 3], files)


# Samples


def test_a_node_has_the_samples_of_its_clients(files):
    made = Settings.of(home.localised(resolved(AT_NODES, "data.client_test_fraction=0.3"), files))
    data = home.at_node(made, [1, 3], files, LABELS).federated()
    assert len(data) == 4 and home.told(made, data, [1, 3]) == ([7, 6], [3, 3])
    assert home.at_node(Settings.of(resolved()), [1, 3], [], LABELS) is None


@pytest.mark.parametrize(
    ("broken", "detail"),
    [
        ([*ROWS, ("a quagga", "weird label")], "row 11"),
        (ROWS[:7], "at most the 7 samples"),
        ([(t, "") for t, _ in ROWS], "row 1"),
        ([*ROWS, ("one", "two", "zebra")], "line 12"),
        ([], "no rows"),
    ],
    ids=["an unknown label", "too few", "an empty label", "a broken line", "nothing"],
)
def test_an_error_in_a_file_stays_at_the_node(broken, detail, files, caplog):
    write(files[1], broken)
    made = Settings.of(home.localised(resolved(AT_NODES), files))
    with pytest.raises(HomeError) as caught:
        home.at_node(made, [1, 3], files, LABELS)
    sent = str(caught.value)
    assert sent.startswith("client 3: its file can't be read as samples of this experiment")
    assert detail in caught.value.here and str(files[1]) in caught.value.here
    assert detail in caplog.text  # the node's own log says it
    for word in (*SECRET_WORDS, "weird", str(files[1].parent), "own1", "7"):
        assert word not in sent, word
    assert caught.value.__cause__ is None and caught.value.__suppress_context__


@pytest.mark.parametrize(
    ("words", "hidden"),
    [
        ([], False),
        (["privacy=dp_sgd"], False),
        (["privacy=dp_sgd", "secure_aggregation=secagg", "aggregator.weights=uniform"], False),
        (["secure_aggregation=secagg", "aggregator.weights=uniform"], True),
        (["privacy=local", "aggregator.weights=uniform", "schedule.max_update_norm=1e6"], True),
        (["privacy=central", "aggregator.weights=uniform", "sampling=available"], True),
    ],
)
def test_numbers_of_samples_are_told_where_they_are_no_secret(words, hidden, files):
    made = Settings.of(home.localised(resolved(AT_NODES, *words), files))
    data = home.at_node(made, [1, 3], files, LABELS).federated()
    sizes = home.told(made, data, [1, 3])
    assert sizes == (([1, 1], [1, 1]) if hidden else ([9, 8], [1, 1]))


def test_the_server_takes_what_was_told(cache):
    made = Settings.of(resolved(AT_NODES, "data.public=5"))
    sets = Tiny().load(made.model)
    data = home.at_server(made, *sets, {c: (10 + c, c) for c in range(4)})
    assert [len(p) for p in data.parts] == [10, 11, 12, 13] and len(data.public) == 5
    with pytest.raises(ConfigError, match=r"partition='at_nodes'.*engine=superlink"):
        home.at_server(made, *sets, {})
    with pytest.raises(ShoalError, match="sizes of 3 clients; clients.number=4"):
        home.at_server(made, *sets, dict.fromkeys(range(3), (10, 1)))


# What can't be kept on hosts

UNIFORM = ("aggregator.weights=uniform",)
SHARES = ("local=client_momentum", "local.steps=1", "aggregator=dp_brem", "privacy=dp_brem_plus", "privacy.rate=0.3",
          "secure_aggregation=shares")  # fmt: skip
PRIVATE = ("adapter=lora_sb", "adapter.init.source=private", "privacy=dp_sgd", "model.head_std=0.02")
REFUSED = {
    "servers that are simulated": (SHARES, r"secure_aggregation='shares'.*simulated"),
    "canaries at a node": (("privacy=dp_sgd", "privacy.audit=true"), r"privacy\.audit=True.*stays there"),
    "scalars": (("schedule=just_one_byte", "local=sgd", "privacy=dp_zero"), r"privacy='dp_zero'.*counted by them"),
    "a draw of clients that all know": (("privacy=central", "sampling=poisson", *UNIFORM), r"sampling='poisson'.*seed"),
    "a draw without replacement": (("privacy=central", "sampling=fixed", *UNIFORM), r"sampling='fixed'.*seed"),
    "a start with noise of the seed": (PRIVATE, r"adapter\.init\.source='private'.*seed"),
    "attackers beside real data": ((AT_NODES, "attack=sign_flip"), r"attack='SignFlip'.*simulated"),
    "a range by all samples": ((AT_NODES, "secure_aggregation=secagg"), r"aggregator\.weights='examples'.*uniform"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_can_not_be_accounted_for_on_hosts_is_refused_by_name(case):
    words, said = REFUSED[case]
    with pytest.raises(ConfigError, match=said):
        home.check_hosts(Settings.of(resolved(*words)))


@pytest.mark.parametrize(
    "words",
    [
        (), (AT_NODES,), ("attack=sign_flip",), ("privacy=dp_sgd",), (AT_NODES, "privacy=dp_sgd"),
        ("privacy=central", "sampling=available", *UNIFORM), ("privacy=dp_ftrl", *UNIFORM),
        ("privacy=central", "sampling=available", "privacy.audit=true", *UNIFORM),
        ("privacy=local", "schedule.max_update_norm=1e6", *UNIFORM), SHARES[:3] + ("privacy=dp_brem", SHARES[4]),
        (AT_NODES, "secure_aggregation=secagg", "privacy=distributed", *UNIFORM),
    ],
)  # fmt: skip
def test_the_others_are_not(words):
    home.check_hosts(Settings.of(resolved(*words)))


def test_keys_of_a_round_need_a_process_that_stays():
    made = Settings.of(resolved("secure_aggregation=secagg", *UNIFORM))
    home.check_hosts(made, resident=True)
    with pytest.raises(ConfigError, match=r"secure_aggregation='secagg'.*stock SuperNode.*shoal node"):
        home.check_hosts(made, resident=False)
    home.check_apart(Settings.of(resolved(*PRIVATE)), resident=False)  # a simulation in many processes
    with pytest.raises(ConfigError, match="canaries"):
        home.check_apart(Settings.of(resolved("privacy=dp_sgd", "privacy.audit=true")), resident=True)


# Books


EXAMPLES = np.arange(100)


def test_a_node_that_lost_a_client_s_book_does_not_spend_more():
    def guard():
        return test_dp_sgd.guard("schedule.rounds=4", sizes=(100, 100))

    node = guard()
    home.check_books(node, 0, 0)
    for round in (1, 2):
        node.job(0, round, "content", EXAMPLES, {})
        home.check_books(node, 0, round)
    old = node.client_state(0)
    node.job(0, 4, "content", EXAMPLES, {})  # job 3 never arrived
    home.check_books(node, 0, 2)  # nor was this one's answer heard
    home.check_books(node, 0, 4)
    empty, copy = guard(), guard()
    home.check_books(empty, 1, 0)
    with pytest.raises(ShoalError, match="client 0's privacy book ends with job 0.*answer to job 1: it was lost"):
        home.check_books(empty, 0, 1)
    copy.restore_client(0, old)
    home.check_books(copy, 0, 2)
    with pytest.raises(ShoalError, match="ends with job 2.*answer to job 4"):
        home.check_books(copy, 0, 4)
    home.check_books(guard_of(LocalDP(), settings()), 5, 0)


def test_a_mechanism_without_books_at_clients_needs_none():
    from privacy.base import Guard

    home.check_books(Guard(), 0, 12)


def test_what_was_charged_is_on_the_disk_before_requests_leave_and_survives_a_crash(tmp_path):
    def charges():
        return home.Charges(test_dp_sgd.guard(sizes=(100, 80)), Kept(tmp_path, "run"), 2)

    first = charges()
    first.restore()  # nothing yet
    at_checkpoint = json.loads(json.dumps(first.guard.state()))
    for client, size in ((0, 100), (1, 80)):
        first.guard.mirror(client, 1, "content", size)
    first.save()
    for _ in range(2):  # after a resume the same job may be answered again
        first.heard(1, 1)
    first.guard.mirror(1, 2, "content", 80)
    first.save()
    second = charges()  # after a crash: the checkpoint is that of the beginning
    second.guard.restore(at_checkpoint)
    assert second.guard.epsilon == 0
    second.restore()
    assert second.guard.state() == first.guard.state() and second.answered == {0: 0, 1: 1}
    second.guard.mirror(1, 2, "content", 80)  # the same request once more
    assert second.guard.state() == first.guard.state()


def test_where_nothing_is_mirrored_nothing_is_written(tmp_path):
    from privacy.base import Guard

    charges = home.Charges(Guard(), Kept(tmp_path, "run"), 3)
    charges.save()
    charges.restore()
    assert not list(tmp_path.iterdir())


# Private runs over hosts

DP = ("privacy=dp_sgd", "privacy.epsilon=null", "privacy.noise_multiplier=1", "local=sgd", "schedule.rounds=3",
      "schedule.min_clients=2", "sampling=available")  # fmt: skip
STEPS = 2  # of a job


def nodes_books(hosts, run: str) -> dict[int, int]:
    """The steps in each client's book, on its node's disk."""
    found = {}
    for node, clients in enumerate(hosts.clients):
        kept = Kept(hosts.folder / f"node-{node}", run)
        found |= {c: kept.load(c)[1]["privacy"]["steps"] for c in clients if kept.holds(c)}
    return found


def servers_books(folder) -> dict[int, int]:
    return {row["client"]: row["steps"] for row in read_run(folder)["privacy_statement"]["holders"]}


def test_what_nodes_spend_is_in_the_server_s_statement_and_their_noise_is_their_own(tmp_path):
    vectors = []
    for name in ("first", "second"):
        hosts = Hosts(tmp_path / name, (0, 3), (1, 2))
        hosts.run(tmp_path / name / "run", *DP)
        made = read_run(tmp_path / name / "run")
        assert [r["accepted"] for r in rounds(tmp_path / name / "run")] == [4, 4, 4]
        assert nodes_books(hosts, made["id"]) == servers_books(tmp_path / name / "run") == dict.fromkeys(range(4), 6)
        assert "the node's own secret" in made["privacy"] and "seed" not in made["privacy"]
        vectors.append(vector(tmp_path / name / "run"))
    go(tmp_path / "here", *DP)
    vectors.append(vector(tmp_path / "here"))
    assert "run's seed" in read_run(tmp_path / "here")["privacy"]
    assert not any(np.array_equal(a, b) for a, b in itertools.combinations(vectors, 2))


def test_a_node_without_its_books_spends_nothing_more(tmp_path):
    hosts, lost = Hosts(tmp_path, (0, 3), (1, 2)), []

    def lose(node, message, answer):
        if node == 0 and message.metadata.message_type == "train" and message.metadata.group_id == "2" and not lost:
            shutil.rmtree(tmp_path / "node-0")
            hosts.start(0)
            lost.append(node)
        return answer(message)

    hosts.between = lose
    hosts.run(tmp_path / "run", *DP)
    assert lost and [(r["accepted"], r["rejected"]) for r in rounds(tmp_path / "run")] == [
        (4, {}), (2, {"error": 2}), (2, {"error": 2}),
    ]  # fmt: skip
    spent = servers_books(tmp_path / "run")
    assert spent == dict.fromkeys(range(4), 3 * STEPS)  # what is refused there is charged here all the same
    assert nodes_books(hosts, read_run(tmp_path / "run")["id"]) == {1: 3 * STEPS, 2: 3 * STEPS}


def test_a_full_disk_undoes_a_job_and_the_next_one_goes_on(tmp_path, monkeypatch):
    hosts, write, failed = Hosts(tmp_path, (0, 3), (1, 2)), checkpoint.save_file, []

    def full(arrays, path, metadata):
        if "node-0" in str(path) and len(rounds(tmp_path / "run")) == 1 and len(failed) < 1:
            failed.append(path)
            raise OSError(errno.ENOSPC, "No space left on device")
        write(arrays, path, metadata=metadata)

    monkeypatch.setattr(checkpoint, "save_file", full)
    hosts.run(tmp_path / "run", *DP)
    assert [(r["accepted"], r["rejected"]) for r in rounds(tmp_path / "run")] == [(4, {}), (3, {"error": 1}), (4, {})]
    mine, theirs = servers_books(tmp_path / "run"), nodes_books(hosts, read_run(tmp_path / "run")["id"])
    assert theirs == {0: 2 * STEPS, 3: 3 * STEPS, 1: 3 * STEPS, 2: 3 * STEPS}
    assert mine == dict.fromkeys(range(4), 3 * STEPS)


@pytest.mark.parametrize("moment", ["before the nodes", "after the nodes"])
def test_a_server_that_dies_and_goes_on_has_charged_what_was_spent(moment, tmp_path):
    hosts = Hosts(tmp_path, (0, 3), (1, 2))

    def die(node, message, answer):
        if message.metadata.message_type == "train" and message.metadata.group_id == "2":
            if moment == "after the nodes":
                answer(message)
            raise KeyboardInterrupt
        return answer(message)

    hosts.between = die
    with pytest.raises(KeyboardInterrupt):
        hosts.run(tmp_path / "run", *DP)
    hosts.between = lambda node, message, answer: answer(message)
    hosts.run(tmp_path / "run", *DP, resume=True)
    assert [r["accepted"] for r in rounds(tmp_path / "run")] == [4, 4, 4]
    mine, theirs = servers_books(tmp_path / "run"), nodes_books(hosts, read_run(tmp_path / "run")["id"])
    assert theirs == mine == dict.fromkeys(range(4), 3 * STEPS)  # the same request came again
