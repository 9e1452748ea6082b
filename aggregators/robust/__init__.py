"""Byzantine-robust rules: how n updates become one when f of them may say anything."""

from aggregators.robust.base import Auto, Mean, NoPre, Pre, Rule
from aggregators.robust.centres import CAF, CenteredClipping, GeometricMedian
from aggregators.robust.combine import Combined, combine, weigh
from aggregators.robust.coordinates import Bulyan, CoordinateMedian, MeaMed, TrimmedMean
from aggregators.robust.geometry import Dense, Factored, Geometry
from aggregators.robust.nearest import MDA, NNA, Krum, MultiKrum
from aggregators.robust.pre import ARC, ARCNNM, NNM, Bucketing, Clipping
from aggregators.robust.trust import FLTrust, FoolsGold

__all__ = [
    "ARC",
    "ARCNNM",
    "CAF",
    "MDA",
    "NNA",
    "NNM",
    "Auto",
    "Bucketing",
    "Bulyan",
    "CenteredClipping",
    "Clipping",
    "Combined",
    "CoordinateMedian",
    "Dense",
    "FLTrust",
    "Factored",
    "FoolsGold",
    "GeometricMedian",
    "Geometry",
    "Krum",
    "MeaMed",
    "Mean",
    "MultiKrum",
    "NoPre",
    "Pre",
    "Rule",
    "TrimmedMean",
    "combine",
    "weigh",
]
