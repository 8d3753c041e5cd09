"""Networks whose layers are time steps: `Evolution` of one dynamics, `ContinuousNet` of several."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, unknown
from ..integrate import METHODS, Separable, Split, undo
from ..integrate.adjoint import AdjointSpec
from ..integrate.field import channels_last
from ..integrate.imex import ImexRungeKutta
from ..integrate.setup import GRADIENTS, Request
from ..integrate.solve import solve
from ..nets.time_weights import opened
from .dynamics import Dynamics


class Evolution(nn.Module):
    """Features carried by a dynamics from time 0 to its horizon.

    Args:
        dynamics: the equation.
        method: of `odeint`, by its name; the dynamics' own if None.
        steps: equal steps; None lets an adaptive method choose them.
        gradient: a strategy of `odeint`. "reversible" keeps the last state alone for the backward
            pass, whatever the number of steps; it needs a method such as "verlet".
        tolerance: of an adaptive method, relative and absolute.

    Raises:
        ArgumentError: a name is not known, `steps` is no positive integer, or None for a method
            of fixed steps; or dynamics, method and gradient do not fit together.
    """

    def __init__(
        self,
        dynamics: Dynamics,
        *,
        method: str | None = None,
        steps: int | None = 8,
        gradient: str = "discrete",
        tolerance: float = 1e-5,
    ) -> None:
        super().__init__()
        method = dynamics.method if method is None else method
        if method not in METHODS:
            raise ArgumentError(unknown("`method`", str(method), METHODS))
        if gradient not in GRADIENTS:
            raise ArgumentError(unknown("`gradient`", str(gradient), GRADIENTS))
        if steps is not None and (not isinstance(steps, int) or steps < 1):
            raise ArgumentError(f"`steps` must be a positive integer or None, got {steps!r}")
        if steps is None and not getattr(METHODS[method], "adaptive", False):
            raise ArgumentError(f"method {method!r} takes fixed steps, and needs `steps`")
        field = dynamics.field
        if method in ("verlet", "leapfrog") and not isinstance(field, Separable):
            raise ArgumentError(
                f"method {method!r} moves two halves in turn, which {type(dynamics).__name__} "
                "does not have; use another `method`"
            )
        split = isinstance(METHODS[method], ImexRungeKutta)
        if split and not isinstance(field, Split):
            raise ArgumentError(
                f"method {method!r} is for SemiImplicit dynamics, got {type(dynamics).__name__}"
            )
        if gradient == "adjoint" and (split or method in ("verlet", "leapfrog")):
            raise ArgumentError(
                f"`gradient='adjoint'` solves another equation backwards, which method {method!r} "
                "can't; use gradient='checkpoint', or another `method`"
            )
        self.dynamics, self.method, self.steps = dynamics, method, steps
        self.gradient, self.tolerance = gradient, tolerance

    @property
    def step(self) -> float | None:
        """The length of a step, h; None where the method chooses."""
        return None if self.steps is None else self.dynamics.horizon / self.steps

    def forward(self, x: Tensor) -> Tensor:
        """Features at the horizon, of features at time 0, (batch, channels, ...)."""
        # On a CPU convolutions are faster with channels last in memory, but in double precision.
        turn = x.ndim == 4 and x.is_cpu and x.dtype != torch.float64 and x.is_contiguous()
        if turn:
            x = x.contiguous(memory_format=torch.channels_last)
        z = self.dynamics.features(self.evolve(self.dynamics.lift(x)))
        return z.contiguous() if turn else z

    def evolve(self, state: Any, start: float = 0.0, stop: float | None = None) -> Any:
        """The state at time `stop`, the horizon if None, of a state at `start`."""
        options = {} if self.step is None else {"step_size": self.step}
        stop = self.dynamics.horizon if stop is None else stop
        return _last(self._solve(state, [start, stop], options, final=True))

    def trajectory(self, state: Any, nodes: int | None = None) -> tuple[Tensor, Any]:
        """Times (nodes + 1,) and the states there, stacked; at the ends of steps by default."""
        nodes = self.steps if nodes is None else nodes
        nodes = 32 if nodes is None else nodes
        t = torch.arange(nodes + 1, dtype=torch.float64) * (self.dynamics.horizon / nodes)
        options = {}
        if self.step is not None and nodes != self.steps:
            options = {"step_size": self.step}
        return t, self._solve(state, t, options)

    def inverse(self, state: Any) -> Any:
        """The state at time 0 that `evolve` took to `state`, to round-off.

        Raises:
            ArgumentError: the method is neither "verlet" nor "leapfrog".
        """
        t = [0.0, self.dynamics.horizon]
        return undo(self.dynamics.field, state, t, method=self.method, step_size=self.step)

    def _solve(self, state: Any, t: Any, options: dict[str, Any], *, final: bool = False) -> Any:
        """The states at the times; where `final`, the first ones may be left out."""
        named = self.gradient in ("reversible", "adjoint")
        request = Request(
            self.dynamics.field,
            state,
            t,
            rtol=self.tolerance,
            atol=self.tolerance,
            method=self.method,
            options=options,
            gradient=self.gradient,
            adjoint=AdjointSpec(params=tuple(self.dynamics.parameters()) if named else None),
            final=final and self.gradient != "adjoint",
        )
        if self.gradient != "discrete":
            return solve(request).or_raise().values
        last = all(channels_last(z) for z in pytree.tree_leaves(state))
        with opened(self.dynamics, channels_last=last):
            return solve(request).or_raise().values

    def extra_repr(self) -> str:
        return f"method={self.method!r}, steps={self.steps}, gradient={self.gradient!r}"


class ContinuousNet(nn.Module):
    """Opening layer, evolution in time, head: head(z(T)) with z' = v(t, z), z(0) = opening(x).

    Several dynamics, with modules between them that change width and resolution, make a network of
    blocks. It is a module like any other, and `pathline.fit` trains it through
    `networks.Classification` and `networks.Regression`.

    Args:
        opening: from inputs to features (batch, channels, ...); None for the inputs themselves.
        dynamics: a `Dynamics`, or a sequence of them and of other modules; an `Evolution` in it
            keeps its own method, steps and gradient.
        head: from features to outputs; None for the features themselves.
        method, steps, gradient, tolerance: as in `Evolution`, of all dynamics.

    Raises:
        ArgumentError: there is no dynamics, or as in `Evolution`.

    Example:
        >>> from pathline import nets, networks
        >>> dynamics = networks.Antisymmetric(nets.Dense(16), nets.TimeBasis(order=8, horizon=5.0))
        >>> net = ContinuousNet(nn.Linear(2, 16), dynamics, nn.Linear(16, 5), steps=8)
        >>> net(torch.zeros(3, 2)).shape
        torch.Size([3, 5])
    """

    def __init__(
        self,
        opening: nn.Module | None,
        dynamics: nn.Module | Sequence[nn.Module],
        head: nn.Module | None,
        *,
        method: str | None = None,
        steps: int | None = 8,
        gradient: str = "discrete",
        tolerance: float = 1e-5,
    ) -> None:
        super().__init__()
        parts = [dynamics] if isinstance(dynamics, nn.Module) else list(dynamics)
        stages = [
            Evolution(part, method=method, steps=steps, gradient=gradient, tolerance=tolerance)
            if isinstance(part, Dynamics)
            else part
            for part in parts
        ]
        if not any(isinstance(stage, Evolution) for stage in stages):
            raise ArgumentError("`dynamics` must hold at least one Dynamics or Evolution, got none")
        self.opening = nn.Identity() if opening is None else opening
        self.stages = nn.ModuleList(stages)
        self.head = nn.Identity() if head is None else head
        self.made: dict[str, Any] | None = None  # by which function, with what arguments

    def config(self) -> dict[str, Any]:
        """What makes this network again, as `pathline.save` and a run keep it.

        Raises:
            ArgumentError: it was put together by hand, or changed since it was made.
        """
        from .architectures import made_again

        advice = "keep the `state_dict()` of this one, and train it without `out`"
        if self.made is None:
            raise ArgumentError(
                "only networks made by `dense_net`, `pde_cnn`, `imexnet` or `wavelet_net` can be "
                f"saved as models; {advice}"
            )
        own, other = _outline(self), _outline(made_again(**self.made))
        if own != other:
            names = [name for name in {**own, **other} if own.get(name) != other.get(name)]
            raise ArgumentError(
                f"the network can't be saved as a model: {names[0]!r} is not as `"
                f"{self.made['name']}` made it; {advice}"
            )
        return self.made

    def forward(self, x: Tensor) -> Tensor:
        """Outputs, such as the logits (batch, classes), of inputs (batch, ...)."""
        return self.head(self.features(x))

    def features(self, x: Tensor) -> Tensor:
        """What the head sees, (batch, channels, ...).

        Raises:
            ArgumentError: `x` is no tensor, or not of the dtype and device of the weights.
        """
        if not isinstance(x, Tensor):
            raise ArgumentError(f"`x` must be a tensor, got {type(x).__name__}")
        like = next(self.parameters(), x)
        differs = x.is_floating_point() and (x.dtype, x.device) != (like.dtype, like.device)
        if differs and not torch.is_autocast_enabled(x.device.type):
            raise ArgumentError(
                f"`x` must be {like.dtype} on {like.device}, as the network is, got "
                f"{x.dtype} on {x.device}"
            )
        z = self.opening(x)
        for stage in self.stages:
            z = stage(z)
        return z

    @torch.no_grad()
    def inverse(self, features: Tensor) -> Tensor:
        """The inputs of which these are the `features`, to round-off.

        Raises:
            ArgumentError: a part cannot be undone, or keeps less of a state than `features` need.
        """
        z = features
        for part in (*reversed(self.stages), self.opening):
            if isinstance(part, Evolution) and part.dynamics.lossless:
                state = part.inverse(part.dynamics.lift(z))
                z = part.dynamics.features(state)
            elif hasattr(part, "inverse") and not isinstance(part, Evolution):
                z = part.inverse(z)  # type: ignore[operator]
            elif not isinstance(part, nn.Identity):
                name = type(part.dynamics if isinstance(part, Evolution) else part).__name__
                raise ArgumentError(
                    f"the network cannot be undone: {name} does not keep all of its input"
                )
        return z

    def evolutions(self) -> Iterator[Evolution]:
        """Its evolutions, in order."""
        return (stage for stage in self.stages if isinstance(stage, Evolution))

    def smoothness(self) -> Tensor:
        """Half of the integral of |theta'(t)|^2 over the weights in time."""
        return torch.stack([part.dynamics.smoothness() for part in self.evolutions()]).sum()

    def decay(self) -> Tensor:
        """Half of the integral of |theta(t)|^2 over the weights in time."""
        return torch.stack([part.dynamics.decay() for part in self.evolutions()]).sum()


def _outline(net: nn.Module) -> dict[str, Any]:
    """What its parts are and the shapes of its tensors, by name: all that decides the function."""
    found: dict[str, Any] = {}
    for name, part in net.named_modules():
        if isinstance(part, Evolution):
            found[name] = (part.method, part.steps, part.tolerance)
        else:
            found[name] = (type(part), part.extra_repr())
    return found | {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def _last(states: Any) -> Any:
    """Of one state there, without the copy that the gradient of z[-1] is."""
    return pytree.tree_map(lambda z: z[-1] if len(z) > 1 else z.squeeze(0), states)
