"""Continuous flows on the tables on which densities are usually compared."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..data import is_published, load_published
from ..flows import FFJORD, RNODE, Flow, OTFlow
from .experiment import Outcome, RunArguments
from .tables import fit_table

JUDGED = 5_000  # most test rows, where they are not those of the published figures


@dataclass(frozen=True)
class Method:
    """A flow as published: how it is built and trained, and its test negative log-likelihoods."""

    label: str
    small: Callable[..., Flow]  # dim, generator
    full: Callable[[str, int, torch.Generator], tuple[Flow, dict[str, Any]]]
    paper: str
    figures: dict[str, float]
    difference: str = ""  # from the paper's model, in size full


# The settings of OT-Flow's authors: width, time steps, batch, learning rate, alpha_C, alpha_R and
# most iterations.
OT_FLOW = {
    "power": (128, 10, 10_000, 0.03, 500, 5, 36_000),
    "gas": (350, 10, 2_000, 0.01, 1_200, 40, 60_000),
    "hepmass": (256, 12, 2_000, 0.02, 500, 40, 40_000),
    "miniboone": (256, 6, 2_000, 0.02, 100, 15, 8_000),
    "bsds300": (512, 14, 300, 0.001, 2_000, 800, 120_000),
}
# Those of FFJORD's: neurons of a layer over columns, hidden layers, batch.
FREE = {
    "power": (10, 3, 10_000),
    "gas": (20, 3, 1_000),
    "hepmass": (10, 2, 10_000),
    "miniboone": (20, 2, 1_000),
    "bsds300": (20, 3, 10_000),
}


def _ot_flow(name: str, dim: int, generator: torch.Generator) -> tuple[Flow, dict[str, Any]]:
    width, steps, batch, rate, alpha_c, alpha_r, iterations = OT_FLOW[name]
    flow = OTFlow(
        dim,
        width,
        2,
        transport=1 / alpha_c,
        hjb=alpha_r / alpha_c,
        train_steps=steps,
        trace="exact",
        generator=generator,
    )
    return flow, {"batch_size": batch, "learning_rate": rate, "max_steps": iterations}


def _free(
    make: Callable[..., Flow], name: str, dim: int, generator: torch.Generator
) -> tuple[Flow, dict[str, Any]]:
    factor, depth, batch = FREE[name]
    flow = make(dim, width=factor * dim, depth=depth, generator=generator)
    # Their papers train until validation stalls; OT-Flow's number of steps bounds that here.
    steps = OT_FLOW[name][-1]
    return flow, {
        "batch_size": batch, "learning_rate": 1e-3, "max_steps": steps, "patience": 30,
    }  # fmt: skip


ONE_BLOCK = (
    "The paper's model stacks up to ten flows with moving batch normalisation between; this one "
    "is a single flow of the same layers, with tanh between them."
)
METHODS = {
    "ot-flow": Method(
        "OT-Flow",
        OTFlow,
        _ot_flow,
        "Onken et al., OT-Flow (arXiv 2006.00104)",
        {"power": -0.30, "gas": -9.20, "hepmass": 17.32, "miniboone": 10.55, "bsds300": -154.20},
    ),
    "ffjord": Method(
        "FFJORD",
        FFJORD,
        lambda *table: _free(FFJORD, *table),
        "Grathwohl et al., FFJORD (arXiv 1810.01367)",
        {"power": -0.46, "gas": -8.59, "hepmass": 14.92, "miniboone": 10.43, "bsds300": -157.40},
        ONE_BLOCK,
    ),
    "rnode": Method(
        "RNODE",
        RNODE,
        lambda *table: _free(RNODE, *table),
        "RNODE (arXiv 2002.02798) as trained by Onken et al., OT-Flow (arXiv 2006.00104)",
        {"power": -0.39, "gas": -11.10, "hepmass": 16.16, "miniboone": 10.54},
        ONE_BLOCK,
    ),
}


def run(method: str, name: str, arguments: RunArguments, size: str) -> Outcome:
    """Fit the table `name` with the flow `method`; test negative log-likelihoods in nats.

    Size small has the default settings, and what is on file of the table; where that is only a
    part, no published figure stands beside the result. Size full fetches the whole table and has
    the authors' settings.
    """
    splits = load_published(name, fetch=size == "full")
    flows = METHODS[method]
    dim = splits.train.shape[1]
    generator = torch.Generator().manual_seed(arguments.seed)
    options: dict[str, Any] = {}
    if size == "full":
        flow, options = flows.full(name, dim, generator)
    else:
        flow = flows.small(dim, generator=generator)
    others: dict[str, float] = {}
    published, notes = None, []
    if is_published(splits):
        published = flows.figures.get(name)
        others = {
            f"{other.label}, published": other.figures[name]
            for other in METHODS.values()
            if name in other.figures
        }
        notes.append(
            f"published by {flows.paper}"
            if published is not None
            else "no published figure of this method is known"
        )
        notes += [flows.difference] if size == "full" and flows.difference else []
    else:
        splits = replace(splits, test=splits.test[:JUDGED])
        notes.append(
            "no published figure: these rows are only a part of the table, so its likelihoods are "
            "not comparable; --size full fetches the whole (817 MB) and has the authors' settings"
        )
    return fit_table(
        flow,
        splits,
        arguments,
        method=flows.label,
        experiment=f"{method}-{name}",
        others=lambda: others,
        published=published,
        note="\n".join(notes),
        **options,
    )
