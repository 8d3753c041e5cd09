"""Posteriors learned from simulations: are they calibrated, and do they fit what was observed?"""

from .calibration import Calibration as Calibration
from .calibration import Coverage as Coverage
from .calibration import RankTest as RankTest
from .calibration import calibrate as calibrate
from .calibration import expected_coverage as expected_coverage
from .calibration import sbc as sbc
from .calibration import tarp as tarp
from .comparison import c2st as c2st
from .export import to_arviz as to_arviz
from .predictive import Predictive as Predictive
from .predictive import outlier as outlier
from .predictive import posterior_predictive as posterior_predictive
from .ranks import Ranks as Ranks
from .ranks import posterior_ranks as posterior_ranks

__all__ = [
    "Calibration",
    "Coverage",
    "Predictive",
    "RankTest",
    "Ranks",
    "c2st",
    "calibrate",
    "expected_coverage",
    "outlier",
    "posterior_predictive",
    "posterior_ranks",
    "sbc",
    "tarp",
    "to_arviz",
]
