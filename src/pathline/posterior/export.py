"""Posterior samples for other programs."""

from collections.abc import Mapping, Sequence
from typing import Any

from numpy.typing import ArrayLike
from torch import Tensor

from ..errors import ArgumentError, ShapeError
from .comparison import as_table


def to_arviz(
    samples: Tensor | ArrayLike,
    names: Sequence[str],
    log_prob: Tensor | ArrayLike | None = None,
    observed: Tensor | ArrayLike | Mapping[str, Tensor | ArrayLike] | None = None,
) -> Any:
    """Posterior samples as ArviZ wants them, for its plots, summaries and netCDF files.

    Args:
        samples: independent draws, (draws, dim), which become one chain; or (chains, draws, dim).
        names: dim names, of as many scalar variables.
        log_prob: of the samples, (draws,) or (chains, draws); kept as `lp` in `sample_stats`.
        observed: the observation, or several by name; kept in `observed_data`.

    Returns:
        An `arviz.InferenceData`, or with ArviZ 1.0 and later an `xarray.DataTree`.

    Raises:
        ArgumentError: ArviZ is not installed, or names occur twice.
        ShapeError: the arrays do not fit together.
    """
    try:
        import arviz
    except ImportError:
        raise ArgumentError("ArviZ is not installed; pip install 'pathline[posterior]'") from None
    draws = as_table(samples)
    if draws.ndim == 2:
        draws = draws[None]
    if draws.ndim != 3 or draws.shape[2] != len(names):
        raise ShapeError(
            f"`samples` must be (draws, {len(names)}) or (chains, draws, {len(names)}) for "
            f"{len(names)} names, got {as_table(samples).shape}"
        )
    if len(set(names)) < len(names):
        raise ArgumentError(f"`names` must differ, got {', '.join(names)}")
    groups: dict[str, Any] = {"posterior": {name: draws[:, :, i] for i, name in enumerate(names)}}
    if log_prob is not None:
        density = as_table(log_prob)
        if density.size != draws.shape[0] * draws.shape[1]:
            raise ShapeError(f"`log_prob` must be {draws.shape[:2]}, got {density.shape}")
        groups["sample_stats"] = {"lp": density.reshape(draws.shape[:2])}
    if observed is not None:
        several = observed if isinstance(observed, Mapping) else {"observation": observed}
        groups["observed_data"] = {name: as_table(values) for name, values in several.items()}
    if hasattr(arviz, "InferenceData"):  # before 1.0
        return arviz.from_dict(**groups)
    return arviz.from_dict(groups)
