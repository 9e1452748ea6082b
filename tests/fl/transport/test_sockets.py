"""What a listening node refuses: whoever is not known, speaks for others, or sends what is no frame of this round."""

from __future__ import annotations

import contextlib
import logging
import socket
import ssl
import struct
import time

import numpy as np
import pytest

from fl.errors import ShoalError
from fl.transport.base import Address, Exchange
from fl.transport.frames import HEADER, BadFrame, pack, read_head
from fl.transport.identity import Identity, name_of
from fl.transport.sockets import WELCOME, Sockets
from tests.fl.transport.credentials import Authority
from tests.fl.transport.test_transport import FIRST, LENGTH, NEVER_S, SECOND, SOON_S, until

MODEL = np.arange(LENGTH, dtype=np.float32)


@pytest.fixture
def authority(tmp_path):
    return Authority(tmp_path / "ours")


@pytest.fixture
def listening(authority):
    """A node that hosts client 1 and hears client 0 at node-0 and client 2 at node-2; it has begun round 2."""
    made = Sockets("127.0.0.1", 0, authority.identity("node-1"), hold_s=NEVER_S)
    book = {0: Address("127.0.0.1", 1, "node-0"), 1: made.address, 2: Address("127.0.0.1", 1, "node-2")}
    made.begin(Exchange(FIRST, 2, frozenset({1}), LENGTH, time.monotonic() + SOON_S, book))
    yield made
    made.close()


def connect(at: Sockets, identity: Identity | None) -> socket.socket:
    raw = socket.create_connection((at.host, at.port), SOON_S)
    if identity is None:
        return raw
    return identity.contexts()[1].wrap_socket(raw)


def closed(sock: socket.socket) -> bool:
    """Whether the other end closes the connection; what it says before is the welcome."""
    try:
        while said := sock.recv(64):
            assert said == WELCOME
        return True
    except (ssl.SSLError, ConnectionError):
        return True


def hears(at: Sockets, src: int = 0, wait_s: float = SOON_S):
    return at.receive(2, 1, [src], time.monotonic() + wait_s)


def refused(at: Sockets, reason: str) -> None:
    until(lambda: at.counts[f"refused: {reason}"] == 1)


def head(magic=b"SHPT", version=1, kind=1, run=FIRST, round=2, src=0, dst=1, length=LENGTH) -> bytes:
    return struct.pack(">4sHH16sQIIQ", magic, version, kind, run, round, src, dst, length)


def test_a_frame_of_a_known_node_is_heard(listening, authority):
    with connect(listening, authority.identity("node-0")) as sock:
        sock.sendall(pack(FIRST, 2, 0, 1, MODEL))
        assert np.array_equal(hears(listening)[0], MODEL)


REFUSED = {
    "of another format": (head(magic=b"GET "), "malformed"),
    "of another version": (head(version=2), "malformed"),
    "of numbers of no type": (head(kind=7), "malformed"),
    "of nothing, at length": (head(kind=0), "malformed"),
    "that is longer": (head(length=LENGTH + 1), "size"),
    "that is much longer": (head(length=2**62), "size"),
    "of other numbers": (head(kind=2), "size"),
    "of a peer of another node": (head(src=2), "sender"),
    "of a peer that is no neighbour": (head(src=5), "sender"),
    "to a peer that lives elsewhere": (head(dst=4), "unknown"),
    "of a round that does not begin": (head(round=3), "unknown"),
    "of a run that does not begin": (head(run=SECOND), "unknown"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_header_that_is_not_expected_ends_the_connection_before_its_numbers_are_read(
    listening, authority, name, caplog
):
    frame, reason = REFUSED[name]
    with caplog.at_level(logging.WARNING), connect(listening, authority.identity("node-0")) as sock:
        sock.sendall(frame)  # and no numbers at all
        assert closed(sock)
    refused(listening, reason)
    assert "refused from 127.0.0.1" in caplog.text
    assert hears(listening, wait_s=NEVER_S) == {}


def test_a_frame_that_ends_too_soon_is_not_heard(listening, authority):
    frame = pack(FIRST, 2, 0, 1, MODEL)
    for cut in (10, HEADER.size, len(frame) - 1):
        with connect(listening, authority.identity("node-0")) as sock:
            sock.sendall(frame[:cut])
    assert hears(listening, wait_s=NEVER_S) == {}
    with connect(listening, authority.identity("node-0")) as sock:
        for byte in range(len(frame)):  # one that comes in pieces is
            sock.sendall(frame[byte : byte + 1])
        assert np.array_equal(hears(listening)[0], MODEL)


def test_frames_that_are_replayed_are_dropped(listening, authority):
    with connect(listening, authority.identity("node-0")) as sock:
        sock.sendall(pack(FIRST, 1, 0, 1, MODEL) + pack(FIRST, 2, 0, 1, MODEL) + pack(FIRST, 2, 0, 1, MODEL + 1))
        until(lambda: listening.counts == {"stale": 1, "duplicate": 1})
    assert np.array_equal(hears(listening)[0], MODEL)


def test_a_certificate_of_another_authority_is_refused(listening, tmp_path, authority):
    forger = Authority(tmp_path / "theirs")
    stranger = forger.identity("node-0", tmp_path / "ours" / "ca.crt")
    with connect(listening, stranger) as sock:
        assert closed(sock)
    refused(listening, "connection")
    with pytest.raises(ssl.SSLCertVerificationError):  # nor does a node send to a listener of another authority
        connect(listening, forger.identity("node-2"))


def test_a_certificate_that_is_over_is_refused(listening, authority):
    with connect(listening, authority.identity("node-0", days=-1)) as sock:
        assert closed(sock)
    refused(listening, "connection")


def test_a_client_without_a_certificate_is_refused(listening, tmp_path):
    context = ssl.create_default_context(cafile=str(tmp_path / "ours" / "ca.crt"))
    context.check_hostname = False
    with context.wrap_socket(connect(listening, None)) as sock:
        assert closed(sock)
    refused(listening, "connection")


def test_a_plain_client_is_refused(listening):
    with connect(listening, None) as sock, contextlib.suppress(ConnectionError):
        sock.sendall(pack(FIRST, 2, 0, 1, MODEL))
        while sock.recv(64):  # a TLS alert
            pass
    refused(listening, "connection")
    assert hears(listening, wait_s=NEVER_S) == {}


def sender(authority, to: Sockets, name: str) -> Sockets:
    """Node 0, whose book has ``to`` under ``name``."""
    made = Sockets("127.0.0.1", 0, authority.identity("node-0"))
    book = {1: Address(to.host, to.port, name)}
    made.begin(Exchange(FIRST, 2, frozenset({0}), LENGTH, time.monotonic() + 2 * NEVER_S, book))
    return made


def test_a_model_goes_to_the_node_that_the_book_names_and_to_no_other(listening, authority):
    made = sender(authority, listening, "node-7")
    made.send(2, 0, 1, MODEL)
    until(lambda: made.counts["unsent"] == 1)
    made.close()
    assert hears(listening, wait_s=NEVER_S) == {}


def test_a_model_goes_to_no_plain_listener(authority):
    with socket.create_server(("127.0.0.1", 0)) as plain:
        made = Sockets("127.0.0.1", 0, authority.identity("node-0"))
        book = {1: Address("127.0.0.1", plain.getsockname()[1], "node-1")}
        made.begin(Exchange(FIRST, 2, frozenset({0}), LENGTH, time.monotonic() + 2 * NEVER_S, book))
        made.send(2, 0, 1, np.full(LENGTH, 1.0, np.float32))
        got, _ = plain.accept()
        with got:
            first = got.recv(4096)
            assert first[:1] == b"\x16" and MODEL.tobytes() not in first  # a TLS handshake, which nobody answers
        until(lambda: made.counts["unsent"] == 1)
        made.close()


def test_a_node_that_restarts_is_reached_again(authority):
    """The first frame after the cut arrives, not the second."""
    identities = [authority.identity(f"node-{i}") for i in range(2)]
    out, there = (Sockets("127.0.0.1", 0, identity) for identity in identities)
    port, book = there.port, {0: out.address, 1: there.address}

    def begin(round: int) -> None:
        end = time.monotonic() + SOON_S
        out.begin(Exchange(FIRST, round, frozenset({0}), LENGTH, end, book))
        there.begin(Exchange(FIRST, round, frozenset({1}), LENGTH, end, book))

    for round in (1, 2, 3):
        begin(round)
        out.send(round, 0, 1, MODEL + round)
        assert np.array_equal(there.receive(round, 1, [0], time.monotonic() + SOON_S)[0], MODEL + round)
        if round < 3:
            there.close()
            there = Sockets("127.0.0.1", port, identities[1])
    # And one that comes up while a frame waits for it.
    there.close()
    out.begin(Exchange(FIRST, 4, frozenset({0}), LENGTH, time.monotonic() + SOON_S, book))
    out.send(4, 0, 1, MODEL)
    time.sleep(NEVER_S)
    there = Sockets("127.0.0.1", port, identities[1])
    there.begin(Exchange(FIRST, 4, frozenset({1}), LENGTH, time.monotonic() + SOON_S, book))
    assert np.array_equal(there.receive(4, 1, [0], time.monotonic() + SOON_S)[0], MODEL)
    out.close()
    there.close()


def test_a_node_that_is_down_costs_its_own_messages_only(listening, authority):
    with socket.create_server(("127.0.0.1", 0)) as gone:
        port = gone.getsockname()[1]
    made = Sockets("127.0.0.1", 0, authority.identity("node-0"))
    book = {1: listening.address, 3: Address("127.0.0.1", port, "node-3")}
    made.begin(Exchange(FIRST, 2, frozenset({0}), LENGTH, time.monotonic() + 2.0, book))
    made.send(2, 0, 3, MODEL)
    made.send(2, 0, 1, MODEL)
    assert np.array_equal(hears(listening)[0], MODEL)
    until(lambda: made.counts["unsent"] == 1)
    made.close()


def test_without_tls_only_on_this_machine_and_only_when_told(tmp_path):
    for host, insecure in (("127.0.0.1", False), ("0.0.0.0", True), ("0.0.0.0", False)):
        with pytest.raises(ShoalError, match="TLS only"):
            Sockets(host, 0, None, insecure=insecure)
    made = Sockets("127.0.0.1", 0, None, insecure=True)
    book = {1: Address("192.0.2.1", 1, "")}
    made.begin(Exchange(FIRST, 2, frozenset({0}), LENGTH, time.monotonic() + NEVER_S, book))
    made.send(2, 0, 1, MODEL)
    until(lambda: made.counts["unsent"] == 1)
    with pytest.raises(ShoalError, match="address"):
        made.send(2, 0, 9, MODEL)
    with pytest.raises(ShoalError, match="can't listen"):
        Sockets("127.0.0.1", made.port, None, insecure=True)
    made.close()


def test_files_that_are_no_identity_are_refused(authority, tmp_path):
    one, other = authority.identity("a"), authority.identity("b", openssh=False)
    assert name_of(one.certificate) == "a"
    one.contexts(), other.contexts()
    for files in (
        Identity(one.authority, one.certificate, other.key),  # another's key
        Identity(one.key, one.certificate, one.key),
        Identity(one.authority, one.certificate, tmp_path / "none"),
    ):
        with pytest.raises(ShoalError, match="shoal keys"):
            files.contexts()


def test_headers_are_forty_eight_bytes_in_network_order():
    assert pack(FIRST, 2, 0, 1, MODEL) == head() + b"".join(struct.pack("<f", x) for x in range(LENGTH))
    assert pack(FIRST, 2, 0, 1, None) == head(kind=0, length=0)
    assert len(head()) == HEADER.size == 48
    found = read_head(head())
    assert (found.run, found.round, found.src, found.dst, found.bytes) == (FIRST, 2, 0, 1, 4 * LENGTH)
    with pytest.raises(BadFrame):
        read_head(bytes(HEADER.size))
