"""Options and answers that several commands share."""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter, validators

from .. import models
from ..data import Recipe
from ..data.pairs import PairRecipe
from ..train.files import finite

Positive = Annotated[int, Parameter(validator=validators.Number(gte=1))]
Seconds = Annotated[float, Parameter(validator=validators.Number(gt=0))]
Weight = Annotated[float, Parameter(validator=validators.Number(gte=0))]
Seed = Annotated[int, Parameter(validator=validators.Number(gte=0))]
Columns = Annotated[list[str] | None, Parameter(negative="")]
Flag = Annotated[bool, Parameter(negative="")]


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """What every command that trains takes."""

    out: Path
    "Folder of the run; must be empty or missing."
    seed: Seed = 0
    "Seed of everything random."
    max_steps: Positive | None = None
    "Training steps; chosen by default from the number of rows, or for the problem."
    budget: Seconds | None = None
    "Seconds for the whole training, turned into a number of steps after a timed warm-up."
    resume: Flag = False
    "Go on from the last checkpoint in the folder."
    overwrite: Flag = False
    "Replace the run in the folder."
    json: Flag = False
    "Print one JSON object on standard output."

    def training(self) -> dict[str, Any]:
        """The arguments of `pathline.fit`."""
        return {
            "out": self.out,
            "seed": self.seed,
            "max_steps": self.max_steps,
            "budget": self.budget,
            "resume": self.resume,
            "overwrite": self.overwrite,
        }


def answer(content: dict[str, Any], as_json: bool, text: str) -> None:
    """Print the result of a command: one JSON object, or `text`."""
    print(json.dumps(finite(content)) if as_json else text)


def say(text: str) -> None:
    """Tell the user something that is not the result."""
    print(text, file=sys.stderr, flush=True)


def open_model(folder: Path) -> tuple[Any, Recipe]:
    """A saved model and how its table was prepared; of a conditional one, that of x alone."""
    model = models.load(folder)
    return model, recipe_of(folder, model)


def recipe_of(folder: Path, model: Any) -> Recipe:
    """How the table of a saved model was prepared; of a conditional one, that of x alone."""
    if getattr(model, "context_dim", 0):
        pairs = open_conditional(folder, model)
        return replace(pairs.recipe, columns=pairs.names, original=pairs.parameters)
    kept = models.metadata(folder).get("recipe")
    return Recipe.from_dict(kept) if kept else Recipe.untouched(model.dim)


def names(values: list[str] | None, columns: tuple[str, ...]) -> list[str]:
    """Column names of a flag that may be repeated or hold a list with commas."""
    found: list[str] = []
    for value in values or []:
        found += [value] if value in columns else [part.strip() for part in value.split(",")]
    return found


def open_conditional(folder: Path, model: Any) -> PairRecipe:
    """How the pairs of a conditional model were prepared."""
    kept = models.metadata(folder)
    if not {"recipe", "parameters"} <= kept.keys():
        return PairRecipe.untouched(model.dim, model.context_dim)
    return PairRecipe.from_metadata(kept)
