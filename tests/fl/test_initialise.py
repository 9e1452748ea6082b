"""The start that the server computes from data: the pooled sample's, whoever holds it, counted and stated."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Error, Message
from torch import Tensor

import fl.server_app
from clients.adapters import statistics
from clients.adapters.initial.base import DataDriven
from clients.models import TinyEncoder
from fl.errors import ConfigError, RunStopped, ShoalError
from fl.experiment import BASE_SEED, Experiment
from fl.initialise import initialise
from fl.keys import torch_generator
from fl.messages import StatisticRequest, TrainReply, payload_bytes
from fl.node import Node
from fl.state import ServerState
from tests.helpers import ENCODER, final, go, metrics, rounds
from tests.oracles import low_rank_cohort as dense

SB = ("adapter=lora_sb", "adapter.rank=4", "adapter.alpha=6", "aggregator=fedsb", "model.head_std=0.1",
      "adapter.init.eta0=0.01", "schedule.rounds=1", "adapter.init.examples=1000")  # fmt: skip


@dataclass
class Seen:
    """What `initialise` left, and the messages that nodes were asked with and answered."""

    server: ServerState | None = None
    experiment: Experiment | None = None
    event: dict[str, Any] = field(default_factory=dict)
    asked: list[Message] = field(default_factory=list)
    answered: list[Message] = field(default_factory=list)


@pytest.fixture
def seen(monkeypatch) -> Seen:
    found, answer = Seen(), Node.statistics

    def watching(world, experiment):
        found.event = initialise(world, experiment)
        found.server, found.experiment = world.server, experiment
        return found.event

    def answering(node, messages):
        replies = answer(node, messages)
        found.asked += messages
        found.answered += replies
        return replies

    monkeypatch.setattr(fl.server_app, "initialise", watching)
    monkeypatch.setattr(Node, "statistics", answering)
    return found


def pooled_gradient(seen: Seen, examples: np.ndarray) -> dict[str, Tensor]:
    """The gradient of the summed losses with respect to the plain base's weights, sample by sample, in float64."""
    base = TinyEncoder(head_std=0.1).load(3, BASE_SEED, dtype=torch.float64).module
    space, batch = seen.server.space, seen.experiment.data.train.batch(examples)
    tensors = space.layout.views(torch.zeros(space.layout.size, dtype=torch.float64))
    head = {n: base.get_parameter(n.split(".model.")[1].replace("modules_to_save.default.", ""))
            for n in tensors if n not in space.of_tensor}  # fmt: skip
    zero = {m.name: torch.zeros(space.sizes(m), dtype=torch.float64, requires_grad=True) for m in space.modules}
    (len(batch) * dense.loss(base, space, {**tensors, **head}, batch, more=zero)).backward()
    return {name: value.grad for name, value in zero.items()}


def best_step(gradient: Tensor, rank: int = 4, eta0: float = 0.01) -> Tensor:
    """The best approximation of rank r of Adam's first step."""
    u, s, vh = torch.linalg.svd(-eta0 * gradient.sign(), full_matrices=False)
    return u[:, :rank] @ torch.diag(s[:rank]) @ vh[:rank]


def starts_at(seen: Seen, examples: np.ndarray) -> None:
    server = seen.server
    found = pooled_gradient(seen, examples)
    assert len(found) == 6
    for low in server.space.delta(server.vector):
        expected = best_step(found[low.name]).numpy()
        assert np.linalg.norm(low.left @ low.right - expected) < 1e-4 * np.linalg.norm(expected)
    for _, a, b, _ in server.space.factors(server.vector.astype(np.float64)):
        np.testing.assert_allclose(a @ a.T, np.eye(4), atol=1e-6)
        np.testing.assert_allclose(b.T @ b, np.eye(4), atol=1e-6)


def events(folder) -> list[dict[str, Any]]:
    return [e for e in metrics(folder) if e["event"] == "initialise"]


@pytest.mark.parametrize("clients", [1, 4])
def test_all_clients_sums_make_the_pooled_samples_start(tmp_path, seen, clients):
    go(tmp_path / "run", *SB, f"clients.number={clients}", "partition=dirichlet")
    data = seen.experiment.data
    assert len(data) == clients
    starts_at(seen, np.concatenate(data.parts))
    (event,) = events(tmp_path / "run")
    assert "1000 examples of each client, sent without noise" in event["statement"]
    assert metrics(tmp_path / "run")[0] == event


def test_one_clients_sample_is_that_clients_alone(tmp_path, seen):
    go(tmp_path / "run", *SB, "adapter.init.source=client", "adapter.init.client=2")
    starts_at(seen, seen.experiment.data.parts[2])
    assert len(seen.asked) == 1
    assert "of client 2" in events(tmp_path / "run")[0]["statement"]


def test_public_samples_are_the_servers_and_cost_nothing(tmp_path, seen):
    go(tmp_path / "run", *SB, "adapter.init.source=public", "data.public=30")
    data = seen.experiment.data
    assert len(data.public) == 30 and not set(data.public) & set(np.concatenate(data.parts))
    starts_at(seen, data.public)
    (event,) = events(tmp_path / "run")
    assert event["bytes_up"] == event["bytes_down"] == 0 and not seen.asked
    assert "reveals nothing about the clients' data" in event["statement"]
    assert final(tmp_path / "run")["bytes_up"] == rounds(tmp_path / "run")[0]["bytes_up"]


def test_private_sums_are_clipped_noised_by_each_client_and_stated(tmp_path, seen):
    """A clip that bounds nothing and noise of no size is the pooled sample; real ones are what the keys say."""
    private = (*SB, "adapter.init.source=private")
    go(tmp_path / "calm", *private, "adapter.init.clip=1000", "adapter.init.noise=1e-12")
    starts_at(seen, np.concatenate(seen.experiment.data.parts))
    calm = [TrainReply.from_record(m.content) for m in seen.answered]
    seen.answered.clear()
    go(tmp_path / "noisy", *private, "adapter.init.clip=1000", "adapter.init.noise=0.5")
    noisy = [TrainReply.from_record(m.content) for m in seen.answered]
    draws = []
    for before, after in zip(calm, noisy, strict=True):
        assert before.client == after.client
        key = torch_generator(0, "statistic-noise", after.client)
        expected = statistics.privatise(torch.from_numpy(before.update.copy()).double(), 1000.0, 0.5, key).numpy()
        np.testing.assert_allclose(after.update, expected, rtol=1e-5, atol=1e-3)
        draws.append(after.update - before.update)
    assert np.std(draws) == pytest.approx(500, rel=0.02)
    assert abs(np.corrcoef(draws[0], draws[1])[0, 1]) < 0.05  # each client's own
    seen.answered.clear()
    go(tmp_path / "clipped", *private, "adapter.init.clip=0.001", "adapter.init.noise=1e-12")
    for m in seen.answered:
        reply = TrainReply.from_record(m.content)
        assert 0 < np.linalg.norm(reply.update) <= 0.001 * reply.examples * (1 + 1e-6)
    init = seen.experiment.settings.adapter.init
    smallest = min(len(p) for p in seen.experiment.data.parts)
    assert isinstance(init, DataDriven) and events(tmp_path / "clipped")[0]["statement"] == init.statement(smallest)
    assert f"delta = 1/{smallest}" in init.statement(smallest)


def test_what_is_sent_for_the_start_is_counted(tmp_path, seen):
    folder = tmp_path / "run"
    go(folder, *SB, "network=lognormal")
    (event,) = events(folder)
    space = seen.server.space
    numbers = sum(d * k for d, k in map(space.sizes, space.modules))
    replies = [TrainReply.from_record(m.content) for m in seen.answered]
    assert {len(r.update) for r in replies} == {numbers} and len(replies) == 4
    assert event["bytes_up"] == sum(payload_bytes(m.content) for m in seen.answered) > 4 * 4 * numbers
    assert event["bytes_down"] == sum(payload_bytes(m.content) for m in seen.asked)
    assert all(len(StatisticRequest.from_record(m.content).state) == 0 for m in seen.asked)
    (round,) = rounds(folder)
    done = final(folder)
    assert done["bytes_up"] == event["bytes_up"] + round["bytes_up"]
    assert done["bytes_down"] == event["bytes_down"] + round["bytes_down"]
    assert 0 < event["virtual_s"] < round["virtual_s"]


def test_the_factors_reach_the_clients_once_and_are_counted_as_such(tmp_path):
    go(tmp_path / "run", *SB, "schedule.rounds=3")
    first, second, third = rounds(tmp_path / "run")
    factors = 4 * 4 * (2 * 2 * (32 + 32) + 2 * (32 + 48))  # bytes of A and B: 4 of rank 4
    assert first["bytes_once"] == 4 * factors and second["bytes_once"] == third["bytes_once"] == 0
    assert first["bytes_down"] - second["bytes_down"] == pytest.approx(4 * factors, abs=100)
    cores = 4 * (6 * 16 + 3 * 32 + 3)
    assert second["bytes_down"] == pytest.approx(4 * cores, rel=0.5) and third["bytes_down"] >= 4 * cores


def test_the_sample_has_as_many_examples_as_asked_for(tmp_path, seen):
    go(tmp_path / "run", *SB, "adapter.init.examples=5")
    assert [TrainReply.from_record(m.content).examples for m in seen.answered] == [5] * 4


def test_a_start_without_data_asks_nobody(tmp_path, seen):
    go(tmp_path / "run", "adapter=lora_xs", "adapter.rank=4", "schedule.rounds=1")
    (event,) = events(tmp_path / "run")
    assert event["statement"] is None and event["bytes_up"] == event["bytes_down"] == 0 and not seen.asked
    base = TinyEncoder().load(3, BASE_SEED).module
    for module, a, b, core in seen.server.space.factors(seen.server.vector):
        weight = base.get_submodule(module.name.removeprefix(dense.PREFIX)).weight.detach().double()
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        product = u[:, :4] @ torch.diag(s[:4]) @ vh[:4]
        np.testing.assert_allclose(b.astype(np.float64) @ a, product.numpy(), atol=1e-5)
        assert 0 < np.abs(core).max() < 1e-4


def test_a_start_that_the_base_takes_back_begins_at_the_base(tmp_path, seen):
    """PiSSA: the first evaluation is the base's own, though the factors are not zero."""
    go(tmp_path / "plain", "schedule.rounds=1", "model.head_std=0.1")
    go(tmp_path / "pissa", "schedule.rounds=1", "model.head_std=0.1", "adapter/init=pissa", "adapter.rank=4")
    plain, pissa = (next(e for e in metrics(tmp_path / n) if e["event"] == "eval") for n in ("plain", "pissa"))
    assert pissa["loss"] == pytest.approx(plain["loss"], rel=1e-5)
    server = seen.server
    for low in server.space.delta(server.vector):
        change = low.left @ low.right
        assert np.linalg.norm(change) > 1e-2
        np.testing.assert_allclose(server.base[low.name].matrix(), -change, atol=1e-5)


def test_the_plain_start_is_no_event(tmp_path, seen):
    go(tmp_path / "run", "schedule.rounds=1")
    assert events(tmp_path / "run") == [] and seen.event is None


# What can't be


def answers(monkeypatch, change) -> None:
    answer = Node.statistics
    monkeypatch.setattr(Node, "statistics", lambda node, messages: change(answer(node, messages), messages))


def broken(kind: str):
    def change(replies, messages):
        out = []
        for reply, message in zip(replies, messages, strict=True):
            said = TrainReply.from_record(reply.content)
            if said.client != 2:
                out.append(reply)
            elif kind == "error":
                out.append(Message(Error(1, "out of memory"), reply_to=message))
            elif kind != "silence":
                update = np.full_like(said.update, np.nan) if kind == "nan" else said.update[1:]
                fields = {n: getattr(said, n) for n in said.__dataclass_fields__} | {"update": update}
                out.append(Message(TrainReply(**fields).to_record(), reply_to=message))
        return out

    return change


@pytest.mark.parametrize("kind", ["error", "nan", "short", "silence"])
def test_a_client_that_gives_no_statistic_stops_the_run(tmp_path, monkeypatch, kind):
    answers(monkeypatch, broken(kind))
    with pytest.raises(RunStopped, match=r"Clients? \[?2\]? gave no statistic to start the adapter from"):
        go(tmp_path / "run", *SB)
    assert not events(tmp_path / "run")


def test_a_node_without_this_initialisation_says_so(tmp_path, monkeypatch):
    begin = Node.__init__
    monkeypatch.setattr(Node, "__init__", lambda node, *arguments: begin(node, *arguments[:7], None))
    with pytest.raises(RunStopped, match="needs no statistic"):
        go(tmp_path / "run", *SB)


@pytest.mark.parametrize(
    ("more", "key"),
    [
        (("adapter.init.source=client", "adapter.init.client=4"), "adapter.init.client"),
        (("adapter.init.source=public",), "adapter.init.source"),
        (("adapter.rank=33",), "adapter.rank"),
        (("model.head_std=0",), "model.head_std"),
        (("model.head_std=0", "adapter.init.source=private"), "model.head_std"),
    ],
)
def test_what_cant_be_started_is_refused_by_name(tmp_path, more, key):
    with pytest.raises(ConfigError) as raised:
        go(tmp_path / "run", *SB, *more)
    assert raised.value.key == key
    assert isinstance(raised.value, ShoalError)


def test_mixed_ranks_start_at_their_own_blocks_unless_the_base_takes_something_back(tmp_path, seen):
    with pytest.raises(ConfigError, match=r"adapter\.init='PiSSA'.*lower rank"):
        go(tmp_path / "pissa", "adapter.rank=[2,4]", "aggregator=hetlora", "adapter/init=pissa")
    go(tmp_path / "run", *SB, "adapter.rank=[2,4]")
    starts_at(seen, np.concatenate(seen.experiment.data.parts))


def test_the_encoders_targets_are_what_these_numbers_assume():
    assert "model=tiny-encoder" in ENCODER and TinyEncoder().target_modules == ["query", "value", "intermediate.dense"]
