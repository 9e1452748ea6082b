"""The client side: a Flower ClientApp that trains all logical clients of a node in one call."""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fl.engine.cohort_grid import cohort_app
from fl.node import Node


def client_app(node: Node, batch_size: int) -> ClientApp:
    """The ClientApp of ``node``, for use under a `fl.engine.cohort_grid.CohortGrid`."""

    def train(messages: list[Message], context: Context) -> list[Message]:
        return node.train(messages)

    def evaluate(messages: list[Message], context: Context) -> list[Message]:
        return node.evaluate(messages, batch_size)

    def query(messages: list[Message], context: Context) -> list[Message]:
        return node.query(messages)

    return cohort_app(train, evaluate, query)
