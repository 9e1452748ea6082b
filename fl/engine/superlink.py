"""The server of an experiment on hosts (``engine=superlink``): what a Flower SuperLink starts as its ServerApp.

The settings come in Flower's run config (`fl.engine.carried`); the run's folder is on the SuperLink's machine, relative
to the folder in which that was started. Clients are found by asking the nodes (`fl.engine.directory`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from fl.engine.carried import Note, carried, digest
from fl.engine.home import Charges
from fl.engine.kept import Kept, secret
from fl.engine.settings import Carried, Serve, SuperLink
from fl.errors import ConfigError, ShoalError
from fl.experiment import Experiment
from fl.keys import key_bytes

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the experiment that the run config holds. What goes wrong is printed in one line, and fails Flower's run."""
    from rich.console import Console

    from fl import run as runs
    from fl.engine.retrying import RetryGrid
    from fl.experiment import Settings
    from fl.records import RunFolder, fresh_folder

    try:
        resolved, where, words = carried(context.run_config)
        settings = Settings.of(resolved)
        if not isinstance(settings.engine, SuperLink):
            raise ConfigError("engine", type(settings.engine).__name__, "superlink, for a run on hosts")
        going_on = bool(context.run_config.get("resume", False))
        named = going_on or Path(where).is_absolute()  # made by `fl.engine.submit` on this machine
        folder = Path(where) if named else fresh_folder(Path(where))
        print(f"Folder: {folder.resolve()}", flush=True)
        patient = RetryGrid(grid, settings.engine.patience_s)
        console = Console(width=110, force_terminal=False)
        record = RunFolder(folder, resume=going_on)
        runs.go(settings, resolved, None if going_on else words, record, going_on, console=console, grid=patient)
        print(f"Completed: {folder.resolve()}", flush=True)
    except ShoalError as error:
        print(f"shoal: {error}", file=sys.stderr, flush=True)
        raise


def connect(engine: SuperLink, experiment: Experiment, about: Carried) -> Callable[[Serve], None]:
    """Wait for the nodes of all clients; then a function that runs a server behind them. Raises `RunStopped`."""
    from fl.engine.cohort_grid import CohortGrid
    from fl.engine.directory import Directory

    settings, grid = experiment.settings, about.grid
    number = settings.clients.number
    assert grid is not None and number is not None  # `SuperLink.check`; only `main` comes here
    labels = list(experiment.shared.data(settings)[0].label_names)
    directory = Directory(grid, number, Note(about.run, digest(about.resolved), 1, number, labels), experiment.note)
    experiment.note(f"Waiting for the nodes of {number} clients ...")
    directory.wait(engine.wait_s)
    experiment.told = directory.samples()
    if settings.privacy.unit is not None:
        # Not in the run's folder, which people publish.
        experiment.secret = key_bytes(secret(Path(".shoal") / "server").hex(), about.run)

    def go(serve: Serve) -> None:
        if settings.privacy.unit is not None:
            kept = Kept(about.folder / "books", about.run)
            experiment.charges = directory.charges = Charges(experiment.guard, kept, number)
        with CohortGrid(grid, number, join=True, places=directory) as clients:
            serve(clients)

    return go
