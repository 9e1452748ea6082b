"""FedBuff in real time over Flower itself: a SuperLink and two SuperNodes on this machine."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ENCODER, clients, read_run, rounds

ROOT = Path(__file__).parents[2]
WORDS = (*ENCODER, "network=wall_clock", "schedule=fedbuff", "schedule.buffer=2")

PROJECT = """
[project]
name = "shoal-wall"
version = "1.0.0"

[tool.flwr.app]
publisher = "shoal"

[tool.flwr.app.components]
serverapp = "shoal_wall.server_app:app"
clientapp = "shoal_wall.client_app:app"

[tool.flwr.app.config]
words = ""
folder = ""
"""
SERVER = """
import time
from pathlib import Path

from flwr.serverapp import ServerApp

from fl.compose import compose
from fl.engine.cohort_grid import CohortGrid
from fl.experiment import Experiment, Settings
from fl.progress import Progress
from fl.records import RunFolder
from fl.server_app import Server

app = ServerApp()


@app.main()
def main(grid, context):
    settings = Settings.of(compose(context.run_config["words"].split())[0])
    experiment = Experiment(settings)
    while len(nodes := list(grid.get_node_ids())) < 2:
        time.sleep(0.5)
    folder = RunFolder(Path(context.run_config["folder"]))
    with Progress(settings.schedule.rounds, experiment.per_round, quiet=True) as progress:
        with CohortGrid(grid, len(experiment.data), sorted(nodes)) as cohorts:
            server = Server(experiment, folder, progress)
            server.run(cohorts)
    folder.write_run({"status": "completed", "final": server.final()})
    folder.close()
"""
CLIENT = """
from fl.compose import compose
from fl.engine.cohort_grid import cohort_app
from fl.experiment import Experiment, Settings


def train(messages, context):
    settings = Settings.of(compose(context.run_config["words"].split())[0])
    return Experiment(settings).node.train(messages)


app = cohort_app(train)
"""


@pytest.fixture
def deployed(tmp_path):
    """A function that starts Flower's programs with one environment; all of them are ended afterwards."""
    env = {
        **os.environ, "FLWR_HOME": str(tmp_path / "flwr"), "FLWR_TELEMETRY_ENABLED": "0", "OMP_NUM_THREADS": "1",
        "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    started: list[subprocess.Popen] = []

    def start(name: str, *words: str) -> subprocess.Popen:
        log = (tmp_path / f"{name}.log").open("w")
        at = str(Path(sys.executable).parent / words[0])
        started.append(
            subprocess.Popen(
                [at, *words[1:]], cwd=tmp_path, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        )
        return started[-1]

    yield start
    for process in reversed(started):
        end(process)


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def end(process: subprocess.Popen, how: int = 15) -> None:
    """End a program and those that it started."""
    try:
        os.killpg(process.pid, how)
        process.wait(20)
    except ProcessLookupError:
        pass
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "killed"), [(3, False), (4, True)], ids=["both", "one is killed"])
def test_fedbuff_on_two_supernodes(deployed, tmp_path, steps, killed):
    """Two clients live on each node. One that is killed after the first step is missed, and not waited for."""
    link = free_port()
    app = tmp_path / "app" / "shoal_wall"
    app.mkdir(parents=True)
    (app.parent / "pyproject.toml").write_text(PROJECT)
    for name, text in (("__init__", ""), ("server_app", SERVER), ("client_app", CLIENT)):
        (app / f"{name}.py").write_text(text)
    (tmp_path / "flwr").mkdir()
    (tmp_path / "flwr" / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n\n[superlink.here]\naddress = "127.0.0.1:{link}"\ninsecure = true\n'
    )
    alone = ("--insecure", "--host", "127.0.0.1", "--port")
    deployed("link", "flower-superlink", *alone, str(link), "--disable-runtime-dependency-installation")
    nodes = []
    for node in range(2):
        at = ("--superlink", f"127.0.0.1:{link}", "--node-config", f"partition-id={node} num-partitions=2")
        nodes.append(deployed(f"node{node}", "flower-supernode", *alone, str(free_port()), *at))
    folder, until = tmp_path / "run", time.monotonic() + 550
    config = f'words="{" ".join((*WORDS, f"schedule.rounds={steps}"))}" folder="{folder}"'
    while deployed("run", "flwr", "run", str(app.parent), "here", "-c", config).wait(60) != 0:
        assert time.monotonic() < until, (tmp_path / "run.log").read_text()
        time.sleep(2)
    while (read_run(folder) or {}).get("status") != "completed":
        logs = {name: (tmp_path / f"{name}.log").read_text()[-2000:] for name in ("link", "node0", "node1", "run")}
        assert time.monotonic() < until, logs
        time.sleep(1)
        written = folder / "metrics.jsonl"
        if killed and written.exists() and '"event":"round"' in written.read_text():
            end(nodes[1], 9)
    taken, arrivals = rounds(folder), clients(folder)
    assert [e["version"] for e in taken] == list(range(1, steps + 1))
    assert [e["accepted"] for e in taken] == [2] * steps
    assert killed or all(e["accepted"] for e in arrivals)
    assert {e["reason"] for e in arrivals} <= {None, "error"}
    assert len({(e["client"], e["round"]) for e in arrivals}) == len(arrivals) >= 2 * steps
    assert all(e["sent_s"] < e["virtual_s"] for e in arrivals)
    assert taken[0]["virtual_s"] > 0
