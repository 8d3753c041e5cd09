"""Posteriors of two simulators: the stochastic Lotka-Volterra process, and shallow water.

Source: Wang, Baptista, Marzouk, Ruthotto, Verma, Efficient neural network approaches for
conditional optimal transport, 2023 (arXiv 2310.16975), sections 6.2 and 6.3.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from ..data.pairs import PairRecipe
from ..data.recipe import Recipe
from ..data.sbibm import ABC_TRUTH, load_abc
from ..errors import DataError
from ..flows import TransportMap
from ..flows.standardize import Bounds
from ..posterior import Calibration, outlier, posterior_predictive
from ..posterior.simulators import SIMULATORS, PrincipalComponents, Simulator
from ..posterior_report import calibrate_flow
from ..report import (
    Section,
    check_section,
    configuration_section,
    training_section,
    write_report,
)
from ..train import Run, files
from .conditional import LABELS, nll_of, standardised, train_flow
from .experiment import Outcome, RunArguments
from .race import columns
from .regressions import LinearGaussian, Pairs

HELD_OUT = 1000  # pairs, to test calibration with
DRAWN = 10_000  # posterior samples
PILOTS = 100  # of size full


# Stochastic Lotka-Volterra

LV = "stochastic_lotka_volterra"
LV_SIMULATIONS = {"small": 50_000, "full": 500_000}
LV_NAMES = tuple(f"log_theta_{i + 1}" for i in range(4))
LV_DATA = (
    *("mean_x", "mean_y", "log_var_x", "log_var_y", "lag1_x", "lag2_x", "lag1_y", "lag2_y"),
    "correlation",
)
LV_FEATURES = (
    *("log1p_mean_x", "log1p_mean_y", "log_var_x", "log_var_y"),
    *("z_lag1_x", "z_lag2_x", "z_lag1_y", "z_lag2_y", "z_correlation"),
)
TIMES = 150  # of a path
LV_WIDTH, LV_STEPS = 64, 6000  # its posterior is curved, and there are pairs enough to learn it
LV_SOURCE = (
    "Wang et al. (arXiv 2310.16975), section 6.2: SMC-ABC with 18.0 and 5.9 million simulations"
)
IDENTIFIED = 1.0  # standard deviation of the reference, of a prior with 2.02
PREDICTED = 2000


@dataclass(frozen=True, eq=False)
class LVReference:
    """What SMC-ABC gives for one observation; all in logarithms of the rates."""

    truth: np.ndarray  # (4,)
    observation: np.ndarray  # (9,)
    mean: np.ndarray  # (4,)
    std: np.ndarray  # (4,)
    samples: np.ndarray | None = None  # (2000, 4)


# Means and standard deviations of the samples that come with the authors' code COT-Flow, and the
# data to five digits, for those who don't have its files.
LV_KNOWN = (
    LVReference(
        np.log(ABC_TRUTH[0]),
        np.array([28.887, 9.140, 8.2031, 6.8733, 0.99882, 0.97904, 0.96684, 0.89591, 0.52781]),
        np.array([-4.561, -0.734, 0.323, -4.355]),
        np.array([0.114, 0.151, 0.180, 0.150]),
    ),
    LVReference(
        np.log(ABC_TRUTH[1]),
        np.array([115.693, 2.347, 5.6501, 4.9444, 0.93308, 0.86526, 0.73665, 0.50613, -0.38603]),
        np.array([-3.949, -4.159, -3.442, -3.872]),
        np.array([0.108, 0.134, 1.788, 0.149]),
    ),
)


def lv_features(x: np.ndarray) -> np.ndarray:
    """The summaries (..., 9) where they spread evenly: logarithms of 1 + the means, and Fisher's z
    of the correlations, which without it crowd at one."""
    features = np.array(x, dtype=np.float64)
    features[..., :2] = np.log1p(features[..., :2])
    # Autocovariances are divided by times - 1, so they may exceed the variance by so much.
    features[..., 4:] = np.arctanh(0.9999 * (TIMES - 1) / TIMES * features[..., 4:])
    return features


def lv_references() -> list[LVReference]:
    """Those of both observations: with samples where PATHLINE_DATA has them."""
    found = []
    for i, known in enumerate(LV_KNOWN, 1):
        try:
            abc = load_abc(i)
        except DataError:
            found.append(known)
            continue
        moments = abc.samples.mean(0), abc.samples.std(0)
        found.append(LVReference(abc.true_parameters, abc.observation, *moments, abc.samples))
    return found


def run_lotka_volterra(method: str, arguments: RunArguments, size: str) -> Outcome:
    """Learn the posterior of all observations from simulations, and compare it for two of them
    with SMC-ABC. The data are the nine summaries of the paper, as `lv_features` has them.

    The measured figure is the largest distance of a posterior mean from the reference's, in its
    standard deviations, over the rates that the data identify.

    Size small has 50,000 simulations and a wider network than the default, full the authors'
    500,000 and 100 pilot runs.
    """
    from ..plots import pairs

    experiment, simulator = f"{method}-lotka-volterra", SIMULATORS[LV]
    out = files.open_run(arguments.out, resume=arguments.resume, overwrite=arguments.overwrite)
    theta, x, lost = simulator.draw_counted(LV_SIMULATIONS[size], arguments.seed)
    features = lv_features(x)
    held_theta, held_x = simulator.draw(HELD_OUT, arguments.seed + 1)
    held = held_theta, lv_features(held_x)
    recipe = _recipe(LV_NAMES, LV_FEATURES)
    flow, trained, _ = train_flow(
        method,
        *validated((theta, features)),
        out,
        arguments,
        pilots=PILOTS if size == "full" else 0,
        options={"width": LV_WIDTH},
        steps=LV_STEPS,
        support=bounds(simulator),
        metadata={"experiment": experiment, "source": simulator.source, **recipe.metadata()},
    )
    rows: list[Sequence[object]] = [
        ("observation", "parameter", "truth", "SMC-ABC", "", "learned", "", "distance / sd")
    ]
    sections, worst, verdicts = [], 0.0, []
    for i, reference in enumerate(lv_references(), 1):
        observed = lv_features(reference.observation)
        samples = samples_of(flow, observed, arguments.seed)
        mean, std = samples.mean(0), samples.std(0)
        for k, name in enumerate(LV_NAMES):
            distance = abs(mean[k] - reference.mean[k]) / reference.std[k]
            identified = reference.std[k] < IDENTIFIED
            worst = max(worst, distance) if identified else worst
            numbers = (
                *(reference.truth[k], reference.mean[k], reference.std[k], mean[k], std[k]),
                distance,
            )
            told = "" if identified else " (not identified)"
            rows.append((i, name + told, *(f"{number:.3f}" for number in numbers)))
        predictive = posterior_predictive(
            simulator.simulate,
            samples[:PREDICTED],
            reference.observation,
            seed=arguments.seed,
            names=LV_DATA,
        )
        verdicts.append(f"Observation {i}: {predictive.verdict}")
        outside = outlier(observed, features, LV_FEATURES)
        verdicts += [] if outside is None else [f"Observation {i}: {outside}"]
        sections.append(
            Section(
                f"Posterior given observation {i}",
                predictive.verdict,
                figure=pairs(samples, LV_NAMES, truth=reference.truth, reference=reference.samples),
            )
        )
    told = (
        f"{LABELS[method]} from {len(theta):,} simulations, which serve any observation ({lost:,} "
        "more did not end within 10,000 events), beside SMC-ABC, which took 18.0 and 5.9 million "
        "for these two; means and standard deviations. The largest distance of an identified rate "
        f"is {worst:.2f} of the reference's standard deviations. SMC-ABC accepts data within a "
        "tolerance, so the exact posterior is not where its own is, to a part of its width."
    )
    calibration = calibrate_flow(flow, *_tensors(held), LV_NAMES, seed=arguments.seed)
    table = [[str(cell) for cell in row] for row in rows]
    text = "\n".join([columns(table), told, *verdicts, calibration.verdict])
    details = {
        "simulations": len(theta),
        "lost_simulations": lost,
        "table": table,
        "calibration": calibration.to_dict(),
    }
    outcome = Outcome(worst, None, LV_SOURCE, text, details)
    first = Section("Posterior means and standard deviations", told, table=table)
    title = f"Stochastic Lotka-Volterra by {LABELS[method]}"
    return _write(outcome, arguments, title, [first, *sections], flow, trained, held, calibration)


# Shallow water

SW = "shallow_water"
SW_SOURCE = "Wang et al. (arXiv 2310.16975), section 6.3, and GATSBI (arXiv 2203.06481)"
DEPTHS = 14  # principal components of the parameters
MOST_PREDICTED = 400
CHUNK = 500  # simulations in memory at a time: each has 20,000 numbers


@dataclass(frozen=True)
class SWSize:
    """Simulations, those that principal components are taken of, and how many of the data."""

    simulations: int
    first: int
    components: int


SW_SIZES = {"small": SWSize(5000, 2000, 100), "full": SWSize(100_000, 10_000, 3500)}


@dataclass(frozen=True, eq=False)
class ShallowWater:
    """Pairs of components of depths and data, and these components."""

    pairs: Pairs
    held: Pairs
    held_depth: np.ndarray  # (rows, 100), in m
    depth: PrincipalComponents
    data: PrincipalComponents


def shallow_water_pairs(size: SWSize, held: int, seed: int) -> ShallowWater:
    """Simulate, and project on the components of the first simulations, chunk by chunk."""
    simulator = SIMULATORS[SW]
    theta, x = simulator.draw(size.first, seed)
    depth = PrincipalComponents.of(theta, DEPTHS)
    data = PrincipalComponents.of(x, size.components)
    parts, depths = [(depth.project(theta), data.project(x))], [theta]
    del x
    rest = size.simulations + held - size.first
    for i, start in enumerate(range(0, rest, CHUNK)):
        chunk_seed = int(np.random.SeedSequence((seed, i)).generate_state(1)[0])
        theta, x = simulator.draw(min(CHUNK, rest - start), chunk_seed)
        parts.append((depth.project(theta), data.project(x)))
        depths.append(theta)
    z, y = (np.concatenate(column) for column in zip(*parts, strict=True))
    return ShallowWater(
        (z[:-held], y[:-held]), (z[-held:], y[-held:]), np.concatenate(depths)[-held:], depth, data
    )


def run_shallow_water(method: str, arguments: RunArguments, size: str) -> Outcome:
    """Learn the depths of a sea, in 14 principal components, from the waves on its surface; the
    measured figure is the negative log-likelihood of held-out depths.

    Size small has 5,000 simulations in 100 components and the default settings, full the authors'
    100,000 in 3,500 and 100 pilot runs, which takes hours of simulation.
    """
    from ..plots import curves, pairs

    simulator = SIMULATORS[SW]
    out = files.open_run(arguments.out, resume=arguments.resume, overwrite=arguments.overwrite)
    made = shallow_water_pairs(SW_SIZES[size], HELD_OUT, arguments.seed)
    names = tuple(f"depth_pc{i + 1}" for i in range(DEPTHS))
    recipe = _recipe(names, tuple(f"data_pc{i + 1}" for i in range(made.pairs[1].shape[1])))
    train, validation = validated(made.pairs)
    flow, trained, _ = train_flow(
        method,
        train,
        validation,
        out,
        arguments,
        pilots=PILOTS if size == "full" else 0,
        metadata={
            "experiment": f"{method}-shallow-water", "source": simulator.source, **recipe.metadata()
        },
    )  # fmt: skip
    units = float(np.log(train[0].std(0)).sum())
    scaled = standardised([train, made.held])
    figures = {
        LABELS[method]: nll_of(flow, made.held) - units,
        "linear Gaussian": LinearGaussian(scaled[0]).nll(scaled[1]),
    }
    errors, covered = _depth_errors(flow, made, arguments.seed)
    observation, truth = made.held[1][0], made.held_depth[0]
    samples = samples_of(flow, observation, arguments.seed)
    drawn = made.depth.restore(samples)  # (DRAWN, 100)
    predictive = posterior_predictive(
        lambda z, rng: made.data.project(simulator.simulate(made.depth.restore(z), rng)),
        samples[:MOST_PREDICTED],
        observation,
        seed=arguments.seed,
    )
    calibration = calibrate_flow(flow, *_tensors(made.held), names, seed=arguments.seed)
    table: list[tuple[str, ...]] = [("", *figures)]
    table += [("NLL of 14 components, nats", *(f"{value:.4f}" for value in figures.values()))]
    told = (
        f"From {len(made.pairs[0]):,} simulations. {DEPTHS} components have "
        f"{100 * made.depth.share:.2f} % of the variance of the depths, and {len(observation):,} "
        f"have {100 * made.data.share:.1f} % of that of the data. Likelihoods are of "
        f"{len(made.held[0]):,} held-out simulations, in units of the components' standard "
        f"deviations. The posterior mean misses the depth of a cell by {errors['posterior']:.3f} m "
        f"(root mean square; the prior mean by {errors['prior']:.3f} m), and intervals of 90 % "
        f"hold {100 * covered:.1f} % of the depths."
    )
    text = "\n".join([columns(table), told, predictive.verdict, calibration.verdict])
    details = {
        "simulations": len(made.pairs[0]),
        "figures": figures,
        "depth_error": errors,
        "coverage_90": covered,
        "predictive": predictive.to_dict(),
        "calibration": calibration.to_dict(),
    }
    cells = np.arange(1, len(truth) + 1)
    low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
    lines = {"truth": truth, "posterior mean": drawn.mean(0), "5 %": low, "95 %": high}
    figure = curves(
        {name: (cells, line) for name, line in lines.items()},
        *("cell", "depth, m", "Depths of a held-out sea, and what its waves tell of them"),
    )
    sections = [
        Section("Held-out likelihood", told, table=table),
        Section("Depths given the first held-out surface", predictive.verdict, figure=figure),
        Section(
            "Components given the same",
            "The first eight; lines mark those of the true depths.",
            figure=pairs(samples, names, truth=made.held[0][0]),
        ),
    ]
    outcome = Outcome(figures[LABELS[method]], None, SW_SOURCE, text, details)
    title = f"Shallow water by {LABELS[method]}"
    return _write(outcome, arguments, title, sections, flow, trained, made.held, calibration)


@torch.no_grad()
def _depth_errors(
    flow: TransportMap, made: ShallowWater, seed: int, rows: int = 200
) -> tuple[dict[str, float], float]:
    """Root mean square errors of posterior and prior means in m, and the share of depths inside
    intervals of 90 %."""
    squares, inside = [], []
    for i in range(min(rows, len(made.held_depth))):
        observation = torch.from_numpy(made.held[1][i])
        drawn = made.depth.restore(flow.sample(200, observation, seed=seed + i).double().numpy())
        truth = made.held_depth[i]
        low, high = np.quantile(drawn, [0.05, 0.95], axis=0)
        squares.append(np.square(np.stack([drawn.mean(0), made.depth.mean]) - truth).mean(1))
        inside.append(((truth > low) & (truth < high)).mean())
    posterior, prior = np.sqrt(np.mean(squares, 0)).tolist()
    return {"posterior": posterior, "prior": prior}, float(np.mean(inside))


# Of both


def _recipe(names: Sequence[str], data: Sequence[str]) -> PairRecipe:
    return PairRecipe(Recipe.untouched(len(names) + len(data), [*names, *data]), tuple(names))


def bounds(simulator: Simulator) -> list[Bounds]:
    """Those of the simulator's prior, as flows take them."""
    return [(None, None) if pair is None else pair for pair in simulator.support]


def _tensors(pairs: Pairs) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.from_numpy(pairs[0]), torch.from_numpy(pairs[1])


def validated(pairs: Pairs) -> tuple[Pairs, Pairs]:
    """The pairs, the last of them to validate with; they are independent draws already."""
    count = max(1, min(len(pairs[0]) // 10, 5000))
    theta, x = pairs
    return (theta[:-count], x[:-count]), (theta[-count:], x[-count:])


def samples_of(flow: TransportMap, observation: np.ndarray, seed: int) -> np.ndarray:
    context = torch.from_numpy(observation)
    return flow.sample(DRAWN, context, seed=seed).double().numpy()


def calibration_sections(calibration: Calibration) -> list[Section]:
    """Ranks and coverage of held-out simulations."""
    figures = calibration.figures()
    return [
        Section("Calibration", calibration.verdict, figure=figures["ranks"]),
        Section("Coverage", calibration.coverage.verdict, figure=figures["coverage"]),
    ]


def _write(
    outcome: Outcome,
    arguments: RunArguments,
    title: str,
    sections: Sequence[Section],
    flow: TransportMap,
    trained: Run,
    held: Pairs,
    calibration: Calibration,
) -> Outcome:
    """Add the report and the figures to the run that `fit` wrote."""
    out = arguments.out
    check = flow.check(*_tensors(held), seed=arguments.seed)
    details: dict[str, Any] = outcome.details | {"check": check.to_dict()}
    metrics = files.read_json(out / "metrics.json") | details | {"text": outcome.text}
    lines = (out / "log.jsonl").read_text(encoding="utf-8").splitlines()
    write_report(
        out / "report.html",
        title,
        [
            *sections,
            *calibration_sections(calibration),
            training_section([json.loads(line) for line in lines], metrics),
            check_section(check),
            configuration_section(files.read_json(out / "config.json")),
        ],
        subtitle=outcome.source,
    )
    files.write_json(out / "metrics.json", metrics)
    text = f"{outcome.text}\n{check.verdict}\ntraining took {trained.seconds:.0f} s"
    return Outcome(outcome.measured, outcome.published, outcome.source, text, details)
