"""Conditional flows on small tables, beside conditional Gaussians.

Source: Wang, Baptista, Marzouk, Ruthotto, Verma, Efficient neural network approaches for
conditional optimal transport, 2023 (arXiv 2310.16975), section 6.1: the same columns, but five
splits in place of one, training statistics for all tables, and no row in two parts.
"""

import copy
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
import torch

from ..data import load_uci
from ..data.pairs import PairRecipe
from ..data.recipe import Recipe
from ..data.splits import shuffle_split
from ..flows import TransportMap
from ..flows.standardize import Bounds
from ..posterior.pilots import METHODS, build, run_pilots
from ..posterior_report import METHODS as NAMES
from ..report import Section
from ..train import Run, files, fit
from .experiment import Outcome, RunArguments
from .race import RunFolder, columns, open_folder
from .regressions import LinearGaussian, Pairs, gaussian_network

PAPER = (
    "Wang et al., Efficient neural network approaches for conditional optimal transport (arXiv "
    "2310.16975); its figures for these tables are not known"
)
# Columns of the table that are x and context. Those of the joint tables are the paper's, in which
# no two correlate by more than 0.98: x are the last of them.
TABLES: dict[str, tuple[Sequence[int], Sequence[int]]] = {
    "concrete": ((8,), range(8)),
    "energy": ((9,), range(9)),
    "yacht": ((6,), range(6)),
    "wine-red": (range(5, 11), range(5)),
    "wine-white": (range(5, 11), range(5)),
    "parkinsons": (range(14, 22), (3, 4, 5, 7, 9, 10, 12)),
}
SPLITS = 5
PILOTS = 50
LABELS = {name: NAMES[method.make.__name__] for name, method in METHODS.items()}
LINEAR, NETWORK = "linear Gaussian", "Gaussian network"


def load_splits(name: str, count: int) -> tuple[list[list[Pairs]], PairRecipe, str]:
    """`count` shuffled splits of a table in 80, 10 and 10 %, each of three parts (x, context);
    names of the columns, and the source.

    Raises:
        DataError: the table is not there.
    """
    table = load_uci(name.replace("-", "_"))
    x, context = TABLES[name]
    values = np.concatenate([table.train, table.validation, table.test])
    splits = [
        [(part[:, list(x)], part[:, list(context)]) for part in shuffle_split(values, seed)]
        for seed in range(count)
    ]
    names = [table.columns[i] for i in (*x, *context)]
    recipe = PairRecipe(Recipe.untouched(len(names), names), tuple(names[: len(x)]))
    return splits, recipe, table.source


def standardised(parts: Sequence[Pairs]) -> list[Pairs]:
    """All parts in units of the first one's means and standard deviations."""
    moments = [(values.mean(0), values.std(0)) for values in parts[0]]
    scaled = [
        [
            (v - mean) / np.where(std > 0, std, 1)
            for v, (mean, std) in zip(part, moments, strict=True)
        ]
        for part in parts
    ]
    return [(x, y) for x, y in scaled]


def run(method: str, name: str, arguments: RunArguments, size: str) -> Outcome:
    """Fit the density of x given the context on five splits of the table `name`; test negative
    log-likelihoods in nats of x in units of its training standard deviation, as in the paper.

    Size small has the default settings; full chooses them by pilot runs for each split.
    """
    splits, recipe, source = load_splits(name, SPLITS)
    folder = open_folder(f"{method}-uci-{name}", arguments, size, data=source)
    if folder.done:
        return folder.done
    found: dict[str, list[float]] = {}
    seconds, chosen, label = [], [], LABELS[method]
    for i, (own, held, test) in enumerate(splits):
        flow, trained, settings = train_flow(
            method,
            own,
            held,
            arguments.out / "checkpoint" / f"split-{i + 1}",
            arguments,
            pilots=PILOTS if size == "full" else 0,
            metadata=recipe.metadata(),
        )
        units = float(np.log(own[0].std(0)).sum())
        train, validation, scaled = standardised([own, held, test])
        nll = {
            label: nll_of(flow, test) - units,
            LINEAR: LinearGaussian(train).nll(scaled),
            NETWORK: gaussian_network(
                train, validation, scaled, seed=arguments.seed, max_steps=arguments.max_steps
            ),
        }
        for key, value in nll.items():
            found.setdefault(key, []).append(value)
        seconds.append(trained.seconds)
        chosen.append(settings)
        if i == 0:
            files.save(flow, arguments.out / "model", metadata=recipe.metadata())
    return _finish(folder, name, label, found, seconds, chosen, splits[0][2])


def train_flow(
    method: str,
    pairs: Pairs,
    validation: Pairs,
    out: Path,
    arguments: RunArguments,
    *,
    pilots: int = 0,
    options: Mapping[str, Any] | None = None,
    steps: int | None = None,
    support: Sequence[Bounds] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> tuple[TransportMap, Run, dict[str, Any]]:
    """A flow of `posterior.pilots.METHODS` in the user's units, what its training did, and what
    pilot runs chose; without pilot runs it has the `options`. `steps` are those without limits.

    It trains in the run folder `out`, which is ready, and goes on from what is there.
    """
    seed, dim, context_dim = arguments.seed, pairs[0].shape[1], pairs[1].shape[1]
    limits: dict[str, Any] = {"max_steps": arguments.max_steps, "budget": arguments.budget}
    if arguments.max_steps is None and arguments.budget is None:
        limits["max_steps"] = steps
    best: dict[str, Any] = {"options": dict(options or {}), "training": {}}
    kept = out / "checkpoint" / "pilots.json"
    if pilots and kept.exists():
        best = files.read_json(kept)
    elif pilots:
        theta, context = map(torch.from_numpy, pairs)
        held = torch.from_numpy(validation[0]), torch.from_numpy(validation[1])
        first, *_ = run_pilots(
            pilots, method, theta, context, support=support, validation=held, seed=seed, **limits
        )
        best = {"options": first.options, "training": first.training}
        files.write_json(kept, best)
    flow = build(method, dim, context_dim, best["options"], support=support, seed=seed)
    trained = fit(
        flow,
        pairs,
        validation=validation,
        seed=seed,
        out=out,
        resume=True,
        metadata=dict(metadata or {}),
        **limits,
        **best["training"],
    )
    return flow, trained, best["options"] | best["training"]


@torch.no_grad()
def nll_of(flow: TransportMap, pairs: Pairs) -> float:
    """Mean negative log-likelihood of pairs in nats, in double precision."""
    x, context = map(torch.from_numpy, pairs)
    return -copy.deepcopy(flow).double().log_prob(x, context).mean().item()


def _finish(
    folder: RunFolder,
    name: str,
    label: str,
    found: Mapping[str, Sequence[float]],
    seconds: Sequence[float],
    chosen: Sequence[Mapping[str, Any]],
    test: Pairs,
) -> Outcome:
    from ..plots import bars

    x, context = test
    figures = {key: (fmean(values), stdev(values)) for key, values in found.items()}
    rows = sorted(figures.items(), key=lambda item: item[1])
    table: list[tuple[str, ...]] = [
        ("", "mean", "sd", *(f"split {i + 1}" for i in range(len(seconds))))
    ]
    table += [(key, *(f"{v:.4f}" for v in (*pair, *found[key]))) for key, pair in rows]
    told = (
        f"Negative log-likelihood of {x.shape[1]} columns given {context.shape[1]} others, in nats "
        f"and units of their training standard deviations, over {len(x)} test rows of each of "
        f"{len(seconds)} splits; lower is better. Rows that repeat others are left "
        "out, and columns with ties have noise of their resolution: not the raw table."
    )
    text = f"{told}\n{columns(table)}\ntraining took {fmean(seconds):.1f} s a split\n{PAPER}"
    details = {"figures": found, "train_seconds": list(seconds), "settings": list(chosen)}
    sections = [
        Section("Held-out likelihood", told, table=table),
        Section(
            "Comparison",
            figure=bars([*figures], [m for m, _ in figures.values()], "Mean over the splits"),
        ),
    ]
    outcome = Outcome(figures[label][0], None, PAPER, text, details)
    return folder.write(outcome, f"{label} on {name}", sections)
