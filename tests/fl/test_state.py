import dataclasses

import numpy as np
import pytest

from clients.adapters.base_change import Piece
from clients.adapters.space import Module, Space
from clients.layout import Layout
from fl import checkpoint
from fl.state import ServerState, Update

LAYOUT = Layout(("lora_A", "scale", "lora_B"), ((2, 5), (), (3, 2)))
SPACE = Space(LAYOUT, ("A", "other", "B"), (("A", "B", "other"),), (Module("m", "lora_A", "lora_B", 2.0, 2),))
PIECE = Piece(np.linspace(1, 2, 3, dtype=np.float32)[:, None], np.linspace(0, 1, 5, dtype=np.float32)[None])


def state() -> ServerState:
    d = LAYOUT.size
    return ServerState(
        vector=np.linspace(0, 1, d, dtype=np.float32),
        space=SPACE,
        version=4,
        round=5,
        optimizer={"m": np.linspace(0, 1e-300, d), "v": np.full(d, 1 / 3)},
        base={"m": PIECE},
        extra={"base/delta": np.arange(6, dtype=np.float16).reshape(2, 3)},
    )


def test_parts_survive_a_checkpoint_bit_for_bit(tmp_path):
    before = state()
    checkpoint.save(tmp_path, *before.parts())
    after = ServerState.from_parts(*checkpoint.load(tmp_path), SPACE)
    assert (after.layout, after.version, after.round) == (LAYOUT, 4, 5)
    assert after.layout.hash == LAYOUT.hash
    assert set(after.optimizer) == {"m", "v"}
    assert set(after.extra) == {"base/delta"}
    pairs = [(before.vector, after.vector)]
    pairs += [(PIECE.left, after.base["m"].left), (PIECE.right, after.base["m"].right)]
    pairs += [(before.optimizer[n], after.optimizer[n]) for n in "mv"]
    pairs += [(before.extra["base/delta"], after.extra["base/delta"])]
    for a, b in pairs:
        assert (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())


def test_other_arrays_of_a_checkpoint_are_ignored():
    arrays, meta = state().parts()
    others = {"client/3/dual": np.zeros(2), "client/server/extra/x": np.zeros(2)}
    assert set(ServerState.from_parts(arrays | others, meta | {"clock": 1}, SPACE).extra) == {"base/delta"}


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
        {"vector": np.zeros(LAYOUT.size, np.float16)},
        {"vector": np.zeros((1, LAYOUT.size), np.float32)},
    ],
)
def test_arrays_that_do_not_fit_are_refused(changes):
    with pytest.raises(ValueError, match="has to be float"):
        state().replace(**changes)


def test_a_state_of_another_layout_is_refused():
    arrays, meta = state().parts()
    with pytest.raises(ValueError, match="another layout"):
        ServerState.from_parts(arrays, meta, Space(Layout(("w",), ((LAYOUT.size,),))))


def test_an_increment_is_folded_into_the_base():
    more = Piece(np.ones((3, 1), np.float32), np.ones((1, 5), np.float32))
    folded = state().replace(increment={"m": more}).folded()
    assert folded.increment == {}
    np.testing.assert_allclose(folded.base["m"].matrix(), PIECE.matrix() + 1, rtol=1e-6)
    same = state()
    assert same.folded() is same


def test_an_update_names_what_it_started_from():
    update = Update(client=3, round=5, start_version=4, vector=np.zeros(LAYOUT.size, np.float32), examples=10)
    assert (update.start_version, update.loss, dict(update.extra)) == (4, None, {})
