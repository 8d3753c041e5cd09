"""Reference posteriors: of the sbi benchmark, and of the stochastic Lotka-Volterra process."""

import bz2
import os
from pathlib import Path
from typing import NamedTuple
from zipfile import BadZipFile

import numpy as np

from ..errors import DataError, unknown

TASKS = {  # numbers of parameters and of data
    "bernoulli_glm": (10, 10),
    "gaussian_linear": (10, 10),
    "gaussian_linear_uniform": (10, 10),
    "gaussian_mixture": (2, 2),
    "lotka_volterra": (4, 20),
    "sir": (2, 10),
    "slcp": (5, 8),
    "two_moons": (2, 2),
}
OBSERVATIONS = 10  # of each task
ABC_FILE = "stochastic_lv_abc/stochastic_lv_abc.npz"
ABC_TRUTH = ((0.01, 0.5, 1.0, 0.01), (0.02, 0.02, 0.02, 0.02))


class Reference(NamedTuple):
    """What is known about the posterior given one observation."""

    observation: np.ndarray  # (context_dim,)
    true_parameters: np.ndarray  # (dim,), from which the observation was simulated
    samples: np.ndarray  # (10000, dim), of the posterior


class AbcReference(NamedTuple):
    """The last population of a sequential Monte Carlo run of approximate Bayesian computation."""

    observation: np.ndarray  # (9,)
    true_parameters: np.ndarray  # (4,), logarithms of the rates
    samples: np.ndarray  # (2000, 4), logarithms of the rates
    tolerance: float  # the largest distance of the data that was accepted
    simulations: int  # in all populations


def load_reference(task: str, observation: int) -> Reference:
    """The reference posterior of a task of the sbi benchmark, given one of its observations.

    The units are those of the simulators in `pathline.posterior.simulators`.

    Args:
        task: bernoulli_glm, gaussian_linear, gaussian_linear_uniform, gaussian_mixture,
            lotka_volterra, sir, slcp or two_moons, read from
            `sbibm_reference/<task>/num_observation_<observation>/` in the folder that the
            environment variable PATHLINE_DATA names.
        observation: 1 to 10.

    Raises:
        DataError: there is no such task or observation, or a file is missing or damaged.

    Source: Lueckmann, Boelts, Greenberg, Goncalves, Macke, Benchmarking simulation-based
    inference, 2021, arXiv 2101.04653; files of its package sbibm, MIT licence.
    """
    if task not in TASKS:
        raise DataError(unknown("task of the sbi benchmark", task, TASKS))
    if observation not in range(1, OBSERVATIONS + 1):
        raise DataError(f"`observation` must be from 1 to {OBSERVATIONS}, got {observation!r}")
    dim, context_dim = TASKS[task]
    part = f"{task}/num_observation_{observation}"
    folder = _folder(
        f"sbibm_reference/{part}",
        f"the folder sbibm/tasks/{task}/files of the package sbibm (github.com/sbi-benchmark/"
        f"sbibm, MIT licence), as sbibm_reference/{task}",
    )
    return Reference(
        _read_rows(folder / "observation.csv", context_dim)[0],
        _read_rows(folder / "true_parameters.csv", dim)[0],
        _read_rows(folder / "reference_posterior_samples.csv.bz2", dim),
    )


def load_abc(observation: int) -> AbcReference:
    """The reference posterior of the stochastic Lotka-Volterra process given one observation.

    It approximates the posterior, for data within the tolerance of those observed.

    Args:
        observation: 1, simulated with the rates (0.01, 0.5, 1, 0.01), or 2, with all rates 0.02.

    Raises:
        DataError: there is no such observation, or the file is missing or damaged.

    Source: Wang, Baptista, Marzouk, Ruthotto, Verma, Efficient neural network approaches for
    conditional optimal transport, 2023, arXiv 2310.16975; files of its code COT-Flow, MIT licence,
    repacked.
    """
    if observation not in (1, 2):
        raise DataError(f"`observation` must be 1 or 2, got {observation!r}")
    path = _folder(
        ABC_FILE,
        "the pickles datasets/StochasticLV_ABCsamples*.pk of github.com/EmoryMLIP/COT-Flow (MIT "
        f"licence), repacked as {ABC_FILE}",
    )
    tag = f"theta{observation}_"
    try:
        with np.load(path, allow_pickle=False) as data:
            samples, y = data[f"{tag}samples"][-1], data[f"{tag}y"]
            tolerance, simulations = data[f"{tag}eps"][-1], data[f"{tag}nsims"].sum()
    except (OSError, KeyError, ValueError, BadZipFile) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    truth = np.log(ABC_TRUTH[observation - 1])
    return AbcReference(y, truth, np.log(samples), float(tolerance), int(simulations))


def _folder(name: str, where: str) -> Path:
    """What is called `name` in the data folder."""
    folder = os.environ.get("PATHLINE_DATA")
    path = Path(folder or ".") / name
    if folder and path.exists():
        return path
    found = f"there is no {path}" if folder else "PATHLINE_DATA is not set"
    raise DataError(
        f"this reference posterior does not come with Pathline, and {found}; set the environment "
        f"variable PATHLINE_DATA to a folder that holds {where}"
    )


def _read_rows(path: Path, columns: int) -> np.ndarray:
    """The numbers of a csv file with one line of names, (rows, columns)."""
    try:
        with bz2.open(path, "rt") if path.suffix == ".bz2" else path.open() as file:
            rows = np.loadtxt(file, delimiter=",", skiprows=1, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    if len(rows) == 0 or rows.shape[1] != columns or not np.isfinite(rows).all():
        raise DataError(f"{path} must hold rows of {columns} finite numbers, got {rows.shape}")
    return rows
