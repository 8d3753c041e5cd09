"""Save and load models."""

from pathlib import Path
from typing import Any

from torch import nn

from .control import Policy, Problem
from .errors import ModelError
from .flows import CNF, ConditionalOTFlow, JointMap, OTFlow, PCPMap
from .networks.architectures import made_again
from .train.files import read_model, save

__all__ = ["load", "metadata", "save"]

MODELS: dict[str, Any] = {
    kind.__name__: kind for kind in (CNF, ConditionalOTFlow, JointMap, OTFlow, PCPMap, Policy)
} | {"ContinuousNet": made_again}


def load(folder: str | Path) -> Any:
    """The model that `save` or a run wrote; `folder` is a run or the model inside it.

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
    return model


def _build(description: dict[str, Any], folder: str | Path) -> nn.Module:
    """The model of a description, without its weights; its parts, if any, are described alike."""
    make = MODELS.get(str(description["kind"]))
    if make is None:
        raise ModelError(
            f"{folder} holds a {description['kind']!r}, which this version of Pathline does not "
            f"know; it knows {', '.join(MODELS)}"
        )
    config = description["config"]
    if make is JointMap:
        config = {name: _build(part, folder) for name, part in config.items()}
    if make is Policy:
        config = config | {"problem": _named_problem(config["problem"], folder)}
    return make(**config)


def _named_problem(made: dict[str, Any] | None, folder: str | Path) -> Problem:
    from .control.problems import make

    if made is None:
        raise ModelError(
            f"{folder} holds a policy for a problem of your own: read it by "
            "`control.Policy.load(folder, problem)`"
        )
    return make(made["name"], **made["options"])


def metadata(folder: str | Path) -> dict[str, Any]:
    """What was kept beside the model, such as column names."""
    found = read_model(folder)[0].get("metadata", {})
    return found if isinstance(found, dict) else {}
