"""Training data kept beside a model, to tell observations that are unlike them."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from ..train.files import read_tensors, write_atomically
from .predictive import outlier

FILE = "contexts.safetensors"
KEPT = 2000


def keep_contexts(folder: Path, contexts: np.ndarray, *, seed: int = 0) -> None:
    """Write up to 2000 rows of the contexts (rows, columns) into the folder of a model.

    Rows with the least or greatest value of a column go first, so that the kept ones have the
    range of all, the others are random.
    """
    if len(contexts) > KEPT:
        ends = np.concatenate([contexts.argmin(0), contexts.argmax(0)])
        order = np.random.default_rng(seed).permutation(len(contexts))
        index = list(dict.fromkeys([*ends.tolist(), *order.tolist()]))[:KEPT]
        contexts = contexts[np.sort(index)]
    tensors = {"contexts": torch.from_numpy(np.ascontiguousarray(contexts, dtype=np.float64))}
    write_atomically(folder / FILE, lambda path: save_file(tensors, path))


def find_outliers(model: Path, observations: np.ndarray, names: tuple[str, ...]) -> dict[int, str]:
    """Which rows of `observations` lie outside the contexts that a model keeps, and how far.

    Empty for a model that keeps none, such as one saved by `pathline.save`.

    Args:
        model: a run folder, or the model inside it.
    """
    folder = model / "model" if (model / "model" / "model.json").exists() else model
    if not (folder / FILE).exists():
        return {}
    contexts = read_tensors(folder / FILE)[0]["contexts"]
    told = (outlier(row, contexts, names) for row in observations)
    return {i: text for i, text in enumerate(told) if text is not None}
