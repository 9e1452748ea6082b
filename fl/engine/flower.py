"""What Shoal does to Flower beyond its public API, all in one place: identity, logging, and quick records.

Checked against flwr 1.41, which is pinned; ``tests/fl/test_flower.py`` fails if another version differs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.task_identity import TaskIdentity

R = TypeVar("R", RecordDict, ArrayRecord, ConfigRecord, MetricRecord)


def ensure_identity(run_id: int) -> None:
    """Make ``flwr.app.Message(...)`` usable in this process.

    Flower 1.41 refuses to make a message before a runtime has said which task this process is. What is already set
    stays: another runtime may have set it, and a grid of ours stamps its own run on every message anyway, so any
    number of grids can be open at once.
    """
    for name, value in (("task_id", 1), ("run_id", run_id), ("node_id", SUPERLINK_NODE_ID)):
        try:
            getattr(TaskIdentity, name)
        except RuntimeError:
            setattr(TaskIdentity, name, value)


def quiet_flower(level: int = logging.WARNING) -> None:
    """Let Flower's log lines go to the root logger only, from ``level`` on.

    Flower adds a handler of its own on import, so under Hydra, which configures the root, each line would come twice.
    """
    logger = logging.getLogger("flwr")
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel(level)


def quick_record(kind: type[R], values: Mapping[str, Any]) -> R:
    """``kind(values)`` for values that are known to be of the right types.

    Flower checks each item as it is set, at 4 us an item, which is most of what a small message costs.
    """
    record = kind()
    record.__dict__["_data"].update(values)
    return record


def server_app(serve: Callable[[Grid], None]) -> ServerApp:
    """The Flower ServerApp that runs ``serve`` on its grid."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        serve(grid)

    return app
