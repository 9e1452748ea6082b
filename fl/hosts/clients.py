"""Lists of clients as they are typed: 0-7,9."""

from __future__ import annotations

import re

from fl.errors import ConfigError

_PART = re.compile(r"\s*(\d{1,9})(-(\d{1,9}))?\s*", re.ASCII)


def parse_clients(spec: str) -> tuple[int, ...]:
    """The clients of ``0-7``, ``0,3,5`` or ``0-3,8``, in the order given."""
    clients: list[int] = []
    for part in spec.split(","):
        found = _PART.fullmatch(part)
        first, last = (int(found[1]), int(found[3] or found[1])) if found else (1, 0)
        if not 0 <= last - first < 1_000_000:
            break
        clients += range(first, last + 1)
    else:
        if len(set(clients)) == len(clients):
            return tuple(clients)
    raise ConfigError("--clients", spec, "numbers and ranges with commas, such as 0-7 or 0,3,5, each client once")
