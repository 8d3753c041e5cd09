"""Estimators in folders: the network as a model, and beside it all else that `fit` found."""

from pathlib import Path
from typing import Any, Self

import numpy as np
from sklearn.utils.validation import check_is_fitted
from torch import nn

from ..errors import ModelError
from ..models import load, metadata, save


class Saved:
    """An estimator with a network that can be saved and loaded."""

    net_: nn.Module
    n_iter_: int

    def save(self, folder: str | Path) -> None:
        """Write the estimator into a folder, as safetensors and JSON; `random_state` is not kept.

        `pathline.load` reads its network from there.
        """
        check_is_fitted(self)
        given = self.get_params() | {"random_state": None}  # type: ignore[attr-defined]
        kept = {
            "estimator": type(self).__name__,
            "parameters": {name: _plain(value) for name, value in given.items()},
            "n_iter": self.n_iter_,
            "fitted": self._fitted(),
        }
        save(self.net_, folder, metadata=kept)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote; nothing in the files is executed.

        Raises:
            ModelError: the folder holds none, a damaged one, or something else.
        """
        net, kept = load(folder), metadata(folder)
        held = kept.get("estimator", type(net).__name__)
        if held != cls.__name__:
            raise ModelError(f"{folder} holds no {cls.__name__}, but a {held}")
        try:
            found = cls(**kept["parameters"])
            found.net_, found.n_iter_ = net.double().eval(), kept["n_iter"]
            found._restore(kept["fitted"])
        except (KeyError, TypeError, ValueError) as error:
            raise ModelError(f"{folder} is damaged ({str(error).splitlines()[0]})") from None
        return found

    def _fitted(self) -> dict[str, Any]:
        """What `fit` found beside the network, as JSON holds it."""
        raise NotImplementedError

    def _restore(self, fitted: dict[str, Any]) -> None:
        """Set what `_fitted` gave; `net_` is there."""
        raise NotImplementedError


def _plain(value: Any) -> Any:
    """A parameter as JSON holds it: grids have NumPy's numbers."""
    numpy = isinstance(value, np.generic | np.ndarray | list | tuple)
    return np.asarray(value).tolist() if numpy else value
