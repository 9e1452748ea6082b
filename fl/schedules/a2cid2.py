"""A2CiD2: asynchronous training in pairs with a local momentum (Nabli et al., arXiv 2306.08289).

As AD-PSGD (`fl.schedules.ad_psgd`), and every peer keeps a second model that mixes with the first between events
(`fl.gossip.acid`). It costs a copy of the model and no communication, and lets models agree like ``sqrt(chi1 chi2)`` in
place of ``chi1``: a gain on graphs with long ways (ring, path, torus), none on the complete one. What is evaluated and
saved is the mean of the first models. Momentum of the local optimiser stays with the peer
(``local=client_momentum``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from fl.gossip.acid import Acid
from fl.gossip.rates import Rates
from fl.schedules.ad_psgd import ADPSGD


@dataclass(frozen=True)
class A2CiD2(ADPSGD):
    """AD-PSGD with the continuous momentum, whose constants follow from the graph and ``communications``."""

    def method(self, start: np.ndarray, rates: Rates) -> Acid:
        return Acid(start, rates)
