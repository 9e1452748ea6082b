import dataclasses

import numpy as np
import pytest

from clients.layout import Layout
from fl import checkpoint
from fl.state import ServerState, Update

LAYOUT = Layout(("lora_A", "scale", "lora_B"), ((2, 5), (), (3, 2)))


def state() -> ServerState:
    d = LAYOUT.size
    return ServerState(
        vector=np.linspace(0, 1, d, dtype=np.float32),
        layout=LAYOUT,
        version=4,
        round=5,
        optimizer={"m": np.linspace(0, 1e-300, d), "v": np.full(d, 1 / 3)},
        extra={"base/delta": np.arange(6, dtype=np.float16).reshape(2, 3)},
    )


def test_parts_survive_a_checkpoint_bit_for_bit(tmp_path):
    before = state()
    checkpoint.save(tmp_path, *before.parts())
    after = ServerState.from_parts(*checkpoint.load(tmp_path))
    assert (after.layout, after.version, after.round) == (LAYOUT, 4, 5)
    assert after.layout.hash == LAYOUT.hash
    assert set(after.optimizer) == {"m", "v"}
    assert set(after.extra) == {"base/delta"}
    pairs = [(before.vector, after.vector)]
    pairs += [(before.optimizer[n], after.optimizer[n]) for n in "mv"]
    pairs += [(before.extra["base/delta"], after.extra["base/delta"])]
    for a, b in pairs:
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_other_arrays_of_a_checkpoint_are_ignored():
    arrays, meta = state().parts()
    others = {"client/3/dual": np.zeros(2), "client/server/extra/x": np.zeros(2)}
    assert set(ServerState.from_parts(arrays | others, meta | {"clock": 1}).extra) == {"base/delta"}


def test_replace_makes_a_new_state_and_fields_cannot_be_set():
    old = state()
    new = old.replace(version=5, vector=old.vector + 1)
    assert (old.version, new.version, new.round) == (4, 5, 5)
    assert new.optimizer is old.optimizer
    with pytest.raises(dataclasses.FrozenInstanceError):
        old.version = 9


@pytest.mark.parametrize(
    "changes",
    [
        {"vector": np.zeros(3, np.float32)},
        {"vector": np.zeros(LAYOUT.size)},
        {"vector": np.zeros((1, LAYOUT.size), np.float32)},
        {"optimizer": {"m": np.zeros(LAYOUT.size, np.float32)}},
        {"optimizer": {"m": np.zeros(2)}},
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="has to be float"):
        state().replace(**changes)


def test_an_update_names_what_it_started_from():
    update = Update(client=3, round=5, start_version=4, vector=np.zeros(LAYOUT.size, np.float32), examples=10)
    assert (update.start_version, update.loss, dict(update.extra)) == (4, None, {})
