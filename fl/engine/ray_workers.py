"""A Flower grid over Ray workers, the actors of Flower's Ray simulation.

Node i of the grid is one worker, Flower's `ClientAppActor`, for good: what a worker keeps in memory is there for the
next message. Of Flower 1.41's simulation runtime (``flwr.simulation.ray_transport``) this uses the actor and its count
of the workers that fit, not the in-memory SuperLink above them, which looks for messages every 0.1 s, runs at most
min(32, cpus + 4) of them at a time, names its nodes at random and gives the messages after a worker's death to the
dead worker again.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import queue
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Error, Message
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid

from clients.tuning import processors
from fl.engine.flower import ensure_identity, server_app
from fl.engine.in_process import FIRST_NODE, InProcessGrid
from fl.errors import ConfigError, RunStopped, ShoalError

if TYPE_CHECKING:
    from fl.engine.settings import Ray

log = logging.getLogger(__name__)
App = Callable[[Message, Context], Message]
START_S = 120.0  # how long a worker may take to start
HEAD_S = 10.0  # how long a standing head may take to answer
POLL_S = 0.02
DEATHS = 2  # a worker that dies so often without an answer in between ends the run
# Of the processes that Ray starts. Its own defaults send statistics home and hide GPUs from workers that ask for none.
QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class _Answer:
    """``app`` in a worker: what it raises becomes the same error reply as in one process."""

    app: App

    def __call__(self, message: Message, context: Context) -> Message:
        ensure_identity(message.metadata.run_id)
        try:
            return self.app(message, context)
        except Exception as error:
            log.error("node %d raised on a %s message", message.metadata.dst_node_id, message.metadata.message_type,
                      exc_info=error)  # fmt: skip
            reason = f"{type(error)}:<'{error}'>"
            return Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)


def simulate(settings: Ray, server_main: Callable[[Grid], None], client_app: App, clients: int) -> None:
    """Run ``server_main(grid)`` with a grid of ``engine.nodes`` workers (at most ``clients``) that run ``client_app``.

    The server runs in the calling thread, so what it raises reaches the caller, Ctrl-C included; the workers end with
    it. ``client_app`` is pickled with every message, so it should be small (`LazyApp`). Raises `ConfigError` where Ray
    is not installed, no worker fits or the address has no Ray, and from the grid `RunStopped` where a worker's
    process dies `DEATHS` times without an answer in between, or all are gone.
    """
    with Workers(settings, clients) as workers, RayGrid(workers, client_app) as grid:
        server_app(server_main)(grid, grid.server_context())


def require() -> None:
    """Raises `ConfigError` where Ray is not installed."""
    if importlib.util.find_spec("ray") is None:
        way_out = "Install it: pip install 'shoal-fl[ray]' (Ray 2.55.1 is for Python 3.10 to 3.14)."
        raise ConfigError("engine", "ray", "Ray is not installed here", way_out)


def check_head(address: str) -> None:
    """Raises `ConfigError` where nothing listens at ``address``; Ray itself would try for minutes."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), HEAD_S).close()
    except (OSError, ValueError) as error:
        allowed = f"HOST:PORT of a running Ray head ({_line(error)})"
        raise ConfigError("engine.ray_address", address, allowed, "Start one: ray start --head.") from error


class Workers:
    """Flower's Ray actors, started on this machine or on the cluster at ``engine.ray_address``. Close them."""

    def __init__(self, settings: Ray, clients: int):
        require()
        for name, value in QUIET.items():
            os.environ.setdefault(name, value)  # before the import, and inherited by what Ray starts here
        self.settings, self.most = settings, clients
        self.resources = {"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus}
        self.actors: list[Any] = []
        self._start()

    def _start(self) -> None:
        import ray

        logging.getLogger("ray").setLevel(logging.CRITICAL)
        if self.settings.ray_address is not None:
            check_head(self.settings.ray_address)
        try:
            ray.init(**init_args(self.settings, self.most))
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise ShoalError(f"Ray did not start: {_line(error)}") from error
        try:
            self.actors = [self._new() for _ in range(self._number())]
            ray.get([actor.__ray_ready__.remote() for actor in self.actors], timeout=START_S)
        except ray.exceptions.RayError as error:
            self.close()
            raise ShoalError(f"the Ray workers did not start within {START_S:g} s: {_line(error)}") from error
        except BaseException:
            self.close()
            raise

    def _number(self) -> int:
        """How many workers there are. Raises `ConfigError` for more than fit."""
        fit, wanted = self._fit(), self.settings.nodes
        if not fit or (wanted != "auto" and int(wanted) > fit):
            each = f"{self.settings.num_cpus} processors and {self.settings.num_gpus:g} GPUs"
            way_out = "Lower engine.num_cpus or engine.num_gpus, or add machines to the cluster."
            raise ConfigError("engine.nodes", wanted, f"{fit} workers of {each} fit", way_out)
        return min(fit if wanted == "auto" else int(wanted), self.most)

    def _fit(self) -> int:
        from flwr.simulation.ray_transport.ray_actor import pool_size_from_resources

        try:
            return pool_size_from_resources(self.resources)
        except ValueError:  # Flower's word for none
            return 0

    def _new(self) -> Any:
        from flwr.simulation.ray_transport.ray_actor import ClientAppActor

        return ClientAppActor.options(**self.resources).remote()  # type: ignore[attr-defined]

    def answer(self, worker: int, app: App, message: Message, context: Context) -> tuple[Message, Context]:
        """Worker ``worker``'s reply, and the context as it left it. Raises `ChildProcessError` where it died."""
        import ray

        try:
            future = self.actors[worker].run.remote(lambda: app, message, str(worker), context)
            _, reply, context = ray.get(future)
            return reply, context
        except ray.exceptions.RayTaskError:  # its process lives: the message could not be read there, say
            raise
        except ray.exceptions.RayError as error:
            raise ChildProcessError(_line(error)) from error

    def renew(self, worker: int) -> bool:
        """Put a new worker in the place of one that died. False: there is no room for it now (a machine left)."""
        import ray

        try:
            ray.kill(self.actors[worker])  # one that only can't be reached must not hold its processors
            actor = self._new()
            ray.get(actor.__ray_ready__.remote(), timeout=START_S)
        except ray.exceptions.RayError as error:
            log.warning("Ray worker %d could not be started again: %s", worker, _line(error))
            return False
        self.actors[worker] = actor
        return True

    def close(self) -> None:
        """End the workers, whatever they do, and the Ray that was started for them."""
        import ray

        if ray.is_initialized():
            for actor in self.actors:
                ray.kill(actor)
            ray.shutdown()

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def init_args(settings: Ray, most: int) -> dict[str, Any]:
    """What ``ray.init`` is given. A Ray on this machine has a processor for each one that ``engine.nodes`` asks for."""
    variables = dict(QUIET)
    if settings.threads != "auto":  # else Ray gives each worker as many as processors
        variables["OMP_NUM_THREADS"] = str(settings.threads)
    args: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.CRITICAL}
    if settings.ray_address is None:
        # Ray's workers on this machine don't inherit what was put into sys.path, the checkout's folder among it.
        variables["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        nodes = 0 if settings.nodes == "auto" else min(int(settings.nodes), most)
        args |= {"address": "local", "num_cpus": max(processors(), nodes * settings.num_cpus)}
        args |= {"include_dashboard": False}
    else:
        args["address"] = settings.ray_address
    return args | {"runtime_env": {"env_vars": variables}}


class RayGrid(InProcessGrid):
    """Nodes 2, 3, ... are ``workers``, each with a thread here that hands it one message at a time.

    A worker's death becomes an error reply to what it worked on, and a new worker takes its place; `pull_messages`
    raises `RunStopped` for one that goes on dying.
    """

    def __init__(self, workers: Workers, client_app: App):
        super().__init__(client_app, len(workers.actors), copy="none")
        self.shares_memory = False
        self._workers, self._remote = workers, _Answer(client_app)
        self._stopped: str | None = None
        self._inboxes: dict[int, queue.SimpleQueue[Message | None]] = {n: queue.SimpleQueue() for n in self._contexts}
        # Daemons: a call that Ray does not end would hold the process at its exit.
        self._threads = [threading.Thread(target=self._serve, args=(n,), daemon=True) for n in self._inboxes]
        for thread in self._threads:
            thread.start()

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        with self._lock:
            ids = super().push_messages(messages)
            while self._queue:
                message = self._queue.popleft()
                self._inboxes[message.metadata.dst_node_id].put(message)
            return ids

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to ``message_ids`` that are here (each once), by node, then as pushed."""
        if self._stopped is not None:
            raise RunStopped(self._stopped)
        return super().pull_messages(message_ids)

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None, poll_s: float = POLL_S
    ) -> list[Message]:
        """Push, and pull until all have answered or ``timeout`` seconds are over."""
        waiting = set(self.push_messages(messages))
        deadline = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while waiting and (deadline is None or time.monotonic() < deadline):
            replies += (got := self.pull_messages(waiting))
            waiting.difference_update(reply.metadata.reply_to_message_id for reply in got)
            time.sleep(poll_s if waiting else 0)
        return sorted(replies, key=lambda reply: reply.metadata.src_node_id)

    def close(self) -> None:
        super().close()
        for inbox in self._inboxes.values():
            inbox.put(None)

    def _serve(self, node: int) -> None:
        deaths = 0
        while (message := self._inboxes[node].get()) is not None and not self._closed:
            try:
                reply, self._contexts[node] = self._workers.answer(
                    node - FIRST_NODE, self._remote, message, self._contexts[node]
                )
                deaths = 0
            except ChildProcessError as error:
                if self._closed:
                    return
                deaths += 1
                log.warning("the Ray worker of node %d died: %s", node, error)
                reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, f"its worker died: {error}"), reply_to=message)
                if deaths >= DEATHS or not self._workers.renew(node - FIRST_NODE):
                    self._stopped = (
                        f"Ray worker {node - FIRST_NODE} died ({error}), and so did the one in its place, or there is "
                        "no room for one. If memory ran out, free some; then go on with `shoal run --resume DIR`."
                    )
            except Exception as error:
                reply = Message(Error(ErrorCode.UNKNOWN, f"{type(error)}:<'{_line(error)}'>"), reply_to=message)
            with self._lock:
                if not self._closed:
                    reply.metadata.__dict__["_message_id"] = str(next(self._ids))
                    self._replies[message.metadata.message_id] = reply


def _line(error: BaseException) -> str:
    """The first line of ``error``; Ray adds pages of its own."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:300]
