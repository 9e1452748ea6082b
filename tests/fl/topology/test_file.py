"""Graphs from files: both formats, and what is refused, with its place."""

import pytest

from fl.errors import ConfigError
from fl.topology.file import File


@pytest.fixture
def write(tmp_path):
    def write(text: str, name: str = "edges.txt") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_text_and_json_are_the_same_graph(write):
    text = write("# a ring\n0 1\n\n 1,2 # on\n2\t3\r\n3, 0\n")
    listed = write("[[0, 1], [1, 2],\n [2, 3], [3, 0]]", "a.json")
    inside = write('{"edges": [[0, 1], [1, 2], [2, 3], [3, 0]]}', "b.JSON")
    for path in (text, listed, inside):
        topology = File(path=path)
        topology.check(4)
        assert topology.graph(4, 0, 1).edges.tolist() == [[0, 1], [0, 3], [1, 2], [2, 3]]
        assert topology.graph(4, 7, 9) is topology.graph(4, 7, 1)
    directed = File(path=text, directed=True)
    directed.check(4)
    assert directed.graph(4, 0, 1).edges.tolist() == [[0, 1], [1, 2], [2, 3], [3, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0 1\n1 2 3\n", "line 2: two whole numbers"),
        ("0 1\n\n1 x\n", "line 3: two whole numbers"),
        ("0 -1\n", "line 1: two whole numbers"),
        ("0 1.0\n", "line 1: two whole numbers"),
        ("0 1\n2 2\n", "line 2: an edge joins two different peers"),
        ("0 1\n1 2\n1 0\n", "line 3: the edge 1 0 is there already, in line 1"),
        ("# nothing\n", "one edge or more"),
    ],
)
def test_bad_lines_are_named(write, text, message):
    with pytest.raises(ConfigError, match=message) as caught:
        File(path=write(text))
    assert caught.value.key == "topology.path"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[0, 1],\n [1, 2]", "line 2: it is not JSON"),
        ("[[0, 1], [1]]", "edge 2: two whole numbers"),
        ("[[0, true]]", "edge 1: two whole numbers"),
        ("[[0, 1.0]]", "edge 1: two whole numbers"),
        ('{"links": []}', "an object with such a list as edges"),
        ("3", "an object with such a list"),
        ("[" * 100_000, "JSON that can be read|is not JSON"),
    ],
)
def test_bad_json_is_named(write, text, message):
    with pytest.raises(ConfigError, match=message):
        File(path=write(text, "edges.json"))


def test_both_ways_of_a_directed_edge_are_two(write):
    topology = File(path=write("0 1\n1 0\n"), directed=True)
    assert topology.graph(2, 0, 1).edges.tolist() == [[0, 1], [1, 0]]


def test_the_graph_must_have_the_run_s_peers_and_be_connected(write):
    topology = File(path=write("0 1\n1 2\n3 4\n"))
    with pytest.raises(ConfigError, match="line 3: there are peers 0 to 3, no 4"):
        topology.check(4)
    with pytest.raises(ConfigError, match="peer 3 can't be reached"):
        topology.check(5)
    one_way = File(path=write("0 1\n1 2\n", "way.txt"), directed=True)
    with pytest.raises(ConfigError, match="strongly connected"):
        one_way.check(3)


def test_a_file_is_needed(tmp_path):
    with pytest.raises(ConfigError, match=r"topology\.path=FILE"):
        File()
    with pytest.raises(ConfigError, match="can be read"):
        File(path=str(tmp_path / "none"))
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="can be read"):
        File(path=str(tmp_path / "binary"))
