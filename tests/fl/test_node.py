"""A node between Flower's messages and the trainer: what it refuses, and that a message may come twice."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import Message

from clients.adapters.initial.base import DataDriven
from clients.adapters.space import Space
from clients.behaviours.base import ReplyFields
from clients.behaviours.faulty import Faulty
from clients.behaviours.none import Honest
from clients.layout import Layout
from clients.local.training import Fit, LocalTraining, Work
from clients.worker import Scores
from fl.engine.cohort_grid import node_id
from fl.engine.flower import ensure_identity
from fl.messages import EvaluateReply, EvaluateRequest, StatisticRequest, TrainReply, TrainRequest
from fl.node import Node
from fl.schedules.base import MESSAGE_TYPE

SIZE = 4
SPACE = Space(Layout(("w",), ((SIZE,),)))
LAYOUT = SPACE.layout.hash


class Tokens:
    labels = np.array([0, 1, 1, 0, 1, 0])


class Data:
    """Three clients; the last one has no test set."""

    parts = (np.array([0, 1]), np.array([2]), np.array([3, 4, 5]))
    client_tests = (np.array([5, 0]), np.array([1]), np.array([], dtype=int))
    train = Tokens()
    poison = None

    def __len__(self):
        return 3


class Trainer:
    """Adds the learning rate to every coordinate, and counts a client's jobs in its memory."""

    def __init__(self, task="classification"):
        cohort = type("Cohort", (), {"task": task})()
        self.worker = type("Worker", (), {"cohort": cohort})()
        self.seen: list[Work] = []

    def train(self, works):
        self.seen += works
        return [
            Fit(
                w.client, w.start + np.float32(w.lr), 0.5, len(w.batches), 7,
                {"jobs": w.memory.get("jobs", np.zeros(1)) + 1},
            )
            for w in works
        ]  # fmt: skip

    def evaluate(self, state, name, examples, batch_size, base):
        assert name == "train"
        loss = np.full(len(examples), float(state[0]))
        return Scores(loss, np.full(len(examples), 2), np.ones(len(examples), np.int64))


def node(behaviour=None, trainer=None) -> Node:
    ensure_identity(1)
    return Node(trainer or Trainer(), Data(), LocalTraining(steps=2, batch_size=1), behaviour or Honest(), 9, SPACE)


def request(client: int, round: int = 1, version: int = 0, kind=TrainRequest, layout: str = LAYOUT, **extra) -> Message:
    state = np.arange(SIZE, dtype=np.float32)
    asked = kind(
        client, round, version, state, layout, {"sent": "adapter", "train": "adapter", **(extra or {"lr": 0.5})}
    )
    return Message(asked.to_record(), node_id(max(client, 0)), MESSAGE_TYPE[kind.kind])


def test_a_job_is_what_the_request_says():
    made = node()
    (reply,) = made.train([request(2, 3, 5)])
    found = TrainReply.from_record(reply.content)
    assert (found.client, found.round, found.version, found.layout) == (2, 3, 5, LAYOUT)
    assert (found.examples, found.steps, found.tokens, found.loss) == (3, 2, 7, 0.5)
    np.testing.assert_array_equal(found.update, np.full(SIZE, 0.5))
    (work,) = made.trainer.seen
    assert (work.client, work.round, work.lr) == (2, 3, 0.5)
    expected = made.local.batches(9, 2, 3, Data.parts[2])
    assert [b.tolist() for b in work.batches] == [b.tolist() for b in expected]


def test_all_jobs_of_a_call_train_together_and_are_answered_one_by_one():
    made = node()
    messages = [request(0), request(1), request(2)]
    replies = made.train(messages)
    assert len(made.trainer.seen) == 3
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert made.train([]) == []


WRONG = {
    "another layout": {"client": 1, "layout": "ffff"},
    "no such client": {"client": 3},
    "a client below zero": {"client": -1},
    "no learning rate": {"client": 1, "mu": 1.0},
    "a learning rate that is text": {"client": 1, "lr": "fast"},
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_job_that_cannot_be_done_is_an_error_and_the_others_are_done(case):
    made = node()
    replies = made.train([request(0), request(**WRONG[case])])
    good = [r for r in replies if not r.has_error()]
    assert [TrainReply.from_record(r.content).client for r in good] == [0]
    assert len(replies) == 2
    assert [w.client for w in made.trainer.seen] == [0]


def test_what_is_no_request_is_an_error():
    evaluation = request(1, kind=EvaluateRequest)
    (reply,) = node().train([evaluation])
    assert reply.has_error()


# Memory


def remembered(made: Node, client: int) -> float:
    return float(made.memories[client].after["jobs"][0])


def test_a_job_that_comes_twice_is_the_same_job():
    made = node()
    for round in (1, 2):
        first, second = made.train([request(0, round)]) + made.train([request(0, round)])
        assert first.content == second.content
        assert remembered(made, 0) == round


def test_memory_goes_from_job_to_job_and_only_with_its_client():
    made = node()
    made.train([request(0, 1), request(1, 1)])
    made.train([request(0, 4)])
    assert (remembered(made, 0), remembered(made, 1)) == (2, 1)
    assert 2 not in made.memories


def test_memory_is_saved_and_restored():
    made, other = node(), node()
    for round in (1, 2):
        made.train([request(0, round), request(2, round)])
    arrays = made.arrays()
    other.train([request(1, 1)])  # what it had is gone then
    other.restore(arrays | {"server/vector": np.zeros(3)})
    assert set(other.memories) == {0, 2}
    for again in (2, 3):  # the newest job may come again, and the next one comes
        for client in (0, 2):
            a, b = made.train([request(client, again)]) + other.train([request(client, again)])
            assert a.content == b.content
            assert remembered(made, client) == remembered(other, client) == again
    assert {k: v.tolist() for k, v in made.arrays().items()} == {k: v.tolist() for k, v in other.arrays().items()}


# Behaviours


def test_affected_clients_answer_as_they_are_told():
    replies = node(Faulty(kind="zero_weight", clients=[1])).train([request(0), request(1)])
    assert [TrainReply.from_record(r.content).examples for r in replies] == [2, 0]
    replies = node(Faulty(kind="silent", clients=[1])).train([request(0), request(1)])
    assert [TrainReply.from_record(r.content).client for r in replies] == [0]
    first, second = node(Faulty(kind="crash", clients=[1])).train([request(0), request(1)])
    assert not first.has_error()
    assert second.has_error()
    assert "InjectedCrash" in second.error.reason


def test_a_client_that_has_no_loss_says_none():
    class Mute(Faulty):
        def apply(self, reply: ReplyFields, *key) -> ReplyFields:
            return replace(reply, loss=None)

    (reply,) = node(Mute(clients=[0])).train([request(0)])
    assert "loss" not in reply.content["metrics"]
    assert TrainReply.from_record(reply.content).loss is None


# Evaluation


def test_a_client_is_tested_on_its_own_test_set():
    message = request(0, kind=EvaluateRequest, version=3)
    (reply,) = node().evaluate([message], 8)
    found = EvaluateReply.from_record(reply.content)
    assert (found.client, found.version, found.examples) == (0, 3, 2)
    assert found.metrics["accuracy"] == 0.0  # its labels are 0, 0 and 1 is always said
    (reply,) = node().evaluate([request(1, kind=EvaluateRequest)], 8)
    assert EvaluateReply.from_record(reply.content).metrics["accuracy"] == 1.0


def test_a_causal_model_has_a_perplexity():
    (reply,) = node(trainer=Trainer("causal_lm")).evaluate([request(0, kind=EvaluateRequest)], 8)
    found = EvaluateReply.from_record(reply.content)
    assert (found.loss, found.metrics) == (0.0, {"perplexity": 1.0})


def test_a_client_without_a_test_set_says_so():
    (reply,) = node().evaluate([request(2, kind=EvaluateRequest)], 8)
    found = EvaluateReply.from_record(reply.content)
    assert (found.examples, found.metrics) == (0, {})


def test_an_evaluation_that_cannot_be_done_is_an_error():
    wrong = [request(7, kind=EvaluateRequest), request(0, kind=EvaluateRequest, layout="x"), request(0)]
    assert all(reply.has_error() for reply in node().evaluate(wrong, 8))


def test_numbers_of_examples_stay_where_they_are_secret():
    made = node()
    made.sizes_hidden = True
    replies = made.evaluate([request(0, kind=EvaluateRequest), request(2, kind=EvaluateRequest)], 8)
    assert [EvaluateReply.from_record(r.content).examples for r in replies] == [1, 0]  # nothing to test on is told


@pytest.mark.parametrize(
    ("local", "hidden", "steps"),
    [
        (LocalTraining(epochs=2.0, batch_size=1), True, [0, 0]),
        (LocalTraining(epochs=2.0, batch_size=1), False, [4, 6]),
        (LocalTraining(steps=3, batch_size=1), True, [3, 3]),
    ],
)
def test_masked_replies_tell_no_steps_that_depend_on_the_examples(local, hidden, steps):
    class Masks:
        def mask(self, request, update, examples):
            return {"masked": np.zeros(1, np.uint32)}

    made = node()
    made.secure, made.local, made.sizes_hidden = Masks(), local, hidden
    replies = made.train([request(0), request(2)])
    assert [TrainReply.from_record(r.content).steps for r in replies] == steps


# Statistics


@pytest.mark.parametrize(
    ("source", "answering"), [("public", []), ("client", [1]), ("clients", [0, 1, 2]), ("private", [0, 1, 2])]
)
def test_only_clients_that_the_declared_start_asks_give_a_statistic(source, answering, monkeypatch):
    class Start(DataDriven):
        def start(self, site):
            raise NotImplementedError

    def sums(init, trainer, name, holders, seed):
        return [(len(examples), np.ones(3)) for _, examples in holders]

    monkeypatch.setattr("fl.node.sums", sums)
    made = node()
    made.initialisation = Start(source=source, client=1)
    replies = made.query([request(client, 0, kind=StatisticRequest) for client in range(3)])
    good = [TrainReply.from_record(r.content).client for r in replies if not r.has_error()]
    assert good == answering
    assert all(f"adapter.init.source={source}" in r.error.reason for r in replies if r.has_error())
    assert len(replies) == 3
