"""Do posteriors hold the truth as often as they say? Tests of the ranks of true parameters."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.special import bdtr, chdtrc
from torch import Tensor

from .ranks import Posterior, Ranks, posterior_ranks

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LEVEL = 0.01  # how often a calibrated posterior may fail
CURVE_POINTS = 20
SIMULATIONS = 5000  # of the curves of a calibrated posterior
CLEAR = 2.5  # standard errors from which a moment of the ranks explains why they are not uniform
DENSITY = "log density"


@dataclass(frozen=True)
class RankTest:
    """What `sbc` found, with its verdict in words.

    The tests are those of each parameter and of the log-density, in the order of `names`. `counts`
    (tests, bins) are the ranks in each bin, and `expected` (bins,) what a calibrated posterior has
    in the mean; `p_values` are those of the chi-squared tests, `adjusted` the same after Holm's
    correction for their number. It has passed if all of the latter exceed `level`.
    """

    rows: int
    samples: int
    names: tuple[str, ...]
    counts: np.ndarray
    expected: np.ndarray
    p_values: tuple[float, ...]
    adjusted: tuple[float, ...]
    level: float
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return _plain(self)


@dataclass(frozen=True)
class Coverage:
    """A coverage curve with its verdict in words: how often regions that should hold the truth
    with probability `levels` (points,) do, `covered` (points,).

    A calibrated posterior stays between `lower` and `upper` (points,) at all levels at once, but
    for a share `level` of such curves; it has passed if `p_value` exceeds `level`. `regions` are
    the "highest-density" or the "TARP" ones.
    """

    regions: str
    rows: int
    samples: int
    levels: np.ndarray
    covered: np.ndarray
    lower: np.ndarray
    upper: np.ndarray
    p_value: float
    level: float
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        return _plain(self)


@dataclass(frozen=True)
class Calibration:
    """What `calibrate` found: its three checks, and a verdict in words on all of them."""

    sbc: RankTest
    coverage: Coverage
    tarp: Coverage
    passed: bool
    verdict: str

    def to_dict(self) -> dict[str, Any]:
        """The fields, JSON-safe."""
        parts = {name: getattr(self, name).to_dict() for name in ("sbc", "coverage", "tarp")}
        return {**parts, "passed": self.passed, "verdict": self.verdict}

    def figures(self) -> "dict[str, Figure]":
        """The histograms of `ranks` and the curves of `coverage`, drawn by `pathline.plots`."""
        from .. import plots

        curves = {
            f"{part.regions} regions": (part.levels, part.covered, part.lower, part.upper)
            for part in (self.coverage, self.tarp)
        }
        return {
            "ranks": plots.rank_histograms(self.sbc.counts, self.sbc.expected, self.sbc.names),
            "coverage": plots.coverage(curves),
        }


def calibrate(
    posterior: Posterior,
    theta: Tensor,
    context: Tensor,
    *,
    samples: int = 199,
    prior: Tensor | None = None,
    names: Sequence[str] | None = None,
    seed: int = 0,
    level: float = LEVEL,
) -> Calibration:
    """Check a posterior on simulations it was not trained on: `sbc`, `expected_coverage` and
    `tarp`, from the same samples.

    All three hold for a posterior that ignores the data and is the prior; compare the
    log-densities of two posteriors to see which has learned more.

    Args:
        posterior, theta, context, samples, prior, names, seed: of `posterior_ranks`.
        level: how often a calibrated posterior fails any of the three.

    Raises:
        ArgumentError, DataError, ModelError, ShapeError: as for `posterior_ranks`.
    """
    ranks = posterior_ranks(
        posterior, theta, context, samples=samples, prior=prior, names=names, seed=seed
    )
    parts = (
        sbc(ranks, level=level / 3),
        expected_coverage(ranks, level=level / 3),
        tarp(ranks, level=level / 3),
    )
    failed = [part.verdict for part in parts if not part.passed]
    verdict = (
        " ".join(failed)
        if failed
        else f"The posterior is calibrated as far as {len(ranks.density):,} test pairs can tell: "
        "ranks and both coverages agree with the nominal ones."
    )
    return Calibration(*parts, not failed, verdict)


def sbc(ranks: Ranks, *, level: float = LEVEL) -> RankTest:
    """Simulation-based calibration: are the ranks of each parameter, and of the log-density of all
    of them together, uniform?

    The log-density sees errors of the joint posterior, such as a wrong correlation, that no single
    parameter shows. The number of bins is a twentieth of that of the rows, from 2 to 20.

    Source: Talts et al., arXiv 1804.06788; Modrák et al., Simulation-based calibration checking for
    Bayesian computation: the choice of test quantities shapes sensitivity, arXiv 2211.02383.
    """
    table = np.column_stack([ranks.marginal, ranks.density])
    rows, values = len(table), ranks.samples + 1
    bins = min(max(2, rows // 20), 20, values)
    share = np.bincount(np.arange(values) * bins // values) / values
    counts = np.stack([np.bincount(c * bins // values, minlength=bins) for c in table.T])
    statistic = (np.square(counts - rows * share) / (rows * share)).sum(1)
    p_values = chdtrc(bins - 1, statistic)
    adjusted = holm(p_values)
    names = (*ranks.names, DENSITY)
    findings = []
    for i in np.argsort(p_values, kind="stable"):
        if adjusted[i] > level:
            continue
        words = _joint if names[i] == DENSITY and i == len(names) - 1 else _marginal
        findings.append(f"{names[i]} {words(table[:, i], values)} ({_p(p_values[i])})")
    verdict = (
        f"Ranks are NOT uniform: {', '.join(findings)}."
        if findings
        else f"Ranks of {rows:,} test pairs are uniform (smallest p {p_values.min():.2g} of "
        f"{len(names)})."
    )
    return RankTest(
        rows, ranks.samples, names, counts, rows * share, tuple(p_values.tolist()),
        tuple(adjusted.tolist()), level, not findings, verdict,
    )  # fmt: skip


def expected_coverage(ranks: Ranks, *, level: float = LEVEL) -> Coverage:
    """How often the regions of highest posterior density hold the true parameters.

    A region of level a is the smallest that holds the share a of the posterior, so theta lies in it
    if fewer than the share a of the samples have a higher density. The curve is that of an
    over-confident posterior below the diagonal, and of an under-confident one above it.

    Source: Hermans et al., A trust crisis in simulation-based inference? Your posterior
    approximations can be unfaithful, arXiv 2110.06581, section 2.
    """
    return _coverage("highest-density", ranks.samples - ranks.density, ranks.samples, level)


def tarp(ranks: Ranks, *, level: float = LEVEL) -> Coverage:
    """How often balls around random points hold the true parameters (tests of accuracy with random
    points).

    Each ball is centred at a reference point and holds the share a of the posterior. Unlike
    `expected_coverage` this needs no densities, and sees a shift of the posterior as such.

    Source: Lemos et al., arXiv 2302.03026, algorithm 2.
    """
    return _coverage("TARP", ranks.distance, ranks.samples, level)


def holm(p_values: np.ndarray) -> np.ndarray:
    """p-values corrected for their number, as Holm does."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p_values[order] * factors))
    return adjusted


def _coverage(regions: str, counts: np.ndarray, samples: int, level: float) -> Coverage:
    """The curve of regions that hold theta if fewer than their share of the samples is in front.

    The band is the binomial one at each level, wide enough to hold whole curves: a curve's
    smallest tail probability over all levels is compared with that of simulated curves (Säilynoja
    et al., Graphical test for discrete uniformity, arXiv 2103.10522).
    """
    rows, values = len(counts), samples + 1
    # Levels at which the counts 0, ..., samples can have exactly that probability.
    edges = np.unique(np.rint(np.linspace(0, 1, CURVE_POINTS + 1) * values).astype(int))
    levels = edges / values
    inside = np.searchsorted(np.sort(counts), edges, side="left")  # (points,)
    cdf = bdtr(np.arange(rows + 1.0), rows, levels[1:-1, None])  # (points - 2, rows + 1)
    upper_tail = 1 - np.pad(cdf, ((0, 0), (1, 0)))[:, :-1]
    tails = np.minimum(cdf, upper_tail)
    rng = np.random.default_rng(0)
    curves = rng.multinomial(rows, np.diff(levels), SIMULATIONS).cumsum(1)[:, :-1]
    points = np.arange(len(cdf))
    simulated = np.sort(tails[points, curves].min(1))
    worst = tails[points, inside[1:-1]].min()
    p_value = (1 + np.searchsorted(simulated, worst, side="right")) / (SIMULATIONS + 1)
    # A curve whose tails all exceed this has a p-value above the level.
    least = simulated[max(0, int(level * (SIMULATIONS + 1)) - 1)]
    within = tails > least
    lower = np.pad(within.argmax(1), 1, constant_values=(0, rows)) / rows
    upper = np.pad(rows - within[:, ::-1].argmax(1), 1, constant_values=(0, rows)) / rows
    passed = bool(p_value > level)
    at = int(np.abs(levels - 0.9).argmin())
    held = (
        f"regions of {100 * levels[at]:.3g} % hold the truth in {100 * inside[at] / rows:.3g} % of "
        f"{rows:,} cases"
    )
    words = _far if regions == "TARP" else lambda c, v: _joint(samples - c, v)
    verdict = (
        f"{regions[0].upper()}{regions[1:]} coverage is as it should be: {held} (p {p_value:.2g})."
        if passed
        else f"{regions[0].upper()}{regions[1:]} coverage is NOT as it should be: the posterior is "
        f"{words(counts, values)}; {held} ({_p(p_value)})."
    )
    return Coverage(
        regions, rows, samples, levels, inside / rows, lower, upper, float(p_value), level, passed,
        verdict,
    )  # fmt: skip


def _marginal(ranks: np.ndarray, values: int) -> str:
    shift, spread = _moments(ranks, values)
    if max(abs(shift), abs(spread)) < CLEAR:
        return "misshapen"
    if abs(shift) >= abs(spread):
        return f"biased (posterior too {'low' if shift > 0 else 'high'})"
    return "over-confident (too narrow)" if spread > 0 else "under-confident (too wide)"


def _joint(ranks: np.ndarray, values: int) -> str:
    shift, _ = _moments(ranks, values)
    if abs(shift) < CLEAR:
        return "misshapen"
    if shift < 0:
        return "over-confident (too narrow, or in the wrong place)"
    return "under-confident (too wide)"


def _far(ranks: np.ndarray, values: int) -> str:
    # Distances shift with the width too, so that the spread has the first word.
    shift, spread = _moments(ranks, values)
    if abs(spread) >= CLEAR:
        return "over-confident or biased" if spread > 0 else "under-confident (too wide)"
    return "biased or of the wrong width" if abs(shift) >= CLEAR else "misshapen"


def _moments(ranks: np.ndarray, values: int) -> tuple[float, float]:
    """Mean and mean square of the centred ranks, in standard errors from those of the uniform."""
    u = (ranks + 0.5) / values - 0.5
    rows = len(u)
    return float(u.mean() * (12 * rows) ** 0.5), float(
        (np.square(u).mean() - 1 / 12) * (180 * rows) ** 0.5
    )


def _p(value: float) -> str:
    return f"p {value:.1g}" if value >= 1e-6 else "p < 1e-6"


def _plain(result: Any) -> dict[str, Any]:
    """A dataclass with its arrays as lists."""
    return {
        name: value.tolist() if isinstance(value, np.ndarray) else value
        for name, value in asdict(result).items()
    }
