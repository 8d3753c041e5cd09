"""The published experiments, each by its name.

Adding one: a function `(RunArguments, size) -> Outcome` and its entry in `EXPERIMENTS`.
"""

from functools import partial

from . import tables, toys
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
}
