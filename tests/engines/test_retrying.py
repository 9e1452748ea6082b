"""Requests to a SuperLink are made again while it is in trouble, and only then."""

from __future__ import annotations

import logging
import ssl
import threading

import httpx
import pytest
from flwr.app import Error, Message, RecordDict
from flwr.app.message import make_message
from flwr.app.metadata import Metadata
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.constant import SYSTEM_MESSAGE_TYPE
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.run import Run, RunNotRunningException
from flwr.superlink.grid import HttpGrid

from fl.engine.flower import ensure_identity
from fl.engine.retrying import Retry, RetryGrid
from fl.errors import RunStopped

AWAY = httpx.ConnectError("refused")


def status(code: int) -> httpx.HTTPStatusError:
    request = httpx.Request("POST", "http://x/v1/push")
    return httpx.HTTPStatusError("", request=request, response=httpx.Response(code, request=request))


class Waiting(threading.Event):
    """A stop event that passes time on a clock of its own instead of sleeping."""

    def __init__(self):
        super().__init__()
        self.now, self.pauses = 0.0, []

    def wait(self, timeout=None):
        self.now += timeout
        self.pauses.append(timeout)
        return self.is_set()


def patient(patience_s=120.0, away_s=None):
    stop = Waiting()
    return Retry("link", patience_s, away_s, stop=stop, clock=lambda: stop.now), stop


def failing(*errors, result="done"):
    """A call that raises ``errors`` one after another, and then returns ``result``."""
    left = list(errors)

    def call(*args, **kwargs):
        call.times += 1
        if left:
            raise left.pop(0)
        return (result, *args) if args else result

    call.times = 0
    return call


@pytest.mark.parametrize("error", [AWAY, httpx.ReadTimeout("late"), status(500), status(503)], ids=str)
def test_it_is_tried_again_with_growing_pauses_and_two_lines_in_the_log(error, caplog):
    retry, stop = patient()
    call = failing(*[error] * 12)
    with caplog.at_level(logging.DEBUG):
        assert retry.invoke(call, 3) == ("done", 3)
    assert call.times == 13 and len(stop.pauses) == 12
    assert stop.pauses[0] == 0.25 and stop.pauses == sorted(stop.pauses) and stop.pauses[-1] == 5.0
    assert [line.levelname for line in caplog.records] == ["WARNING", "WARNING"]
    assert "link gives an error" in caplog.text and f"answers again after {stop.now:.1f} s" in caplog.text
    retry.invoke(failing())
    assert len(caplog.records) == 2


def test_calls_in_trouble_together_log_one_start_and_one_end(caplog):
    retry, _ = patient()
    outer = failing(AWAY)

    def call():
        result = outer()  # in trouble at first; then another call's trouble comes and goes within this one's
        retry.invoke(failing(AWAY, AWAY))
        return result

    assert retry.invoke(call) == "done"
    assert ["answers again" in record.message for record in caplog.records] == [False, True]


def test_patience_ends_with_the_error_itself():
    retry, stop = patient(10.0)
    with pytest.raises(httpx.ConnectError):
        retry.invoke(failing(*[AWAY] * 1000))
    assert 10.0 <= stop.now < 15.0


def test_a_superlink_that_is_away_has_a_patience_of_its_own():
    retry, stop = patient(10.0, float("inf"))
    assert retry.invoke(failing(*[AWAY, status(502), status(504)] * 100)) == "done"
    assert stop.now > 1000
    with pytest.raises(httpx.HTTPStatusError):
        retry.invoke(failing(*[status(500)] * 100))


@pytest.mark.parametrize("code", [400, 401, 404, 412, 413])
def test_a_4xx_is_not_tried_again(code, caplog):
    retry, stop = patient()
    with pytest.raises(httpx.HTTPStatusError):
        retry.invoke(failing(status(code)))
    assert not stop.pauses and not caplog.records


def test_403_means_that_the_run_is_over():
    with pytest.raises(RunNotRunningException):
        patient()[0].invoke(failing(status(403)))


def test_what_happens_before_the_first_answer_shows_a_wrong_certificate():
    error = httpx.ConnectError("no")
    error.__cause__ = ssl.SSLCertVerificationError("unknown CA")
    retry, stop = patient()
    with pytest.raises(httpx.ConnectError):
        retry.invoke(failing(error))
    assert not stop.pauses
    retry.invoke(failing())
    assert retry.invoke(failing(error)) == "done"


def test_stop_ends_the_waiting():
    retry, stop = patient(away_s=float("inf"))
    stop.set()
    with pytest.raises(httpx.ConnectError):
        retry.invoke(failing(*[AWAY] * 1000))
    assert len(stop.pauses) == 1


def test_one_try_where_flower_says_so():
    retry, stop = patient()
    retry.max_tries = 1
    with pytest.raises(httpx.ConnectError):
        retry.invoke(failing(AWAY))
    assert not stop.pauses


class FakeGrid(Grid):
    """Keeps one message an id, as a SuperLink does; ``errors[method]`` are raised first, after the work if "after"."""

    def __init__(self, **errors):
        self.errors, self.kept, self.pushes, self.replies = errors, {}, 0, []

    def _trouble(self, name):
        if self.errors.get(name):
            raise self.errors[name].pop(0)

    @property
    def run(self):
        return self._run

    def set_run(self, run):
        self._run = run

    def create_message(self, *args, **kwargs):
        raise NotImplementedError

    def get_node_ids(self):
        self._trouble("nodes")
        return iter([3, 4])

    def push_messages(self, messages):
        self.pushes += 1
        for message in messages:
            self.kept.setdefault(message.object_id, message)
            self._trouble("push")
        return [message.object_id for message in messages]

    def pull_messages(self, message_ids):
        self._trouble("pull")
        got = [reply for reply in self.replies if reply.metadata.reply_to_message_id in set(message_ids)]
        self.replies = [reply for reply in self.replies if reply not in got]
        return got

    def send_and_receive(self, messages, *, timeout=None):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def _identity():
    ensure_identity(1)


def grid_over(grid, patience_s=120.0):
    retry, stop = patient(patience_s)
    return RetryGrid(grid, retry=retry), stop


def system_error(message_id: str) -> Message:
    """What Flower's grid makes of a reply whose objects never came."""
    metadata = Metadata(1, "", SUPERLINK_NODE_ID, SUPERLINK_NODE_ID, message_id, "", 1.0, 0, SYSTEM_MESSAGE_TYPE)
    return make_message(metadata, error=Error(ErrorCode.MESSAGE_UNAVAILABLE, "objects"))


def test_a_push_that_failed_half_way_keeps_each_message_once():
    below = FakeGrid(push=[status(500), AWAY, ObjectPushError("o", 1, "s")])
    grid, _ = grid_over(below)
    messages = [Message(RecordDict(), node, "train") for node in (3, 4)]
    ids = grid.push_messages(iter(messages))
    assert below.pushes == 4
    assert ids == [m.object_id for m in messages] and list(below.kept) == ids
    assert grid.push_messages([]) == [] and below.pushes == 4


def test_an_object_that_is_never_stored_stops_the_run(monkeypatch):
    monkeypatch.setattr("fl.engine.retrying.time.sleep", lambda seconds: None)
    grid, _ = grid_over(FakeGrid(push=[ObjectPushError("o", 1, "s")] * 100))
    with pytest.raises(RunStopped, match="ObjectPushError"):
        grid.push_messages([Message(RecordDict(), 3, "train")])


@pytest.mark.parametrize(("name", "call"), [("nodes", "get_node_ids"), ("pull", "pull_messages")])
def test_patience_ends_with_a_way_out(name, call):
    grid, _ = grid_over(FakeGrid(**{name: [AWAY, status(500), AWAY]}), 10.0)
    args = [["a"]] if name == "pull" else []
    assert list(getattr(grid, call)(*args)) == ([] if name == "pull" else [3, 4])
    grid, stop = grid_over(FakeGrid(**{name: [status(500)] * 1000}), 10.0)
    with pytest.raises(RunStopped, match=r"after 10 s \(HTTP 500.*--database.*shoal run --resume"):
        getattr(grid, call)(*args)
    assert stop.now < 20


def test_a_refusal_is_not_called_impatience():
    grid, stop = grid_over(FakeGrid(nodes=[status(404)]))
    with pytest.raises(RunStopped, match="refuses a request"):
        grid.get_node_ids()
    assert not stop.pauses


def test_a_reply_without_its_objects_is_attributed(monkeypatch):
    monkeypatch.setattr("fl.engine.retrying.time.sleep", lambda seconds: None)
    below = FakeGrid(pull=[AWAY])
    grid, _ = grid_over(below)
    message, other = (Message(RecordDict(), node, "train") for node in (3, 4))
    good = Message(RecordDict(), reply_to=_numbered(other))
    below.replies = [system_error(message.object_id), good]
    replies = grid.send_and_receive([message, other], timeout=60)
    assert {r.metadata.reply_to_message_id: r.has_error() for r in replies} == {
        message.object_id: True, other.object_id: False,
    }  # fmt: skip


def _numbered(message: Message) -> Message:
    message.metadata.__dict__["_message_id"] = message.object_id
    return message


def test_a_timeout_gives_what_is_there():
    grid, _ = grid_over(FakeGrid())
    assert grid.send_and_receive([Message(RecordDict(), 3, "train")], timeout=0) == []


def test_flowers_grid_repeats_single_requests(monkeypatch):
    """The trouble is within one pull: the request for the nodes is made again, the rest is not."""
    answers, seen = [500, 503, 200], []

    def answer(request):
        seen.append(request.url.path)
        return httpx.Response(answers.pop(0))

    below = HttpGrid("127.0.0.1:1", insecure=True, token="t")
    client = below._runtime_client  # connected before it is wrapped, as Flower's runtime does
    client._client = httpx.Client(transport=httpx.MockTransport(answer))
    below.set_run(Run.create_empty(1))
    grid, stop = grid_over(below)
    assert grid.get_node_ids() == [] and len(seen) == 3 and len(stop.pauses) == 2
    assert grid.run.run_id == 1
    grid.close()
    answers[:] = [403]
    with pytest.raises(RunNotRunningException):
        grid.pull_messages(["a"])
    answers[:] = [500] * 1000
    with pytest.raises(RunStopped):
        grid.pull_messages(["a"])
