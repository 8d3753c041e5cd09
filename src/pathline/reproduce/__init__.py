"""The published experiments, each by its name.

Adding one: a function `(RunArguments, size) -> Outcome` and its entry in `EXPERIMENTS`.
"""

from functools import partial

from ..data import BENCHMARKS
from . import do_vs_od, gradients, mnist, published, tables, toys
from .experiment import Experiment as Experiment
from .experiment import Outcome as Outcome
from .experiment import RunArguments as RunArguments

__all__ = ["EXPERIMENTS", "Experiment", "Outcome", "RunArguments"]

EXPERIMENTS = {
    **{
        f"ot-flow-{name}": Experiment(f"OT-Flow on the toy density {name}", partial(toys.run, name))
        for name in toys.PAPER
    },
    **{
        f"ot-flow-{name.replace('_', '-')}": Experiment(
            f"OT-Flow on the real table {name}, beside classical densities",
            partial(tables.run, name),
        )
        for name in tables.TABLES
    },
    **{
        f"{method}-{name}": Experiment(
            f"{flow.label} on the benchmark table {name.upper()}, beside the published figures",
            partial(published.run, method, name),
        )
        for method, flow in published.METHODS.items()
        for name in BENCHMARKS
    },
    "ot-flow-mnist": Experiment(
        "OT-Flow on codes of MNIST's digits: generated and interpolated images", mnist.run
    ),
    "do-vs-od-gradient": Experiment(
        "gradients of the discrete and the continuous adjoint: errors and memory",
        gradients.run,
    ),
    "do-vs-od-time-series": Experiment(
        "a spiral, learned by discretize-optimize and by optimize-discretize",
        do_vs_od.run_time_series,
    ),
    **{
        f"do-vs-od-cnf-{name}": Experiment(
            f"a flow of {name}, trained by discretize-optimize and by optimize-discretize",
            partial(do_vs_od.run_cnf, name),
        )
        for name in do_vs_od.SMALL
    },
}
