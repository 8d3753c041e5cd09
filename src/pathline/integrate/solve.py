"""One solve: its arguments checked and brought together, and the march that it asks for."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, SolveError, SolveWarning, unknown
from .adaptive import AdaptiveMarch, Control, rms
from .adjoint import ONCE, AdjointSolve, AdjointSpec, adjoint_norm, solve_adjoint
from .captured import Captured
from .checkpoint import Checkpoint, read_bytes
from .dense import Scalar
from .events import Event
from .explicit import RungeKutta
from .field import Field, Layout, Velocity
from .fixed import FixedMarch
from .grid import Grid
from .independent import IndependentMarch
from .methods import METHODS
from .options import (
    ADAPTIVE,
    FIXED,
    check_monotonic,
    check_names,
    check_rows,
    check_times,
    check_tolerance,
    floats,
    number,
    traced,
    transformed,
)
from .precision import solve_low_precision
from .quadrature import Quadrature, Rate, Rates
from .reversible import solve_reversible
from .scipy_solver import solve_scipy
from .solution import Halt, Piece, Solution, Statistics, Status, first_not_finite

GRADIENTS = ("discrete", "checkpoint", "reversible", "adjoint")
CALLBACKS = ("callback_step", "callback_accept_step", "callback_reject_step")
SCIPY = "scipy_solver"
Outputs = list[tuple[Tensor, Rates]]


@dataclass
class Request:
    """The arguments of `odeint`, as they came."""

    func: Velocity
    y0: Any
    t: Any
    rtol: Any = 1e-7
    atol: Any = 1e-9
    method: str | None = "dopri5"
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
    lenient: bool = False  # warn of unknown options, and let fixed steps end in what is not finite


class Solve:
    """A checked request, ready to run.

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
        self.layout = Layout(request.y0, samples=samples and not isinstance(request.y0, Tensor))
        self.z0 = self.layout.join(request.y0)
        if not (self.z0.is_floating_point() or self.z0.is_complex()):
            raise ArgumentError(
                f"`y0` must be of a floating point or complex type, got {self.z0.dtype}"
            )
        self.traced = traced(self.z0)
        if not self.traced and _known(lambda: torch.isfinite(self.z0).all()) is False:
            raise ArgumentError("`y0` must be finite")
        self._check_times()
        self.rtol = check_tolerance("rtol", request.rtol, self.layout, self.z0)
        self.atol = check_tolerance("atol", request.atol, self.layout, self.z0)
        if self.adaptive and self.rtol is not None and _both_zero(self.rtol, self.atol):
            raise ArgumentError("`rtol` and `atol` must not both be zero")
        if getattr(self.method, "rtol", None) is not None or (
            self.adaptive and hasattr(self.method, "rtol")
        ):
            self.method = replace(self.method, rtol=self.rtol, atol=self.atol)
        autocast = torch.is_autocast_enabled(self.z0.device.type)
        self.velocity = Field(request.func, self.layout, cast=autocast or request.lenient)
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
        if self.transformed and self.adaptive and _known(lambda: self.z0.sum() == 0) is None:
            raise ArgumentError(
                "adaptive steps can't be chosen under torch.func.vmap: solve the whole batch with "
                'batch="independent", or take fixed steps'
            )
        self.callbacks = self._callbacks()
        self.rate: Rate | None = None
        self.plan: Any = None
        if self.adaptive:
            self.control = self._control()

    # Arguments

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
        if request.gradient != "checkpoint" and (request.memory or request.segments) is not None:
            raise ArgumentError('`memory` and `segments` go with gradient="checkpoint" only')
        if request.memory is not None and request.segments is not None:
            raise ArgumentError("give `memory` or `segments`, not both")
        if request.segments is not None and request.segments < 1:
            raise ArgumentError(f"`segments` must be at least 1, got {request.segments}")
        self.memory = None if request.memory is None else read_bytes(request.memory)

    def _find_method(self) -> None:
        request = self.request
        self.options = dict(request.options or {})
        name = request.method or "dopri5"
        table = {**METHODS, **request.methods}
        if name == SCIPY:
            self._check_options({"solver", "min_step", "max_step", "norm"}, name)
            return
        if name not in table:
            raise ArgumentError(unknown("`method`", str(name), [*table, SCIPY]))
        self.method = table[name]
        gridded = "step_size" in self.options or "grid_constructor" in self.options
        self.adaptive = bool(getattr(self.method, "adaptive", False)) and not gridded
        own = {f.name for f in fields(self.method)} - {"tableau", "name"}
        self._check_options((ADAPTIVE if self.adaptive else FIXED) | own, name)
        self.method = replace(
            self.method, **{key: value for key, value in self.options.items() if key in own}
        )
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
        found = {name: getattr(self.request.func, name, None) for name in CALLBACKS}
        able = CALLBACKS if self.adaptive else CALLBACKS[:1] if self.method is not None else ()
        wrong = [name for name, callback in found.items() if callback and name not in able]
        if wrong:
            warnings.warn(
                f"method {self.request.method!r} does not call {', '.join(wrong)}",
                SolveWarning,
                stacklevel=4,
            )

        def split(callback: Callable[..., Any]) -> Callable[..., Any]:
            return lambda t, z, dt: callback(t, self.layout.split(z), dt)

        return {name: split(callback) for name in able if (callback := found[name])}

    def _control(self) -> Control:
        options = dict(self.request.defaults)
        options.update(
            {name: value for name, value in self.options.items() if name in ADAPTIVE - {"dtype"}}
        )
        for name in options:
            if name in ("step_t", "jump_t"):
                options[name] = floats(name, options[name])
            elif name == "max_num_steps":
                options[name] = int(number(name, options[name], 1))
            elif name not in ("norm", "first_step"):
                options[name] = number(name, options[name])
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
        split = self.layout.split
        if norm is not None:
            return lambda z: norm(split(z))
        return lambda z: torch.stack([rms(leaf) for leaf in pytree.tree_leaves(split(z))]).max()

    # The march

    def run(self) -> Solution:
        """Solves, and returns the solution as far as it came."""
        if self.request.event_fn is not None:
            return self._until_event()
        if self.method is None:
            return self._scipy()
        if self.request.gradient == "adjoint":
            return self._by_adjoint()
        return self._march()

    def _march(self) -> Solution:
        if self.independent:
            return self._run_independent()
        return self._run_adaptive() if self.adaptive else self._run_fixed()

    def _quadrature(self) -> Quadrature | None:
        if self.request.quadrature is None:
            return None
        assert self.method is not None
        self.rate = Rate(self.request.quadrature, self.velocity)
        return Quadrature(self.rate, getattr(self.method, "tableau", None), self.method.order)

    def _recorder(self, steps: int | None) -> Checkpoint | None:
        request = self.request
        if request.gradient != "checkpoint" or not torch.is_grad_enabled():
            return None
        if self.transformed:
            warnings.warn(
                'torch.func can\'t recompute: gradient="checkpoint" keeps the whole graph here, '
                'as "discrete" does',
                SolveWarning,
                stacklevel=7,
            )
            return None
        width, slots = 1, None
        if request.segments is not None:
            slots = request.segments
            width = 1 if steps is None else ceil(steps / slots)
        recorder = Checkpoint(
            steps=steps, slots=slots, memory=self.memory, width=width, device=self.z0.device
        )
        return recorder

    def _watched(self, march: Any, recorder: Checkpoint | None, *args: Any) -> Outputs:
        if recorder is None:
            return march.run(*args)
        with recorder:
            outputs = march.run(*args, recorder=recorder)
        self.plan = recorder.plan
        return outputs

    def fixed_march(self) -> FixedMarch:
        """The march through the grid that the options ask for."""
        method = self.method
        assert method is not None
        nodes, inside = self._nodes()
        grid = Grid(
            nodes,
            method.offsets,
            self.z0,
            perturb=bool(self.options.get("perturb", False)),
            traced=self.traced,
        )
        watch = self.callbacks.get("callback_step")
        return FixedMarch(
            method,
            self.velocity,
            grid,
            inside,
            interpolation=self._interpolation(),
            quadrature=self._quadrature(),
            watch=watch,
            dense=self.request.solution,
        )

    def _interpolation(self) -> str:
        word = self.options.get("interp", "linear")
        if word not in ("linear", "cubic"):
            raise ArgumentError(unknown("option `interp`", str(word), ("linear", "cubic")))
        return word

    def _nodes(self) -> tuple[Tensor, list[list[Scalar]]]:
        """The nodes of the grid, and where in its steps output is wanted."""
        step_size, make = self.options.get("step_size"), self.options.get("grid_constructor")
        if step_size is not None and make is not None:
            raise ArgumentError("give option `step_size` or `grid_constructor`, not both")
        t = self.t
        if step_size is None and make is None:
            return t, [[1.0]] * (t.shape[-1] - 1)
        if self.traced:
            raise ArgumentError(
                "a compiled solve takes one step between neighbouring times: list all times in "
                "`t` in place of option `step_size` or `grid_constructor`"
            )
        if t.shape[-1] == 1:
            return t, []
        if t.ndim == 2:
            if make is not None:
                raise ArgumentError("option `grid_constructor` needs times of shape (times,)")
            return self._cut(t, number("step_size", step_size, 1e-300))
        if make is not None:
            nodes = make(self.request.func, self.request.y0, self.request.t).to(t)
            check_monotonic(nodes.tolist(), "the times of option `grid_constructor`")
            if nodes[0] != t[0] or nodes[-1] != t[-1]:
                raise ArgumentError(
                    "the times of option `grid_constructor` must begin at t[0] and end at t[-1]"
                )
        else:
            nodes = self._equal_steps(t, number("step_size", step_size, 1e-300))
        return nodes, self._inside(nodes, t)

    @staticmethod
    def _equal_steps(t: Tensor, h: float) -> Tensor:
        """Steps of length h from t[0], the last one shorter if need be."""
        start, end = float(t[0].detach()), float(t[-1].detach())
        count = max(1, ceil(abs(end - start) / h * (1 - 1e-9)))
        sign = 1.0 if end > start else -1.0
        nodes = t[0] + sign * h * torch.arange(count, dtype=t.dtype, device=t.device)
        return torch.cat([nodes, t[-1:]])

    @staticmethod
    def _cut(t: Tensor, h: float) -> tuple[Tensor, list[list[Scalar]]]:
        """Each sample's intervals cut into equally many steps, none longer than h."""
        pieces = [t[:, :1]]
        inside: list[list[Scalar]] = []
        for a, b in zip(t.T[:-1], t.T[1:], strict=True):
            count = max(1, ceil(float((b - a).abs().max()) / h * (1 - 1e-9)))
            shares = torch.arange(1, count + 1, dtype=t.dtype, device=t.device) / count
            pieces.append(a[:, None] + (b - a)[:, None] * shares)
            inside += [[]] * (count - 1) + [[1.0]]
        return torch.cat(pieces, 1), inside

    @staticmethod
    def _inside(nodes: Tensor, t: Tensor) -> list[list[Scalar]]:
        times, ends = t.tolist(), nodes.tolist()
        sign = 1.0 if ends[-1] > ends[0] else -1.0
        inside: list[list[Scalar]] = [[] for _ in ends[1:]]
        n = 0
        for j in range(1, len(times)):
            while n < len(inside) - 1 and sign * (times[j] - ends[n + 1]) > 1e-6 * abs(
                ends[n + 1] - ends[n]
            ):
                n += 1
            length = ends[n + 1] - ends[n]
            if abs(times[j] - ends[n + 1]) <= 1e-6 * abs(length):
                inside[n].append(1.0)
            elif t.requires_grad:
                inside[n].append((t[j] - nodes[n]) / (nodes[n + 1] - nodes[n]))
            else:
                inside[n].append((times[j] - ends[n]) / length)
        return inside

    def _run_fixed(self) -> Solution:
        march = self.fixed_march()
        request = self.request
        if request.gradient == "reversible":
            captured = self._captured()
            outputs = solve_reversible(march, self.z0, captured)
        elif self.low and _castable(captured := self._captured()):
            outputs = solve_low_precision(march, self.z0, captured, scaling=request.scaling)
        else:
            outputs = self._watched(march, self._recorder(len(march.grid) + 1), self.z0)
        halt = march.halt
        if halt is None and not self.traced and not request.lenient:
            end = outputs[-1][0]
            if _known(lambda: torch.isfinite(end).all()) is False:
                halt, outputs = self._diagnose()
        statistics = Statistics(self.velocity.evaluations, len(march.grid), 0)
        if len(march.grid) and isinstance(march.grid.lengths[-1], float):
            statistics.last_step = march.grid.lengths[-1]
        return self._solution(outputs, statistics, halt=halt, pieces=march.pieces)

    def _captured(self) -> Captured:
        real = self.z0.dtype.to_real()
        t = self.t[..., 0].to(real)
        if t.ndim:
            t = t.view(-1, *(1,) * (self.z0.ndim - 1))
        return Captured(self.velocity, t, self.z0, self.request.adjoint.params)

    def _diagnose(self) -> tuple[Halt, Outputs]:
        """Runs again without a graph, to say where it stopped being finite."""
        march = self.fixed_march()
        outputs: Outputs = []
        with torch.no_grad():
            state = march.begin(self.z0.detach())
            outputs.append((state.z, state.sums))
            for n in range(len(march.grid)):
                after, outs = march.step(n, state)
                if not torch.isfinite(after.z).all():
                    t = float(march.grid.nodes[..., n].min())
                    sample = first_not_finite(after.z)
                    return Halt(Status.NOT_FINITE, t, state.z, sample), outputs
                state, outputs = after, outputs + outs
        return Halt(Status.NOT_FINITE, float(march.grid.nodes.max()), state.z), outputs

    def _run_adaptive(self, event: Event | None = None, t: Tensor | None = None) -> Any:
        march = AdaptiveMarch(
            self.method,
            self.velocity,
            self.control,
            quadrature=self._quadrature(),
            callbacks=self.callbacks,
            dense=self.request.solution,
            watch=None if event is None else event.watch,
        )
        times = self.t if t is None else t
        outputs = self._watched(march, self._recorder(None), self.z0, times)
        march.statistics.evaluations = self.velocity.evaluations
        halt = march.halt
        if halt is not None:
            halt = self._explain(halt, march)
        if event is not None:
            return march, halt
        return self._solution(
            outputs, march.statistics, halt=halt, pieces=march.pieces, last=march.last
        )

    def _explain(self, halt: Halt, march: AdaptiveMarch) -> Halt:
        """The likely cause behind a step limit or a vanishing step."""
        finest = torch.finfo(self.z0.dtype).eps
        rtol = float(self.rtol.min()) if isinstance(self.rtol, Tensor) else self.rtol
        if halt.status is Status.STEP_LIMIT and march.stiffness() > 2.0:
            halt.status = Status.STIFF
        elif halt.status is Status.STEP_TOO_SMALL and rtol < 10 * finest:
            halt.status = Status.TOLERANCE
        return halt

    def _run_independent(self) -> Solution:
        march = IndependentMarch(self.method, self.velocity, self.control, self._quadrature())
        outputs = self._watched(march, self._recorder(None), self.z0, self.t)
        march.statistics.evaluations = self.velocity.evaluations
        last = (march.last[0], march.last[1])
        return self._solution(
            outputs, march.statistics, halts=march.halts, status=march.status, last=last
        )

    # Other ways

    def _scipy(self) -> Solution:
        keys = ("solver", "min_step", "max_step")
        options = {key: self.options[key] for key in keys if key in self.options}
        if self.t.ndim != 1:
            raise ArgumentError('method "scipy_solver" takes times of shape (times,) only')
        zs = solve_scipy(
            self.velocity, self.z0, self.t.detach(), rtol=self.rtol, atol=self.atol, **options
        )
        outputs: Outputs = [(z, ()) for z in zs.unbind(0)]
        return self._solution(outputs, Statistics(self.velocity.evaluations))

    def _by_adjoint(self) -> Solution:
        request = self.request
        if request.quadrature is not None or self.t.ndim != 1 or self.independent:
            raise ArgumentError(
                'gradient="adjoint" takes neither `quadrature` nor times or steps of each '
                'sample\'s own; use gradient="discrete" or "checkpoint"'
            )
        solution: list[Solution] = []

        def forward(z: Tensor, t: Tensor) -> Tensor:
            self.z0, self.t = z, t
            solution.append(self._march())
            return solution[0].joined

        z0, t = self.z0, self.t
        adjoint = AdjointSolve(
            forward,
            self._adjoint_odeint(),
            self.velocity,
            self._captured(),
            self._adjoint_options(),
            {
                name: callback
                for name in CALLBACKS
                if (callback := getattr(request.func, f"{name}_adjoint", None))
            },
        )
        zs = solve_adjoint(adjoint, z0, t)
        result = solution[0]
        return replace(result, values=self.layout.split(zs), joined=zs)

    def _adjoint_options(self) -> dict[str, Any]:
        spec, request = self.request.adjoint, self.request
        if spec.method not in (None, request.method) and self.options and spec.options is None:
            raise ArgumentError(
                "`adjoint_options` must be given where `options` is and `adjoint_method` differs "
                "from `method`"
            )
        if spec.options is None:
            options = {name: value for name, value in self.options.items() if name != "norm"}
        else:
            options = dict(spec.options)
        split = None if self.layout.plain else self.layout.split
        leaves = None if split is None else lambda z: pytree.tree_leaves(split(z))
        options["norm"] = adjoint_norm(options.get("norm"), self.norm(), leaves)
        return options

    def _adjoint_odeint(self) -> Callable[..., Any]:
        request, spec = self.request, self.request.adjoint

        def solve(func: Velocity, state: Any, t: Tensor, options: Mapping[str, Any]) -> Any:
            return (
                Solve(
                    Request(
                        func,
                        state,
                        t,
                        rtol=self._or(spec.rtol, request.rtol),
                        atol=self._or(spec.atol, request.atol),
                        method=spec.method or request.method,
                        options=options,
                        methods=request.methods,
                        defaults=request.defaults,
                        lenient=request.lenient,
                    )
                )
                .run()
                .or_raise()
                .values
            )

        return solve

    @staticmethod
    def _or(first: Any, second: Any) -> Any:
        value = second if first is None else first
        if isinstance(value, tuple | list):
            raise ArgumentError(
                "`adjoint_rtol` and `adjoint_atol` must be numbers where `rtol` and `atol` have "
                "an entry for each tensor"
            )
        return value

    def _until_event(self) -> Solution:
        request = self.request
        if self.method is None or self.independent or self.t.ndim != 1:
            raise ArgumentError("`event_fn` takes neither scipy_solver nor samples of their own")
        assert request.event_fn is not None
        real = self.z0.dtype.to_real()
        tolerance = float(self.atol.min()) if isinstance(self.atol, Tensor) else self.atol
        start = self.t[0].to(real)
        event = Event(request.event_fn, self.velocity, start, self.z0, tolerance)
        graph = request.gradient != "adjoint" and torch.is_grad_enabled()
        if bool((event.signs == 0).any()):
            return self._event_solution(self.t[0], self.z0, Statistics(1), None)
        with torch.set_grad_enabled(graph):
            if self.adaptive:
                away = torch.full_like(self.t[1:], inf if self.t[1] > self.t[0] else -inf)
                march, halt = self._run_adaptive(event, torch.cat([self.t[:1], away]))
                statistics = march.statistics
            else:
                halt, statistics = self._step_until(event)
        if event.found is None:
            if halt is None or halt.status is Status.STEP_LIMIT:
                halt = Halt(Status.NO_EVENT, halt.t if halt else 0.0, halt.z if halt else self.z0)
            raise SolveError(halt.words)
        t, z = event.found
        if request.gradient == "adjoint":
            times = torch.cat([self.t[:1], t.detach().reshape(1).to(self.t)])
            again = replace(request, t=times, event_fn=None)
            z = Solve(again).run().or_raise().joined[-1]
        t, z = event.attach(t, z)
        return self._event_solution(t, z, statistics, None)

    def _step_until(self, event: Event) -> tuple[Halt | None, Statistics]:
        """Equal steps from t[0] until the event."""
        if "step_size" not in self.options:
            raise ArgumentError("`event_fn` with a method of fixed steps needs option `step_size`")
        h = number("step_size", self.options["step_size"], 1e-300)
        sign = 1.0 if self.t[1] > self.t[0] else -1.0
        limit, chunk, z = 1_000_000, 256, self.z0
        carry: Any = None
        for first in range(0, limit, chunk):
            index = torch.arange(first, first + chunk + 1, dtype=self.t.dtype)
            nodes = self.t[0] + sign * h * index.to(self.t.device)
            march = FixedMarch(
                self.method,
                self.velocity,
                Grid(nodes, self.method.offsets, z),
                [()] * chunk,
                dense=self._interpolation() == "cubic",
                watch=self.callbacks.get("callback_step"),
            )
            state = march.begin(z) if carry is None else carry
            for n in range(chunk):
                after, _ = march.step(n, state)
                piece = march.piece(n, state, after)
                if event.watch(piece, after.z):
                    return None, Statistics(self.velocity.evaluations, first + n + 1)
                state = after
            carry = state
        return Halt(Status.NO_EVENT, float(nodes[-1]), state.z), Statistics()

    def _event_solution(
        self, t: Tensor, z: Tensor, statistics: Statistics, halt: Halt | None
    ) -> Solution:
        joined = torch.stack([self.z0, z])
        t = t.to(self.request.t) if isinstance(self.request.t, Tensor) else t
        return Solution(
            torch.stack([self.t[0].to(t), t.detach()]),
            self.layout.split(joined),
            torch.zeros((), dtype=torch.long),
            [],
            statistics,
            (t.detach(), self.layout.split(z.detach())),
            event=t,
            joined=joined,
        )

    # The result

    def _solution(
        self,
        outputs: Outputs,
        statistics: Statistics,
        *,
        halt: Halt | None = None,
        halts: list[Halt] | None = None,
        status: Tensor | None = None,
        pieces: list[Piece] | None = None,
        last: tuple[Any, Tensor] | None = None,
    ) -> Solution:
        halts = halts or ([halt] if halt is not None else [])
        count = self.t.shape[-1]
        values = [z for z, _ in outputs]
        values += [torch.full_like(self.z0, torch.nan)] * (count - len(values))
        joined = torch.stack(values)
        integrals = None
        if self.rate is not None:
            assert self.rate.spec is not None
            columns = list(zip(*(sums for _, sums in outputs), strict=True))
            full = [
                torch.stack(
                    [*column, *[torch.full_like(column[0], torch.nan)] * (count - len(column))]
                )
                for column in columns
            ]
            integrals = pytree.tree_unflatten(full, self.rate.spec)
        if status is None:
            status = torch.tensor(int(halts[0].status) if halts else 0)
        if last is None:
            final = (halts[0].t, halts[0].z) if halts else (self.t[..., -1], values[count - 1])
        else:
            final = last
        return Solution(
            self.t,
            self.layout.split(joined),
            status,
            [halt.words for halt in halts],
            statistics,
            (torch.as_tensor(final[0]).detach(), self.layout.split(final[1])),
            integrals=integrals,
            plan=self.plan,
            pieces=pieces or [],
            split=self.layout.split,
            joined=joined,
        )


def _known(question: Callable[[], Tensor]) -> bool | None:
    """The answer, or None where torch.func hides it."""
    try:
        return bool(question())
    except RuntimeError:
        return None


def _castable(captured: Captured) -> bool:
    """Automatic casting leaves double precision as it is."""
    return all(p.dtype != torch.float64 for p in captured.tensors)


def _both_zero(rtol: float | Tensor, atol: float | Tensor) -> bool:
    return bool(torch.as_tensor(torch.as_tensor(rtol) + torch.as_tensor(atol) == 0).any())
