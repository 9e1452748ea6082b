"""OLoRA: the adapter begins with the first columns of W0's QR factorisation.

With ``W0 = Q R``: ``B = Q_r`` (orthonormal columns), ``A = R_r`` (the first r rows), and ``-s B A`` is added to the
base. Büyükakyüz, OLoRA (arXiv 2406.01775), as in PEFT (``olora``). R's diagonal is made non-negative here, which fixes
the signs of Q and R and leaves B A alone. PEFT factors GPT-2's weight as it is stored, (in, out), and gets factors of
the wrong shapes; here W0 is always (out, in).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from clients.adapters.initial.base import Initialisation, Site, Start, check_rank, exact
from clients.adapters.initial.factors import qr


@dataclass(frozen=True)
class OLoRA(Initialisation):
    """B A is Q_r R_r of W0's QR factorisation: exact on W0's first r columns. No data."""

    changes_base: ClassVar[bool] = True

    def start(self, site: Site) -> Start:
        check_rank(site.rank, min(site.weight.shape))
        q, r = qr(exact(site.weight))
        return Start.of(site.weight, r[: site.rank], q[:, : site.rank], cancel=site.scale)
