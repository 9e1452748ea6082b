"""How named tensors lie in a flat vector."""

import pytest
import torch

from clients.layout import Layout

LAYOUT = Layout(("a.weight", "scale", "b.weight"), ((2, 3), (), (4, 1)))


def test_sizes_count_the_scalars_of_each_tensor():
    assert LAYOUT.sizes == (6, 1, 4)
    assert LAYOUT.size == 11


@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_views_then_flatten_gives_the_vector_back(lead):
    flat = torch.arange(11.0 * torch.Size(lead).numel()).reshape(*lead, 11)
    views = LAYOUT.views(flat)
    assert [tuple(v.shape) for v in views.values()] == [(*lead, *s) for s in LAYOUT.shapes]
    assert torch.equal(LAYOUT.flatten(views, len(lead)), flat)


def test_tensors_lie_in_the_order_of_the_names():
    views = LAYOUT.views(torch.arange(11.0))
    assert views["a.weight"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert views["scale"].item() == 6
    assert views["b.weight"].flatten().tolist() == [7, 8, 9, 10]


def test_views_share_memory_with_the_vector_and_flatten_copies():
    flat = torch.zeros(2, 11)
    views = LAYOUT.views(flat)
    views["scale"][1] = 7
    assert flat[1, 6] == 7
    copy = LAYOUT.flatten(views, 1)
    copy += 1
    assert flat.sum() == 7


def test_flatten_follows_the_layout_and_not_the_order_of_the_mapping():
    views = LAYOUT.views(torch.arange(11.0))
    assert torch.equal(LAYOUT.flatten(dict(reversed(views.items()))), torch.arange(11.0))


def test_columns_are_where_the_named_tensors_lie():
    assert LAYOUT.columns(["b.weight", "scale"]).tolist() == [6, 7, 8, 9, 10]
    assert LAYOUT.columns([]).tolist() == []


def test_a_vector_of_another_size_is_refused():
    with pytest.raises(ValueError, match="10 scalars; this layout has 11"):
        LAYOUT.views(torch.zeros(10))


@pytest.mark.parametrize(
    ("names", "shapes"),
    [
        (("a.weight", "scale", "c.weight"), ((2, 3), (), (4, 1))),
        (("a.weight", "scale", "b.weight"), ((3, 2), (), (4, 1))),
        (("scale", "a.weight", "b.weight"), ((), (2, 3), (4, 1))),
    ],
    ids=["a name", "a shape", "the order"],
)
def test_the_hash_tells_layouts_apart(names, shapes):
    assert len(LAYOUT.hash) == 16
    assert LAYOUT.hash == Layout(LAYOUT.names, LAYOUT.shapes).hash
    assert Layout(names, shapes).hash != LAYOUT.hash


def test_of_takes_names_and_shapes_from_tensors():
    assert Layout.of(LAYOUT.views(torch.zeros(11))) == LAYOUT
