"""`shoal run engine=superlink`: hands an experiment to a SuperLink through Flower's Control API, and follows its log.

What is sent is the tiny Flower app ``fl/flower_app`` and the settings; the server's machine and the nodes run the Shoal
that is installed there.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fl
from fl.engine.carried import carry
from fl.engine.settings import SuperLink
from fl.errors import ConfigError, RunStopped, ShoalError
from fl.records import fresh_folder, read_run

if TYPE_CHECKING:
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from rich.console import Console

    from fl.run import Outcome

APP = Path(fl.__file__).parent / "flower_app"
AGAIN_S, LOST_S = 1.0, 120.0  # between looks at a run; without any answer from the SuperLink


def submit(
    engine: SuperLink,
    resolved: dict[str, Any],
    words: Sequence[str] | None,
    folder: Path,
    resume: bool,
    console: Console,
) -> Outcome:
    """Run the experiment at the SuperLink; returns when it is over. Raises `RunStopped` where it failed.

    ``folder`` is absolute for a SuperLink on this machine, else relative to where that was started.
    """
    from flwr.cli.build import build_fab_from_disk
    from flwr.common.serde import fab_to_proto, user_config_to_proto
    from flwr.proto.control_pb2 import StartRunRequest
    from flwr.supercore.fab import Fab

    from fl.run import Outcome

    here = engine.address.rpartition(":")[0] in ("127.0.0.1", "localhost", "[::1]")
    if resume:
        folder = folder.absolute()  # its config.yaml was read here
    elif here:
        folder = fresh_folder(folder.absolute())
    with control(engine) as client:
        content = build_fab_from_disk(APP)
        fab = Fab(hashlib.sha256(content).hexdigest(), content, {})
        certificates = engine.root_certificates or "null"
        config = carry(resolved, str(folder), words, resume)
        request = StartRunRequest(fab=fab_to_proto(fab), override_config=user_config_to_proto(config))
        try:
            answer = client.StartRun(request)
        except Exception as error:
            secure = "without TLS" if engine.insecure else f"with TLS, and engine.root_certificates={certificates}"
            raise ShoalError(
                f"The SuperLink at {engine.address} did not start the run ({_reason(error)}). It was asked {secure}; "
                "`shoal server` starts one, and says how it is reached."
            ) from error
        if not answer.HasField("run_id"):
            raise ShoalError(f"The SuperLink at {engine.address} did not start the run. Its log says why.")
        run_id = answer.run_id
        console.print(f"Run {run_id} at the SuperLink {engine.address}, folder {folder}", highlight=False)
        try:
            ended = follow(client, run_id, console)
        except KeyboardInterrupt as error:
            error.add_note(f"run {run_id} goes on at the SuperLink; its folder there is {folder}")
            raise
    if ended != "completed":
        way_out = f"Go on with `shoal run --resume {folder}`" + ("." if here else " engine.address is kept in it.")
        raise RunStopped(f"Run {run_id} {ended}; its log above says why. {way_out}")
    return Outcome(folder, (read_run(folder) if here else None) or {"status": ended})


@contextmanager
def control(engine: SuperLink) -> Iterator[ControlHttpClient]:
    """A client of the SuperLink's Control API."""
    from flwr.supercore.control.control_http_client import ControlHttpClient
    from flwr.supercore.interceptors.http.runtime_version import RuntimeVersionHttpInterceptor

    os.environ.setdefault("FLWR_HOME", str(Path(".shoal") / "flwr"))
    certificates = None
    if engine.root_certificates is not None:
        try:
            certificates = Path(engine.root_certificates).expanduser().read_bytes()
        except OSError as error:
            allowed = f"a file that can be read ({error.strerror})"
            raise ConfigError("engine.root_certificates", engine.root_certificates, allowed) from error
    client = ControlHttpClient.from_server_address(
        server_address=engine.address,
        insecure=engine.insecure,
        root_certificates=certificates,
        interceptors=[RuntimeVersionHttpInterceptor(component_name="flwr CLI")],
    )
    try:
        yield client
    finally:
        client.close()


def follow(client: ControlHttpClient, run_id: int, console: Console) -> str:
    """Print the run's log as it grows, until it is over; how it ended: ``completed``, ``failed`` or ``stopped``.

    A SuperLink that is gone is waited for, `LOST_S` at most.
    """
    from flwr.proto.control_pb2 import ListRunsRequest, StreamLogsRequest

    after, seen = 0.0, time.monotonic()
    while True:
        try:
            status = client.ListRuns(ListRunsRequest(run_id=run_id)).run_dict[run_id].status
            for part in client.StreamLogs(StreamLogsRequest(run_id=run_id, after_timestamp=after)):
                console.print(part.log_output, end="", highlight=False, markup=False, soft_wrap=True)
                after, seen = max(after, part.latest_timestamp), time.monotonic()
            seen = time.monotonic()
            if status.status == "finished":
                return str(status.sub_status)
        except Exception as error:  # of httpx, or what Flower makes of it
            if time.monotonic() - seen > LOST_S:
                raise RunStopped(
                    f"The SuperLink has not answered for {LOST_S:g} s ({_reason(error)}). Restart it with its "
                    f"database; run {run_id} goes on if its server process is still there."
                ) from error
        time.sleep(AGAIN_S)


def _reason(error: Exception) -> str:
    text = getattr(getattr(error, "response", None), "text", "") or str(error)
    return f"{type(error).__name__}: {' '.join(text.split())[:300]}"
