"""Training of any objective: batches, recipe, checkpoints, run folders, progress."""

from .fit import fit as fit
from .fit import hold_out as hold_out
from .multilevel import Level as Level
from .multilevel import MultilevelRun as MultilevelRun
from .multilevel import multilevel as multilevel
from .objective import Distrust as Distrust
from .objective import Loss as Loss
from .objective import Objective as Objective
from .objective import step_generator as step_generator
from .rows import Rows as Rows
from .trainer import Run as Run

__all__ = [
    "Distrust",
    "Level",
    "Loss",
    "MultilevelRun",
    "Objective",
    "Rows",
    "Run",
    "fit",
    "hold_out",
    "multilevel",
    "step_generator",
]
