"""How a network treats perturbations: growth along depth, spectra, energy, inverse, attacks."""

import copy
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, ShapeError, SolveWarning
from ..integrate import METHODS
from .attacks import check_labels, fgsm, pgd
from .net import ContinuousNet, Evolution

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NUDGE = 1e-6  # of a perturbation, relative to the inputs; in double precision
ITERATIONS = 20  # of the search for the worst direction
LARGEST = 1_024  # entries of a state whose Jacobian is formed
ROUNDED = 1 + 1e-9


@dataclass(frozen=True)
class EvolutionReport:
    """What was found of one evolution."""

    name: str  # of its dynamics
    method: str
    steps: int | None
    h: float | None
    bound: float | None  # longest stable step, where one is known
    times: np.ndarray  # (nodes,)
    energy: np.ndarray  # (nodes,), mean over the samples
    spectrum: np.ndarray | None  # eigenvalues of dv/dz in the middle of time, of the first sample
    inverse_error: float | None  # of the state, relative; None where steps can't be undone


@dataclass(frozen=True)
class StabilityReport:
    """The result of `stability_report`; `print(report.table())` and `report.figure()` show it."""

    evolutions: list[EvolutionReport]
    depth: np.ndarray  # (nodes,), steps from the first state on
    gain: np.ndarray  # (nodes,), |change of the state| / |change of x|, the largest of the probes
    worst: np.ndarray  # (nodes,), the same of the direction that grows most until the end
    accuracy: dict[str, np.ndarray] | None  # by attack, (epsilons,); "clean" is (1,)
    epsilons: np.ndarray

    def table(self) -> str:
        """One line for each evolution, and one for each attack."""
        lines = [
            f"{'dynamics':<22}{'method':<22}{'steps':>6}{'h':>9}{'bound':>9}"
            f"{'Re lambda':>11}{'energy':>9}{'inverse':>10}"
        ]
        for part in self.evolutions:
            real = None if part.spectrum is None else part.spectrum.real.max()
            drift = part.energy[-1] / part.energy[0] if part.energy[0] else None
            lines.append(
                f"{part.name:<22}{part.method:<22}{part.steps or 'auto':>6}{_number(part.h):>9}"
                f"{_number(part.bound):>9}{_number(real):>11}{_number(drift):>9}"
                f"{_number(part.inverse_error):>10}"
            )
        lines.append(
            f"growth of perturbations: {self.gain[-1]:.3g} at random, {self.worst[-1]:.3g} at worst"
        )
        for name, values in (self.accuracy or {}).items():
            shown = [f"{value:.1%}" for value in values]
            if name != "clean":
                pairs = zip(self.epsilons, shown, strict=True)
                shown = [f"{text} (epsilon {epsilon:g})" for epsilon, text in pairs]
            lines.append(f"accuracy, {name}: {', '.join(shown)}")
        return "\n".join(lines)

    def figure(self) -> "Figure":
        """Growth along depth, spectrum, energy and accuracy, as far as there are any."""
        from ..network_plots import stability

        spectra = {
            f"{i + 1} {part.name}": part.spectrum
            for i, part in enumerate(self.evolutions)
            if part.spectrum is not None
        }
        energies = {
            f"{i + 1} {part.name}": (part.times, part.energy)
            for i, part in enumerate(self.evolutions)
        }
        attacks = {}
        for name, values in (self.accuracy or {}).items():
            if name != "clean":
                assert self.accuracy is not None
                first = self.accuracy["clean"]
                attacks[name] = (np.append(0.0, self.epsilons), np.append(first, values))
        lines = {"random": (self.depth, self.gain), "worst at the end": (self.depth, self.worst)}
        return stability(lines, spectra, energies, attacks)


def stability_report(
    net: ContinuousNet,
    x: Tensor,
    labels: Tensor | None = None,
    *,
    epsilons: Sequence[float] = (0.01, 0.03, 0.1),
    probes: int = 8,
    seed: int = 0,
) -> StabilityReport:
    """How perturbations of `x` grow along the depth of a network, and what else says it is stable.

    It works on a copy of the network in double precision and evaluation mode.

    Args:
        net: the network.
        x: inputs, (batch, ...); a few dozen suffice.
        labels: (batch,), for the accuracy under attacks on x; of classifiers.
        epsilons: largest changes of an entry of x in attacks.
        probes: random perturbations of each sample.
        seed: of these, and of the attacks.

    Returns:
        A `StabilityReport`. A `SolveWarning` says so where a step is longer than the bound of its
        dynamics.

    Raises:
        ArgumentError: `probes` is no positive integer.
        ShapeError: there is no sample, or the labels are not one for each.
        DataError: a label is no integer, or none of the network's classes.
    """
    if not isinstance(probes, int) or probes < 1:
        raise ArgumentError(f"`probes` must be a positive integer, got {probes!r}")
    net = copy.deepcopy(net).double().eval().requires_grad_(False)
    for evolution in net.evolutions():
        evolution.gradient = "discrete"
    like = next(net.parameters())
    x = torch.as_tensor(x).detach().to(like)
    if not len(x):
        raise ShapeError(f"`x` must hold at least one sample, got shape {tuple(x.shape)}")
    if labels is not None:
        labels = torch.as_tensor(labels, device=like.device)
        with torch.no_grad():
            check_labels(net(x), labels)
    generator = torch.Generator().manual_seed(seed)
    size = NUDGE * float(x.norm()) / max(len(x), 1) ** 0.5 or NUDGE
    with torch.no_grad():
        base = _states(net, x)
        shape = (probes, *x.shape)
        es = [_unit(e.to(x)) for e in torch.randn(shape, generator=generator, dtype=x.dtype)]
        growths = torch.stack([_growth(base, _states(net, x + size * e), size) for e in es])
        best = growths[:, -1].argmax(0)  # by sample
        start = torch.stack(es)[best.to(x.device), torch.arange(len(x), device=x.device)]
    e = _worst(net, x, start, size)
    with torch.no_grad():
        worst = _growth(base, _states(net, x + size * e), size)
        evolutions = list(_parts(net, x))
    accuracy = None
    if labels is not None:
        accuracy = _attacks(net, x, labels, epsilons, seed)
    return StabilityReport(
        evolutions,
        np.arange(len(worst)),
        growths.amax((0, 2)).cpu().numpy(),
        worst.amax(1).cpu().numpy(),
        accuracy,
        np.asarray(epsilons, dtype=float),
    )


def _flat(states: Any) -> Tensor:
    """Stacked states, (nodes, batch, entries)."""
    return torch.cat([leaf.flatten(2) for leaf in pytree.tree_leaves(states)], 2)


def _states(net: ContinuousNet, x: Tensor) -> list[Tensor]:
    """The states at all nodes of each evolution, each (nodes, batch, entries)."""
    z, found = net.opening(x), []
    for stage in net.stages:
        if isinstance(stage, Evolution):
            states = stage.trajectory(stage.dynamics.lift(z))[1]
            found.append(_flat(states))
            z = stage.dynamics.features(pytree.tree_map(lambda leaf: leaf[-1], states))
        else:
            z = stage(z)
    return found


def _growth(base: list[Tensor], moved: list[Tensor], size: float) -> Tensor:
    """Changes of the states over that of the inputs, (all nodes, batch)."""
    pairs = zip(base, moved, strict=True)
    return torch.cat([((b - a) / size).norm(dim=2) for a, b in pairs])


def _unit(e: Tensor) -> Tensor:
    """Each sample over its norm."""
    norm = e.flatten(1).norm(dim=1).clamp_min(torch.finfo(e.dtype).tiny)
    return e / norm.view(-1, *(1,) * (e.ndim - 1))


def _worst(net: ContinuousNet, x: Tensor, e: Tensor, size: float) -> Tensor:
    """For each sample the direction that the last state amplifies most, by power iteration."""
    for _ in range(ITERATIONS):
        with torch.enable_grad():
            inputs = x.clone().requires_grad_()
            last = _states(net, inputs)[-1][-1]
        with torch.no_grad():
            pushed = (_states(net, x + size * e)[-1][-1] - last) / size
        (pulled,) = torch.autograd.grad(last, inputs, pushed)
        e = _unit(pulled)
    return e


def _parts(net: ContinuousNet, x: Tensor) -> Any:
    z = net.opening(x)
    for stage in net.stages:
        if isinstance(stage, Evolution):
            yield _part(stage, z)
        z = stage(z)


def _part(evolution: Evolution, z: Tensor) -> EvolutionReport:
    dynamics = evolution.dynamics
    first = dynamics.lift(z)
    t, states = evolution.trajectory(first)

    def node(n: int) -> Any:
        return pytree.tree_map(lambda leaf: leaf[n], states)

    energy = [float(dynamics.energy(float(t[n]), node(n)).mean()) for n in range(len(t))]
    error = None
    if getattr(METHODS[evolution.method], "memoryless", False):
        back = pytree.tree_leaves(evolution.inverse(node(-1)))
        start = pytree.tree_leaves(first)
        size = torch.stack([leaf.norm() for leaf in start]).norm()
        lost = torch.stack([(a - b).norm() for a, b in zip(back, start, strict=True)]).norm()
        error = float(lost / size)
    bound = dynamics.step_bound(evolution.method, z.shape[1:])
    name = type(dynamics).__name__
    h = evolution.step
    if h is not None and bound is not None and h > bound * ROUNDED:
        warnings.warn(
            f"{name} by {evolution.method!r} takes steps of {h:.3g}, and is stable up to "
            f"{bound:.3g}; take {int(np.ceil(dynamics.horizon / bound))} steps or more"
            if bound > 0
            else f"{name} by {evolution.method!r} is stable for no step; take another method or "
            "diffusion",
            SolveWarning,
            stacklevel=4,
        )
    middle = len(t) // 2
    return EvolutionReport(
        name,
        evolution.method,
        evolution.steps,
        h,
        bound,
        t.numpy(),
        np.array(energy),
        _spectrum(dynamics, t[middle], pytree.tree_map(lambda z: z[:1], node(middle))),
        error,
    )


def _spectrum(dynamics: Any, t: Tensor, state: Any) -> np.ndarray | None:
    """Eigenvalues of dv/dz at a state of one sample; None of a large one."""
    leaves, spec = pytree.tree_flatten(state)
    sizes = [leaf.numel() for leaf in leaves]
    if sum(sizes) > LARGEST:
        return None

    def velocity(flat: Tensor) -> Tensor:
        parts = [
            part.view(leaf.shape) for part, leaf in zip(flat.split(sizes), leaves, strict=True)
        ]
        dz = dynamics(t, pytree.tree_unflatten(parts, spec))
        return torch.cat([leaf.flatten() for leaf in pytree.tree_leaves(dz)])

    with torch.enable_grad():
        J = torch.autograd.functional.jacobian(
            velocity, torch.cat([leaf.flatten() for leaf in leaves])
        )
    return torch.linalg.eigvals(J).cpu().numpy()


def _attacks(
    net: ContinuousNet, x: Tensor, labels: Tensor, epsilons: Sequence[float], seed: int
) -> dict[str, np.ndarray]:
    def accuracy(inputs: Tensor) -> float:
        with torch.no_grad():
            return float((net(inputs).argmax(1) == labels).double().mean())

    return {
        "clean": np.array([accuracy(x)]),
        "FGSM": np.array([accuracy(fgsm(net, x, labels, e)) for e in epsilons]),
        "PGD": np.array([accuracy(pgd(net, x, labels, e, seed=seed)) for e in epsilons]),
    }


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"
