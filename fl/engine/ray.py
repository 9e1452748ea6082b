"""Ray (``engine=ray``): the clients of an experiment in worker processes of this machine or of a Ray cluster.

Each worker hosts the clients c with ``c % workers`` its own number and trains those that are asked together as a cohort
(`fl.engine.session`); the server runs in this process.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flwr.app import Context, Message
from flwr.serverapp import Grid

from fl.engine.carried import Note, digest
from fl.engine.cohort_grid import CohortGrid
from fl.engine.directory import Directory
from fl.engine.home import Charges
from fl.engine.kept import Kept
from fl.engine.ray_workers import POLL_S, App, require, simulate
from fl.errors import RunStopped

if TYPE_CHECKING:
    from clients.trainer import Plan
    from fl.engine.settings import Carried, Ray, Serve
    from fl.experiment import Experiment

log = logging.getLogger(__name__)


def connect(engine: Ray, experiment: Experiment, about: Carried) -> Callable[[Serve], None]:
    """A function that runs a server with the clients of ``experiment`` in Ray workers, and raises what `simulate` does.

    Raises `ConfigError` where Ray is not installed.
    """
    require()

    def go(serve: Serve) -> None:
        number = len(experiment.data)
        resolved = {**about.resolved, "engine": about.resolved["engine"] | _plan(engine, experiment.choose_plan())}
        # What clients remember lies in the run's folder, which workers on other machines must be able to reach.
        app = LazyApp(json.dumps(resolved), str((about.folder / "clients").resolve()), str(Path.cwd()))

        def server_main(grid: Grid) -> None:
            directory = Directory(grid, number, Note(about.run, digest(resolved), 1, number), log.info)
            if experiment.settings.privacy.unit is not None:
                kept = Kept(about.folder / "books", about.run)
                experiment.charges = directory.charges = Charges(experiment.guard, kept, number)
            while len(directory.present()) < number:
                if directory.refused:
                    raise RunStopped(f"a Ray worker takes no part: {next(iter(directory.refused.values()))}")
                time.sleep(POLL_S)
            serve(CohortGrid(grid, number, places=directory))

        simulate(engine, server_main, app, number)

    return go


def _plan(engine: Ray, plan: Plan) -> dict[str, Any]:
    """The ``engine.*`` settings of a worker, where ``plan`` is that of this process.

    A worker trains on a GPU if it is given one, or if ``engine.device`` says so. Precision, attention and cohorts are
    those that were measured here, the same for all workers; on another kind of device they are as the user gave them.
    """
    device = "cuda" if engine.num_gpus else "cpu" if engine.device == "auto" else engine.device
    measured = plan.settings() if device.startswith(plan.device.partition(":")[0]) else {}
    threads = engine.num_cpus if engine.threads == "auto" else engine.threads
    return measured | {"device": device, "workers": 1, "threads": threads}


@dataclass(frozen=True)
class LazyApp:
    """The client app of the experiment ``text`` (JSON): made where it is first called, so that nothing big travels.

    ``folder`` is where workers keep what clients remember, ``cwd`` the folder that relative paths start from.
    """

    text: str
    folder: str
    cwd: str

    def __call__(self, message: Message, context: Context) -> Message:
        return _session(self)(message, context)


@functools.lru_cache(maxsize=1)
def _session(app: LazyApp) -> App:
    from fl.engine.flower import quiet_flower
    from fl.engine.session import Place, Session

    quiet_flower()
    with contextlib.suppress(OSError):  # a machine of the cluster that does not have it
        os.chdir(app.cwd)
    return Session(Place(Path(app.folder), own=False), json.loads(app.text)).app()
