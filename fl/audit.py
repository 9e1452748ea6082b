"""What can be shown against a run: `shoal audit DIR`, and the end of a run with ``privacy.audit=true``.

Two kinds of evidence stand beside the ledger's epsilon, in DIR/audit.json, in the report and on the terminal:

* the canaries that the run planted (`privacy.audit.log`): a lower bound on epsilon that is valid;
* membership inference on the final model (`privacy.audit.membership`): members are the clients' training examples,
  others are the clients' held-out examples and the central test set, and the reference is the model before training.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from rich.console import Console
from rich.table import Table
from rich.text import Text

from clients.worker import Scores
from fl import checkpoint
from fl.errors import ShoalError
from fl.experiment import Experiment, Settings, Shared
from fl.keys import generator
from fl.records import plain, read_run, write_atomically
from fl.report.audit_card import FILE, HEAD, rows
from fl.server_app import CHECKPOINT
from fl.state import ServerState
from privacy.audit.log import log_of
from privacy.audit.membership import Membership, attack, calibrated_scores, threshold_scores
from privacy.base import Guard

MOST = 4000  # members and others that are scored, drawn where there are more
FEWEST = 8  # of each kind, for an attack
CONFIDENCE = 0.95
SCORES = ("loss threshold", "calibrated loss")  # the second: by the loss before training


def canaries(guard: Guard) -> dict[str, Any] | None:
    """The verdict of a run's canaries as plain values; None where it planted none, or they saw nothing."""
    log = log_of(guard)
    found = None if log is None else log.verdict()
    return None if found is None else found.as_plain()


def audit(folder: Path, shared: Shared | None = None) -> dict[str, Any]:
    """Audit the finished run in ``folder``: what goes into audit.json, which is written.

    Raises `ShoalError` where there is no run, or none that is complete.
    """
    run = read_run(folder)
    if run is None:
        raise ShoalError(
            f"{folder} holds no run to audit: it has no run.json. Give the folder that `shoal run` printed."
        )
    if run.get("status") != "completed":
        way_out = f"Go on with `shoal run --resume {folder}`."
        raise ShoalError(f"The run in {folder} is not complete ({run.get('status')}). {way_out}")
    try:
        settings = Settings.of(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ShoalError(
            f"{folder}/config.yaml can't be read ({' '.join(str(error).split())}). Put it back."
        ) from error
    saved = checkpoint.load(folder / "checkpoint")
    if saved is None:
        raise ShoalError(f"{folder} has no checkpoint, and so no final model to audit. Run it again.")
    experiment = Experiment(settings, shared)
    try:
        stated = run.get("privacy_statement") or {}
        delta = stated.get("delta") or 1 / max(2, sum(map(len, experiment.data.parts)))
        found = {
            "claimed": {key: stated.get(key) for key in ("unit", "epsilon", "delta")},
            "canaries": run.get("audit"),
            **membership(experiment, saved, delta),
        }
    finally:
        experiment.close()
    write(folder, found)
    return found


def write(folder: Path, found: dict[str, Any]) -> None:
    """Write audit.json."""
    write_atomically(folder / FILE, json.dumps(plain(found), indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def membership(
    experiment: Experiment, saved: tuple[dict[str, np.ndarray], dict[str, Any]], delta: float
) -> dict[str, Any]:
    """Membership inference on the model of a checkpoint: over all clients, and the client that it exposes most."""
    arrays, meta = saved
    if meta.get("kind") != CHECKPOINT:
        raise ShoalError(f"The checkpoint is of another kind ({meta.get('kind')!r}).")
    cohort = experiment.trainer.worker.cohort
    try:
        server = ServerState.from_parts(arrays, meta["server"], cohort.space)
    except ValueError as error:
        raise ShoalError("The checkpoint belongs to another model or adapter than config.yaml.") from error
    data, seed = experiment.data, experiment.settings.seed
    members = _some(np.concatenate(data.parts), seed, "members")
    held_out = _some(np.concatenate(data.client_tests), seed, "others")
    test = _some(np.arange(len(data.test)), seed, "test")[: MOST - len(held_out)]
    if min(len(members), len(held_out) + len(test)) < FEWEST:
        raise ShoalError(f"An attack needs {FEWEST} training examples and as many others; this run has fewer.")
    batch = experiment.settings.evaluation.batch_size
    losses = []
    for vector, base in ((server.vector, server.base), (cohort.initial.numpy(), {})):
        scores = [
            experiment.trainer.evaluate(vector, name, examples, batch, base)
            for name, examples in (("train", np.concatenate([members, held_out])), ("test", test))
            if len(examples)
        ]
        losses.append(np.concatenate([_losses(s) for s in scores]))
    after, before = losses
    n = len(members)
    by_name = dict(zip(SCORES, (threshold_scores(after), calibrated_scores(after, before)), strict=True))
    attacks = [attack(score[:n], score[n:], delta, CONFIDENCE, name) for name, score in by_name.items()]
    labels = None
    if data.train.labels is not None and data.test.labels is not None:
        labels = np.concatenate([data.train.labels[members], data.train.labels[held_out], data.test.labels[test]])
    owner = np.full(len(data.train), -1)
    for client, part in enumerate(data.parts):
        owner[part] = client
    worst = _worst(by_name[SCORES[1]], owner[members], labels, delta)
    return {
        "membership": [_plain(found) for found in attacks],
        "worst_client": None if worst is None else {"client": worst[0], **_plain(worst[1])},
    }


def _some(examples: np.ndarray, seed: int, kind: str) -> np.ndarray:
    """``examples`` in an order of their own, `MOST` of them at most: order tells nothing then."""
    return generator(seed, "membership", kind).permutation(examples)[:MOST]


def _losses(scores: Scores) -> np.ndarray:
    """Each example's loss, of a language model the mean over its tokens."""
    return np.asarray(scores.loss / np.maximum(scores.targets, 1))


def _worst(
    scores: np.ndarray, owner: np.ndarray, labels: np.ndarray | None, delta: float
) -> tuple[int, Membership] | None:
    """The client whose members the attack tells best from as many others of the same labels.

    Without equal labels a client with one label would look exposed to an attack that knows nothing but the labels. The
    interval is corrected for the choice among the clients.
    """
    n = len(owner)
    others = np.arange(n, len(scores))
    found = []
    clients = np.unique(owner)
    for client in clients:
        mine, alike = np.flatnonzero(owner == client), others
        if labels is not None:
            mine, alike = _alike(labels, mine, others)
        if min(len(mine), len(alike)) >= FEWEST:
            level = 1 - (1 - CONFIDENCE) / len(clients)
            found.append((int(client), attack(scores[mine], scores[alike], delta, level, SCORES[1])))
    return max(found, key=lambda pair: pair[1].auc.value) if found else None


def _alike(labels: np.ndarray, members: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """As many of ``members`` as of ``others`` of each label."""
    mine, alike = [], []
    for kind in np.unique(labels[members]):
        there = members[labels[members] == kind], others[labels[others] == kind]
        count = min(map(len, there))
        mine.append(there[0][:count])
        alike.append(there[1][:count])
    return np.concatenate(mine), np.concatenate(alike)


def _plain(found: Membership) -> dict[str, Any]:
    return {**found.as_plain(), "sentence": found.sentence()}


def show(console: Console, found: dict[str, Any]) -> None:
    """Print an audit: the canaries' verdict, in red where it contradicts the claim, and the attacks."""
    verdict, claimed = found.get("canaries"), found.get("claimed") or {}
    if claimed.get("epsilon") is not None:
        about = f"epsilon {claimed['epsilon']:.4g} at delta {claimed['delta']:.3g} for one {claimed['unit']}"
    elif found.get("membership"):
        about = "no epsilon"
    else:
        about = ""
    if about:
        console.print(Text(f"The ledger claims {about}."), soft_wrap=True)
    if verdict is not None:
        style = "bold red" if verdict["contradicts"] else ""
        console.print(Text(verdict["sentence"], style=style), soft_wrap=True)
    if found.get("membership"):
        console.print(_table(found))


def _table(found: dict[str, Any]) -> Table:
    table = Table(box=None, header_style="bold")
    for i, name in enumerate(HEAD):
        table.add_column(name, justify="left" if i == 0 else "right")
    for row in rows(found):
        table.add_row(*row)
    return table
