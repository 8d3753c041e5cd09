"""One solve: from the checked arguments to the march they ask for, and its solution."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import replace
from math import ceil, inf
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ..errors import ArgumentError, SolveError, SolveWarning, unknown
from .adaptive import AdaptiveMarch
from .adjoint import AdjointSolve, adjoint_norm, solve_adjoint
from .captured import Captured
from .checkpoint import Checkpoint
from .events import Event
from .explicit import RungeKutta
from .field import Velocity, real_dtype
from .fixed import FixedMarch
from .grid import Grid, beside
from .implicit import ImplicitRungeKutta
from .independent import IndependentMarch
from .nodes import fixed_nodes
from .options import finite, positive
from .precision import solve_low_precision
from .quadrature import Quadrature, Rate, Rates
from .reversible import solve_reversible
from .scipy_solver import solve_scipy
from .setup import CALLBACKS, Request, Setup, compilable, known
from .solution import Halt, NotConverged, Solution, Statistics, Status, first_not_finite

Outputs = list[tuple[Tensor, Rates]]
EVENT_STEPS = 1_000_000  # of fixed length, before a search for an event gives up


def solve(request: Request) -> Solution:
    """Solves, and returns the solution as far as it came.

    Raises:
        ArgumentError, ShapeError: something makes no sense; before the second evaluation.
        SolveError: the strategy can't be differentiated this way, or SciPy's solver failed.
    """
    if torch.compiler.is_compiling() and not compilable(request):
        return torch.compiler.disable(solve)(request)
    given = Setup(request)
    if given.z0.numel() == 0:
        outputs: Outputs = [(given.z0, ())] * given.t.shape[-1]
        return _solution(given, outputs, None, Statistics(), [])
    if request.event_fn is not None:
        return _until_event(given)
    if given.method is None:
        return _by_scipy(given)
    if request.gradient == "adjoint":
        return _by_adjoint(given)
    return _march(given)


def _march(given: Setup) -> Solution:
    if given.independent:
        return _independent(given)
    return _adaptive(given) if given.adaptive else _fixed(given)


# Fixed steps


def _fixed(given: Setup) -> Solution:
    request, rate = given.request, _rate(given)
    march = fixed_march(given, rate)
    plan = None
    if request.gradient == "reversible":
        outputs = solve_reversible(march, given.z0, _captured(given))
    elif given.low and _castable(captured := _captured(given)):
        outputs = solve_low_precision(march, given.z0, captured, scaling=request.scaling)
    else:
        outputs, plan = _run(march, _recorder(given, len(march.grid) + 1), given.z0)
    halt = march.halt
    if halt is None and not given.traced and not request.lenient:
        end = outputs[-1][0]
        if known(lambda: finite(end)) is False:
            halt, outputs = _diagnose(given)
    statistics = Statistics(given.velocity.evaluations, len(march.grid), 0)
    if len(march.grid) and isinstance(march.grid.lengths[-1], float):
        statistics.last_step = march.grid.lengths[-1]
    result = _solution(given, outputs, rate, statistics, [halt] if halt is not None else [])
    return replace(result, pieces=march.pieces, plan=plan)


def fixed_march(given: Setup, rate: Rate | None = None) -> FixedMarch:
    """The march of a request with fixed steps, and its rates."""
    nodes, inside = fixed_nodes(given)
    perturb = bool(given.options.get("perturb", False))
    return FixedMarch(
        given.method,
        given.velocity,
        Grid(nodes, given.method.offsets, given.z0, perturb=perturb, traced=given.traced),
        inside,
        interpolation=_interpolation(given),
        quadrature=_quadrature(given, rate),
        watch=given.callbacks.get("callback_step"),
        dense=given.request.solution,
    )


def _interpolation(given: Setup) -> str:
    word = given.options.get("interp", "linear")
    if word not in ("linear", "cubic"):
        raise ArgumentError(unknown("option `interp`", str(word), ("linear", "cubic")))
    return word


def _diagnose(given: Setup) -> tuple[Halt, Outputs]:
    """Runs again without a graph, to say where the solution stopped being finite."""
    march = fixed_march(given, _rate(given))
    with torch.no_grad():
        state = march.begin(given.z0.detach())
        outputs: Outputs = [(state.z, state.sums)]
        for n in range(len(march.grid)):
            after, outs = march.step(n, state)
            if not torch.isfinite(after.z).all():
                t = float(march.grid.nodes[n].detach().min())
                return Halt(
                    Status.NOT_FINITE, t, state.z, first_not_finite(given.layout.leaves(after.z))
                ), outputs
            state, outputs = after, outputs + outs
    return Halt(Status.NOT_FINITE, float(march.grid.nodes.detach().max()), state.z), outputs


def _castable(captured: Captured) -> bool:
    """Automatic casting leaves double precision as it is."""
    return all(p.dtype != torch.float64 for p in captured.tensors)


# Steps of chosen length


def _adaptive(given: Setup) -> Solution:
    rate = _rate(given)
    march = _adaptive_march(given, rate, None)
    outputs, plan = _run(march, _recorder(given, None), given.z0, given.t)
    halts = [_explained(given, march.halt, march)] if march.halt is not None else []
    march.statistics.evaluations = given.velocity.evaluations
    result = _solution(given, outputs, rate, march.statistics, halts)
    t, z = march.last
    last = (torch.tensor(t, dtype=torch.float64), given.layout.split(z))
    return replace(result, pieces=march.pieces, plan=plan, last=last)


def _adaptive_march(given: Setup, rate: Rate | None, event: Event | None) -> AdaptiveMarch:
    return AdaptiveMarch(
        given.method,
        given.velocity,
        given.control,
        quadrature=_quadrature(given, rate),
        callbacks=given.callbacks,
        dense=given.request.solution,
        watch=None if event is None else event.watch,
    )


def _explained(given: Setup, halt: Halt, march: AdaptiveMarch) -> Halt:
    """The likely cause behind a step limit or a vanishing step."""
    rtol = float(torch.as_tensor(given.rtol).min())
    grown = bool(halt.z.abs().max() > 1e6 * (1 + given.z0.abs().max()))
    tight = rtol < 10 * torch.finfo(given.z0.dtype).eps and not grown
    if halt.status is Status.STEP_LIMIT and march.stiffness() > 2.0:
        return replace(halt, status=Status.STIFF)
    if halt.status in (Status.STEP_LIMIT, Status.STEP_TOO_SMALL) and tight:
        return replace(halt, status=Status.TOLERANCE)
    return halt


def _independent(given: Setup) -> Solution:
    rate = _rate(given)
    march = IndependentMarch(given.method, given.velocity, given.control, _quadrature(given, rate))
    outputs, plan = _run(march, _recorder(given, None), given.z0, given.t)
    march.statistics.evaluations = given.velocity.evaluations
    result = _solution(given, outputs, rate, march.statistics, march.halts)
    t, z = march.last
    return replace(result, status=march.status, plan=plan, last=(t, given.layout.split(z)))


# What the marches share


def _rate(given: Setup) -> Rate | None:
    quadrature = given.request.quadrature
    return None if quadrature is None else Rate(quadrature, given.velocity)


def _quadrature(given: Setup, rate: Rate | None) -> Quadrature | None:
    if rate is None:
        return None
    single = isinstance(given.method, RungeKutta | ImplicitRungeKutta)
    return Quadrature(rate, given.method.tableau if single else None, given.method.order)


def _recorder(given: Setup, steps: int | None) -> Checkpoint | None:
    request = given.request
    if request.gradient != "checkpoint" or not torch.is_grad_enabled():
        return None
    if given.transformed:
        warnings.warn(
            'torch.func can\'t recompute: gradient="checkpoint" keeps the whole graph here, '
            'as "discrete" does',
            SolveWarning,
            stacklevel=6,
        )
        return None
    slots = request.segments
    return Checkpoint(
        steps=steps,
        slots=slots,
        memory=given.memory,
        width=1 if steps is None or slots is None else ceil(steps / slots),
        device=given.z0.device,
    )


def _run(march: Any, recorder: Checkpoint | None, *args: Any) -> tuple[Outputs, Any]:
    """The outputs of the march, and the plan of a recorder."""
    if recorder is None:
        return march.run(*args), None
    with recorder:
        outputs = march.run(*args, recorder=recorder)
    return outputs, recorder.plan


def _captured(given: Setup) -> Captured:
    t = given.t[..., 0].to(real_dtype(given.z0))
    t = beside(t, given.z0) if t.ndim else t
    return Captured(given.velocity, t, given.z0, given.request.adjoint.params)


def _solution(
    given: Setup, outputs: Outputs, rate: Rate | None, statistics: Statistics, halts: list[Halt]
) -> Solution:
    missing = given.t.shape[-1] - len(outputs)
    if given.request.final:
        outputs, missing = outputs[-1:], 0

    def column(parts: list[Tensor]) -> Tensor:
        if len(parts) == 1 and not missing:
            return parts[0][None]
        return torch.stack([*parts, *[torch.full_like(parts[0], torch.nan)] * missing])

    joined = column([z for z, _ in outputs])
    integrals = None
    if rate is not None:
        assert rate.spec is not None
        columns = zip(*(sums for _, sums in outputs), strict=True)
        integrals = pytree.tree_unflatten([column(list(c)) for c in columns], rate.spec)
    split = given.layout.split
    if halts:
        last = (torch.tensor(halts[0].t, dtype=torch.float64), split(halts[0].z))
    else:
        last = (given.t[..., -1].detach(), split(outputs[-1][0]))
    return Solution(
        given.t,
        split(joined),
        torch.tensor(int(halts[0].status) if halts else 0),
        [halt.words for halt in halts],
        statistics,
        last,
        integrals=integrals,
        split=split,
        joined=joined,
    )


# Other ways


def _by_scipy(given: Setup) -> Solution:
    keys = ("solver", "min_step", "max_step")
    options = {key: given.options[key] for key in keys if key in given.options}
    zs = solve_scipy(given.velocity, given.z0, given.t, rtol=given.rtol, atol=given.atol, **options)
    outputs: Outputs = [(z, ()) for z in zs.unbind(0)]
    return _solution(given, outputs, None, _counted(given, Statistics()), [])


def _by_adjoint(given: Setup) -> Solution:
    request = given.request
    if request.quadrature is not None or given.t.ndim != 1 or given.independent:
        raise ArgumentError(
            'gradient="adjoint" takes neither `quadrature` nor times or steps of each sample\'s '
            'own; use gradient="discrete" or "checkpoint"'
        )
    solutions: list[Solution] = []

    def forward() -> Tensor:
        solutions.append(_march(given))
        return solutions[0].joined

    callbacks = {name: getattr(request.func, f"{name}_adjoint", None) for name in CALLBACKS}
    adjoint = AdjointSolve(
        forward,
        _adjoint_odeint(given),
        given.velocity,
        _captured(given),
        _adjoint_options(given),
        {name: callback for name, callback in callbacks.items() if callback is not None},
    )
    joined = solve_adjoint(adjoint, given.z0, given.t)
    return replace(solutions[0], values=given.layout.split(joined), joined=joined)


def _adjoint_options(given: Setup) -> dict[str, Any]:
    spec, request = given.request.adjoint, given.request
    if spec.method not in (None, request.method) and given.options and spec.options is None:
        raise ArgumentError(
            "`adjoint_options` must be given where `options` is and `adjoint_method` differs from "
            "`method`"
        )
    if spec.options is None:
        options = {name: value for name, value in given.options.items() if name != "norm"}
    else:
        options = dict(spec.options)
    split = None if given.layout.plain else given.layout.leaves
    options["norm"] = adjoint_norm(options.get("norm"), given.norm(), split)
    return options


def _adjoint_odeint(given: Setup) -> Callable[..., Any]:
    request, spec = given.request, given.request.adjoint
    rtol = request.rtol if spec.rtol is None else spec.rtol
    atol = request.atol if spec.atol is None else spec.atol
    if isinstance(rtol, tuple | list) or isinstance(atol, tuple | list):
        raise ArgumentError(
            "`adjoint_rtol` and `adjoint_atol` must be numbers where `rtol` and `atol` have an "
            "entry for each tensor"
        )
    method = spec.method or request.method

    def backward(func: Velocity, state: Any, t: Tensor, options: Mapping[str, Any]) -> Any:
        back = Request(func, state, t, rtol=rtol, atol=atol, method=method, options=options)
        back = replace(
            back, methods=request.methods, defaults=request.defaults, lenient=request.lenient
        )
        try:
            return solve(back).or_raise().values
        except SolveError as error:
            raise SolveError(f"in the adjoint solve, backward in time: {error}") from None

    return backward


def _until_event(given: Setup) -> Solution:
    request = given.request
    assert request.event_fn is not None
    tolerance = float(torch.as_tensor(given.atol).min())
    start = given.t[0].to(real_dtype(given.z0))
    event = Event(request.event_fn, given.velocity, start, given.z0, tolerance)
    if event.now:
        return _event_solution(given, given.t[0], given.z0, Statistics())
    with torch.set_grad_enabled(request.gradient != "adjoint" and torch.is_grad_enabled()):
        seek = _adapt_until if given.adaptive else _step_until
        halt, statistics = seek(given, event)
    if event.found is None:
        if halt.status is Status.STEP_LIMIT:
            halt = replace(halt, status=Status.NO_EVENT)
        outputs: Outputs = [(given.z0, ())]
        return _solution(given, outputs, None, _counted(given, statistics), [halt])
    t, z = event.found
    if request.gradient == "adjoint":
        times = torch.cat([given.t[:1], t.detach().reshape(1).to(given.t)])
        z = solve(replace(request, t=times, event_fn=None)).or_raise().joined[-1]
    t, z = event.attach(t, z)
    return _event_solution(given, t, z, _counted(given, statistics))


def _adapt_until(given: Setup, event: Event) -> tuple[Halt, Statistics]:
    march = _adaptive_march(given, None, event)
    away = torch.full_like(given.t[1:], inf if given.t[1] > given.t[0] else -inf)
    march.run(given.z0, torch.cat([given.t[:1], away]))
    return march.halt or Halt(Status.NO_EVENT, *march.last), march.statistics


def _step_until(given: Setup, event: Event) -> tuple[Halt, Statistics]:
    """Equal steps from t[0] until the event, laid out in parts."""
    if "step_size" not in given.options:
        raise ArgumentError("`event_fn` with a method of fixed steps needs option `step_size`")
    h = positive("step_size", given.options["step_size"])
    h, part, state = h if given.t[1] > given.t[0] else -h, 256, None
    for first in range(0, EVENT_STEPS, part):
        index = torch.arange(first, first + part + 1).to(given.t)
        march = FixedMarch(
            given.method,
            given.velocity,
            Grid(given.t[0] + h * index, given.method.offsets, given.z0),
            [()] * part,
            watch=given.callbacks.get("callback_step"),
            dense=_interpolation(given) == "cubic",
        )
        state = march.begin(given.z0) if state is None else state
        for n in range(part):
            try:
                after, _ = march.step(n, state)
            except NotConverged:
                t = float(march.grid.nodes[n].detach())
                return Halt(Status.NOT_CONVERGED, t, state.z), Statistics(accepted=first + n)
            if event.watch(march.piece(n, state, after), after.z):
                return Halt(Status.SUCCESS, 0.0, after.z), Statistics(accepted=first + n + 1)
            state = after
    end = float(march.grid.nodes[-1].detach())
    return Halt(Status.NO_EVENT, end, after.z), Statistics(accepted=EVENT_STEPS)


def _event_solution(given: Setup, t: Tensor, z: Tensor, statistics: Statistics) -> Solution:
    joined = torch.stack([given.z0, z])
    wanted = given.request.t
    t = t.to(wanted) if isinstance(wanted, Tensor) else t
    return Solution(
        torch.stack([given.t[0].to(t), t]).detach(),
        given.layout.split(joined),
        torch.tensor(0),
        [],
        statistics,
        (t.detach(), given.layout.split(z.detach())),
        event=t,
        joined=joined,
    )


def _counted(given: Setup, statistics: Statistics) -> Statistics:
    return replace(statistics, evaluations=given.velocity.evaluations)
