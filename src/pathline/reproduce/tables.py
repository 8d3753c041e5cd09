"""OT-Flow on real tables, beside the classical densities."""

from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch

from .. import models
from ..data import Recipe, Splits, load_electricity, load_uci, write_table
from ..errors import ArgumentError
from ..flows import Flow, OTFlow
from ..report import finish_density
from ..train import fit
from .baselines import baselines
from .experiment import Outcome, RunArguments

TABLES: dict[str, Callable[[], Splits]] = {
    "electricity": load_electricity,
    **{
        name: partial(load_uci, name)
        for name in ("wine_red", "wine_white", "parkinsons", "concrete")
    },
}


def run(name: str, arguments: RunArguments, size: str) -> Outcome:
    """Fit the table `name`; held-out negative log-likelihoods in nats, in the table's units.

    Size small has the default settings. Size full exists for electricity and has the authors'
    settings for POWER (width 128, 10 time steps, alpha_C 500, alpha_R 5, batch 10,000).
    """
    splits = TABLES[name]()
    dim = splits.train.shape[1]
    generator = torch.Generator().manual_seed(arguments.seed)
    options: dict[str, Any] = {}
    if size == "small":
        flow = OTFlow(dim, generator=generator)
    elif name == "electricity":
        flow = OTFlow(
            dim, 128, 2, transport=1 / 500, hjb=5 / 500, train_steps=10, generator=generator
        )
        options = {"batch_size": 10_000, "learning_rate": 0.03, "max_steps": 36_000}
    else:
        raise ArgumentError(f"ot-flow-{name} has no published setting; --size full does not exist")
    return fit_table(
        flow,
        splits,
        arguments,
        method="OT-Flow",
        experiment=f"ot-flow-{name}",
        others=lambda: baselines(splits.train, splits.validation, splits.test),
        **options,
    )


def fit_table(
    flow: Flow,
    splits: Splits,
    arguments: RunArguments,
    *,
    method: str,
    experiment: str,
    others: Callable[[], Mapping[str, float]],
    published: float | None = None,
    note: str = "",
    **options: Any,
) -> Outcome:
    """Train `flow` on a table, judge it on the test rows, and write report and samples.

    Args:
        method: what the flow is called beside others.
        experiment: name of the experiment.
        others: gives the negative log-likelihoods of other methods on the same rows.
        published: the figure of the paper for these rows.
        note: what the reader must know about the comparison.
        options: of `fit`; the user's arguments have precedence.
    """
    chosen = {key: value for key, value in asdict(arguments).items() if value is not None}
    fit(
        flow,
        splits.train,
        validation=splits.validation,
        metadata={
            "experiment": experiment,
            "source": splits.source,
            "recipe": Recipe.untouched(flow.dim, splits.columns).to_dict(),
        },
        **(options | chosen),
    )
    compared = dict(others())
    metrics = finish_density(
        arguments.out,
        splits.test,
        splits.columns,
        title=f"{method} on {splits.name}",
        method=method,
        classical=compared,
        subtitle=splits.source,
    )
    samples = models.load(arguments.out).sample(10_000, seed=arguments.seed)
    write_table(arguments.out / "samples.csv", samples.double().numpy(), splits.columns)
    figures = {method: metrics["nll"], **compared}
    width = max(map(len, figures))
    lines = [f"held-out negative log-likelihood (nats, {len(splits.test)} rows; lower is better)"]
    lines += [
        f"  {name:<{width}}  {value:9.4f}"
        for name, value in sorted(figures.items(), key=lambda pair: pair[1])
    ]
    lines += [
        *([note] if note else []),
        metrics["check"]["verdict"],
        f"training took {metrics['seconds']:.0f} s; data: {splits.source}",
    ]
    details = {"figures": figures, "check": metrics["check"], "train_seconds": metrics["seconds"]}
    return Outcome(metrics["nll"], published, splits.source, "\n".join(lines), details)
