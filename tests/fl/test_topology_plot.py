"""The pictures of a decentralized run: the graph with its links' bytes, how far apart the peers are, how good each."""

import json
import re
from html import unescape

import pytest

from fl.report.load import load_run
from fl.report.peers import consensus_picture, link_bytes, peer_tests, peers_card, peers_pictures, traffic_picture
from fl.report.topology_plot import topology_card, topology_picture
from fl.topology.drawn import ErdosRenyi
from fl.topology.fixed import Complete, Ring, Star, Torus
from fl.topology.one_peer import OnePeerExponential
from tests.fl.test_report import Page

ROUNDS = range(1, 7)


@pytest.fixture
def run(tmp_path):
    """A run over a topology, with ``links`` (from, to) -> bytes, or none of it."""

    def run(topology=None, number: int = 4, links=None, tests: bool = True, consensus=lambda r: 0.5**r):
        info = {"experiment": "gossip", "seed": 0, "status": "completed", "task": "classification", "settings": {}}
        if topology is not None:
            info["topology"] = topology.about(number, 0)
        (tmp_path / "run.json").write_text(json.dumps(info))
        events = [{"event": "round", "round": r, "consensus": consensus(r), "bytes_links": 100} for r in ROUNDS]
        if tests:
            for r in (2, 4, 6, 6):  # a resumed run writes a round again
                values = [0.5 + 0.05 * r - 0.01 * peer for peer in range(number)]
                mean = sum(values) / number
                common = {"event": "eval", "round": r, "virtual_s": r}
                facts = {"per_client": values, "mean": mean, "std": 0.01, "worst_decile": values[-1]}
                events.append({**common, "split": "peers", "metric": "accuracy", **facts})
                events.append({**common, "split": "test", "accuracy": mean + 0.02, "loss": 0.4})
        if links is not None:
            events.append({"event": "links", "links": [[i, j, size] for (i, j), size in links.items()]})
        lines = [json.dumps(event) for event in events]
        (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"event": "links", "li']))
        return load_run(tmp_path)

    return run


def links_of(topology, number: int) -> list[tuple[int, int]]:
    return list(map(tuple, topology.graph(number, 0, 1).links.tolist()))


def tips(picture) -> list[str]:
    return [unescape(text) for text in re.findall(r"<title>(.*?)</title>", picture.svg)]


def widths(picture) -> dict[str, float]:
    """Line widths of the links' paths, by the number of lines that share it."""
    found = re.findall(
        r'<path d="([^"]*)"[^>]*style="fill: none; opacity: [\d.]+; stroke: [^;]*; ([^"]*)"', picture.svg
    )
    wide = [(d.count("M "), re.search(r"stroke-width: ([\d.]+)", style)) for d, style in found]
    return {count: float(match[1]) if match else 1.0 for count, match in wide}


def test_events_of_peers_are_read_back(run):
    made = run(Ring(), links={(0, 1): 5, (1, 0): 7})
    assert link_bytes(made) == {(0, 1): 5.0, (1, 0): 7.0}
    assert [event["round"] for event in peer_tests(made)] == [2, 4, 6]


def test_a_graph_shows_its_links_bytes(run):
    sent = dict.fromkeys(links_of(Ring(), 4), 1_000_000) | {(0, 1): 5_000_000}
    picture = topology_picture(run(Ring(), links=sent))
    told = tips(picture)
    assert "0 → 1: 5.00 MB, 1 → 0: 1.00 MB" in told and "2 → 3: 1.00 MB, 3 → 2: 1.00 MB" in told
    assert "peer 0: sent 6.00 MB, received 2.00 MB" in told
    assert ">widest line: 6.00 MB<" in picture.svg
    wide = widths(picture)
    assert wide[1] > 2 * wide[3]  # one line of the most, three of a third of it


def test_equal_links_are_thin_and_said_so(run):
    sent = dict.fromkeys(links_of(Star(), 5), 1000)
    made = run(Star(), 5, links=sent)
    assert ">each line: 2.00 kB<" in topology_picture(made).svg
    assert set(widths(topology_picture(made)).values()) == {1.1}
    assert traffic_picture(made) is None
    assert "Each of the 8 links carried 1.00 kB." in Page(peers_card(made)).text


def test_without_recorded_bytes_there_is_just_the_graph(run):
    made = run(Torus(), 16)
    picture = topology_picture(made)
    assert "line: " not in picture.svg
    assert [t for t in tips(picture) if "→" in t] == []
    assert "peer 15" in tips(picture)
    assert traffic_picture(made) is None and link_bytes(made) == {}


@pytest.mark.parametrize(
    ("topology", "number", "words"),
    [
        (Ring(), 4, ["ring", "4", "2", "0.667"]),
        (Star(), 16, ["star", "16", "15", "1 to 15, mean 1.88", "0.0625"]),
        (OnePeerExponential(), 8, ["one_peer_exponential, directed", "8", "edges in a round", "1", "gap is that of a"]),
        (ErdosRenyi(redraw_every=2), 12, ["erdos_renyi", "edges in a round", "are the first one's"]),
        (Complete(), 300, ["complete", "300", "44,850", "299", "1"]),
    ],
    ids=lambda x: getattr(x, "name", None),
)
def test_the_card_states_the_graph(run, topology, number, words):
    made = run(topology, number)
    page = Page(topology_card(made))
    for word in words:
        assert word in page.text
    assert ("svg" in page.tags) == (number <= 200)
    assert (topology_picture(made) is None) == (number > 200)


def test_arrows_show_which_way_a_link_goes(run):
    plain, directed = (topology_picture(run(Ring(directed=d), 6)) for d in (False, True))

    def arrows(picture) -> int:
        return sum(d.count("z") for d in re.findall(r'<path d="([^"]*)"[^>]*style="fill: var\(--muted\)"', picture.svg))

    assert arrows(plain) == 0
    assert arrows(directed) == 6


def test_lines_that_would_pass_through_a_peer_are_bent(run):
    """Those around a torus: 4 rows and 4 columns have one each."""
    bent = [d.count("Q ") for d in re.findall(r'<path d="([^"]*)"', topology_picture(run(Torus(), 16)).svg)]
    assert sum(bent) == 8
    assert "Q " not in topology_picture(run(Ring(), 16)).svg


def test_peers_and_their_distance(run):
    made = run(Ring(), 4, links={(0, 1): 10, (1, 0): 30})
    names = [picture.name for picture in peers_pictures(made)]
    assert names == ["consensus", "peers_rounds", "peers", "links"]
    by_name = dict(zip(names, map(tips, peers_pictures(made))))
    assert by_name["consensus"][2] == "round 3: 0.125"
    assert by_name["peers_rounds"][0] == "round 2: mean 58.5 %, from 57.0 % to 60.0 %"
    assert by_name["peers"] == ["peer 3: 77.0 %", "peer 2: 78.0 %", "peer 1: 79.0 %", "peer 0: 80.0 %"]
    assert by_name["links"] == ["1 → 0: 30.0 B", "0 → 1: 10.0 B"]
    text = Page(peers_card(made)).text
    assert "After round 6 the peers' own states have a test accuracy of 78.5 ± 1.0 %" in text
    assert "the worst decile 77.0 %" in text


def test_hostile_peers_stand_apart(run):
    made = run(Ring(), 4)
    path = made.folder / "metrics.jsonl"
    path.write_text(path.read_text().replace('"split": "peers"', '"split": "peers", "hostile": [3]'))
    by_name = {picture.name: picture for picture in peers_pictures(made)}
    assert tips(by_name["peers"])[:2] == ["hostile peer 3: 77.0 %", "peer 2: 78.0 %"]
    assert ">hostile<" in by_name["peers"].svg and ">mean 79.0 %<" in by_name["peers"].svg
    assert tips(by_name["peers_rounds"])[0] == "round 2: mean 59.0 %, from 58.0 % to 60.0 %"


def test_rounds_in_full_agreement_are_counted(run):
    picture = consensus_picture(run(Complete(), consensus=lambda r: 0.0 if r > 4 else 0.5**r))
    assert "2 rounds at 0 are not drawn" in picture.svg
    assert len(tips(picture)) == 4
    assert consensus_picture(run(Complete(), consensus=lambda r: 0.0)) is None


def test_a_run_with_a_server_has_none_of_it(run):
    made = run(None, tests=False, consensus=lambda r: None)
    assert topology_card(made) is topology_picture(made) is peers_card(made) is None
    assert peers_pictures(made) == []
