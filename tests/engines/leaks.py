"""What must not leave a node, in the forms it could take on the way, and the search for it in recorded bytes."""

from __future__ import annotations

import base64
import bz2
import contextlib
import gzip
import lzma
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from clients.data.tokens import TokenData

WINDOW = 8  # numbers in a row: 8 tokens of some 60 that there are, or 3 x 8 labels of three, stand nowhere by chance
KINDS = ("<u2", "<i4", "<i8", ">u2", ">i4", ">i8", "<f4", "<f8", "<f2")
STARTS = {b"\x1f\x8b": gzip.decompress, b"BZh": bz2.decompress, b"\xfd7zXZ": lzma.decompress}
DEEPEST = 3


def _varints(numbers: Iterable[int]) -> bytes:
    """As a list of whole numbers in a Flower record (protobuf), which is what JSON-like values travel as."""
    out = bytearray()
    for number in numbers:
        while number > 127:
            out.append(number & 127 | 128)
            number >>= 7
        out.append(number)
    return bytes(out)


def forms(numbers: np.ndarray, small: bool = False) -> dict[str, bytes]:
    """A row of whole numbers as bytes of many types, and as text."""
    plain = [int(n) for n in numbers]
    found = {kind: numbers.astype(kind).tobytes() for kind in (*KINDS, *(("u1",) if small else ()))}
    found |= {"varints": _varints(plain), "zigzag varints": _varints(2 * n for n in plain)}
    return found | {f"text{sep!r}": sep.join(map(str, plain)).encode() for sep in (", ", ",", " ", "\n")}


def needles(texts: Sequence[str], data: TokenData, parts: Sequence[np.ndarray]) -> dict[bytes, str]:
    """Whatever of the samples ``parts`` of ``data``, whose texts are ``texts``, would give some of them away."""
    found: dict[bytes, str] = {}
    for i in np.concatenate(parts).tolist():
        for word in re.findall(r"\w{12,}", texts[i]):  # words that nothing else has
            found |= {word.encode(code): f"the word {word} of sample {i} ({code})" for code in ("utf-8", "utf-16-le")}
            found[word.encode().hex().encode()] = f"the word {word} of sample {i} in hex"
        row = np.asarray(data.tokens[data.offsets[i] : data.offsets[i + 1]], np.int64)
        for at in range(0, len(row) - WINDOW + 1, 2):
            window = row[at : at + WINDOW]
            if len(np.unique(window)) > 3:
                found |= {f: f"tokens {at} on of sample {i} as {kind}" for kind, f in forms(window).items()}
    for part in parts:
        assert data.labels is not None
        labels = data.labels[part]
        for at in range(len(labels) - 3 * WINDOW + 1):
            window = labels[at : at + 3 * WINDOW]
            if len(np.unique(window)) > 1:
                found |= {f: f"labels {at} on as {kind}" for kind, f in forms(window, small=True).items()}
    return found


def layers(payload: bytes, depth: int = 0) -> Iterable[bytes]:
    """``payload``, and whatever can be unpacked of it: compressed streams wherever one begins, and base64."""
    yield payload
    if depth == DEEPEST:
        return
    inside: list[bytes] = []
    for at in (m.start() for m in re.finditer(rb"\x78[\x01\x5e\x9c\xda]", payload)):
        with contextlib.suppress(zlib.error):
            inside.append(zlib.decompressobj().decompress(payload[at:]))
    for start, unpack in STARTS.items():
        for at in (m.start() for m in re.finditer(re.escape(start), payload)):
            with contextlib.suppress(OSError, EOFError, ValueError, zlib.error, lzma.LZMAError):
                inside.append(_stream(unpack, payload[at:]))
    for match in re.finditer(rb"[A-Za-z0-9+/]{24,}={0,2}", payload):
        text = match.group()
        with contextlib.suppress(ValueError):
            inside.append(base64.b64decode(text[: len(text) // 4 * 4]))
    for content in inside:
        if len(content) > 8:
            yield from layers(content, depth + 1)


def _stream(unpack, content: bytes) -> bytes:
    """The first compressed stream of ``content``, whatever comes behind it."""
    if unpack is gzip.decompress:
        return zlib.decompressobj(31).decompress(content)
    reader = bz2.BZ2Decompressor() if unpack is bz2.decompress else lzma.LZMADecompressor()
    return reader.decompress(content)


def leaks(payloads: Iterable[bytes], wanted: Mapping[bytes, str]) -> list[str]:
    """What of ``wanted`` is in ``payloads``: all needles at once, looked up by how they begin."""
    beginnings: dict[int, dict[bytes, list[bytes]]] = {}
    for needle in wanted:
        size = next(n for n in (48, 24, 12, 8) if len(needle) >= n)
        beginnings.setdefault(size, {}).setdefault(needle[:size], []).append(needle)
    found = set()
    for payload in payloads:
        for content in layers(payload):
            for size, begun in beginnings.items():
                for at in range(len(content) - size + 1):
                    for needle in begun.get(content[at : at + size], ()):
                        if content.startswith(needle, at):
                            found.add(wanted[needle])
    return sorted(found)
