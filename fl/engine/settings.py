"""The ``engine=`` group: where the clients' work runs.

An engine connects an experiment's server to its nodes: `Engine.connect` gives a function that runs the server on a grid
whose nodes are the clients.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from clients.tuning import Resources
from fl.config import setting
from fl.errors import ConfigError

if TYPE_CHECKING:
    from flwr.serverapp import Grid

    from fl.experiment import Experiment, Settings

Serve = Callable[["Grid"], None]


@dataclass(frozen=True)
class Carried:
    """What an engine takes to the nodes of a run: its ``resolved`` settings, its name ``run`` (the same after a resume)
    and its ``folder``; ``grid`` is Flower's, where Flower has started the server."""

    resolved: dict[str, Any]
    run: str
    folder: Path
    grid: Grid | None = None


@dataclass(frozen=True)
class Engine(Resources):
    """Where the clients of an experiment train."""

    # Whether clients keep what they remember where they train (`fl.engine.session`), not in this process.
    remote: ClassVar[bool] = False

    def check(self, settings: Settings) -> None:
        """Raise `ConfigError`, before anything loads, for settings that this engine can't carry."""
        if self.remote and settings.checkpoint_every != 1:
            allowed = "1: clients keep what the newest round needs, where they train, and no older one"
            raise ConfigError("checkpoint_every", settings.checkpoint_every, allowed)

    @abstractmethod
    def connect(self, experiment: Experiment, carried: Carried) -> Callable[[Serve], None]:
        """A function that runs ``serve(grid)`` with a grid that shows clients as nodes, and returns when it does."""


@dataclass(frozen=True)
class InProcess(Engine):
    """All clients in this process (and its workers), with Flower messages between them and the server.

    ``message_copy``: what a message costs between server and clients: ``records`` gives each receiver its own records
    over shared bytes, ``wire`` serialises as on a network.
    """

    message_copy: str = setting("records", choices=["records", "wire", "none"], help="how messages are handed over")

    def connect(self, experiment: Experiment, carried: Carried) -> Callable[[Serve], None]:
        from fl.client_app import client_app
        from fl.engine.cohort_grid import CohortGrid
        from fl.engine.flower import server_app
        from fl.engine.in_process import InProcessGrid

        def go(serve: Serve) -> None:
            app = client_app(experiment.node, experiment.settings.evaluation.batch_size)
            nodes = InProcessGrid(app, copy=self.message_copy)  # type: ignore[arg-type]
            with CohortGrid(nodes, len(experiment.data)) as grid:
                server_app(serve)(grid, nodes.server_context())

        return go


@dataclass(frozen=True)
class Ray(Engine):
    """Flower's Ray simulation: clients in worker processes of this machine or of a Ray cluster, several a worker."""

    nodes: int | str = setting("auto", ge=1, help="Ray workers that hold the clients; auto: as many as fit")
    num_cpus: int = setting(1, ge=1, help="processors of a worker")
    num_gpus: float = setting(0.0, ge=0, help="GPUs of a worker; a fraction lets several share one")
    ray_address: str | None = setting(None, help="address of a standing Ray head; null starts one here")

    remote = True
    forks = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.nodes, str) and self.nodes != "auto":
            raise ConfigError("engine.nodes", self.nodes, "a whole number >= 1, or auto")

    def check(self, settings: Settings) -> None:
        from fl.engine.home import check_apart

        super().check(settings)
        check_apart(settings, resident=False)

    def connect(self, experiment: Experiment, carried: Carried) -> Callable[[Serve], None]:
        from fl.engine.ray import connect

        return connect(self, experiment, carried)


@dataclass(frozen=True)
class SuperLink(Engine):
    """Hosts: a Flower SuperLink at ``address``, and nodes that have connected to it (`shoal node`)."""

    address: str = setting("127.0.0.1:8000", help="HOST:PORT of the SuperLink")
    root_certificates: str | None = setting(None, help="certificate of the authority that signed the SuperLink's")
    insecure: bool = setting(False, help="no TLS; only for a SuperLink on this machine")
    wait_s: float = setting(300.0, gt=0, help="how long the server waits for the nodes of all clients")
    patience_s: float = setting(120.0, gt=0, help="how long the server tries to reach the SuperLink again")
    peers: str = setting("relay", choices=["relay", "direct"], help="how models of peers travel to each other")

    remote = True
    forks = False

    def __post_init__(self) -> None:
        super().__post_init__()
        host, _, port = self.address.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError("engine.address", self.address, "HOST:PORT")
        if self.insecure and host not in ("127.0.0.1", "localhost", "[::1]"):
            allowed = f"false for {host}: without TLS everybody on the way reads and changes what is sent"
            raise ConfigError("engine.insecure", True, allowed, "Give engine.root_certificates=ca.crt.")

    def check(self, settings: Settings) -> None:
        from fl.engine.home import check_hosts
        from fl.network import WallClock

        super().check(settings)
        if not isinstance(settings.network, WallClock):
            allowed = "wall_clock: on hosts time is real"
            raise ConfigError("network", type(settings.network).__name__, allowed, "Leave network= out.")
        if settings.clients.number is None:
            way_out = "Give clients.number=4, say."
            raise ConfigError("clients.number", None, "a number: nodes say which clients they host", way_out)
        if self.peers == "direct" and not settings.schedule.decentral:
            allowed = f"relay with {type(settings.schedule).__name__}, which has a server"
            raise ConfigError("engine.peers", "direct", allowed, "Or choose schedule=dpsgd.")
        check_hosts(settings)

    def connect(self, experiment: Experiment, carried: Carried) -> Callable[[Serve], None]:
        from fl.engine.superlink import connect

        return connect(self, experiment, carried)
