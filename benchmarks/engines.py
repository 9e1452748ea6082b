"""What a round costs on each engine for the same work, and what a resident node saves over Flower's stock one.

    python -m benchmarks.engines                             # 4, 16 and 64 clients; stock nodes with 4 and 16
    python -m benchmarks.engines --clients 4 --stock-clients 4 --model minilm --out engines.json

Every engine runs the same experiment as a program of its own (`shoal run`), all clients every round, one step of 2
samples each, float32 on one thread, nothing evaluated between rounds:

* ``in process``: one process;
* ``ray``: two Ray workers on this machine;
* ``resident``: a SuperLink and two `shoal node`, on this machine's loopback, without TLS;
* ``stock``: the same SuperLink and two `shoal node --stock`, so Flower's own SuperNodes, a new process for a message.

``round`` is the median of the rounds after the first, by the wall clock, checkpoints included, and ``slowest`` the
longest of them; ``message`` a round's time over its clients, each asked and heard once; ``x`` a round's time over that
in process; ``whole run`` from the command to the last record, loading, starting workers and the last evaluation
included (the SuperLink and the nodes run already).

**Reload.** Two training messages of a node's clients are recorded, as bytes. A fresh process answers both: ``fresh`` is
from its start to the end of the first answer, ``warm`` the second answer alone. The difference is what a process for
each message pays again and again, Flower's own part left out; ``stock - resident`` is the difference of rounds above.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import pickle
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fl import environment
from fl.records import read_events

ROOT = Path(__file__).parents[1]
SHOAL = [sys.executable, "-m", "fl.cli"]
WORDS = (
    "data=tiny", "partition=iid", "partition.min_size=1", "data.client_test_fraction=0", "local.steps=1",
    "local.batch_size=2", "report=false", "evaluation.every=1000",
    "engine.device=cpu", "engine.dtype=float32", "engine.attention=sdpa",
    "engine.cohort_size=8", "engine.workers=1", "engine.threads=1",
)  # fmt: skip
QUIET = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "RAY_USAGE_STATS_ENABLED": "0", "PYTHONPATH": str(ROOT)}
ENGINES = ("in process", "ray", "resident", "stock")
START_S, END_S, RUN_S = 120.0, 30.0, 3600.0


def words(model: str, clients: int, rounds: int) -> list[str]:
    return [f"model={model}", *WORDS, f"clients.number={clients}", f"schedule.rounds={rounds}"]


@contextmanager
def program(command: Sequence[str], folder: Path, log: Path) -> Iterator[subprocess.Popen]:
    """A program in a session of its own, which is ended at the end, with what it has started."""
    with log.open("ab") as out:
        process = subprocess.Popen(
            command, cwd=folder, env={**os.environ, **QUIET}, stdin=subprocess.DEVNULL, stdout=out,
            stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
    try:
        yield process
    finally:
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextmanager
def server(folder: Path) -> Iterator[str]:
    """A SuperLink; its address."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    log = folder / "server.log"
    with program([*SHOAL, "server", "--insecure", "--port", str(port)], folder, log) as process:
        end = time.monotonic() + START_S
        while "SuperLink is up" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > end:
                raise SystemExit(f"The SuperLink did not start:\n{log.read_text(errors='replace')}")
            time.sleep(0.1)
        yield f"127.0.0.1:{port}"


@contextmanager
def nodes(folder: Path, address: str, clients: int, stock: bool) -> Iterator[None]:
    """Two nodes, with half of the clients each."""
    half, kind = clients // 2, "stock" if stock else "resident"
    with program(_node(folder, address, f"0-{half - 1}", 0, kind), folder, folder / f"{kind}-0.log"):
        # One after the other: a stock node looks for a free port.
        time.sleep(5.0 if stock else 0.0)
        with program(_node(folder, address, f"{half}-{clients - 1}", 1, kind), folder, folder / f"{kind}-1.log"):
            time.sleep(5.0)
            yield


def _node(folder: Path, address: str, clients: str, number: int, kind: str) -> list[str]:
    state = folder / f"{kind}-{number}-of-{clients}"
    command = [*SHOAL, "node", address, "--insecure", "--clients", clients, "--state", str(state)]
    return [*command, "--stock"] if kind == "stock" else command


def run(folder: Path, name: str, settings: Sequence[str]) -> dict[str, Any]:
    """Run an experiment; seconds of a round after the first (median and longest) and of the whole run."""
    where, log = folder / name, folder / f"{name}.log"
    began = time.time()
    with program([*SHOAL, "run", *settings, f"hydra.run.dir={where}"], folder, log) as process:
        if process.wait(RUN_S) != 0:
            raise SystemExit(f"The run {name} failed:\n{log.read_text(errors='replace')[-4000:]}")
    rounds = [e for e in read_events(where) if e["event"] == "round"]
    if any(e["rejected"] for e in rounds):
        raise SystemExit(f"The run {name} lost messages: {[e['rejected'] for e in rounds]}")
    ends = [e["wall_s"] for e in rounds]
    after = (where / "run.json").stat().st_mtime - began
    later = [b - a for a, b in itertools.pairwise(ends)]
    return {"round_s": statistics.median(later), "slowest_s": max(later), "whole_s": after, "rounds": len(ends)}


def measure(folder: Path, engine: str, model: str, clients: int, rounds: int, address: str) -> dict[str, Any]:
    """One engine at one number of clients."""
    settings = words(model, clients, rounds)
    name = f"{engine.replace(' ', '_')}-{model}-{clients}"
    if engine == "in process":
        return run(folder, name, settings)
    if engine == "ray":
        return run(folder, name, [*settings, "engine=ray", "engine.nodes=2", *_resources()])
    link = [*settings, "engine=superlink", f"engine.address={address}", "engine.insecure=true", *_resources()]
    with nodes(folder, address, clients, engine == "stock"):
        return run(folder, name, link)


def _resources() -> list[str]:
    """`WORDS` of the engine again, after ``engine=...``."""
    return [word for word in WORDS if word.startswith("engine.")]


# Reload


def recorded(folder: Path, model: str, clients: int) -> Path:
    """The training messages that a node with all ``clients`` gets in two rounds, in a file, with its run config."""
    from flwr.common.serde import message_to_proto

    from fl.compose import compose
    from fl.engine.carried import carry
    from fl.engine.in_process import InProcessGrid
    from fl.engine.session import Place, Session
    from fl.experiment import Settings
    from fl.records import RunFolder
    from fl.run import go

    settings = [*words(model, clients, 2), "engine=superlink", "engine.insecure=true", *_resources()]
    resolved = compose(settings)[0]
    config = carry(resolved, str(folder / "recorded"), settings, False)
    session, messages = Session(Place(folder / "recording", tuple(range(clients)))), []
    app = session.app()

    def record(message: Any, context: Any) -> Any:
        if message.metadata.message_type == "train":
            messages.append(message_to_proto(message).SerializeToString())
        return app(message, context)

    grid = InProcessGrid(record, 1, copy="wire", run_config=config)
    go(Settings.of(resolved), resolved, settings, RunFolder(folder / "recorded"), False, None, True, grid=grid)
    session.close()
    path = folder / "messages.pickle"
    path.write_bytes(pickle.dumps((messages, config, clients)))
    return path


def answer(path: str, state: str) -> None:
    """In a fresh process: answer what `recorded` kept, and print when each answer was there."""
    from flwr.app import Context, RecordDict
    from flwr.common.serde import message_from_proto
    from flwr.proto.message_pb2 import Message as ProtoMessage

    from fl.engine.flower import ensure_identity
    from fl.engine.session import Place, Session

    messages, config, clients = pickle.loads(Path(path).read_bytes())
    ensure_identity(1)
    app = Session(Place(Path(state), tuple(range(clients)))).app()
    times = [time.time()]
    for data in messages:
        message = message_from_proto(ProtoMessage.FromString(data))
        reply = app(message, Context(message.metadata.run_id, 2, {}, RecordDict(), config))
        if reply.has_error():
            raise SystemExit(reply.error.reason)
        times.append(time.time())
    print(json.dumps(times))


def reload(folder: Path, model: str, clients: int, repeats: int) -> dict[str, float]:
    """Seconds of a message in a fresh process and in a warm one: medians."""
    path, fresh, imports, warm = recorded(folder, model, clients), [], [], []
    for repeat in range(repeats):
        code = f"from benchmarks.engines import answer; answer({str(path)!r}, {str(folder / f'reload-{repeat}')!r})"
        began = time.time()
        done = subprocess.run([sys.executable, "-c", code], env={**os.environ, **QUIET}, capture_output=True, text=True)
        if done.returncode != 0:
            raise SystemExit(f"The answer failed:\n{done.stderr[-4000:]}")
        imported, first, second = json.loads(done.stdout.splitlines()[-1])
        imports.append(imported - began)
        fresh.append(first - began)
        warm.append(second - first)
    middle = statistics.median
    return {"clients": clients, "fresh_s": middle(fresh), "imports_s": middle(imports), "warm_s": middle(warm)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, nargs="+", default=[4, 16, 64], help="even numbers of clients")
    parser.add_argument("--stock-clients", type=int, nargs="*", default=[4, 16], help="of these, with stock nodes too")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--stock-rounds", type=int, default=4, help="rounds of runs with stock nodes")
    parser.add_argument("--engines", nargs="+", default=list(ENGINES), choices=ENGINES)
    parser.add_argument("--model", default="tiny-encoder", help="a model of `shoal list`")
    parser.add_argument("--repeats", type=int, default=3, help="fresh processes of the reload; 0: leave it out")
    parser.add_argument("--out", type=Path, help="JSON file")
    options = parser.parse_args()
    if any(n < 2 or n % 2 for n in options.clients):
        parser.error("--clients: even numbers, since two nodes have half each")
    if importlib.util.find_spec("ray") is None:
        options.engines = [e for e in options.engines if e != "ray"]
    machine = environment.device_name("cpu")
    print(f"{options.model}; {machine}, {os.cpu_count()} processors")
    results: dict[str, Any] = {
        "machine": machine, "processors": os.cpu_count(), "versions": environment.versions(), "model": options.model,
        "words": WORDS, "rows": [], "stock_minus_resident_s": {}, "reload": None,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="shoal-engines-") as scratch:
        folder = Path(scratch)
        if options.repeats:
            results["reload"] = again = reload(folder, options.model, options.clients[0] // 2, options.repeats)
            print(
                f"a message of {again['clients']} clients: {again['fresh_s']:.2f} s in a fresh process (imports "
                f"{again['imports_s']:.2f}), {again['warm_s']:.3f} s in a warm one"
            )
        print(f"{'clients':>7} {'engine':12}{'round s':>9}{'slowest':>9}{'message s':>11}{'x':>8}{'whole run s':>13}")
        with server(folder) as address:
            for clients in options.clients:
                took: dict[str, float] = {}
                for engine in options.engines:
                    if engine == "stock" and clients not in options.stock_clients:
                        continue
                    rounds = options.stock_rounds if engine == "stock" else options.rounds
                    row = measure(folder, engine, options.model, clients, rounds, address)
                    took[engine] = row["round_s"]
                    row |= {"engine": engine, "clients": clients, "message_s": row["round_s"] / clients}
                    row["load"] = os.getloadavg()[1]  # of five minutes: other work on the machine counts
                    if "in process" in took:
                        row["times_in_process"] = row["round_s"] / took["in process"]
                    results["rows"].append(row)
                    print(line(row), flush=True)
                    if {"stock", "resident"} <= took.keys():
                        saved = results["stock_minus_resident_s"][clients] = took["stock"] - took["resident"]
                        print(f"stock - resident, {clients} clients: {saved:.1f} s a round")
                    if options.out:
                        options.out.parent.mkdir(parents=True, exist_ok=True)
                        options.out.write_text(json.dumps(results, indent=1) + "\n")


def line(row: dict[str, Any]) -> str:
    times = f"{row['times_in_process']:8.1f}" if "times_in_process" in row else " " * 8
    return (
        f"{row['clients']:7} {row['engine']:12}{row['round_s']:9.3f}{row['slowest_s']:9.3f}{row['message_s']:11.4f}"
        f"{times}{row['whole_s']:13.1f}"
    )


if __name__ == "__main__":
    main()
