"""Save and load models."""

from pathlib import Path
from typing import Any

from torch import nn

from .control import Policy, Problem
from .control.problems import PROBLEMS, Named, make
from .errors import ModelError
from .flows import CNF, ConditionalOTFlow, JointMap, OTFlow, PCPMap
from .games import Equilibrium, Population
from .games.problems import GAMES
from .networks import TrajectoryNet
from .networks.architectures import made_again
from .train.files import read_model, save

__all__ = ["load", "metadata", "save"]

MODELS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        CNF,
        ConditionalOTFlow,
        Equilibrium,
        JointMap,
        OTFlow,
        PCPMap,
        Policy,
        Population,
        TrajectoryNet,
    )
} | {"ContinuousNet": made_again}
POLICIES = (Policy, Equilibrium, Population)
NAMED: dict[str, Named] = PROBLEMS | GAMES  # the problems that policies are for


def load(folder: str | Path) -> Any:
    """The model that `save` or a run wrote, in evaluation mode.

    `folder` is a run or the model inside it.

    Nothing in the files is executed.

    Raises:
        ModelError: the folder holds no model, a damaged one, or one of a newer format.
    """
    description, state = read_model(folder)
    try:
        model = _build(description, folder)
        model.load_state_dict(state, assign=True)
    except ModelError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(
            f"{folder} is damaged: weights and description differ ({reason})"
        ) from None
    return model.eval()


def _build(description: dict[str, Any], folder: str | Path) -> nn.Module:
    """The model of a description, without its weights; its parts, if any, are described alike."""
    kind = MODELS.get(str(description["kind"]))
    if kind is None:
        raise ModelError(
            f"{folder} holds a {description['kind']!r}, which this version of Pathline does not "
            f"know; it knows {', '.join(MODELS)}"
        )
    config = description["config"]
    if kind is JointMap:
        config = {name: _build(part, folder) for name, part in config.items()}
    if kind in POLICIES:
        config = config | {"problem": _named_problem(config["problem"], kind, folder)}
    return kind(**config)


def _named_problem(made: dict[str, Any] | None, kind: type[Policy], folder: str | Path) -> Problem:
    if made is None:
        raise ModelError(
            f"{folder} is for a problem of your own: read it by "
            f"`{kind.__name__}.load(folder, problem)`"
        )
    return make(made["name"], NAMED, **made["options"])


def metadata(folder: str | Path) -> dict[str, Any]:
    """What was kept beside the model, such as column names."""
    found = read_model(folder)[0].get("metadata", {})
    return found if isinstance(found, dict) else {}
