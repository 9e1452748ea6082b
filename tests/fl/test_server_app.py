"""What the server writes down, evaluates and saves: the events' schema, and that totals add up."""

import numpy as np
import pytest
from flwr.app import Message

from fl import checkpoint
from fl.engine.cohort_grid import CohortGrid
from fl.messages import EvaluateReply
from fl.records import read_events
from fl.server_app import CHECKPOINT
from tests.helpers import DECODER, ENCODER, SHARED, clients, evaluations, final, go, metrics, rounds

CLIENT = [
    "event", "round", "version", "client", "virtual_s", "staleness", "bytes_down", "bytes_up", "examples", "steps",
    "tokens", "loss", "accepted", "reason", "sent_s", "began_s", "done_s", "wall_s",
]  # fmt: skip
ROUND = [
    "event", "round", "version", "virtual_s", "sampled", "accepted", "rejected", "bytes_down", "bytes_up",
    "bytes_down_total", "bytes_up_total", "client_steps", "client_steps_total", "tokens", "loss", "update_norm",
    "bytes_once", "aggregation_error",
    "epsilon", "staleness", "live_versions", "wall_s",
]  # fmt: skip
EVAL = ["event", "round", "virtual_s", "split", "examples", "loss"]
CLIENTS = [
    "event", "round", "virtual_s", "split", "metric", "mean", "std", "worst_decile", "per_client", "loss_mean",
    "bytes_down", "bytes_up", "wall_s",
]  # fmt: skip
MORE = (
    "clients.number=6", "clients.per_round=4", "schedule.rounds=3", "network=lognormal", "network.dropout=0.2",
    "evaluation.clients=always",
)  # fmt: skip


@pytest.fixture(scope="module", params=[ENCODER, DECODER], ids=["encoder", "decoder"])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("server") / "run"
    go(folder, *MORE, base=request.param)
    return folder


def test_the_keys_of_every_event(run):
    causal = "perplexity" in final(run)
    scores = ["perplexity"] if causal else ["accuracy", "macro_f1"]
    wanted = {"client": CLIENT, "round": ROUND, "test": [*EVAL, *scores, "wall_s"], "clients": CLIENTS}
    for event in read_events(run):
        assert list(event) == wanted[event.get("split", event["event"])]
    assert {e.get("split", e["event"]) for e in read_events(run)} == set(wanted)


def test_events_come_in_the_order_in_which_things_happen(run):
    shape = [(e["round"], e.get("split", e["event"])) for e in metrics(run)]
    expected = [(0, "test"), (0, "clients")]
    for k in (1, 2, 3):
        expected += [(k, "client")] * 4 + [(k, "round"), (k, "test"), (k, "clients")]
    assert shape == expected
    walls = [e["wall_s"] for e in read_events(run)]
    assert walls == sorted(walls)
    times = [e["virtual_s"] for e in rounds(run)]
    assert times == sorted(times)
    assert times[0] > 0


def test_a_round_is_the_sum_of_its_clients(run):
    down = up = steps = 0
    for k, event in enumerate(rounds(run), 1):
        mine = clients(run, k)
        assert (event["round"], event["version"], event["sampled"]) == (k, k, len(mine))
        assert event["accepted"] == sum(e["accepted"] for e in mine)
        assert sum(event["rejected"].values()) == event["sampled"] - event["accepted"]
        for name, total in (("bytes_down", "bytes_down"), ("bytes_up", "bytes_up"), ("steps", "client_steps")):
            assert event[total] == sum(e[name] or 0 for e in mine)
        assert event["loss"] == pytest.approx(np.mean([e["loss"] for e in mine if e["accepted"]]))
        assert event["virtual_s"] == max(e["virtual_s"] for e in mine)
        assert all(e["version"] == k - 1 for e in mine)
        down, up, steps = down + event["bytes_down"], up + event["bytes_up"], steps + event["client_steps"]
        assert (event["bytes_down_total"], event["bytes_up_total"], event["client_steps_total"]) == (down, up, steps)
    found = final(run)
    assert (found["bytes_down"], found["bytes_up"], found["client_steps"]) == (down, up, steps)
    assert found["virtual_s"] == rounds(run)[-1]["virtual_s"]
    assert found["rounds"] == 3
    assert found["client_steps_per_s"] > 0
    assert found["tokens_per_s"] / found["client_steps_per_s"] == pytest.approx(
        sum(e["tokens"] for e in rounds(run)) / steps
    )


def test_a_checkpoint_holds_the_run_after_its_last_round(run):
    arrays, meta = checkpoint.load(run / "checkpoint")
    assert meta["kind"] == CHECKPOINT
    assert meta["server"]["round"] == 3
    assert meta["clock"] == round(rounds(run)[-1]["virtual_s"] * 1e6)
    assert meta["metrics_offset"] == (run / "metrics.jsonl").stat().st_size
    assert arrays["server/vector"].dtype == np.float32


@pytest.mark.parametrize(("every", "saved"), [(1, [0, 1, 2, 3, 4, 5]), (2, [0, 2, 4, 5]), (9, [0, 5])])
def test_checkpoints_are_saved_when_they_are_due(tmp_path, monkeypatch, every, saved):
    seen, save = [], checkpoint.save

    def watching(folder, arrays, meta):
        seen.append(meta["server"]["round"])
        save(folder, arrays, meta)

    monkeypatch.setattr(checkpoint, "save", watching)
    go(tmp_path / "run", "schedule.rounds=5", f"checkpoint_every={every}")
    assert seen == saved


def test_round_0_is_the_frozen_start(tmp_path):
    """Before training the head is zero: every class is as likely, whatever the sentence."""
    go(tmp_path / "run")
    start = evaluations(tmp_path / "run")[0]
    assert start["round"] == 0
    assert start["loss"] == pytest.approx(np.log(3), rel=1e-6)


def test_training_learns_something(tmp_path):
    go(tmp_path / "run", "schedule.rounds=12", "local.steps=6", "local.lr=0.01")
    scores = evaluations(tmp_path / "run")
    assert scores[-1]["accuracy"] > scores[0]["accuracy"] + 0.2
    assert scores[-1]["loss"] < scores[0]["loss"] - 0.1
    losses = [e["loss"] for e in rounds(tmp_path / "run")]
    assert losses[-1] < losses[0]


# Clients' evaluations are replies like any others


def replied(monkeypatch, change) -> None:
    """Let ``change`` (client, message) -> messages stand between the clients' evaluations and the server."""
    pull = CohortGrid.pull_messages

    def changed(self, ids):
        out = []
        for message in pull(self, ids):
            train = message.metadata.message_type != "evaluate" or message.has_error()
            out += [message] if train else change(message.metadata.src_node_id - 1_000_000, message)
        return out

    monkeypatch.setattr(CohortGrid, "pull_messages", changed)


def test_a_client_that_claims_nonsense_is_left_out(tmp_path, monkeypatch):
    def lie(client: int, message: Message) -> list[Message]:
        reply = EvaluateReply.from_record(message.content)
        if client == 1:
            message.content["metrics"]["accuracy"] = float("nan")
        if client == 2:
            message.content["header"]["client"] = 0
        if client == 3:
            del message.content["metrics"]["accuracy"]
        assert reply.client == client
        return [message]

    go(tmp_path / "honest")
    replied(monkeypatch, lie)
    go(tmp_path / "run")
    (event,), (honest,) = evaluations(tmp_path / "run", "clients"), evaluations(tmp_path / "honest", "clients")
    assert event["per_client"] == [honest["per_client"][0], None, None, None]
    assert event["mean"] == honest["per_client"][0]


def test_an_evaluation_that_comes_twice_counts_once(tmp_path, monkeypatch):
    go(tmp_path / "honest")
    replied(monkeypatch, lambda client, message: [message, message])
    go(tmp_path / "run")
    (event,), (honest,) = evaluations(tmp_path / "run", "clients"), evaluations(tmp_path / "honest", "clients")
    assert event["per_client"] == honest["per_client"]
    assert None not in event["per_client"]


def test_where_nobody_answers_there_is_no_line(tmp_path, monkeypatch):
    def spoil(client: int, message: Message) -> list[Message]:
        message.content["metrics"]["loss"] = float("inf")
        return [message]

    replied(monkeypatch, spoil)
    go(tmp_path / "run", "evaluation.clients=always")
    assert evaluations(tmp_path / "run", "clients") == []


def test_the_first_round_does_not_depend_on_what_was_shared(tmp_path):
    """Runs that share a loaded base leave it as they found it."""
    go(tmp_path / "a", shared=SHARED)
    go(tmp_path / "other", "adapter=peft", "local.lr=0.5", shared=SHARED)
    go(tmp_path / "b", shared=SHARED)
    go(tmp_path / "alone", shared=None)
    assert metrics(tmp_path / "a") == metrics(tmp_path / "b") == metrics(tmp_path / "alone")
