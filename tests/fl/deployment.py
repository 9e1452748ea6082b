"""A deployment made of threads: each node works through its messages by itself, and time passes as the server waits.

The server's waiting (`fl.wall.sleep`) moves a common time on, node by node in the order in which they are done, so a
node thread takes as long as it says and no test takes that long.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from flwr.app import Error, Message
from flwr.app.message import make_message
from flwr.app.metadata import Metadata

from fl import wall
from fl.messages import TrainReply, TrainRequest

FIRST = 50  # the node of client c is 50 + c
Answer = Callable[[TrainReply], list[TrainReply | Error]]


@dataclass
class Node:
    """A node whose every message takes ``seconds``; it answers with what ``answer`` makes of its reply, and at
    ``gone`` (from, until) it is not there: what it has then is lost."""

    seconds: Callable[[int], float]  # of a job
    answer: Answer
    gone: tuple[float, float]
    inbox: deque[tuple[float, str, TrainRequest]] = field(default_factory=deque)
    due: float | None = None  # when it is done with what it works on


class Deployment:
    """A Flower grid over threads. ``pushes`` are the jobs (client, number, version) of each push, by time."""

    def __init__(self, update: Callable[[int, np.ndarray], np.ndarray], limit_s: float = 400.0):
        self.update, self.limit_s = update, limit_s
        self.time, self.nodes = 0.0, {}
        self.pushes: list[tuple[float, list[tuple[int, int, int]]]] = []
        self.requests: list[TrainRequest] = []
        self.pulled: set[str] = set()
        self.replies: list[tuple[str, Message]] = []
        self.changed = threading.Condition()
        self.open = True

    def add(self, client: int, seconds: Any, answer: Answer = lambda reply: [reply], gone: Any = (0, 0)) -> None:
        length = seconds if callable(seconds) else lambda job: seconds
        node = self.nodes[FIRST + client] = Node(length, answer, gone)
        threading.Thread(target=self._work, args=(node,), daemon=True).start()

    def close(self) -> None:
        with self.changed:
            self.open = False
            self.changed.notify_all()

    # Time

    def monotonic(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        """Let the time pass; every node that is done by then has answered when this returns."""
        with self.changed:
            end = self.time + seconds
            assert end <= self.limit_s, "the server waits without end"
            while due := [n.due for n in self.nodes.values() if n.due is not None and n.due <= end]:
                self.time = max(self.time, min(due))
                self.changed.notify_all()
                assert self.changed.wait(10)
            self.time = end

    def _work(self, node: Node) -> None:
        with self.changed:
            while True:
                self.changed.wait_for(lambda: not self.open or (node.due is not None and node.due <= self.time))
                if not self.open:
                    return
                _, name, request = node.inbox.popleft()
                if not self._away(node, node.due):
                    self._reply(name, request, node)
                node.due, done = None, node.due
                self._begin(node, done)
                self.changed.notify_all()

    def _begin(self, node: Node, now: float) -> None:
        if node.due is None and node.inbox:
            pushed, _, request = node.inbox[0]
            node.due = max(now, pushed) + node.seconds(request.round)

    def _reply(self, name: str, request: TrainRequest, node: Node) -> None:
        update = self.update(request.client, request.state).astype(np.float32)
        job = (request.client, request.round, request.version, request.layout)
        for said in node.answer(TrainReply(*job, update, 10, 5, 7, 0.5)):
            metadata = Metadata(1, f"r{name}", FIRST + request.client, 0, name, "", 0.0, 60.0, "train")
            error = isinstance(said, Error)
            content = make_message(metadata, error=said) if error else make_message(metadata, said.to_record())
            self.replies.append((name, content))

    @staticmethod
    def _away(node: Node, time: float) -> bool:
        return node.gone[0] <= time < node.gone[1]

    # The grid

    def get_node_ids(self) -> list[int]:
        return [n for n, node in self.nodes.items() if not self._away(node, self.time)]

    def push_messages(self, messages):
        with self.changed:
            requests = [TrainRequest.from_record(m.content) for m in messages]
            self.requests += requests
            self.pushes.append((self.time, [(r.client, r.round, r.version) for r in requests]))
            ids = []
            for message, request in zip(messages, requests, strict=True):
                ids.append(f"m{len(self.pushes)}-{request.client}")
                message.metadata.__dict__["_message_id"] = ids[-1]
                node = self.nodes[message.metadata.dst_node_id]
                if not self._away(node, self.time):
                    node.inbox.append((self.time, ids[-1], request))
                    self._begin(node, self.time)
            return ids

    def pull_messages(self, ids):
        with self.changed:
            wanted = set(ids)
            here = [m for name, m in self.replies if name in wanted]
            self.pulled.update(name for name, _ in self.replies if name in wanted)
            self.replies = [(name, m) for name, m in self.replies if name not in wanted]
            return here


def deploy(monkeypatch, update: Callable[[int, np.ndarray], np.ndarray], longest_s: float = 0.01) -> Deployment:
    """A deployment without nodes, whose time is the wall's."""
    made = Deployment(update)
    monkeypatch.setattr(wall, "monotonic", made.monotonic)
    monkeypatch.setattr(wall, "sleep", made.sleep)
    monkeypatch.setattr(wall, "LONGEST_S", longest_s)
    return made
