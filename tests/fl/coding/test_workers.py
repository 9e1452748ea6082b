"""Coded sums of chunks' gradients: what they are, that each gradient is computed once, and what a node refuses."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from flwr.app import Message

from clients.adapters.lora import LoRA
from clients.data.federated import FederatedData
from clients.local.training import LocalTraining
from clients.trainer import Plan, Trainer
from clients.worker import Worker
from fl.coding import workers
from fl.coding.codes import Cyclic
from fl.coding.schemes import Task
from fl.engine.cohort_grid import node_id
from fl.engine.flower import ensure_identity
from fl.messages import GradientRequest, MalformedMessage, TrainReply
from fl.node import Node
from privacy.base import Guard
from tests.oracles.cohorts import build, states
from tests.oracles.models import token_set

SAMPLES = 20
BOUNDS = np.array([0, 3, 9, 10, 15, 20])


def _trainer(dropout: float = 0.0) -> Trainer:
    cohort = build("bert", LoRA(rank=3, dropout=dropout), torch.float32)
    sets = {"train": token_set("classification", SAMPLES, 1)}
    return Trainer(Worker(cohort, sets, LocalTraining(steps=1), seed=5), Plan(cohort_size=3))


TRAINER = _trainer()
SIZE = TRAINER.worker.cohort.layout.size
LAYOUT = TRAINER.worker.cohort.layout.hash
STATES = {job: states(TRAINER.worker.cohort, 1, seed=job)[0].numpy().astype(np.float32) for job in (4, 5)}
PARTS = [np.arange(SAMPLES)] * 3


def _workers(trainer: Trainer = TRAINER, parts=PARTS, batch_size: int = 2) -> workers.Workers:
    return workers.Workers(trainer, parts, batch_size, seed=7)


def _task(job: int, chunks, weights=None, part: int = 0) -> Task:
    weights = np.ones(len(chunks)) if weights is None else np.array(weights)
    return Task(job, part, np.array(chunks), weights)


def _request(client: int, *tasks: Task, most: int = 2) -> GradientRequest:
    return workers.request(client, 6, 2, LAYOUT, tasks, BOUNDS, STATES, most)


def _sum(low: int, high: int, job: int, trainer: Trainer = TRAINER) -> np.ndarray:
    """``(1 / N) sum_j (grad l_j, l_j)``, one sample at a time."""
    worker = trainer.worker
    total = np.zeros(SIZE + 1)
    for sample in range(low, high):
        batch = worker._batch("train", [np.array([sample])], None)
        loss, grads = worker.cohort.gradients(torch.from_numpy(STATES[job])[None], batch)
        total += np.concatenate([grads[0].double().numpy(), loss.double().numpy()]) / SAMPLES
    return total


def test_a_chunk_s_gradient_is_its_share_of_the_mean():
    [reply] = _workers().answer([_request(1, _task(4, [1]))])
    assert isinstance(reply, TrainReply)
    coded = reply.arrays["coded/0"]
    assert coded.dtype == np.float64 and coded.shape == (SIZE + 1,)
    true = _sum(3, 9, 4)
    assert np.abs(coded - true).max() < 1e-6 * np.abs(true).max()
    assert (reply.client, reply.round, reply.version, reply.examples, reply.steps) == (1, 6, 2, 6, 3)
    assert reply.loss is None and len(reply.update) == 0
    assert reply.tokens == TRAINER.worker.sets["train"].lengths[3:9].sum()


def test_tasks_of_several_jobs_weigh_their_chunks():
    of = _workers()
    single = {
        (job, c): of.answer([_request(0, _task(job, [c]))])[0].arrays["coded/0"] for job in (4, 5) for c in (0, 2, 4)
    }
    [reply] = of.answer([_request(2, _task(5, [4, 0], [0.5, -3e5]), _task(4, [2], [7.0]))])
    assert np.array_equal(reply.arrays["coded/0"], 0.5 * single[5, 4] - 3e5 * single[5, 0])
    assert np.array_equal(reply.arrays["coded/1"], 7.0 * single[4, 2])
    assert reply.examples == 5 + 3 + 1


def test_what_survivors_decode_is_the_sum_of_chunk_gradients():
    """To 1e-9 of its largest entry, for every set of survivors of a cyclic code."""
    of, code = _workers(), Cyclic(5, 2, seed=1)
    coded = [of.answer([_request(0, _task(4, code.chunks[i], code.weights[i]))])[0].arrays["coded/0"] for i in range(5)]
    chunks = np.array([of.answer([_request(0, _task(4, [c]))])[0].arrays["coded/0"] for c in range(5)])
    assert (chunks == chunks.astype(np.float32)).all()
    true = chunks.sum(0)
    for late in ((), (0,), (3, 4), (1, 3)):
        weights = code.decode(set(range(5)) - set(late))
        found = sum(weights[i] * coded[i] for i in range(5))
        assert np.abs(found - true).max() < 1e-9 * np.abs(true).max()


def test_each_gradient_is_computed_once(monkeypatch):
    of, calls = _workers(), []
    whole = TRAINER.gradients
    monkeypatch.setattr(TRAINER, "gradients", lambda made: calls.extend(made) or whole(made))
    asked = [_request(c, _task(4, [0, 1, 2]), _task(5, [1])) for c in range(3)]
    first = of.answer(asked)
    # Chunks of 3, 6 and 1 samples of one job and of 6 of the other, each in a pass of its own.
    assert sorted(sum(map(len, examples)) for _, examples, _ in calls) == [1, 3, 6, 6]
    again = of.answer([asked[1]])
    assert len(calls) == 4
    assert np.array_equal(again[0].arrays["coded/0"], first[2].arrays["coded/0"])


def test_a_gradient_does_not_depend_on_what_else_was_asked():
    alone = _workers().answer([_request(0, _task(4, [1]))])[0].arrays["coded/0"]
    among = _workers().answer([_request(1, _task(4, [0, 3])), _request(0, _task(4, [1]))])[1].arrays["coded/0"]
    assert np.array_equal(alone, among)


def test_a_chunk_larger_than_a_pass_is_several(monkeypatch):
    of, calls = _workers(batch_size=1), []
    whole = TRAINER.gradients
    monkeypatch.setattr(TRAINER, "gradients", lambda made: calls.extend(made) or whole(made))
    [reply] = of.answer([_request(0, _task(4, [3]))])
    assert [[s.tolist() for s in examples] for _, examples, _ in calls] == [[[10], [11], [12]], [[13], [14]]]
    # Dropout masks are named by the seed, the job and the sample.
    assert [key for *_, keys in calls for key in keys] == [(7, "chunk", 4, sample) for sample in range(10, 15)]
    true = _sum(10, 15, 4)
    assert np.abs(reply.arrays["coded/0"] - true).max() < 1e-6 * np.abs(true).max()


def test_only_the_newest_states_are_kept():
    of = _workers()
    of.answer([_request(0, _task(4, [0])), _request(1, _task(5, [0]))])
    assert [name[0] for name in of.known] == [4, 5]
    of.answer([_request(0, _task(4, [1]), most=1)])
    assert [name[0] for name in of.known] == [4]


def test_two_states_under_one_job_are_two(monkeypatch):
    of = _workers()
    first = of.answer([_request(0, _task(4, [0]))])[0].arrays["coded/0"]
    other = replace(_request(0, _task(4, [0])), state=STATES[5])
    assert not np.array_equal(of.answer([other])[0].arrays["coded/0"], first)


def test_dropout_masks_are_a_chunk_s_and_a_job_s():
    trainer = _trainer(dropout=0.5)
    ask = [_request(0, _task(4, [0])), _request(1, _task(4, [0])), _request(2, _task(4, [1]))]
    one, two, _ = (r.arrays["coded/0"] for r in _workers(trainer).answer(ask))
    assert np.array_equal(one, two)
    plain = _workers().answer(ask[:1])[0].arrays["coded/0"]
    assert not np.allclose(one, plain)
    later = [replace(ask[0], arrays={**ask[0].arrays, "jobs": np.array([9], np.uint32)})]
    assert not np.allclose(one, _workers(trainer).answer(later)[0].arrays["coded/0"])


WRONG = {
    "no jobs": ({"jobs": None}, "holds the arrays"),
    "jobs of another type": ({"jobs": np.array([4.0])}, "holds the arrays"),
    "no task": ({"jobs": np.zeros(0, np.uint32), "counts": np.zeros(0, np.uint32)}, "don't match"),
    "too many chunks": ({"counts": np.array([3], np.uint32)}, "don't match"),
    "a weight that is none": ({"weights": np.array([1.0, np.nan])}, "a weight is none"),
    "ends": ({"ranges": np.array([0, 3, 3], np.uint32)}, "2 chunks have no 3 ends"),
    "an empty range": ({"ranges": np.array([0, 3, 4, 4], np.uint32)}, "range of the 20 samples"),
    "beyond the data": ({"ranges": np.array([0, 3, 4, 21], np.uint32)}, "range of the 20 samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_request_that_makes_no_sense_is_refused(case):
    change, text = WRONG[case]
    good = _request(0, _task(4, [0, 1]))
    arrays = {k: v for k, v in {**good.arrays, **change}.items() if v is not None}
    found = _workers().answer([replace(good, arrays=arrays), good])
    assert isinstance(found[0], MalformedMessage) and text in str(found[0])
    assert isinstance(found[1], TrainReply)


def test_states_are_checked():
    two = _request(0, _task(4, [0]), _task(5, [0]))
    for bad in ({}, {"state/5": STATES[5][:-1]}, {"state/5": STATES[5].astype(np.float64)}):
        arrays = {k: v for k, v in two.arrays.items() if k != "state/5"} | bad
        [found] = _workers().answer([replace(two, arrays=arrays)])
        assert isinstance(found, MalformedMessage) and "state of job 5" in str(found)


def test_data_of_clients_own_are_never_used():
    own = [np.arange(SAMPLES), np.arange(1, SAMPLES + 1) % SAMPLES]
    [found] = _workers(parts=own).answer([_request(0, _task(4, [0]))])
    assert isinstance(found, MalformedMessage) and "data of their own" in str(found)


def _node(guard: Guard | None = None, secure=None) -> Node:
    data = FederatedData(TRAINER.worker.sets["train"], TRAINER.worker.sets["train"], PARTS, [np.zeros(0, int)] * 3)
    behaviour = type("Nobody", (), {"affected": lambda *_: frozenset()})()
    local = LocalTraining(steps=1, batch_size=2)
    return Node(TRAINER, data, local, behaviour, 7, TRAINER.worker.cohort.space, guard, secure=secure)


def _sent(request: GradientRequest) -> Message:
    ensure_identity(1)
    return Message(request.to_record(), node_id(request.client), "query")


def test_a_node_answers_over_the_wire():
    node, request = _node(), _request(1, _task(4, [0, 2], [2.0, -1.0]), _task(5, [1]))
    [reply] = node.query([_sent(request)])
    got = TrainReply.from_record(reply.content)
    [right] = _workers().answer([request])
    assert {k: a.tobytes() for k, a in got.arrays.items()} == {k: a.tobytes() for k, a in right.arrays.items()}
    assert workers.answers(request, SIZE) == dict.fromkeys(got.arrays, ("float64", SIZE + 1))


def test_a_node_with_private_data_refuses():
    class Private(Guard):
        pass

    for node in (_node(Private()), _node(secure=object())):
        [reply] = node.query([_sent(_request(1, _task(4, [0])))])
        assert reply.has_error() and "private" in str(reply.error.reason)


def test_a_node_says_what_is_wrong():
    other = replace(_request(1, _task(4, [0])), layout="other")
    wrong = replace(_request(2, _task(4, [0])), arrays={})
    replies = _node().query([_sent(other), _sent(wrong), _sent(_request(0, _task(4, [0])))])
    reasons = [str(r.error.reason) for r in replies if r.has_error()]
    assert len(reasons) == 2 and "layout" in reasons[0] and "holds the arrays" in reasons[1]
    assert sum(not r.has_error() for r in replies) == 1
