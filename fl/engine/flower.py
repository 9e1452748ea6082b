"""What Flower keeps for the whole process: who we are, and where its log goes. Everything that touches it is here."""

from __future__ import annotations

import logging

from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.supercore.task_identity import TaskIdentity


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
