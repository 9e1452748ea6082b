"""The start of an adapter that is made from the base's weights or from a sample of data, before the first round.

The server computes it once, for all clients (`clients.adapters.initial`). Where it needs a statistic of data, that
comes from the declared source: the public samples, which the server holds, or clients, each of whom is asked by a
message and answers with a sum over some of its examples. What is sent is counted as any other message is.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from clients.adapters import statistics
from clients.adapters.base_change import Piece
from clients.adapters.initial.base import DataDriven, Site
from fl.errors import ConfigError, RunStopped
from fl.keys import torch_generator
from fl.messages import StatisticRequest, TrainReply, payload_bytes
from fl.statistic import sums
from fl.validation import Validator

if TYPE_CHECKING:
    from fl.experiment import Experiment
    from fl.schedules.base import Event, World

SERVER = -1  # the holder of public data, in the keys of its draws


def initialise(world: World, experiment: Experiment) -> Event | None:
    """Set the start of ``world.server``; None where the adapter starts as it was attached.

    Raises `ConfigError` where the source has no data, `RunStopped` where a client does not answer.
    """
    init = experiment.settings.adapter.initialisation
    if init is None:
        return None
    event: dict[str, Any] = {"event": "initialise", "round": 0, "statement": None, "bytes_down": 0, "bytes_up": 0}
    flat, count = None, 1
    if isinstance(init, DataDriven):
        event["statement"] = statement(init, experiment)
        flat, count = _statistic(init, world, experiment, event)
    cohort = experiment.trainer.worker.cohort
    shapes, frozen = statistics.shapes(cohort), statistics.layers(cohort)
    parts = {} if flat is None else statistics.unpack(torch.from_numpy(flat), shapes, init.statistic)
    vector, base = world.server.vector.copy(), {}
    for module, a, b, core in world.server.space.factors(vector):
        key = torch_generator(world.seed, "initialise", module.name)
        weight = statistics.weight(frozen[module.name])
        start = init.start(Site(weight, parts.get(module.name), module.rank, module.scale, key, count))
        a[:], b[:] = start.a.numpy(), start.b.numpy()
        if core is not None and start.core is not None:
            core[:] = start.core.numpy()
        if start.base is not None:
            base[module.name] = Piece(start.base[0].float().numpy(), start.base[1].float().numpy())
    world.server = world.server.replace(vector=vector, base=base)
    return {**event, "virtual_s": world.clock.now_s}


def statement(init: DataDriven, experiment: Experiment) -> str:
    """What the start reveals or guarantees, for the run's records."""
    return init.statement(min(len(part) for part in experiment.data.parts))


def _statistic(init: DataDriven, world: World, experiment: Experiment, event: Event) -> tuple[np.ndarray, int]:
    """The sum over the declared source, and the examples behind it; adds its costs to ``event``."""
    data = experiment.data
    if init.source == "public":
        if len(data.public) == 0:
            raise ConfigError("adapter.init.source", "public", "a source with data", "Set data.public=200, say.")
        ((count, vector),) = sums(init, experiment.trainer, "train", [(SERVER, data.public)], world.seed)
        return vector, count
    if init.source == "client" and init.client >= world.number:
        raise ConfigError("adapter.init.client", init.client, f"one of the {world.number} clients, from 0")
    asked = [init.client] if init.source == "client" else list(range(world.number))
    server = world.server
    nothing = np.zeros(0, np.float32)
    requests = {c: StatisticRequest(c, 0, server.version, nothing, server.layout.hash) for c in asked}
    replies, sent = world.ask(list(requests.values()))
    size = statistics.layout(statistics.shapes(experiment.trainer.worker.cohort), init.statistic).size
    validator = Validator(server.layout.hash, size, max_weight=data.most)
    start, end = world.clock.now, world.clock.now
    found: dict[int, TrainReply] = {}
    for client, reply in replies:
        checked = validator.check(reply, requests[client])
        if not isinstance(checked, TrainReply):
            raise RunStopped(f"Client {client} gave no statistic to start the adapter from ({checked.detail}).")
        up = payload_bytes(reply.content)
        event["bytes_down"] += sent[client]
        event["bytes_up"] += up
        # One pass over the sample: about as long as one local step.
        end = max(end, start + world.fleet.job(client, 0, 1, sent[client], up).total)
        found[client] = checked
    if len(found) < len(asked):
        missing = sorted(set(asked) - set(found))
        raise RunStopped(f"Clients {missing} gave no statistic to start the adapter from.")
    world.clock.advance(end)
    total = np.sum([found[c].update.astype(np.float64) for c in asked], axis=0)
    return total, sum(found[c].examples for c in asked)
