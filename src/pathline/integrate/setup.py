"""The arguments of a solve: as they came, and checked and brought together."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import inf
from typing import Any

import torch
from torch import Tensor

from ..errors import ArgumentError, SolveError, SolveWarning, unknown
from .adaptive import Control, rms
from .adjoint import ONCE, AdjointSpec
from .checkpoint import read_bytes
from .dense import Scalar
from .explicit import RungeKutta
from .field import Field, Layout, Velocity
from .implicit import ImplicitRungeKutta
from .methods import METHODS
from .options import (
    ADAPTIVE,
    FIXED,
    check_names,
    check_rows,
    check_times,
    check_tolerance,
    finite,
    floats,
    number,
    positive,
    traced,
    transformed,
)
from .tableaus import Tableau

GRADIENTS = ("discrete", "checkpoint", "reversible", "adjoint")
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
SCIPY = "scipy_solver"
FIXED_FIELDS = {"tableau", "pair", "name", "implicit", "rtol", "atol"}  # of methods: no options


def known(question: Callable[[], Tensor | bool]) -> bool | None:
    """The answer, or None where torch.func hides it."""
    try:
        return bool(question())
    except RuntimeError:
        return None


@dataclass
class Request:
    """The arguments of `odeint`, as they came."""

    func: Velocity
    y0: Any
    t: Any
    rtol: Any = 1e-7
    atol: Any = 1e-9
    method: str | Tableau | None = "dopri5"
    options: Mapping[str, Any] | None = None
    event_fn: Callable[[Tensor, Any], Tensor] | None = None
    gradient: str = "discrete"
    memory: str | float | None = None
    segments: int | None = None
    quadrature: Callable[[Tensor, Any, Any], Any] | None = None
    batch: str = "shared"
    mask: Tensor | None = None
    solution: bool = False
    scaling: bool = True
    adjoint: AdjointSpec = field(default_factory=AdjointSpec)
    methods: Mapping[str, Any] = field(default_factory=dict)  # names that mean something else
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of the step size control
    final: bool = False  # keep the state at the last time alone; not with "adjoint"
    lenient: bool = False  # warn of unknown options, and let fixed steps end in what is not finite


class Setup:
    """A checked request.

    Raises:
        ArgumentError, ShapeError: something makes no sense; before the first evaluation.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        self.method: Any = None  # None for SciPy's
        self.adaptive = False
        self._check_words()
        self._find_method()
        samples = request.batch == "independent" or getattr(request.t, "ndim", 1) == 2
        samples = samples and not isinstance(request.y0, Tensor)
        self.layout = Layout(request.y0, samples=samples, lenient=request.lenient)
        self.z0 = self.layout.join(request.y0)
        if not (self.z0.is_floating_point() or self.z0.is_complex()):
            raise ArgumentError(
                f"`y0` must be of a floating point or complex type, got {self.z0.dtype}"
            )
        self.traced = traced(self.z0)
        if not self.traced and known(lambda: finite(self.z0)) is False:
            raise ArgumentError("`y0` must be finite")
        self._check_times()
        self.rtol = check_tolerance("rtol", request.rtol, self.layout, self.z0)
        self.atol = check_tolerance("atol", request.atol, self.layout, self.z0)
        if self.adaptive and _both_zero(self.rtol, self.atol):
            raise ArgumentError("`rtol` and `atol` must not both be zero")
        self._pass_tolerances()
        autocast = torch.is_autocast_enabled(self.z0.device.type)
        self.velocity = Field(request.func, self.layout, cast=autocast, lenient=request.lenient)
        self.low = (
            autocast
            and not self.adaptive
            and request.gradient == "discrete"
            and request.quadrature is None
            and request.event_fn is None
            and isinstance(self.method, RungeKutta)
            and not request.solution
            and not self.traced
            and self.z0.dtype in (torch.float32, torch.float64)
            and self.options.get("interp", "linear") == "linear"
        )
        self.transformed = not self.traced and transformed()
        if self.transformed and request.gradient in ("adjoint", "reversible"):
            raise SolveError(ONCE.format(request.gradient))
        if self.transformed and isinstance(self.method, ImplicitRungeKutta):
            raise ArgumentError(
                f"the implicit method {request.method!r} can't be transformed by torch.func; "
                "torch.autograd works, twice as well"
            )
        if self.transformed and self.adaptive and known(lambda: self.z0.sum() == 0) is None:
            raise ArgumentError(
                "adaptive steps can't be chosen under torch.func.vmap: solve the whole batch with "
                'batch="independent", or take fixed steps'
            )
        self.callbacks = self._callbacks()
        if self.adaptive:
            self.control = self._control()

    def _pass_tolerances(self) -> None:
        """To methods that iterate; implicit ones go to round-off in fixed steps (None)."""
        if getattr(self.method, "rtol", None) is not None or (
            self.adaptive and hasattr(self.method, "rtol")
        ):
            self.method = replace(self.method, rtol=self.rtol, atol=self.atol)

    def _check_words(self) -> None:
        request = self.request
        if not callable(request.func):
            raise ArgumentError(f"`func` must be callable, got {type(request.func).__name__}")
        for name, value, known in (
            ("gradient", request.gradient, GRADIENTS),
            ("batch", request.batch, ("shared", "independent")),
        ):
            if value not in known:
                raise ArgumentError(unknown(f"`{name}`", str(value), known))
        bounded = request.memory is not None or request.segments is not None
        if bounded and request.gradient != "checkpoint":
            raise ArgumentError('`memory` and `segments` go with gradient="checkpoint" only')
        if request.memory is not None and request.segments is not None:
            raise ArgumentError("give `memory` or `segments`, not both")
        segments = request.segments
        if segments is not None and not (isinstance(segments, int) and segments >= 1):
            raise ArgumentError(f"`segments` must be a whole number from 1, got {segments!r}")
        self.memory = None if request.memory is None else read_bytes(request.memory)
        self._check_combinations()

    def _check_combinations(self) -> None:
        """Refuses what would be ignored."""
        request, adjoint = self.request, self.request.adjoint
        backward = (adjoint.rtol, adjoint.atol, adjoint.method, adjoint.options)
        if request.gradient != "adjoint" and any(value is not None for value in backward):
            raise ArgumentError(
                "`adjoint_rtol`, `adjoint_atol`, `adjoint_method` and `adjoint_options` go with "
                'gradient="adjoint" only'
            )
        if adjoint.method is not None and adjoint.method not in {**METHODS, **request.methods}:
            raise ArgumentError(unknown("`adjoint_method`", str(adjoint.method), METHODS))
        if request.event_fn is not None:
            if request.method == SCIPY or request.batch == "independent":
                raise ArgumentError(
                    '`event_fn` goes neither with method "scipy_solver" nor with '
                    'batch="independent"'
                )
            if request.quadrature is not None or request.gradient in ("checkpoint", "reversible"):
                raise ArgumentError(
                    '`event_fn` goes with gradient="discrete" or "adjoint", without `quadrature`'
                )
        if request.method == SCIPY and (
            request.quadrature is not None
            or request.gradient != "discrete"
            or getattr(request.t, "ndim", 1) != 1
        ):
            raise ArgumentError(
                'method "scipy_solver" takes times of shape (times,), no `quadrature`, and has no '
                "gradient"
            )

    def _find_method(self) -> None:
        request = self.request
        self.options = dict(request.options or {})
        name = request.method or "dopri5"
        table: dict[str, Any] = {**METHODS, **request.methods}
        if isinstance(name, Tableau):
            table = {name.name: RungeKutta(name) if name.explicit else ImplicitRungeKutta(name)}
            name = name.name
        if name == SCIPY:
            self._check_options({"solver", "min_step", "max_step", "norm"}, name)
            return
        if name not in table:
            raise ArgumentError(unknown("`method`", str(name), [*table, SCIPY]))
        self.method = table[name]
        gridded = not request.lenient and bool(
            {"step_size", "grid_constructor"} & set(self.options)
        )
        self.adaptive = bool(getattr(self.method, "adaptive", False)) and not gridded
        own = {f.name for f in fields(self.method)} - FIXED_FIELDS
        self._check_options((ADAPTIVE if self.adaptive else FIXED) | own, name)
        chosen = {key: value for key, value in self.options.items() if key in own}
        if chosen:
            self.method = replace(self.method, **chosen)
        if request.gradient == "reversible" and not getattr(self.method, "reversible", False):
            able = [key for key, method in METHODS.items() if getattr(method, "reversible", False)]
            raise ArgumentError(
                f'gradient="reversible" needs a reversible method ({", ".join(able)}), got '
                f'{name!r}; gradient="checkpoint" works with every method'
            )

    def _check_options(self, known: set[str], method: str) -> None:
        try:
            check_names(self.options, known, method)
        except ArgumentError as error:
            if not self.request.lenient:
                raise
            warnings.warn(str(error), SolveWarning, stacklevel=7)
            self.options = {name: self.options[name] for name in self.options if name in known}

    def _check_times(self) -> None:
        request = self.request
        self.t = check_times(request.t, self.z0, values=not self.traced)
        if request.mask is not None and self.t.ndim != 2:
            raise ArgumentError("`mask` goes with times of shape (batch, times) only")
        if self.t.ndim == 2:
            self.t = check_rows(self.t, request.mask)
        self.independent = self.adaptive and (request.batch == "independent" or self.t.ndim == 2)
        if request.batch == "independent" and self.z0.ndim == 0:
            raise ArgumentError('batch="independent" needs a batch axis in front of `y0`, got ()')
        if self.independent and self.t.ndim == 1:
            self.t = self.t.expand(self.z0.shape[0], -1)
        if request.event_fn is not None and self.t.shape != (2,):
            raise ArgumentError(
                f"`t` must be (start, anything in the direction of time) with `event_fn`, got "
                f"shape {tuple(self.t.shape)}"
            )

    def _callbacks(self) -> dict[str, Callable[..., Any]]:
        able = CALLBACKS if self.adaptive else CALLBACKS[:1] if self.method is not None else ()
        callbacks = {}
        for name in CALLBACKS:
            callback = getattr(self.request.func, name, None)
            if callback is not None and name in able:
                callbacks[name] = _split(callback, self.layout)
            elif callback is not None:
                text = f"method {self.request.method!r} does not call {name}"
                warnings.warn(text, SolveWarning, stacklevel=5)
        return callbacks

    def _control(self) -> Control:
        options = dict(self.request.defaults)
        options.update(
            {name: value for name, value in self.options.items() if name in ADAPTIVE - {"dtype"}}
        )
        for name in options:
            if name in ("step_t", "jump_t"):
                options[name] = floats(name, options[name])
            elif name == "max_num_steps":
                options[name] = number(name, options[name], 1)
            elif name == "first_step" and options[name] is not None:
                options[name] = positive(name, options[name])
            elif name not in ("norm", "first_step", "limit_per_output"):
                options[name] = number(name, options[name])
        if options.get("min_step", 0.0) > options.get("max_step", inf):
            raise ArgumentError("option `min_step` must not be above `max_step`")
        both = set(options.get("step_t", ())) & set(options.get("jump_t", ()))
        if both:
            raise ArgumentError(f"`step_t` and `jump_t` must not share times, got {sorted(both)}")
        options["norm"] = self.norm()
        if self.independent and (options.get("step_t") or options.get("jump_t")):
            raise ArgumentError('options `step_t` and `jump_t` need batch="shared"')
        if self.independent and "norm" in self.options:
            raise ArgumentError('option `norm` needs batch="shared"')
        return Control(self.rtol, self.atol, **options)

    def norm(self) -> Callable[[Tensor], Tensor]:
        """The norm of the joined state: the user's, or root mean squares."""
        norm = self.options.get("norm")
        if self.layout.plain:
            return rms if norm is None else norm
        if norm is not None:
            return lambda z: norm(self.layout.split(z))
        return lambda z: torch.stack([rms(leaf) for leaf in self.layout.leaves(z)]).max()


def _both_zero(rtol: float | Tensor, atol: float | Tensor) -> bool:
    return bool(torch.as_tensor(torch.as_tensor(rtol) + torch.as_tensor(atol) == 0).any())


def _split(callback: Callable[..., Any], layout: Layout) -> Callable[..., Any]:
    """The user's callback, who sees the state, and the length of the step as a tensor."""

    def split(t: Tensor, z: Tensor, dt: Scalar) -> Any:
        length = torch.as_tensor(dt, dtype=t.dtype, device=t.device).abs()
        return callback(t, layout.split(z), length)

    return split


def compilable(request: Request) -> bool:
    """Whether the solve can be one graph: fixed steps and their own gradient."""
    method = request.method
    if isinstance(method, str):
        method = {**METHODS, **request.methods}.get(method)
    return (
        method is not None
        and not getattr(method, "adaptive", False)
        and request.gradient == "discrete"
        and request.event_fn is None
    )
