"""What happens at a node: its clients' messages become jobs, jobs become cohorts, results become replies.

Work is idempotent, since Flower may deliver a message twice: a job is a pure function of the request and of what the
client remembered before it, and the memory from before its newest job is kept until the next one comes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from flwr.app import Error, Message
from flwr.common.constant import ErrorCode

from clients.behaviours.base import Behaviour, ReplyFields
from clients.data.federated import FederatedData
from clients.local.training import Fit, LocalTraining, Memory, Work
from clients.trainer import Trainer
from fl.evaluation import numbers
from fl.messages import EvaluateReply, EvaluateRequest, MalformedMessage, TrainReply, TrainRequest


@dataclass
class Remembered:
    """A client's memory before and after its newest job, ``round``."""

    round: int
    before: Memory
    after: Memory


class Node:
    """Trains and evaluates the logical clients of one Flower node.

    ``layout`` is the hash of the state's layout: a request for another is refused with an error reply. ``memories``
    holds what clients keep between their jobs; a checkpoint saves it (`memory_arrays`, `restore_memories`).
    """

    def __init__(
        self, trainer: Trainer, data: FederatedData, local: LocalTraining, behaviour: Behaviour, seed: int, layout: str
    ):
        self.trainer, self.data, self.local, self.behaviour = trainer, data, local, behaviour
        self.seed, self.layout = seed, layout
        self.memories: dict[int, Remembered] = {}
        self.affected = behaviour.affected(len(data), seed)

    def train(self, messages: Sequence[Message]) -> list[Message]:
        """A reply to each message, an error among them where a job can't be done; none from a client that is silent."""
        replies: list[Message] = []
        works: list[Work] = []
        requests: list[tuple[Message, TrainRequest]] = []
        for message in messages:
            try:
                request = TrainRequest.from_record(message.content)
                works.append(self._work(request))
                requests.append((message, request))
            except MalformedMessage as error:
                replies.append(_error(str(error), message))
        for (message, request), fit in zip(requests, self.trainer.train(works), strict=True):
            reply = self._reply(request, fit, message)
            replies += [] if reply is None else [reply]
        return replies

    def _work(self, request: TrainRequest) -> Work:
        if request.layout != self.layout:
            raise MalformedMessage("layout", f"this node's adapter has layout {self.layout}, not {request.layout:.40}")
        if not 0 <= request.client < len(self.data):
            raise MalformedMessage("schema", f"this node holds clients 0 to {len(self.data) - 1}, not {request.client}")
        lr = request.extra.get("lr")
        if not isinstance(lr, float):
            raise MalformedMessage("schema", f"a training request carries a learning rate lr, not {lr!r:.40}")
        kept = self.memories.get(request.client)
        memory: Memory = {}
        if kept is not None:
            memory = kept.before if kept.round == request.round else kept.after
        batches = self.local.batches(self.seed, request.client, request.round, self.data.parts[request.client])
        return Work(request.client, request.round, request.state, batches, lr, memory)

    def _reply(self, request: TrainRequest, fit: Fit, message: Message) -> Message | None:
        kept = self.memories.get(request.client)
        if fit.memory or kept is not None:
            again = kept is not None and kept.round == request.round
            before = kept.before if kept is not None and again else (kept.after if kept is not None else {})
            self.memories[request.client] = Remembered(request.round, before, fit.memory)
        honest = ReplyFields(
            request.client, request.round, request.version, request.layout, fit.state - request.state,
            len(self.data.parts[request.client]), fit.steps, fit.tokens, fit.loss,
        )  # fmt: skip
        try:
            said = self.behaviour.act(honest, self.affected, self.seed, "attack", request.client, request.round)
        except Exception as error:
            return _error(f"{type(error).__name__}: {error}", message)
        if said is None:
            return None
        reply = TrainReply(
            said.client, said.round, said.version, said.layout, said.update, said.examples, said.steps, said.tokens,
            float("nan") if said.loss is None else said.loss,
        )  # fmt: skip
        return Message(reply.to_record(), reply_to=message)

    def evaluate(self, messages: Sequence[Message], batch_size: int) -> list[Message]:
        """One reply each: the client's own test set under the request's state."""
        out: list[Message] = []
        for message in messages:
            try:
                request = EvaluateRequest.from_record(message.content)
                out.append(Message(self._score(request, batch_size).to_record(), reply_to=message))
            except MalformedMessage as error:
                out.append(_error(str(error), message))
        return out

    def _score(self, request: EvaluateRequest, batch_size: int) -> EvaluateReply:
        if request.layout != self.layout or not 0 <= request.client < len(self.data):
            raise MalformedMessage("layout", f"no client {request.client} with layout {request.layout:.40} here")
        examples = self.data.client_tests[request.client]
        if len(examples) == 0:
            return EvaluateReply(request.client, request.round, request.version, 0, 0.0)
        scores = self.trainer.evaluate(request.state, "train", examples, batch_size)
        labels = self.data.train.labels if self.trainer.worker.cohort.task == "classification" else None
        found = numbers(scores, None if labels is None else labels[examples])
        loss = found.pop("loss")
        good = {k: float(v) for k, v in found.items() if v is not None}
        return EvaluateReply(request.client, request.round, request.version, len(examples), float(loss or 0.0), good)

    def memory_arrays(self) -> dict[str, np.ndarray]:
        """All clients' memories as named arrays, for a checkpoint."""
        return {
            f"memory/{client}/{kept.round}/{side}/{name}": array
            for client, kept in self.memories.items()
            for side, memory in (("before", kept.before), ("after", kept.after))
            for name, array in memory.items()
        }

    def restore_memories(self, arrays: dict[str, np.ndarray]) -> None:
        """Undo `memory_arrays`; other arrays are ignored."""
        self.memories.clear()
        for path, array in arrays.items():
            if path.startswith("memory/"):
                _, client, round, side, name = path.split("/", 4)
                kept = self.memories.setdefault(int(client), Remembered(int(round), {}, {}))
                getattr(kept, side)[name] = array


def _error(reason: str, message: Message) -> Message:
    return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
